"""May a run go on from a checkpoint of another config?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megafn.pure.config.family_record import FamilyRecord
from megafn.pure.config.field_types import all_fields
from megafn.pure.config.problems import Problem
from megafn.pure.config.records import TrainConfig

# Beside the model's fields, what makes it other samples or another meaning of how many were consumed. Layout, precision, learning rate,
# length of the run, logs and where the data lies may change; that the data is the same is seen in the data.
FIXED = (
    "optimizer.name",
    "seed",
    "global_batch_size",
    "data.split",
    "data.sampler",
    "data.tokenizer",
    "data.reset_position_ids",
    "data.reset_attention_mask",
    "data.eod_mask_loss",
)


def resume_problems(saved: TrainConfig, config: TrainConfig, iteration: int) -> tuple[Problem, ...]:
    """Why a run of `config` cannot go on behind `iteration` iterations of one of `saved`; () where it can.

    >>> import attrs
    >>> from megafn.pure.config.records import ModelConfig, ParallelConfig
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=2, global_batch_size=16, train_iters=9)
    >>> resume_problems(config, attrs.evolve(config, parallel=ParallelConfig(tp=2)), 4)
    ()
    >>> print(*resume_problems(config, attrs.evolve(config, seed=7), 4))
    seed = 7: the checkpoint was written with 1234; set that, or start anew in another checkpoint.directory
    """
    problems = [
        Problem(
            path,
            now,
            f"the checkpoint was written with {before!r}; set that, or start anew in another checkpoint.directory",
        )
        for path, before, now in _changes(saved, config)
        if _fixed(path)
    ]
    if iteration > config.iterations:
        problems.append(_length(config, iteration))
    return tuple(problems)


def schedule_changes(saved: TrainConfig, config: TrainConfig) -> tuple[Problem, ...]:
    """What may change when a run goes on and makes its steps others: schedule, optimizer, precision, length.

    >>> from megafn.pure.config.records import ModelConfig
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> runs = [TrainConfig(model=model, micro_batch_size=2, global_batch_size=16, train_iters=n) for n in (9, 12)]
    >>> print(*schedule_changes(*runs))
    train_iters = 12: the checkpoint was written with 9
    """
    return tuple(
        Problem(path, now, f"the checkpoint was written with {before!r}")
        for path, before, now in _changes(saved, config)
        if path.startswith(
            ("schedule.", "optimizer.", "precision.", "train_iters", "train_samples")
        )
    )


def _changes(saved: TrainConfig, config: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, value then, value now) of each field that both have and that differs, in the order of `config`."""
    before = _values(saved)
    for path, now in _values(config).items():
        if path in before and now != before[path]:
            yield path, before[path], now


def _values(config: TrainConfig) -> dict[str, Any]:
    """Values by dotted path; a family's record is its name, as in a file."""
    return {
        path: value.name if isinstance(value, FamilyRecord) else value
        for path, value, kind in all_fields(config)
    }


def _fixed(path: str) -> bool:
    return path in FIXED or path.startswith("model.")


def _length(config: TrainConfig, iteration: int) -> Problem:
    field: str = "train_iters" if config.train_iters is not None else "train_samples"
    value: Any = getattr(config, field)
    least = iteration * (1 if field == "train_iters" else config.global_batch_size)
    return Problem(
        field, value, f"the checkpoint stands at iteration {iteration}; give {least} or more"
    )

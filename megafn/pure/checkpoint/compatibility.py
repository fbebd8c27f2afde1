"""May a run resume from a checkpoint that was written with another config?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megafn.pure.config.field_types import all_fields
from megafn.pure.config.problems import Problem
from megafn.pure.config.records import TrainConfig

# Besides the model's fields, those that decide which samples a run reads, or what the number of
# consumed samples means. Layout, precision, learning rate, length of the run, logs and the place of
# the data may change; whether the data is the same is checked on the data itself.
FIXED_FIELDS = (
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

# What may change when a run resumes, but makes its steps other than those of the first run.
FIELDS_OF_A_STEP = (
    "schedule.",
    "optimizer.",
    "precision.",
    "train_iters",
    "train_samples",
)


def resume_problems(saved: TrainConfig, config: TrainConfig, iteration: int) -> tuple[Problem, ...]:
    """Why a run of `config` cannot resume after `iteration` iterations of `saved`; () if it can.

    >>> import attrs
    >>> from megafn.pure.config.records import ModelConfig, ParallelConfig
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=2, global_batch_size=16, train_iters=9)
    >>> resume_problems(config, attrs.evolve(config, parallel=ParallelConfig(tp=2)), 4)
    ()
    >>> print(*resume_problems(config, attrs.evolve(config, seed=7), 4))    # doctest: +ELLIPSIS
    seed = 7: the checkpoint was written with 1234; set that, or start a new run in another ...
    """
    problems = []
    for path, before, now in _changed_fields(saved, config):
        if path in FIXED_FIELDS or path.startswith("model."):
            remedy = (
                f"the checkpoint was written with {before!r}; set that, "
                "or start a new run in another checkpoint.directory"
            )
            problems.append(Problem(path, now, remedy))
    if iteration > config.iterations:
        problems.append(_too_short(config, iteration))
    return tuple(problems)


def schedule_changes(saved: TrainConfig, config: TrainConfig) -> tuple[Problem, ...]:
    """What differs in schedule, optimizer, precision and length of the run.

    A run may resume with other values, but its steps are then not those of the first run.

    >>> import attrs
    >>> from megafn.pure.config.records import ModelConfig
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> saved = TrainConfig(model=model, micro_batch_size=2, global_batch_size=16, train_iters=9)
    >>> print(*schedule_changes(saved, attrs.evolve(saved, train_iters=12)))
    train_iters = 12: the checkpoint was written with 9
    """
    return tuple(
        Problem(path, now, f"the checkpoint was written with {before!r}")
        for path, before, now in _changed_fields(saved, config)
        if path.startswith(FIELDS_OF_A_STEP)
    )


def _changed_fields(saved: TrainConfig, config: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, saved value, new value) of each field that both have and that differs.

    In the order of `config`.
    """
    before = _values(saved)
    for path, now in _values(config).items():
        if path in before and now != before[path]:
            yield path, before[path], now


def _values(config: TrainConfig) -> dict[str, Any]:
    """Values by dotted path."""
    return {path: value for path, value, _ in all_fields(config)}


def _too_short(config: TrainConfig, iteration: int) -> Problem:
    if config.train_iters is not None:
        field = "train_iters"
        least = iteration
    else:
        field = "train_samples"
        least = iteration * config.global_batch_size
    remedy = f"the checkpoint stands at iteration {iteration}; give {least} or more"
    return Problem(field, getattr(config, field), remedy)

"""May a run resume from a checkpoint that was written with another config?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isclose
from typing import Any

import attrs

from megafn.pure.config.family_record import FamilyRecord
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
        # two paths may name the same tokenizer: `data_problems` compares its definition
        another_tokenizer = path == "data.tokenizer" and "bytes" in (before, now)
        if path in FIXED_FIELDS or path.startswith("model.") or another_tokenizer:
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

    In the order of `config`. Of a section that both have, its fields are compared.
    """
    before = _values_by_path(saved)
    for path, now in _values_by_path(config).items():
        if path not in before or now == before[path]:
            continue
        if not (attrs.has(type(now)) and attrs.has(type(before[path]))):
            yield path, before[path], now


def _values_by_path(config: TrainConfig) -> dict[str, Any]:
    """Values by dotted path; a family's record is its name, as in a file."""
    return {
        path: value.name if isinstance(value, FamilyRecord) else value
        for path, value, _ in all_fields(config)
    }


def _too_short(config: TrainConfig, iteration: int) -> Problem:
    if config.train_iters is not None:
        field = "train_iters"
        least = iteration
    else:
        field = "train_samples"
        least = iteration * config.global_batch_size
    remedy = f"the checkpoint stands at iteration {iteration}; give {least} or more"
    return Problem(field, getattr(config, field), remedy)


def data_problems(
    saved: Mapping[str, Any], now: Mapping[str, Any], config: TrainConfig
) -> tuple[Problem, ...]:
    """What the data of a run differs in from that of a checkpoint; () if it can resume.

    saved, now: tokenizer and corpora as manifests hold them; what `saved` lacks is not compared.
    The names of corpora and of the tokenizer's file may change, since contents are compared.
    """
    problems = [_tokenizer_problem(saved, now), *_corpus_problems(saved, now, config)]
    return tuple(problem for problem in problems if problem is not None)


def _tokenizer_problem(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Problem | None:
    before = saved.get("tokenizer")
    tokenizer = now["tokenizer"]
    if before is None or before["digest"] == tokenizer["digest"]:
        return None
    remedy = (
        f"it defines another tokenizer (digest {tokenizer['digest'][:12]}) than the checkpoint was "
        f"written with ({before['name']!r}, digest {before['digest'][:12]}); give that one, "
        f"{_OR_A_NEW_RUN}"
    )
    return Problem("data.tokenizer", tokenizer["name"], remedy)


def _corpus_problems(
    saved: Mapping[str, Any], now: Mapping[str, Any], config: TrainConfig
) -> Iterator[Problem]:
    corpora_before = saved.get("corpora")
    corpora = now["corpora"]
    if corpora_before is None:
        return
    if len(corpora_before) != len(corpora):
        names = ", ".join(repr(corpus["source"]) for corpus in corpora_before)
        sources = [corpus["source"] for corpus in corpora]
        written_with = f"the checkpoint was written with {names}; give those, {_OR_A_NEW_RUN}"
        yield Problem("data.train", sources, written_with)
        return
    shares_before = _shares(corpora_before)
    shares = _shares(corpora)
    for i, (before, corpus) in enumerate(zip(corpora_before, corpora, strict=True)):
        remedy = _corpus_remedy(before, corpus)
        if remedy is None and not isclose(shares[i], shares_before[i], rel_tol=1e-9):
            remedy = (
                f"its weight in the blend is {shares[i]:g}, the checkpoint was written with "
                f"{shares_before[i]:g}; set that, {_OR_A_NEW_RUN}"
            )
        if remedy is not None:
            yield Problem("data.train", corpus["source"], remedy)


def _corpus_remedy(before: Mapping[str, Any], corpus: Mapping[str, Any]) -> str | None:
    """Why a corpus is not read as it was, weights apart."""
    if any(before.get(name, corpus[name]) != corpus[name] for name in _CONTENT):
        return (
            f"it holds {_content_in_words(corpus)}, but the checkpoint was written with "
            f"{before['source']!r} of {_content_in_words(before)}; give that text, {_OR_A_NEW_RUN}"
        )
    if before.get("epochs", corpus["epochs"]) != corpus["epochs"]:
        return (
            f"a run of this length reads it in another order ({corpus['epochs']}) than the "
            f"checkpoint's did ({before['epochs']}); give the length that the run began with, "
            f'{_OR_A_NEW_RUN} (data.sampler = "cyclic" gives one order for every length)'
        )
    return None


_CONTENT = ("fingerprint", "documents", "tokens")
_OR_A_NEW_RUN = "or start a new run in another checkpoint.directory"


def _content_in_words(corpus: Mapping[str, Any]) -> str:
    return (
        f"{corpus.get('documents')} documents of {corpus.get('tokens')} tokens "
        f"(fingerprint {corpus.get('fingerprint')})"
    )


def _shares(corpora: Sequence[Mapping[str, Any]]) -> list[float]:
    """The weight of each corpus in the blend; they sum up to 1, or are all 0 without weights."""
    weights = [corpus.get("weight") or 0.0 for corpus in corpora]
    total = sum(weights) or 1.0
    return [weight / total for weight in weights]

"""What a run resumes from: the newest checkpoint, and the batches after it.

Rank zero looks into the directory, one broadcast lists the checkpoints to every rank, and the
newest one that is whole is loaded.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megafn.pure.checkpoint.compatibility import data_problems
from megafn.pure.config.problems import ConfigError, Problem, config_error
from megafn.pure.config.records import CheckpointConfig, data_of, num_micro_batches
from megafn.runtime.checkpoint.adapters import ReadBase
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.checkpoint.disk_format import checkpoint_around, checkpoints
from megafn.runtime.checkpoint.load import load_verified, verified_manifest
from megafn.runtime.data.batches import batches as read_batches
from megafn.runtime.data.corpora import Corpus, corpora
from megafn.runtime.data.corpus_identity import describe_data
from megafn.runtime.data.same_batches import first_sample
from megafn.runtime.metrics.sinks import print_on_rank_zero
from megafn.runtime.model.state import State
from megafn.runtime.parallel.object_collectives import broadcast_from_rank_zero

MicroBatches = Iterable[Any] | Callable[[int], Iterable[Any]] | None  # see `train`


def check_directory(settings: CheckpointConfig) -> None:
    """Raises ConfigError if the run cannot save there, or must not resume from what is there."""
    if settings.directory is None:
        return
    remedy = _directory_remedy(Path(settings.directory), settings)
    if remedy is not None:
        raise config_error([Problem("checkpoint.directory", settings.directory, remedy)])


def _directory_remedy(directory: Path, settings: CheckpointConfig) -> str | None:
    checkpoint = checkpoint_around(directory)
    if checkpoint is not None:
        return f"{checkpoint} is a checkpoint; name the run's folder, the one above it"
    if settings.resume == "must" and not checkpoints(directory):
        return (
            'it holds no checkpoint, and checkpoint.resume = "must"; name the folder of the run, '
            "or set checkpoint.resume to true to start fresh"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{error.strerror}; name a folder that can be made"
    if not os.access(directory, os.W_OK | os.X_OK):
        return "it cannot be written to; name another or change its permissions"
    if not settings.resume and checkpoints(directory):
        return (
            "it already holds checkpoints; name an empty one, or set checkpoint.resume to resume "
            "from the newest"
        )
    return None


def resume(
    state: State,
    batches: MicroBatches,
    read_base: ReadBase,
    parts: Sequence[Corpus] | None = None,
) -> tuple[State, Iterable[Any] | None]:
    """The state of the newest checkpoint in checkpoint.directory, if any, and the batches after it.

    With on_damage = "previous" a damaged checkpoint is renamed to damaged-... and the one before it
    is read; one that cannot be read now keeps its name, and is an OSError. If the data is the
    config's, tokenizer and corpora are compared with the checkpoint's, and the last sample read
    before it is read again and compared: other data, or another order, is a ConfigError.
    read_base: gives a state the weights beneath its adapters, see `checkpoint.adapters`.
    parts: the corpora of config.data's training split, if they were found before.
    """
    start = state.iteration
    state, manifest = _load_newest(state, read_base)
    if batches is None and state.iteration != start:
        _check_corpora(state, manifest.get("data") or {}, parts)
    return state, remaining_batches(batches, state, start, manifest.get("last_sample"))


# ---------------------------------------------------------------------------------------- state


def _load_newest(state: State, read_base: ReadBase) -> tuple[State, Mapping[str, Any]]:
    """The state of the newest whole checkpoint and its manifest; {} if there is no checkpoint."""
    settings = state.config.checkpoint
    pg = state.pg
    if settings.directory is None:
        return state, {}
    paths: list[Path] = []
    if pg.is_rank_zero:
        _remove_leftovers(Path(settings.directory))
        paths = list(reversed(checkpoints(settings.directory).values()))
    paths = broadcast_from_rank_zero(paths, pg)
    for path in paths:
        try:
            manifest = verified_manifest(path, pg)
        except CheckpointError as error:
            _refuse_damage(error, settings)
            if pg.is_rank_zero:
                _set_aside(path, error, earlier=paths[paths.index(path) + 1 :])
            continue
        state = load_verified(state, path, manifest, read_base)
        _print_what_is_left(path, state)
        return state, manifest
    if paths:
        raise CheckpointError(
            f"{settings.directory}: no checkpoint in it is whole; name another "
            "checkpoint.directory to start anew"
        )
    print_on_rank_zero(
        f"starting fresh: {settings.directory} holds no checkpoint", state.config, pg
    )
    return state, {}


def _remove_leftovers(directory: Path) -> None:
    """Delete what a killed run left half written or half deleted."""
    for pattern in (".saving-iteration-*", ".removing-iteration-*"):
        for leftover in directory.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _refuse_damage(error: CheckpointError, settings: CheckpointConfig) -> None:
    if settings.on_damage == "raise":
        raise CheckpointError(
            f'{error}; set checkpoint.on_damage to "previous" to resume from the checkpoint before'
        ) from None


def _set_aside(path: Path, error: CheckpointError, *, earlier: list[Path]) -> None:
    """Rename a damaged checkpoint, and warn."""
    number = 1
    while path.with_name(f"damaged-{number}-{path.name}").exists():
        number += 1
    damaged = path.rename(path.with_name(f"damaged-{number}-{path.name}"))
    before = earlier[0].name if earlier else "none"
    warnings.warn(
        f"{error}; it is now {damaged.name}, the checkpoint before: {before}",
        stacklevel=5,  # the caller of `train`
    )


def _print_what_is_left(path: Path, state: State) -> None:
    iterations = state.config.iterations
    left = iterations - state.iteration
    if left:
        text = f"resuming from {path}: {left} of {iterations} iterations are left"
    else:
        text = f"{path} is the end of this run of {iterations} iterations: nothing is left to do"
    print_on_rank_zero(text, state.config, state.pg)


# -------------------------------------------------------------------------------------- batches


def remaining_batches(
    batches: MicroBatches, state: State, start: int, last_sample: int | None
) -> Iterable[Any] | None:
    """The batches after the state's position, in a run that began at iteration `start`.

    None if the config's data is read, which is compared with what was read before the checkpoint.
    """
    if callable(batches) and not isinstance(batches, Iterable):
        return batches(state.consumed_samples)
    if state.iteration == start:
        return batches
    if batches is None:
        _check_data(state, last_sample)
        return None
    iterations = state.iteration - start
    count = iterations * num_micro_batches(state.config, state.pg.dp_size)
    return _skip_batches(batches, count, state, last_sample)


def _check_corpora(state: State, saved: Mapping[str, Any], parts: Sequence[Corpus] | None) -> None:
    """Raises ConfigError, on every rank, if the run's data is not what a manifest says of it."""
    error = None
    if state.pg.is_rank_zero and saved:
        now = describe_data(state.config, parts if parts is not None else corpora(state.config))
        problems = data_problems(saved, now, state.config)
        error = config_error(problems) if problems else None
    error = broadcast_from_rank_zero(error, state.pg)
    if error is not None:
        raise error


def _check_data(state: State, last_sample: int | None) -> None:
    """Raises ConfigError, on every rank, if the last sample before the checkpoint is another."""
    problem = None
    if state.pg.is_rank_zero and last_sample is not None:
        problem = _data_problem(state, last_sample)
    problem = broadcast_from_rank_zero(problem, state.pg)
    if problem is not None:
        raise ConfigError(problem)


def _data_problem(state: State, last_sample: int) -> str | None:
    config = state.config
    position = state.consumed_samples - config.global_batch_size
    last_batch = next(read_batches(config, state.pg, consumed_samples=position, count=1))
    if first_sample(last_batch) == last_sample:
        return None
    remedy = (
        f"sample {position} is not the one that was read before the checkpoint, so the text or its "
        "order is another (the order of a text read more than once depends on the run's length); "
        "give the data that the run began with"
    )
    return str(Problem("data.train", data_of(config).train, remedy))


def _skip_batches(
    batches: Iterable[Any], count: int, state: State, last_sample: int | None
) -> Iterator[Any]:
    """The micro-batches after the first `count`, which are read and dropped."""
    iterator = iter(batches)
    compared = None
    if state.pg.is_rank_zero and last_sample is not None:
        compared = count - num_micro_batches(state.config, state.pg.dp_size)
    # `range` first: zip asks it first, so no micro-batch is read and lost when it ends
    for i, micro_batch in zip(range(count), iterator, strict=False):
        if i == compared and first_sample([micro_batch]) != last_sample:
            warnings.warn(
                f"batches: micro-batch {i} is not the one that was read before the checkpoint. The "
                "run resumes after as many as it had read, but they are others; seed the loader, "
                "or give a function of consumed_samples.",
                stacklevel=6,
            )
    yield from iterator

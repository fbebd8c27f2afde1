"""What a run resumes from: the newest checkpoint, and the batches after it.

Rank zero looks into the directory, one broadcast lists the checkpoints to every rank, and the
newest one that is whole is loaded.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megafn.pure.config.problems import Problem, config_error
from megafn.pure.config.records import CheckpointConfig, data_of, num_micro_batches
from megafn.runtime.checkpoint.adapters import ReadBase
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.checkpoint.disk_format import checkpoint_around, checkpoints
from megafn.runtime.checkpoint.load import check_data, load_verified, verified_manifest
from megafn.runtime.data.batches import batches as read_batches
from megafn.runtime.data.corpora import Corpus
from megafn.runtime.data.corpus_identity import describe_data
from megafn.runtime.data.same_batches import first_sample
from megafn.runtime.metrics.sinks import print_on_rank_zero
from megafn.runtime.model.state import State
from megafn.runtime.parallel.object_collectives import call_on_rank_zero

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
        check_data(manifest, partial(describe_data, state.config, parts), state)
    return state, remaining_batches(batches, state, start, manifest.get("last_sample"))


# ---------------------------------------------------------------------------------------- state


def _load_newest(state: State, read_base: ReadBase) -> tuple[State, Mapping[str, Any]]:
    """The state of the newest whole checkpoint and its manifest; {} if there is no checkpoint."""
    settings = state.config.checkpoint
    pg = state.pg
    if settings.directory is None:
        return state, {}
    paths = call_on_rank_zero(partial(_newest_first, Path(settings.directory)), pg)
    for path in paths:
        try:
            manifest = verified_manifest(path, pg)
        except CheckpointError as error:
            _refuse_damage(error, settings)
            earlier = paths[paths.index(path) + 1 :]
            call_on_rank_zero(partial(_set_aside, path, error, earlier=earlier), pg)
            continue
        state = load_verified(state, path, manifest, read_base)
        _print_what_is_left(path, state)
        return state, manifest
    if paths:
        raise CheckpointError(
            f"{settings.directory}: no checkpoint in it is whole; name another "
            "checkpoint.directory to start anew"
        )
    start = "fresh" if settings.pretrained is None else f"from {settings.pretrained}"
    print_on_rank_zero(
        f"starting {start}: {settings.directory} holds no checkpoint", state.config, pg
    )
    return state, {}


def _newest_first(directory: Path) -> list[Path]:
    """The checkpoints in a directory, after what a killed run left behind is gone."""
    _remove_leftovers(directory)
    return list(reversed(checkpoints(directory).values()))


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
        stacklevel=6,  # the caller of `train`
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
        _check_last_sample(state, last_sample)
        return None
    iterations = state.iteration - start
    count = iterations * num_micro_batches(state.config, state.pg.dp_size)
    return _skip_batches(batches, count, state, last_sample)


def _check_last_sample(state: State, last_sample: int | None) -> None:
    """Raises ConfigError, on every rank, if the last sample before the checkpoint is another."""
    if last_sample is not None:
        call_on_rank_zero(partial(_compare_last_sample, state, last_sample), state.pg)


def _compare_last_sample(state: State, last_sample: int) -> None:
    config = state.config
    position = state.consumed_samples - config.global_batch_size
    last_batch = next(read_batches(config, state.pg, consumed_samples=position, count=1))
    if first_sample(last_batch) == last_sample:
        return
    remedy = (
        f"sample {position} is not the one that was read before the checkpoint, so the text or its "
        "order is another (the order of a text read more than once depends on the run's length); "
        "give the data that the run began with"
    )
    raise config_error([Problem("data.train", data_of(config).train, remedy)])


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

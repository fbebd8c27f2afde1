"""What a run resumes from: the newest checkpoint, and the batches after it."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megafn.pure.config.problems import ConfigError, Problem, config_error
from megafn.pure.config.records import TrainConfig, num_micro_batches
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.checkpoint.checkpoint import checkpoints, read_checkpoint
from megafn.runtime.data.batches import batches as read_batches
from megafn.runtime.data.same_batches import first_sample
from megafn.runtime.metrics.sinks import print_on_rank_zero
from megafn.runtime.model.state import State
from megafn.runtime.parallel.object_collectives import broadcast_from_rank_zero


def check_directory(config: TrainConfig) -> None:
    """Raises ConfigError where checkpoint.directory cannot be written to, or holds checkpoints that the run is not to go on from."""
    settings = config.checkpoint
    if settings.directory is None:
        return
    try:
        Path(settings.directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise config_error(
            [
                Problem(
                    "checkpoint.directory",
                    settings.directory,
                    f"{error.strerror}; name a folder that can be made",
                )
            ]
        ) from None
    if not os.access(settings.directory, os.W_OK | os.X_OK):
        raise config_error(
            [
                Problem(
                    "checkpoint.directory",
                    settings.directory,
                    "it cannot be written to; name another or change its permissions",
                )
            ]
        )
    if not settings.resume and checkpoints(settings.directory):
        raise config_error(
            [
                Problem(
                    "checkpoint.directory",
                    settings.directory,
                    "it holds checkpoints already; name an empty one, or set checkpoint.resume to go on from the newest",
                )
            ]
        )


def resume(state: State, batches: Any = None) -> tuple[State, Any]:
    """The state of the newest checkpoint in config.checkpoint.directory (where there is one), and `batches` from there on.

    Under on_damage = "previous" a damaged checkpoint is renamed to damaged-... and the one before it is read. Where the data is
    the config's, the last sample read before is read again and compared: other data, or another order, is a ConfigError.
    """
    started, (state, last_sample) = state.iteration, _load_newest(state)
    return state, remaining_batches(batches, state, started, last_sample)


def remaining_batches(batches: Any, state: State, started: int, last_sample: int | None) -> Any:
    """The user's batches from where the state stands, in a run that began at iteration `started`; None: those of the config's data."""
    if callable(batches) and not isinstance(batches, Iterable):
        return batches(state.consumed_samples)
    if state.iteration == started:
        return batches
    if batches is not None:
        return _skip_batches(
            batches,
            (state.iteration - started) * num_micro_batches(state.config, state.pg.dp_size),
            state,
            last_sample,
        )
    _check_data(state, last_sample)
    return None


def _load_newest(state: State) -> tuple[State, int | None]:
    config, pg = state.config, state.pg
    if config.checkpoint.directory is None:
        return state, None
    found = broadcast_from_rank_zero(
        _remove_leftovers(Path(config.checkpoint.directory)) if pg.is_rank_zero else None, pg
    )
    for path in reversed(found):
        try:
            state, manifest = read_checkpoint(state, path)
            left = config.iterations - state.iteration
            print_on_rank_zero(
                f"going on from {path}: {left} of {config.iterations} iterations are left"
                if left
                else f"{path} is the end of this run of {config.iterations} iterations: nothing is left to do",
                config,
                pg,
            )
            return state, manifest["last_sample"]
        except CheckpointError as error:
            if config.checkpoint.on_damage == "raise":
                raise CheckpointError(
                    f'{error}; set checkpoint.on_damage to "previous" to go on from the checkpoint before'
                ) from None
            if pg.is_rank_zero:
                before = next((one.name for one in reversed(found) if one < path), "none")
                warnings.warn(
                    f"{error}; it is now {_set_aside(path).name}, the checkpoint before: {before}",
                    stacklevel=4,
                )
    if found:
        raise CheckpointError(
            f"{config.checkpoint.directory}: no checkpoint in it is whole; name another checkpoint.directory to start anew"
        )
    return state, None


def _check_data(state: State, last_sample: int | None) -> None:
    config, pg, problem = state.config, state.pg, None
    at = state.consumed_samples - config.global_batch_size
    if (
        pg.is_rank_zero
        and last_sample is not None
        and first_sample(next(read_batches(config, pg, consumed_samples=at, count=1)))
        != last_sample
    ):
        problem = str(
            Problem(
                "data.train",
                config.data.train,
                f"sample {at} is not the one that was read before the checkpoint, so the text or its "
                "order is another (that of a text read more than once hangs on the run's length); give what the run began with",
            )
        )
    if problem := broadcast_from_rank_zero(problem, pg):
        raise ConfigError(problem)


def _skip_batches(
    batches: Iterable[Any], count: int, state: State, last_sample: int | None
) -> Iterator[Any]:
    """What follows the first `count` micro-batches, which are read and dropped."""
    iterator, last = iter(batches), count - num_micro_batches(state.config, state.pg.dp_size)
    for i, micro_batch in zip(range(count), iterator):
        if (
            i == last
            and state.pg.is_rank_zero
            and last_sample not in (None, first_sample([micro_batch]))
        ):
            warnings.warn(
                f"batches: micro-batch {i} is not the one that was read before the checkpoint. The run goes on behind as many as it had read, "
                "but they are others; seed the loader, or give a function of consumed_samples.",
                stacklevel=6,
            )
    yield from iterator


def _remove_leftovers(directory: Path) -> list[Path]:
    """The checkpoints, after what a killed run left half written or half deleted is gone."""
    for left in (*directory.glob(".saving-iteration-*"), *directory.glob(".removing-iteration-*")):
        shutil.rmtree(left, ignore_errors=True)
    return list(checkpoints(directory).values())


def _set_aside(path: Path) -> Path:
    number = next(
        i for i in range(1, 1000) if not path.with_name(f"damaged-{i}-{path.name}").exists()
    )
    return path.rename(path.with_name(f"damaged-{number}-{path.name}"))

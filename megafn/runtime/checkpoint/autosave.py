"""When `train` saves: at intervals, after the last iteration, on a signal or when its launcher has
died; and what it deletes.

`save_if_due`, `save_on_signal` and `save_before_error` take the record of where automatic saving
stands, and the first two return the next one.

What a signal of one rank means for all costs a small collective at the end of each iteration. It is
not joined with one of the others that a run makes:

- `sum_over_ranks` has its own before the update. A signal or a failed sink that comes after it, in
  an evaluation for instance, would be found a whole step later.
- `check_same_batches` has its own after the next batch is read. A loader that hangs or fails then
  would take the checkpoint with it, for which a scheduler leaves seconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import attrs
import torch
import torch.distributed as dist
from attrs import frozen

from megafn.pure.checkpoint.retention import iterations_to_keep
from megafn.pure.config.records import CheckpointConfig
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.checkpoint.disk_format import checkpoints
from megafn.runtime.checkpoint.save import Saving, begin_save, finish_save
from megafn.runtime.checkpoint.state_boxes import check_buffers
from megafn.runtime.data.same_batches import first_sample
from megafn.runtime.metrics.sinks import print_on_rank_zero
from megafn.runtime.model.state import State
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.object_collectives import all_ranks_arrive

_NO_ITERATION = -1

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm's, and torchrun's

# Treated as a signal, all of whose numbers are smaller, but the run leaves with exit code 1.
LAUNCHER_DIED = 128


@frozen(kw_only=True, eq=False)
class Autosave:
    """Where automatic saving stands."""

    settings: CheckpointConfig
    pg: ProcessGroups
    signals: Sequence[int]  # numbers of those received so far; a handler appends to it
    data: Mapping[str, Any] | None  # tokenizer and corpora of the run, see `describe_data`
    newest: int  # iteration of the newest checkpoint, which may still be in progress
    last_batch: Any = None  # rank zero's share of the last global batch
    saving: Saving | None = None  # the save in progress
    # whether a rank's sink has failed in this iteration: on every rank, or, if no checkpoints are
    # written, on this one
    has_failed: bool = False


@contextlib.contextmanager
def open_autosave(state: State, data: Mapping[str, Any] | None = None) -> Iterator[Autosave]:
    """Listen to SIGTERM and SIGUSR1 for the length of the `with`, if checkpoints are written.

    data: what checkpoints say of the run's data, see `describe_data`; rank zero's counts.
    Signals are received in the main thread only. Raises ConfigError if the state has something that
    cannot be saved.
    """
    settings = state.config.checkpoint
    listening: contextlib.AbstractContextManager[list[int]] = contextlib.nullcontext([])
    if settings.directory is not None:
        check_buffers(state)  # now, not when the first checkpoint is due
        listening = _received_signals()
    with listening as signals:
        yield Autosave(
            settings=settings,
            pg=state.pg,
            signals=signals,
            data=data,
            newest=state.iteration,
        )


def save_if_due(
    autosave: Autosave, state: State, batch: Any = None, *, ended: bool = False
) -> Autosave:
    """Save the state if the interval says so, or if the run has ended.

    Every rank calls it after each iteration with its share of the global batch, before anything
    else that can fail. If a checkpoint cannot be written, rank zero warns and training continues.
    """
    settings = autosave.settings
    directory = settings.directory
    if directory is None:
        return autosave
    if batch is not None and state.pg.is_rank_zero:
        autosave = attrs.evolve(autosave, last_batch=batch)
    if (ended or _interval_is_over(state)) and state.iteration != autosave.newest:
        autosave = _finish(autosave)
        asynchronous = settings.asynchronous and not ended
        autosave = _begin(autosave, state, directory, asynchronous=asynchronous, last_chance=False)
    if ended or not settings.asynchronous:
        autosave = _finish(autosave)
    return autosave


def save_on_signal(autosave: Autosave, state: State, *, failed: bool = False) -> Autosave:
    """If any rank received a signal, save the state and raise SystemExit(0), on every rank.

    Every rank calls it at the end of each iteration; this is also where a save in the background
    is finished. If a checkpoint cannot be written after a signal, that is a CheckpointError.
    failed: whether a sink raised on this rank. Then a save in the background is finished, and every
    rank finds `has_failed` in what is returned.
    """
    directory = autosave.settings.directory
    if directory is None:
        return attrs.evolve(autosave, has_failed=failed)
    news = _largest_of_all_ranks(autosave, failed)
    if news.signal_number or news.has_failed or not news.is_writing:
        autosave = _finish(autosave)
    if news.has_failed:
        return attrs.evolve(autosave, has_failed=True)
    if not news.signal_number:
        return autosave
    if state.iteration != autosave.newest:
        autosave = _begin(autosave, state, directory, asynchronous=False, last_chance=True)
        autosave = _finish(autosave, last_chance=True)
    _leave(autosave, state, news.signal_number)


# How long a rank that is about to raise waits for the others, which may not be about to.
LONGEST_WAIT_FOR_OTHERS = 30.0


def save_before_error(autosave: Autosave) -> None:
    """Finish a save in the background, if every rank is about to raise and calls this.

    A rank that is alone with its exception waits for at most LONGEST_WAIT_FOR_OTHERS and
    half of timeout_seconds; then it leaves, and the checkpoint is not published.
    """
    saving = autosave.saving
    if saving is None or saving.ended.is_set():
        return
    seconds = min(LONGEST_WAIT_FOR_OTHERS, autosave.pg.timeout_seconds / 2)
    if all_ranks_arrive(str(saving.hidden), autosave.pg, seconds=seconds):
        _finish(autosave)


@frozen(kw_only=True)
class _News:
    """What the ranks tell each other in each iteration: of each number the largest."""

    signal_number: int  # that any rank received, or 0; LAUNCHER_DIED if any launcher has died
    is_writing: bool
    has_failed: bool


def _largest_of_all_ranks(autosave: Autosave, failed: bool) -> _News:
    saving = autosave.saving
    is_writing = saving is not None and not saving.written.done()
    flags = torch.tensor(
        [_reason_to_leave(autosave), is_writing, failed],
        dtype=torch.int32,
        device=autosave.pg.device,
    )
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=autosave.pg.world)
    signal_number, is_writing, has_failed = flags.tolist()
    return _News(
        signal_number=signal_number, is_writing=bool(is_writing), has_failed=bool(has_failed)
    )


def _reason_to_leave(autosave: Autosave) -> int:
    """LAUNCHER_DIED, the number of a signal that this rank received, or 0."""
    launcher = autosave.pg.launcher
    if launcher is not None and os.getppid() != launcher:
        return LAUNCHER_DIED
    return max(autosave.signals, default=0)


def _interval_is_over(state: State) -> bool:
    interval = state.config.checkpoint.interval
    return interval is not None and state.iteration % interval == 0


def _begin(
    autosave: Autosave,
    state: State,
    directory: str,
    *,
    asynchronous: bool,
    last_chance: bool,
) -> Autosave:
    last_batch = autosave.last_batch
    try:
        saving = begin_save(
            state,
            directory,
            asynchronous=asynchronous,
            last_sample=None if last_batch is None else first_sample(last_batch),
            data=autosave.data,
        )
    except CheckpointError as error:
        if last_chance:
            raise
        _warn_of_failure(error, autosave.pg)
        return autosave
    return attrs.evolve(autosave, saving=saving, newest=state.iteration)


def _finish(autosave: Autosave, *, last_chance: bool = False) -> Autosave:
    """Wait for the save in progress, if there is one; then delete what need not be kept."""
    if autosave.saving is None:
        return autosave
    try:
        finish_save(autosave.saving)
    except CheckpointError as error:
        if last_chance:
            raise
        _warn_of_failure(error, autosave.pg)
        # no checkpoint has this iteration now; the next occasion to save it is taken
        return attrs.evolve(autosave, saving=None, newest=_NO_ITERATION)
    if autosave.pg.is_rank_zero:
        _delete_old_checkpoints(autosave.saving.folder.parent, autosave.settings)
    return attrs.evolve(autosave, saving=None)


def _warn_of_failure(error: CheckpointError, pg: ProcessGroups) -> None:
    if pg.is_rank_zero:
        warnings.warn(
            f"no checkpoint was written: {error}; training continues, earlier checkpoints are "
            "whole",
            stacklevel=6,  # the caller of `train`
        )


def _delete_old_checkpoints(directory: Path, settings: CheckpointConfig) -> None:
    """Delete the checkpoints of the directory that are not kept.

    Each loses its name first, so that half of one is never taken for a whole one.
    """
    paths = checkpoints(directory)
    kept = iterations_to_keep(paths, keep_last=settings.keep_last, keep_every=settings.keep_every)
    for iteration in paths.keys() - kept:
        path = paths[iteration]
        unnamed = path.with_name(f".removing-{path.name}")
        try:
            path.rename(unnamed)
            shutil.rmtree(unnamed)
        except OSError as error:
            warnings.warn(f"{path} could not be deleted: {error}", stacklevel=6)


def _leave(autosave: Autosave, state: State, signal_number: int) -> NoReturn:
    is_orphan = signal_number == LAUNCHER_DIED
    if is_orphan:
        reason = "torchrun, which started this run, has died"
    else:
        reason = signal.Signals(signal_number).name
    print_on_rank_zero(
        f"{reason}: iteration {autosave.newest} is saved in "
        f"{autosave.settings.directory}; the same command resumes from there",
        state.config,
        autosave.pg,
    )
    dist.barrier(group=autosave.pg.world)  # no rank leaves while another still reads from it
    # the torchrun of another host may start it again
    raise SystemExit(1 if is_orphan else 0)


@contextlib.contextmanager
def _received_signals() -> Iterator[list[int]]:
    """The numbers of the signals received, appended as they come.

    The previous handlers are put back at the end.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {}
    for number in SIGNALS:
        previous[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""When `train` saves: at intervals, after the last iteration, on a signal; what it goes on from; what it deletes."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megafn.pure.checkpoint.retention import iterations_to_keep
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.checkpoint.checkpoint import Saving, begin_save, checkpoints, finish_save
from megafn.runtime.checkpoint.state_boxes import check_buffers
from megafn.runtime.data.same_batches import first_sample
from megafn.runtime.metrics.sinks import print_on_rank_zero
from megafn.runtime.model.state import State

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm's, and torchrun's


@contextlib.contextmanager
def open_autosave(state: State) -> Iterator[Callable[..., None]]:
    """`keep(state, batch)`, to be called by every rank after each iteration, and once more with `ended=True` behind the last.

    It saves where the interval says so and, once a rank was sent SIGTERM or SIGUSR1, on every rank: that raises SystemExit(0).
    Where a checkpoint cannot be written, rank zero warns and training goes on. The signals are heard only from the main thread.
    """
    settings, pg, newest, sample = state.config.checkpoint, state.pg, state.iteration, None
    if settings.directory is None:
        yield lambda state, batch=None, ended=False: None
        return
    check_buffers(state)  # now, not when the first checkpoint is due
    saving: list[Saving] = []  # at most one

    def attempt(part: Callable[[], Any], last_chance: bool) -> Any:
        try:
            return part()
        except CheckpointError as error:
            if last_chance:
                raise
            if pg.is_rank_zero:
                warnings.warn(
                    f"no checkpoint was written: {error}; training goes on, the checkpoints before are whole",
                    stacklevel=5,
                )

    def complete(last_chance: bool = False) -> None:
        if saving and attempt(lambda: finish_save(saving.pop()), last_chance) and pg.is_rank_zero:
            _forget(Path(settings.directory), settings.keep_last, settings.keep_every)

    def keep(state: State, batch: Any = None, *, ended: bool = False) -> None:
        nonlocal newest, sample
        if batch is not None and pg.is_rank_zero:
            sample = batch
        flags = torch.tensor(
            [max(asked, default=0), bool(saving) and not saving[0].written.done()],
            dtype=torch.int32,
            device=pg.device,
        )
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=pg.world)
        number, busy = flags.tolist()
        leave = number > 0
        if not busy:
            complete()
        if (
            leave or ended or settings.interval and state.iteration % settings.interval == 0
        ) and state.iteration != newest:
            complete()  # waits for the one before
            begun = attempt(
                lambda: begin_save(
                    state,
                    settings.directory,
                    asynchronous=settings.asynchronous and not (leave or ended),
                    last_sample=first_sample(sample) if sample is not None else None,
                ),
                leave,
            )
            if begun:
                saving.append(begun)
                newest = state.iteration
        if leave or ended or not settings.asynchronous:
            complete(leave)
        if leave:
            print_on_rank_zero(
                f"{signal.Signals(number).name}: iteration {newest} is saved in {settings.directory}; the same command goes on from there",
                state.config,
                pg,
            )
            dist.barrier(group=pg.world)  # nobody leaves while another still listens to it
            raise SystemExit(0)

    with _signals() as asked:
        yield keep


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that came, as they come; the handlers of before are put back."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {
        number: signal.signal(number, lambda number, _: came.append(number)) for number in SIGNALS
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget(directory: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete the checkpoints that are not to be kept; each loses its name first, so that half of one never passes for a whole one."""
    found = checkpoints(directory)
    for iteration in found.keys() - iterations_to_keep(
        found, keep_last=keep_last, keep_every=keep_every
    ):
        path = found[iteration]
        gone = path.with_name(f".removing-{path.name}")
        try:
            path.rename(gone)
            shutil.rmtree(gone)
        except OSError as error:
            warnings.warn(f"{path} could not be deleted: {error}", stacklevel=6)

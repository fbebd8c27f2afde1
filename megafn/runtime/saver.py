"""When `train` saves: at intervals, after the last iteration, on a signal; what it goes on from; what it deletes."""
from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megafn.pure.config import ConfigError, Problem, TrainConfig, num_micro_batches
from megafn.pure.dicts import refusal
from megafn.pure.retention import kept
from megafn.runtime.agreement import fingerprint, told
from megafn.runtime.checkpoint import Saving, begin, checkpoints, finish, read
from megafn.runtime.data import batches as read_batches
from megafn.runtime.durable import CheckpointError
from megafn.runtime.pieces import check_buffers
from megafn.runtime.sinks import say
from megafn.runtime.state import State

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)          # Slurm's, and torchrun's


def check_directory(config: TrainConfig) -> None:
    """Raises ConfigError where checkpoint.directory cannot be written to, or holds checkpoints that the run is not to go on from."""
    settings = config.checkpoint
    if settings.directory is None:
        return
    try:
        Path(settings.directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal([Problem("checkpoint.directory", settings.directory, f"{error.strerror}; name a folder that can be made")]) from None
    if not os.access(settings.directory, os.W_OK | os.X_OK):
        raise refusal([Problem("checkpoint.directory", settings.directory, "it cannot be written to; name another or change its permissions")])
    if not settings.resume and checkpoints(settings.directory):
        raise refusal([Problem("checkpoint.directory", settings.directory,
                               "it holds checkpoints already; name an empty one, or set checkpoint.resume to go on from the newest")])


def resume(state: State, batches: Any = None) -> tuple[State, Any]:
    """The state of the newest checkpoint in config.checkpoint.directory (where there is one), and `batches` from there on.

    Under on_damage = "previous" a damaged checkpoint is renamed to damaged-... and the one before it is read. Where the data is
    the config's, the last sample read before is read again and compared: other data, or another order, is a ConfigError.
    """
    started, (state, last_sample) = state.iteration, _newest(state)
    return state, batches_from(batches, state, started, last_sample)


def batches_from(batches: Any, state: State, started: int, last_sample: int | None) -> Any:
    """The user's batches from where the state stands, in a run that began at iteration `started`; None: those of the config's data."""
    if callable(batches) and not isinstance(batches, Iterable):
        return batches(state.consumed_samples)
    if state.iteration == started:
        return batches
    if batches is not None:
        return _behind(batches, (state.iteration - started) * num_micro_batches(state.config, state.pg.dp_size), state, last_sample)
    _check_data(state, last_sample)
    return None


def _newest(state: State) -> tuple[State, int | None]:
    config, pg = state.config, state.pg
    if config.checkpoint.directory is None:
        return state, None
    found = told(_tidy(Path(config.checkpoint.directory)) if pg.is_rank_zero else None, pg)
    for path in reversed(found):
        try:
            state, manifest = read(state, path)
            left = config.iterations - state.iteration
            say(f"going on from {path}: {left} of {config.iterations} iterations are left" if left else
                f"{path} is the end of this run of {config.iterations} iterations: nothing is left to do", config, pg)
            return state, manifest["last_sample"]
        except CheckpointError as error:
            if config.checkpoint.on_damage == "raise":
                raise CheckpointError(f'{error}; set checkpoint.on_damage to "previous" to go on from the checkpoint before') from None
            if pg.is_rank_zero:
                before = next((one.name for one in reversed(found) if one < path), "none")
                warnings.warn(f"{error}; it is now {_set_aside(path).name}, the checkpoint before: {before}", stacklevel=4)
    if found:
        raise CheckpointError(f"{config.checkpoint.directory}: no checkpoint in it is whole; name another checkpoint.directory to start anew")
    return state, None


def _check_data(state: State, last_sample: int | None) -> None:
    config, pg, problem = state.config, state.pg, None
    at = state.consumed_samples - config.global_batch_size
    if pg.is_rank_zero and last_sample is not None and first_sample(next(read_batches(config, pg, consumed_samples=at, count=1))) != last_sample:
        problem = str(Problem("data.train", config.data.train, f"sample {at} is not the one that was read before the checkpoint, so the text or its "
                              "order is another (that of a text read more than once hangs on the run's length); give what the run began with"))
    if problem := told(problem, pg):
        raise ConfigError(problem)


def _behind(batches: Iterable[Any], count: int, state: State, last_sample: int | None) -> Iterator[Any]:
    """What follows the first `count` micro-batches, which are read and dropped."""
    iterator, last = iter(batches), count - num_micro_batches(state.config, state.pg.dp_size)
    for i, micro_batch in zip(range(count), iterator):
        if i == last and state.pg.is_rank_zero and last_sample not in (None, first_sample([micro_batch])):
            warnings.warn(f"batches: micro-batch {i} is not the one that was read before the checkpoint. The run goes on behind as many as it had read, "
                          "but they are others; seed the loader, or give a function of consumed_samples.", stacklevel=6)
    yield from iterator


def first_sample(batch: Any) -> int:
    """A fingerprint of the first row of a global batch's share: on rank zero, whatever the layout, the first sample of the global batch."""
    micro_batch = next(iter(batch))
    if isinstance(micro_batch, Mapping):
        micro_batch = {key: value[0] for key, value in micro_batch.items() if isinstance(value, torch.Tensor) and value.dim() and len(value)}
    return fingerprint(micro_batch)


@contextlib.contextmanager
def open_saver(state: State) -> Iterator[Callable[..., None]]:
    """`keep(state, batch)`, to be called by every rank after each iteration, and once more with `ended=True` behind the last.

    It saves where the interval says so and, once a rank was sent SIGTERM or SIGUSR1, on every rank: that raises SystemExit(0).
    Where a checkpoint cannot be written, rank zero warns and training goes on. The signals are heard only from the main thread.
    """
    settings, pg, newest, sample = state.config.checkpoint, state.pg, state.iteration, None
    if settings.directory is None:
        yield lambda state, batch=None, ended=False: None
        return
    check_buffers(state)                      # now, not when the first checkpoint is due
    saving: list[Saving] = []                 # at most one

    def attempt(part: Callable[[], Any], last_chance: bool) -> Any:
        try:
            return part()
        except CheckpointError as error:
            if last_chance:
                raise
            if pg.is_rank_zero:
                warnings.warn(f"no checkpoint was written: {error}; training goes on, the checkpoints before are whole", stacklevel=5)

    def complete(last_chance: bool = False) -> None:
        if saving and attempt(lambda: finish(saving.pop()), last_chance) and pg.is_rank_zero:
            _forget(Path(settings.directory), settings.keep_last, settings.keep_every)

    def keep(state: State, batch: Any = None, *, ended: bool = False) -> None:
        nonlocal newest, sample
        if batch is not None and pg.is_rank_zero:
            sample = batch
        flags = torch.tensor([max(asked, default=0), bool(saving) and not saving[0].written.done()], dtype=torch.int32, device=pg.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=pg.world)
        number, busy = flags.tolist()
        leave = number > 0
        if not busy:
            complete()
        if (leave or ended or settings.interval and state.iteration % settings.interval == 0) and state.iteration != newest:
            complete()                                                  # waits for the one before
            begun = attempt(lambda: begin(state, settings.directory, asynchronous=settings.asynchronous and not (leave or ended),
                                          last_sample=first_sample(sample) if sample is not None else None), leave)
            if begun:
                saving.append(begun)
                newest = state.iteration
        if leave or ended or not settings.asynchronous:
            complete(leave)
        if leave:
            say(f"{signal.Signals(number).name}: iteration {newest} is saved in {settings.directory}; the same command goes on from there", state.config, pg)
            dist.barrier(group=pg.world)                                # nobody leaves while another still listens to it
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
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tidy(directory: Path) -> list[Path]:
    """The checkpoints, after what a killed run left half written or half deleted is gone."""
    for left in (*directory.glob(".saving-iteration-*"), *directory.glob(".removing-iteration-*")):
        shutil.rmtree(left, ignore_errors=True)
    return list(checkpoints(directory).values())


def _set_aside(path: Path) -> Path:
    number = next(i for i in range(1, 1000) if not path.with_name(f"damaged-{i}-{path.name}").exists())
    return path.rename(path.with_name(f"damaged-{number}-{path.name}"))


def _forget(directory: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete the checkpoints that are not to be kept; each loses its name first, so that half of one never passes for a whole one."""
    found = checkpoints(directory)
    for iteration in found.keys() - kept(found, keep_last=keep_last, keep_every=keep_every):
        path = found[iteration]
        gone = path.with_name(f".removing-{path.name}")
        try:
            path.rename(gone)
            shutil.rmtree(gone)
        except OSError as error:
            warnings.warn(f"{path} could not be deleted: {error}", stacklevel=6)

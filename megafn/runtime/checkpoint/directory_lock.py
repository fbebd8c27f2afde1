"""One run at a time in a `checkpoint.directory`.

Rank zero locks the file `.lock` in it: it alone publishes and deletes checkpoints. The lock is the
kernel's (flock), so it ends with the process however that dies, and the file that a killed run
leaves behind locks nothing. What is written in the file is only for people.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from io import FileIO
from multiprocessing import util
from pathlib import Path

from megafn.pure.config.problems import Problem, config_error
from megafn.pure.config.records import TrainConfig
from megafn.runtime.metrics.sinks import print_on_rank_zero
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.object_collectives import broadcast_from_rank_zero

LOCK_FILE = ".lock"

# Longer than the 90 s for which an NFS server usually keeps the lock of a host that died.
LONGEST_WAIT = 120.0
SECONDS_BETWEEN_TRIES = 0.2


@contextlib.contextmanager
def lock_directory(config: TrainConfig, pg: ProcessGroups) -> Iterator[None]:
    """Keep other runs out of checkpoint.directory, if one is set, for the length of the `with`.

    Every rank enters it; rank zero takes the lock. If another run has it, they wait for at most
    LONGEST_WAIT and half of timeout_seconds; then every rank raises ConfigError. If the file cannot
    be locked (not every file system has locks), rank zero warns, and the run continues without.
    """
    directory = config.checkpoint.directory
    if directory is None:
        yield
        return
    file = None
    problem = None
    if pg.is_rank_zero:
        file, problem = _lock_or_problem(Path(directory, LOCK_FILE), config, pg)
    try:
        problem = broadcast_from_rank_zero(problem, pg)
        if problem is not None:
            raise config_error([Problem("checkpoint.directory", directory, problem)])
        yield
    finally:
        if file is not None:
            _release(file)


def _lock_or_problem(
    path: Path, config: TrainConfig, pg: ProcessGroups
) -> tuple[FileIO | None, str | None]:
    """The locked file, or why there is none; neither of them if it cannot be locked."""
    # the other ranks wait meanwhile, and must not time out
    seconds = min(LONGEST_WAIT, pg.timeout_seconds / 2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _wait_for_lock(path, seconds, config, pg)
    except OSError as error:
        warnings.warn(
            f"{path} cannot be locked ({error.strerror or error}), so a second run in this "
            "checkpoint.directory would not be noticed: start one at a time",
            stacklevel=5,  # the caller of `train`
        )
        return None, None
    if file is None:
        return None, _remedy(path, seconds)
    _write_holder(file)
    # A forked process, as a DataLoader's workers are, would hold the lock after the death of this.
    util.register_after_fork(file, FileIO.close)
    return file, None


def _wait_for_lock(
    path: Path, seconds: float, config: TrainConfig, pg: ProcessGroups
) -> FileIO | None:
    """The locked file, or None if another run still has it after that time."""
    end = time.monotonic() + seconds
    is_waiting = False
    while True:
        file = _try_to_lock(path)
        if file is not None:
            return file
        if time.monotonic() > end:
            return None
        if not is_waiting:
            is_waiting = True
            text = f"{path.parent}: {_holder(path)} trains in it; waiting for up to {seconds:g} s"
            print_on_rank_zero(text, config, pg)
        time.sleep(SECONDS_BETWEEN_TRIES)


def _try_to_lock(path: Path) -> FileIO | None:
    """The locked file, or None if another run has it."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(FileIO(path, "a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        # Its last holder may have removed it meanwhile: then others lock a new one.
        if not _is_at(path, file):
            return None
        stack.pop_all()  # it stays open
        return file


def _is_at(path: Path, file: FileIO) -> bool:
    """Whether an open file is still the one of that name.

    NFS asks its server whenever a file is opened, but not for each `stat` of a name.
    """
    try:
        with FileIO(path) as current:
            return os.path.sameopenfile(current.fileno(), file.fileno())
    except FileNotFoundError:
        return False


def _release(file: FileIO) -> None:
    """Remove the file, while it is locked, and unlock it."""
    with contextlib.suppress(OSError):  # its folder may be gone
        path = Path(file.name)
        if _is_at(path, file):
            path.unlink()
    file.close()


def _write_holder(file: FileIO) -> None:
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with contextlib.suppress(OSError):  # a full disk: the lock is held all the same
        file.truncate(0)
        file.write(json.dumps(holder).encode())


def _holder(path: Path) -> str:
    """Who has the lock, in words, as far as it is known."""
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


def _remedy(path: Path, seconds: float) -> str:
    return (
        f"{_holder(path)} trains in it, and did not end within {seconds:g} s; end that run or name "
        f"another directory (if its host is gone for good, remove {path})"
    )

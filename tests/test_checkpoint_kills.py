"""Ranks that are killed or hang during a save: the run resumes from the last whole checkpoint."""

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from functools import partial
from unittest import mock

import attrs
import pytest

from checkpoint_runs import (
    assert_resumed,
    text_config,
    train,
    with_checkpoint,
    without_checkpoints,
)
from megafn.runtime.checkpoint import atomic_files, save
from megafn.runtime.checkpoint.disk_format import checkpoints
from pool import PoolError


def train_and_strike(config, rank, at, strike):
    """`train`, in which one rank calls strike() at the `at`-th of what it does to the disk.

    If `at` is a fraction, it is the number of seconds after which it does.
    """
    count = 0

    def wrapped(real):
        def effect(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                strike()
            return real(*args, **kwargs)

        return effect

    with contextlib.ExitStack() as stack:
        if int(os.environ["RANK"]) == rank:
            for owner, name in (
                (os, "fsync"),
                (os, "rename"),
                (atomic_files, "write_tensors"),
                (save, "write_tensors"),
                (save, "write_file"),
            ):
                stack.enter_context(mock.patch.object(owner, name, wrapped(getattr(owner, name))))
            if isinstance(at, float):
                threading.Timer(at, strike).start()
        return train(config)


# ------------------------------------------------------------------------------------- kills


def kill(victims):
    for victim in sorted(victims, key=os.getpid().__eq__):  # itself last
        os.kill(victim, signal.SIGKILL)


KILLS = int(os.environ.get("MEGAFN_KILLS", "20"))


@pytest.mark.timeout(60 + KILLS * 30)
def test_killed_runs_end_on_the_uninterrupted_curve(pool, tmp_path):
    """SIGKILL, 20 times (or MEGAFN_KILLS), of a random rank or of all at once.

    It comes in the midst of what a save does to the disk, or at any time.
    """
    # many iterations: a fast machine gets far before the kill
    config = text_config(tmp_path, steps=8 * KILLS)
    config = with_checkpoint(config, interval=1, keep_last=2)
    whole = pool(2, train, without_checkpoints(config))
    draw = random.Random(1)
    newest = 0
    kinds = Counter()
    for turn in range(KILLS):
        rank = draw.randrange(2)
        number = draw.choice((1, 2))
        at_any_time = turn % 3 == 0
        turn_config = with_checkpoint(config, asynchronous=draw.random() < 0.5)
        pids = pool(2, os.getpid)
        if at_any_time:
            at = draw.uniform(0.05, 0.5)
        else:
            at = draw.randrange(1, 24 if rank == 0 else 6)
        strike = partial(kill, pids if number == 2 else [pids[rank]])
        with pytest.raises(PoolError) as killed:
            pool(2, train_and_strike, turn_config, rank, at, strike)
        assert str(killed.value).count("exit code -9") == number, killed.value
        kinds[number, at_any_time] += 1
        before = newest
        newest = max(checkpoints(tmp_path), default=0)
        assert newest >= before
    assert len(kinds) == 4 and 5 < newest < config.train_iters - 2, (kinds, newest)
    assert_resumed(whole, pool(2, train, config), after=newest)
    assert list(checkpoints(tmp_path)) == [config.train_iters - 1, config.train_iters]
    assert not list(tmp_path.glob(".*"))


# ------------------------------------------------------------------------------------- hangs

SECONDS = 6  # timeout_seconds, from the first step on


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "rank, at, strike, asynchronous, newest",
    [
        # before it writes its file for the second checkpoint
        (1, 3, partial(send, signal.SIGSTOP), False, 1),
        # rank zero, before its folder is flushed
        (0, 10, partial(time.sleep, 60), False, 1),
        # before the checkpoint gets its name
        (0, 17, partial(send, signal.SIGSTOP), False, 1),
        # after that
        (0, 18, partial(time.sleep, 60), False, 2),
        # in the thread that writes: the rank itself continues until the next save
        (1, 3, partial(time.sleep, 60), True, 1),
    ],
)
def test_a_rank_that_hangs_in_a_save_is_named_and_the_run_resumes_from_the_last_whole_one(
    rank, at, strike, asynchronous, newest, pool, tmp_path, monkeypatch
):
    # as torchrun, the pool ends the rank that hangs once another one has failed
    monkeypatch.setattr("pool.GRACE", 5.0 if asynchronous else 1.0)
    config = text_config(tmp_path)
    whole = pool(2, train, without_checkpoints(config))
    config = with_checkpoint(config, interval=1, asynchronous=asynchronous)
    hanging = attrs.evolve(config, timeout_seconds=SECONDS)
    started = time.monotonic()
    with pytest.raises(PoolError) as hung:
        pool(2, train_and_strike, hanging, rank, at, strike)
    seconds = time.monotonic() - started
    assert seconds < SECONDS + 30, "it is bounded by the 60 s that the rank sleeps"
    message = str(hung.value)
    by_itself = f"rank {rank} hangs: "
    by_others = rf"a rank hangs (.|\n)*(Ranks {rank} failed to pass|from rank {rank}\b)"
    during = f"RuntimeError: saving {tmp_path}/iteration-00000002: "
    assert re.search(f"{during}({by_itself}|{by_others})", message), message
    # a rank whose thread hangs comes to an end by itself
    assert ("no answer" in message) == (not asynchronous), message
    assert list(checkpoints(tmp_path)) == list(range(1, newest + 1))
    assert_resumed(whole, pool(2, train, config), after=newest)
    assert not list(tmp_path.glob(".*"))

"""Timing in which the peers take turns.

Other work on the machine then slows all of them alike, and ratios stay true.
"""

import contextlib
import statistics
import time

import torch


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def take_turns(runs, rounds, between=lambda: None):
    """Seconds of every call, {name: [rounds]}, of runs {name: function}.

    `between` is called after each round.
    """
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        between()
    return seconds


def times_as_fast(ours, theirs):
    """Median over rounds of their time over ours."""
    return statistics.median(there / here for here, there in zip(ours, theirs, strict=True))

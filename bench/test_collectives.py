"""What a small collective costs where processes outnumber cores, and what `hold_gloo_back` saves.

Prints; never asserts speed.
"""

import contextlib
import os
import statistics
import time
from unittest import mock

import pytest
import torch

import megafn as mf
from megafn.runtime.parallel import cpu
from pool import worker_pool
from turns import take_turns, times_as_fast

TP = 4
COUNT = 200


def seconds_of_an_all_reduce(held):
    plain = contextlib.nullcontext() if held else mock.patch.object(cpu, "hold_gloo_back")
    with plain, mf.init_groups(mf.build_groups(mf.ParallelConfig(tp=TP), TP)) as pg:
        numbers = torch.zeros(16)
        for count in (5, COUNT):  # the first few warm up
            start = time.perf_counter()
            for _ in range(count):
                torch.distributed.all_reduce(numbers, group=pg.tp)
        return (time.perf_counter() - start) / COUNT


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo is for CPUs")
@pytest.mark.timeout(300)
def test_an_all_reduce_where_processes_outnumber_cores(table):
    seconds = {True: [], False: []}
    with worker_pool() as pool:

        def measure(held):
            seconds[held].append(pool(TP, seconds_of_an_all_reduce, held)[0])

        take_turns({held: lambda held=held: measure(held) for held in seconds}, rounds=5)
    held_back = 1e3 * statistics.median(seconds[True])
    plain = 1e3 * statistics.median(seconds[False])
    table(
        f"all_reduce of 16 numbers over {TP} processes on {os.cpu_count()} cores, gloo: "
        f"{held_back:.2f} ms, with its threads at their own priority {plain:.2f} ms: "
        f"{times_as_fast(seconds[True], seconds[False]):.2f}x"
    )

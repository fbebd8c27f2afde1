"""What a small collective costs where processes outnumber cores, and what `hold_gloo_back` saves of it. Prints; never asserts speed."""

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

TP, COUNT = 4, 200


def seconds_of_an_all_reduce(held):
    plain = contextlib.nullcontext() if held else mock.patch.object(cpu, "hold_gloo_back")
    with plain, mf.init_groups(mf.build_groups(mf.ParallelConfig(tp=TP), TP)) as pg:
        numbers = torch.zeros(16)
        for count in (5, COUNT):
            start = time.perf_counter()
            for _ in range(count):
                torch.distributed.all_reduce(numbers, group=pg.tp)
        return (time.perf_counter() - start) / COUNT


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo is for CPUs")
@pytest.mark.timeout(300)
def test_an_all_reduce_where_processes_outnumber_cores(table):
    with worker_pool() as pool:
        told = {True: [], False: []}
        take_turns(
            {
                held: lambda held=held: told[held].append(
                    pool(TP, seconds_of_an_all_reduce, held)[0]
                )
                for held in told
            },
            rounds=5,
        )
    here, there = (1e3 * statistics.median(told[held]) for held in (True, False))
    table(
        f"all_reduce of 16 numbers over {TP} processes on {os.cpu_count()} cores, gloo: {here:.2f} ms, with its threads at their own priority "
        f"{there:.2f} ms: {times_as_fast(told[True], told[False]):.2f}x"
    )

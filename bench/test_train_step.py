"""Tokens per second of one optimizer step, megafn beside its peers, in turns.

Prints; never asserts speed.
"""

import os
import shutil
import statistics
import time

import pytest
import torch

import megafn as mf
import rivals
from megafn.runtime.model.layers import DTYPES
from rivals import BATCH, HIDDEN, LAYERS, SEQUENCE, VOCABULARY
from turns import take_turns, threads, times_as_fast

ROUNDS = {"fp32": 9, "bf16": 11}
PEERS = (
    ("megafn train_step", rivals.megafn_step, None),
    ("(a) bare megatron-core loop, same modules", rivals.bare_step, 1.00),
    ("(b) megatron-core GPTModel, local spec", rivals.local_spec_step, 1.10),
    ("(c) transformers GPT-2, SDPA", rivals.transformers_step, 1.25),
    ("(d) plain torch GPT, SDPA", rivals.plain_step, None),
    ("(d) plain torch GPT, compiled", rivals.compiled_step, 1.00),
)
if not shutil.which(os.environ.get("CXX", "g++")):
    PEERS = PEERS[:-1]  # torch.compile wants a C++ compiler


def matmul_gflops(dtype, seconds=0.5):
    """Best of repeated products of 2048 x 2048 matrices: what this machine's matmul can do."""
    a, b = torch.randn(2, 2048, 2048, dtype=dtype)
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start) / 1e9)
    return best


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares CPUs")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_train_step_beside_its_peers(dtype, table):
    if dtype == "bf16":
        skip_where_bf16_is_emulated()
    torch.manual_seed(0)
    text = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1))
    peaks = []
    with (
        threads(2),
        mf.init_groups(mf.build_groups(mf.ParallelConfig(), world_size=1)) as pg,
        rivals.megatron_globals(),
    ):
        runs = {}
        counts = {}
        for name, make, _ in PEERS:
            run, counts[name] = make(pg, dtype)
            losses = [run(text) for _ in range(2)]  # compiles, allocates, warms up
            assert 8 < losses[1] < losses[0] < 11, losses  # ln 8192 = 9.01: it learns
            runs[name] = lambda run=run: run(text)
        assert len(set(counts.values())) == 1, f"not the same model: {counts}"
        seconds = take_turns(
            runs, ROUNDS[dtype], between=lambda: peaks.append(matmul_gflops(DTYPES[dtype]))
        )
    table(*rows(dtype, seconds, next(iter(counts.values())), max(peaks)))


def skip_where_bf16_is_emulated():
    bf16 = matmul_gflops(torch.bfloat16)
    fp32 = matmul_gflops(torch.float32)
    if bf16 < fp32 / 2:
        pytest.skip(
            f"this CPU emulates bf16 ({bf16:.0f} GFLOP/s, {fp32:.0f} in fp32): nobody trains in it"
        )


def rows(dtype, seconds, parameters, peak):
    tokens = BATCH * SEQUENCE
    without_positions = parameters - SEQUENCE * HIDDEN
    flop = (6 * without_positions + 12 * LAYERS * HIDDEN * SEQUENCE) * tokens
    ours = seconds[PEERS[0][0]]
    yield (
        f"train_step, {dtype}: {LAYERS} layers x {HIDDEN}, sequence {SEQUENCE}, batch {BATCH}, "
        f"vocabulary {VOCABULARY}, 2 threads, {len(ours)} interleaved rounds; "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )
    columns = f"{'tokens/s':>10}{'best':>8}{'GFLOP/s':>9}{'of peak':>9}{'megafn is':>11}{'goal':>7}"
    yield f"{'':44}{columns}"
    for name, _, goal in PEERS:
        median = statistics.median(seconds[name])
        best = min(seconds[name])
        gflops = flop / median / 1e9
        goals = f"{goal:.2f}x" if goal else ""
        yield (
            f"{name:44}{tokens / median:10.0f}{tokens / best:8.0f}{gflops:9.0f}{gflops / peak:9.2f}"
            f"{times_as_fast(ours, seconds[name]):10.2f}x{goals:>7}"
        )
    yield (
        f"matmul peak {peak:.0f} GFLOP/s (2048 x 2048, {dtype}, best of all rounds); goal 0.80 of "
        "it in fp32. FLOP of a step: (6 N + 12 L h s) tokens, "
        f"N = {without_positions:,} without the position table."
    )

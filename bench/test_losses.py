"""Cross-entropy, forward and backward, beside torch's. Prints; never asserts speed."""

import statistics

import pytest
import torch
import torch.nn.functional as F

import megafn as mf
from megafn.runtime.model.layers import DTYPES
from megafn.runtime.model.losses import cross_entropy
from turns import take_turns, threads, times_as_fast

SEQUENCE, BATCH, VOCABULARY = 256, 8, 8192


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cross_entropy_beside_torch(dtype, table):
    logits = torch.randn(SEQUENCE, BATCH, VOCABULARY, dtype=DTYPES[dtype], requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE))
    by_position = labels.t().contiguous()  # given to torch's as the logits lie
    with threads(2), mf.init_groups(mf.build_groups(mf.ParallelConfig(), world_size=1)) as pg:
        losses = {
            "megafn": lambda: cross_entropy(logits, labels, pg).sum(),
            "torch": lambda: F.cross_entropy(
                logits.flatten(0, 1), by_position.flatten(), reduction="sum"
            ),
        }
        assert abs(losses["megafn"]().item() / losses["torch"]().item() - 1) < (
            1e-5 if dtype == "fp32" else 1e-2
        )

        def run(loss):
            logits.grad = None
            loss().backward()

        seconds = take_turns(
            {name: lambda loss=loss: run(loss) for name, loss in losses.items()}, rounds=21
        )
    here, there = (1e3 * statistics.median(seconds[name]) for name in ("megafn", "torch"))
    table(
        f"cross_entropy, {dtype}, logits {SEQUENCE} x {BATCH} x {VOCABULARY}, forward and backward: {here:.0f} ms, "
        f"torch's {there:.0f} ms: megafn is {times_as_fast(seconds['megafn'], seconds['torch']):.2f}x"
    )

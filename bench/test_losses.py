"""Cross-entropy, forward and backward, beside torch's. Prints; never asserts speed."""

import statistics

import pytest
import torch
import torch.nn.functional as F

import megafn as mf
from megafn.runtime.model.layers import DTYPES
from megafn.runtime.model.losses import cross_entropy
from turns import take_turns, threads, times_as_fast

SEQUENCE = 256
BATCH = 8
VOCABULARY = 8192


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cross_entropy_beside_torch(dtype, table):
    logits = torch.randn(SEQUENCE, BATCH, VOCABULARY, dtype=DTYPES[dtype], requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE))
    by_position = labels.t().contiguous()  # for torch's, in the layout of the logits
    tolerance = 1e-5 if dtype == "fp32" else 1e-2
    with threads(2), mf.init_groups(mf.build_groups(mf.ParallelConfig(), world_size=1)) as pg:
        losses = {
            "megafn": lambda: cross_entropy(logits, labels, pg).sum(),
            "torch": lambda: F.cross_entropy(
                logits.flatten(0, 1), by_position.flatten(), reduction="sum"
            ),
        }
        ratio = losses["megafn"]().item() / losses["torch"]().item()
        assert abs(ratio - 1) < tolerance

        def run(loss):
            logits.grad = None
            loss().backward()

        seconds = take_turns(
            {name: lambda loss=loss: run(loss) for name, loss in losses.items()}, rounds=21
        )
    ours = 1e3 * statistics.median(seconds["megafn"])
    theirs = 1e3 * statistics.median(seconds["torch"])
    table(
        f"cross_entropy, {dtype}, logits {SEQUENCE} x {BATCH} x {VOCABULARY}, forward and "
        f"backward: {ours:.0f} ms, torch's {theirs:.0f} ms: megafn is "
        f"{times_as_fast(seconds['megafn'], seconds['torch']):.2f}x"
    )

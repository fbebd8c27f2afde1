"""The bytes that the planner sends are those that the code sends.

Of a machine whose links carry a megabyte a second, seconds are megabytes. A dry run counts the
tensors that collectives are given; of n ranks, each sends (n - 1) / n of one that is gathered or
scattered, and twice that of one that is reduced.
"""

import attrs
import pytest

import megafn as mf
from megafn.pure.planner.layout import layout_of
from megafn.pure.planner.machine import MACHINES
from megafn.pure.planner.time.step_time import step_time

MEGABYTE = 1e6
MEGABYTE_A_SECOND = attrs.evolve(
    MACHINES["h100"], link_bandwidth=MEGABYTE, network_bandwidth=MEGABYTE, link_efficiency=1.0
)
# How often a share (n - 1) / n of the tensor is sent.
ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


def sent(messages, ranks):
    total = 0.0
    for collective, size in messages.by_collective.items():
        if collective in ROUNDS:
            total += ROUNDS[collective] * (ranks - 1) / ranks * size
        elif collective in ("send", "recv"):
            total += size
    return total


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_messages_of_a_step_have_the_bytes_that_are_priced(sequence_parallel):
    """Not priced, and below 2% here: numbers of the loss, and gradients of norms, which tp sums."""
    config = mf.TrainConfig(
        model=mf.ModelConfig(
            num_layers=2,
            hidden_size=512,
            num_attention_heads=8,
            seq_length=256,
            vocab_size=512,
            position_embedding="none",
        ),
        parallel=mf.ParallelConfig(tp=2, pp=2, cp=2, sequence_parallel=sequence_parallel),
        optimizer=mf.OptimizerConfig(use_distributed_optimizer=True),
        precision=mf.PrecisionConfig(dtype="bf16"),
        micro_batch_size=4,
        global_batch_size=8,
        train_iters=1,
    )
    messages = mf.dry_run(config, world_size=16, rank=15).messages
    time = step_time(config, layout_of(config, 16), MEGABYTE_A_SECOND)
    assert sent(messages["tp"], 2) == pytest.approx(time.tp * MEGABYTE, rel=0.02)
    assert sent(messages["cp"], 2) == pytest.approx(time.cp * MEGABYTE)
    assert sent(messages["pp"], 2) == pytest.approx(time.pp * MEGABYTE, rel=1e-4)
    assert sent(messages["dp_cp"], 4) == pytest.approx(time.dp * MEGABYTE)

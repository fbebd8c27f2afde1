"""Bytes of a plan, by stage and kind: equal to what the product holds."""

import attrs
import pytest

from megafn.pure.config.records import (
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RecomputeConfig,
    TrainConfig,
)
from megafn.pure.planner.memory import memory_by_stage
from megafn.pure.planner.records import Layout

LLAMA_7B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    ffn_hidden_size=11008,
    seq_length=4096,
    vocab_size=32000,
    position_embedding="rope",
    activation="swiglu",
    normalization="RMSNorm",
    add_bias_linear=False,
    tie_word_embeddings=False,
)


def run(model=LLAMA_7B, dtype="bf16", **optimizer):
    return TrainConfig(
        model=model,
        micro_batch_size=1,
        global_batch_size=64,
        train_iters=1,
        precision=PrecisionConfig(dtype=dtype),
        optimizer=OptimizerConfig(**optimizer),
    )


def test_llama_7b_has_its_published_number_of_parameters():
    (memory,) = memory_by_stage(run(), Layout())
    assert memory.parameters == 2 * 6_738_415_616


@pytest.mark.parametrize(
    ("dtype", "optimizer", "dp", "expected"),
    [
        ("bf16", {}, 1, 2 + 4 + 12),
        ("bf16", {"use_distributed_optimizer": True}, 8, 2 + 4 + 12 / 8),
        ("fp32", {}, 1, 4 + 4 + 8),
        ("fp32", {"use_distributed_optimizer": True}, 8, 4 + 4 + 8 / 8),
        ("bf16", {"name": "sgd"}, 1, 2 + 4 + 8),
        ("fp32", {"name": "sgd", "momentum": 0.0}, 1, 4 + 4),
    ],
)
def test_state_takes_the_bytes_a_parameter_of_mixed_precision(dtype, optimizer, dp, expected):
    sharded = optimizer.get("use_distributed_optimizer", False)
    layout = Layout(dp=dp, use_distributed_optimizer=sharded)
    (memory,) = memory_by_stage(run(dtype=dtype, **optimizer), layout)
    state = memory.parameters + memory.gradients + memory.optimizer_state
    assert state == pytest.approx(expected * 6_738_415_616)


def test_only_the_stages_asked_for_are_priced():
    layout = Layout(pp=4, num_micro_batches=8)
    every_stage = memory_by_stage(run(), layout)
    assert len(every_stage) == 4
    assert memory_by_stage(run(), layout, stages=(3, 0)) == (every_stage[3], every_stage[0])


def test_what_should_save_memory_does():
    def activations(implementation="megafn", **changes):
        layout = attrs.evolve(Layout(pp=2, num_micro_batches=8), **changes)
        return memory_by_stage(run(), layout, implementation=implementation)[0].activations

    plain = activations()
    full = RecomputeConfig(granularity="full")
    assert activations(tp=2) < plain
    assert activations(tp=2, sequence_parallel=True) < activations(tp=2)
    assert activations(cp=2) < plain
    assert activations(num_micro_batches=1) < plain
    assert activations("megatron") < plain
    assert activations(recompute=full) < plain / 4
    assert activations(micro_batch_size=2) > 1.9 * plain
    assert activations(vpp=2) > plain

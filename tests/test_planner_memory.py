"""Bytes of a plan, by stage and kind: equal to what the product holds."""

import math
import os

import attrs
import pytest

import megafn as mf
import test_bert
import test_equivalence
import test_t5
from bert_rows import PAIRS
from equivalence import recomputation, tiny
from megafn.pure.config.records import (
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RecomputeConfig,
    TrainConfig,
)
from megafn.pure.families.built_in import parameter_shapes
from megafn.pure.planner.layout import layout_of
from megafn.pure.planner.memory.parameter_counts import parameters_by_stage
from megafn.pure.planner.memory.stage_memory import memory_by_stage
from megafn.pure.planner.published.rows import published_rows
from megafn.pure.planner.records import Layout
from t5_rows import T5

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
    "changes",
    [
        dict(tie_word_embeddings=False),
        dict(tie_word_embeddings=False, position_embedding="rope", qk_layernorm=True),
        dict(family="bert", num_labels=3, num_tokentypes=2),
        dict(family="bert", tie_word_embeddings=False, bert_binary_head=True),
    ],
)
@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=4),
        Layout(pp=4, num_layers_in_last_pipeline_stage=2),
        Layout(pp=3, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=3),
    ],
)
def test_stages_hold_the_whole_model_once_if_no_table_is_tied(changes, layout):
    model = tiny(num_layers=8, **changes).model
    every_parameter = sum(map(math.prod, parameter_shapes(model).values()))
    assert sum(parameters_by_stage(model, layout)) == every_parameter


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


# ------------------------------------------------------------------- beside bytes of real GPUs

CI_OF_7B = [row for row in published_rows() if row.name.startswith("ci-") and "-7b_" in row.name]


def test_megatron_lms_models_of_7b_need_what_its_ci_measured():
    """On H100, A100 and GB200: state 0.94 to 1.0 of what was allocated, peak 0.97 to 1.0.

    The rest is not the model's: workspaces, and buffers of Transformer Engine and of libraries.
    """
    assert len(CI_OF_7B) == 6
    for row in CI_OF_7B:
        plan = memory_by_stage(row.config, row.layout, implementation="megatron")[-1]
        state = plan.parameters + plan.gradients + plan.optimizer_state
        assert 0.94 < state / row.state_bytes < 1.0, row.name
        assert 0.97 < plan.total / row.peak_bytes < 1.0, row.name


@pytest.mark.parametrize(
    "name",
    [
        "ci-h100-tiny_tp1_pp1_uniform_full_recompute",
        "ci-h100-tiny_tp1_pp1_dist_optimizer",
        "ci-h100-tiny_tp2_pp2",
        "ci-h100-tiny_tp2_pp2_cp2",
        "ci-h100-tiny_tp2_pp1_cp2_nondeterministic",
    ],
)
def test_activations_of_a_tiny_model_are_what_an_h100_needed_between_state_and_peak(name):
    """Its state is dwarfed by workspaces, which are in both of the measured numbers."""
    (row,) = (row for row in published_rows() if row.name == name)
    plan = memory_by_stage(row.config, row.layout, implementation="megatron")[-1]
    assert plan.activations == pytest.approx(row.peak_bytes - row.state_bytes, rel=0.03)


# ---------------------------------------------------------------------------- beside a dry run

SIZES = (
    "hidden_size",
    "seq_length",
    "ffn_hidden_size",
    "kv_channels",
    "max_position_embeddings",
    "decoder_seq_length",
    "sliding_window",
)


def few(cases, *names):
    """Some names of cases, or, in `make memory-check`, all of them."""
    return tuple(cases) if os.environ.get("MEGAFN_ALL_PLANS") else names


def of_the_law(base, layout):
    """A config of the law with larger matrices and longer sequences, and few micro-batches.

    Beside them constants are small.
    """
    layout = dict(layout)
    config = tiny(**base | layout | recomputation(layout))
    model = config.model
    sizes = {name: getattr(model, name) for name in SIZES}
    scaled = {name: 8 * size for name, size in sizes.items() if size is not None}
    return attrs.evolve(
        config, model=attrs.evolve(model, vocab_size=512, num_labels=None, **scaled)
    )


def with_few_micro_batches(config, world_size):
    """As many as there are stages, and at least two."""
    parallel = config.parallel
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    micro_batches = max(2, parallel.pp)
    return attrs.evolve(config, global_batch_size=config.micro_batch_size * dp * micro_batches)


def first_rank(config, world_size, stage):
    """The first rank of a pipeline stage."""
    groups = mf.build_groups(config.parallel, world_size, model=config.model)
    return next(r for r in range(world_size) if mf.coordinates(groups, r).pp == stage)


def assert_as_a_dry_run_says(config, world_size, stages=None, tolerance=0.03):
    """Parameters exactly, the bytes at the peak within 3%, on the first and the last stage."""
    element = 4 if config.precision.dtype == "fp32" else 2
    for stage in sorted({0, config.parallel.pp - 1}) if stages is None else stages:
        run = mf.dry_run(config, world_size, rank=first_rank(config, world_size, stage))
        (plan,) = memory_by_stage(config, layout_of(config, world_size), stages=(stage,))
        peak = run.memory.peak
        assert plan.parameters == run.num_parameters * element, stage
        # megatron-core pads each of them in its buffers
        assert plan.gradients == pytest.approx(peak.gradients, rel=0.005), stage
        assert plan.optimizer_state == pytest.approx(peak.optimizer_state, rel=0.005), stage
        expected = peak.total - run.memory.cpu_only
        assert plan.total == pytest.approx(expected, rel=tolerance), stage


def assert_case(case, base=None):
    processes, layout, *changes = case
    config = of_the_law((base or {}) | (changes[0] if changes else {}), layout)
    assert_as_a_dry_run_says(with_few_micro_batches(config, processes), processes)


GPT = few(
    test_equivalence.LAYOUTS,
    "tp4-sp",
    "pp4-vpp2",
    "cp4",
    "tp2-pp2-dp2-sp-dist",
    "pp4-first1-last3",
    "selective-tp2-cp2",
    "full-block1-pp2-cp2",
)
SHAPES = few(
    test_equivalence.SHAPES,
    "gpt2",
    "llama",
    "relu",
    "qk-rmsnorm",
    "scaled-rope-window",
    "parallel-residual",
)
BERT = few(test_bert.LAYOUTS, "tp2-cp2-sp", "pp4")
T5_LAYOUTS = few(test_t5.LAYOUTS, "pp4-split1", "tp2-sp")
T5_SHAPES = few(test_t5.SHAPES, "relative")


@pytest.mark.parametrize("name", GPT)
def test_a_layout_of_gpt_needs_what_a_dry_run_says(name):
    assert_case(test_equivalence.LAYOUTS[name])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_of_gpt_needs_what_a_dry_run_says(shape):
    base = test_equivalence.SHAPES[shape]
    config = of_the_law(base, dict(tp=2, pp=2, sequence_parallel=True, dtype="bf16"))
    assert_as_a_dry_run_says(with_few_micro_batches(config, 4), 4, stages=(1,))
    assert_case((2, dict(cp=2)), base)


@pytest.mark.parametrize("name", BERT)
def test_a_layout_of_bert_needs_what_a_dry_run_says(name):
    assert_case(test_bert.LAYOUTS[name], PAIRS)


@pytest.mark.parametrize("name", T5_LAYOUTS)
def test_a_layout_of_t5_needs_what_a_dry_run_says(name):
    assert_case(test_t5.LAYOUTS[name], T5)


@pytest.mark.parametrize("shape", T5_SHAPES)
def test_a_shape_of_t5_needs_what_a_dry_run_says(shape):
    assert_case((2, dict(pp=2)), T5 | test_t5.SHAPES[shape])


LLAMA = dict(
    position_embedding="rope",
    activation="swiglu",
    normalization="RMSNorm",
    add_bias_linear=False,
    tie_word_embeddings=False,
)
LLAMA_3 = LLAMA | dict(num_query_groups=8, vocab_size=128256, seq_length=8192)
WIDTHS_OF_7B = dict(num_layers=32, hidden_size=4096, num_attention_heads=32)
WIDTHS_OF_70B = dict(num_layers=80, hidden_size=8192, num_attention_heads=64, ffn_hidden_size=28672)
SP_AND_SHARDS = dict(sequence_parallel=True, use_distributed_optimizer=True)
# name: (processes, micro-batches, model and layout)
REAL_SIZES = {
    "Llama 2 7B": (
        16,
        2,
        LLAMA
        | WIDTHS_OF_7B
        | dict(ffn_hidden_size=11008, vocab_size=32000, seq_length=4096, tp=2)
        | SP_AND_SHARDS,
    ),
    "Llama 2 13B": (
        16,
        4,
        LLAMA
        | dict(num_layers=40, hidden_size=5120, num_attention_heads=40, ffn_hidden_size=13824)
        | dict(vocab_size=32000, seq_length=4096, tp=2, pp=2)
        | SP_AND_SHARDS,
    ),
    "Llama 2 70B": (
        256,
        4,
        LLAMA
        | WIDTHS_OF_70B
        | dict(num_query_groups=8, vocab_size=32000, seq_length=4096, tp=8, pp=4)
        | SP_AND_SHARDS,
    ),
    "Llama 3 8B": (
        16,
        1,
        LLAMA_3 | WIDTHS_OF_7B | dict(ffn_hidden_size=14336, cp=2, use_distributed_optimizer=True),
    ),
    "Llama 3 8B, 32k tokens": (
        64,
        1,
        LLAMA_3
        | WIDTHS_OF_7B
        | dict(ffn_hidden_size=14336, seq_length=32768, tp=4, cp=4, granularity="full")
        | SP_AND_SHARDS,
    ),
    "Llama 3 70B": (64, 4, LLAMA_3 | WIDTHS_OF_70B | dict(tp=4, pp=4, vpp=5) | SP_AND_SHARDS),
    "Llama 3 405B": (
        16384,
        16,
        LLAMA_3
        | dict(num_layers=126, hidden_size=16384, num_attention_heads=128, ffn_hidden_size=53248)
        | dict(num_layers_in_first_pipeline_stage=7, num_layers_in_last_pipeline_stage=7)
        | dict(tp=8, pp=16, granularity="full")
        | SP_AND_SHARDS,
    ),
    "GPT-3 175B": (
        1024,
        8,
        dict(num_layers=96, hidden_size=12288, num_attention_heads=96, vocab_size=51200)
        | dict(seq_length=2048, tp=8, pp=8)
        | SP_AND_SHARDS,
    ),
    "Mistral 7B": (
        16,
        1,
        LLAMA
        | WIDTHS_OF_7B
        | dict(ffn_hidden_size=14336, vocab_size=32000, seq_length=8192, num_query_groups=8)
        | dict(sliding_window=4096, tp=2, use_distributed_optimizer=True),
    ),
    "Qwen2 7B": (
        16,
        1,
        LLAMA
        | dict(num_layers=28, hidden_size=3584, num_attention_heads=28, num_query_groups=4)
        | dict(ffn_hidden_size=18944, vocab_size=152064, seq_length=4096, add_qkv_bias=True, tp=4),
    ),
    "GPT-NeoX 20B": (
        96,
        4,
        dict(num_layers=44, hidden_size=6144, num_attention_heads=64, vocab_size=50432)
        | dict(seq_length=2048, position_embedding="rope", rotary_percent=0.25)
        | dict(parallel_residual=True, tie_word_embeddings=False, tp=2, pp=4),
    ),
    "T5 11B": (
        64,
        1,
        dict(family="t5", num_layers=24, hidden_size=1024, num_attention_heads=128)
        | dict(kv_channels=128, ffn_hidden_size=65536, vocab_size=32128, seq_length=512)
        | dict(position_embedding="relative", activation="relu", normalization="RMSNorm")
        | dict(add_bias_linear=False, tp=8, micro_batch_size=8),
    ),
}


@pytest.mark.parametrize("name", few(REAL_SIZES, "Llama 2 7B"))
def test_a_model_of_real_size_needs_what_a_dry_run_says(name):
    processes, micro_batches, changes = REAL_SIZES[name]
    recompute = mf.RecomputeConfig(granularity=changes.get("granularity"))
    layout = {key: value for key, value in changes.items() if key != "granularity"}
    config = tiny(dtype="bf16", recompute=recompute, **dict(micro_batch_size=1) | layout)
    dp = layout_of(config, processes).dp
    batch = config.micro_batch_size * dp * micro_batches
    assert_as_a_dry_run_says(attrs.evolve(config, global_batch_size=batch), processes)

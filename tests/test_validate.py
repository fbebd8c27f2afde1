"""What `validate` accepts megatron-core can run, what it refuses it can't; it tells all, truly, and
never raises."""

from operator import attrgetter
from types import SimpleNamespace

import attrs
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from config_values import CONFIGS
from megafn.pure.config.field_types import all_fields
from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    RopeScaling,
    ScheduleConfig,
    TrainConfig,
)
from megafn.pure.layout import AXES, build_groups
from megafn.pure.schedule import make_schedule
from megafn.pure.validation.validate import check, validate

MODEL = ModelConfig(num_layers=8, hidden_size=64, num_attention_heads=8, seq_length=32)
CONFIG = TrainConfig(
    model=MODEL,
    parallel=ParallelConfig(tp=2, pp=2),
    data=DataConfig(train="a"),
    micro_batch_size=2,
    global_batch_size=16,
    train_iters=100,
)  # on 8 processes: dp = 2, 4 micro-batches
PATHS = [path for path, *_ in all_fields(CONFIG)]


def changed(config, changes):
    """The config with fields, by dotted path, set to other values; sections last, so that junk may
    replace them."""
    for path, value in sorted(changes.items(), key=lambda change: "." not in change[0]):
        section, _, name = path.rpartition(".")
        config = attrs.evolve(
            config,
            **(
                {section: attrs.evolve(getattr(config, section), **{name: value})}
                if section
                else {name: value}
            ),
        )
    return config


def fields_of(problems):
    return sorted(problem.field for problem in problems)


def is_true_to(problems, config, world_size):
    """Each problem names a field that there is, with the value that it has, and can be printed."""
    for problem in problems:
        value = world_size if problem.field == "world_size" else attrgetter(problem.field)(config)
        assert problem.value is value and problem.field in str(problem) and problem.remedy, problem
    return True


# It never raises

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(),
    st.text("-tpcedx"),
    st.binary(),
    st.sampled_from(
        [
            10**5000,
            -(2**63),
            2**63 - 1,
            1e308,
            1j,
            len,
            object(),
            int,
            ...,
            ModelConfig,
            MODEL,
            DataConfig(train=()),
            "bert",
            "rope",
            "wsd",
        ]
    ),
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.tuples(inner, inner)
            | st.lists(inner)
            | st.lists(inner).map(tuple)
            | st.dictionaries(st.text(), inner)
        ),
        max_leaves=6,
    ),
)


@given(
    st.dictionaries(st.sampled_from(PATHS), JUNK, min_size=1, max_size=12),
    JUNK | st.just(8),
    st.sampled_from([None, True, False]),
)
def test_it_never_raises_whatever_the_fields_hold(changes, world_size, cuda):
    config = changed(CONFIG, changes)
    assert is_true_to(validate(config, world_size, cuda=cuda), config, world_size)


@given(CONFIGS, st.integers(-2, 2**64))
def test_it_never_raises_where_all_types_are_right(config, world_size):
    assert is_true_to(validate(config, world_size), config, world_size)


@given(JUNK)
def test_what_is_no_config_is_a_problem_too(junk):
    assert [problem.field for problem in validate(junk, 1)] == ["config"]


@pytest.mark.parametrize("path", [*PATHS, "world_size"])
def test_a_value_of_a_wrong_type_is_the_first_problem_and_spoils_no_other_field(path):
    junk = {"no": "type of any field"}
    config = CONFIG if path == "world_size" else changed(CONFIG, {path: junk})
    first, *others = validate(config, junk if path == "world_size" else 8)
    assert (
        first.field == path
        and first.value is junk
        and first.remedy.startswith("give ")
        and others == []
    )


# It tells what is wrong, all of it, and nothing else

# changes of CONFIG, and the fields that are blamed on 8 processes; those of one change alone
RAMP = {
    "schedule.weight_decay_incr_style": "linear",
    "schedule.start_weight_decay": 0.0,
    "schedule.end_weight_decay": 0.1,
}
ROPE = {"model.position_embedding": "rope"}
SAVED = {"checkpoint.directory": "a", "checkpoint.interval": 5}

BAD = [
    ({"model.family": "GTP"}, "model.family"),
    ({"model.num_tokentypes": 2}, "model.num_tokentypes"),
    ({"model.bert_binary_head": True}, "model.bert_binary_head"),
    ({"model.num_labels": 2}, "model.num_labels"),
    ({"model.problem_type": "regression"}, "model.problem_type"),
    ({"model.scale_decoder_outputs": True}, "model.scale_decoder_outputs"),
    ({"model.output_layer_bias": False}, "model.output_layer_bias"),
    ({"model.rope_scaling": RopeScaling(factor=8.0)}, "model.rope_scaling"),
    ({"model.layers_without_rope": (0,)}, "model.layers_without_rope"),
    *(
        ({**ROPE, "model.layers_without_rope": layers}, "model.layers_without_rope")
        for layers in ((8,), (-1,), (1, 1), (2, 1), tuple(range(8)))
    ),
    *(
        (
            {**ROPE, "model.rope_scaling": RopeScaling(**{"factor": 8.0, name: value})},
            f"model.rope_scaling.{name}",
        )
        for name, value in (
            ("factor", 0.9),
            ("factor", float("nan")),
            ("low_freq_factor", 0.0),
            ("high_freq_factor", float("inf")),
            ("high_freq_factor", 1.0),
            ("original_max_position_embeddings", 0),
        )
    ),
    (
        {"model.family": "bert", "model.sliding_window": 8, "model.parallel_residual": True},
        "model.parallel_residual model.sliding_window",
    ),
    ({"data.mask_prob": 0.2}, "data.mask_prob"),
    ({"data.short_seq_prob": 0.0}, "data.short_seq_prob"),
    ({"model.family": "bert", "model.num_labels": 0, "data": None}, "model.num_labels"),
    (
        {
            "model.family": "bert",
            "model.num_labels": 2,
            "model.bert_binary_head": True,
            "data": None,
        },
        "model.bert_binary_head",
    ),
    (
        {"model.family": "bert", "model.problem_type": "regression", "data": None},
        "model.problem_type",
    ),
    (
        {
            "model.family": "bert",
            "model.num_labels": 1,
            "model.problem_type": "single_label_classification",
            "data": None,
        },
        "model.problem_type",
    ),
    (
        {
            "model.family": "bert",
            "model.num_labels": 2,
            "model.problem_type": "regressive",
            "data": None,
        },
        "model.problem_type",
    ),
    (
        {
            "model.family": "bert",
            "model.num_labels": 2,
            "model.tie_word_embeddings": False,
            "data": None,
        },
        "model.tie_word_embeddings",
    ),
    ({"model.family": "bert", "model.num_labels": 2}, "data"),
    ({"model.family": "bert", "data.eod_mask_loss": True}, "data.eod_mask_loss"),
    ({"model.family": "bert", "data.mask_prob": 1.0}, "data.mask_prob"),
    ({"model.family": "bert", "data.short_seq_prob": 1.1}, "data.short_seq_prob"),
    ({"model.num_layers": 7}, "model.num_layers"),
    ({"model.num_attention_heads": 1}, "model.num_attention_heads"),
    ({"model.num_attention_heads": 6}, "model.hidden_size"),
    ({"model.num_query_groups": 1}, "model.num_query_groups"),
    ({"model.num_query_groups": 6}, "model.num_query_groups"),
    ({"model.ffn_hidden_size": 255}, "model.ffn_hidden_size"),
    (
        {"parallel.tp": 8, "parallel.pp": 1, "model.hidden_size": 9, "model.kv_channels": 4},
        "model.ffn_hidden_size",
    ),
    ({"model.max_position_embeddings": 31}, "model.max_position_embeddings"),
    ({"model.position_embedding": "roped"}, "model.position_embedding"),
    ({"model.position_embedding": "rope", "model.kv_channels": 5}, "model.position_embedding"),
    ({"model.position_embedding": "rope", "model.rotary_percent": 0.4}, "model.rotary_percent"),
    ({"model.position_embedding": "rope", "model.rotary_percent": 0.1}, "model.rotary_percent"),
    ({"model.rotary_base": 5e5}, "model.rotary_base"),
    ({"model.rotary_percent": 0.5}, "model.rotary_percent"),
    (
        {"model.position_embedding": "none", "data.reset_position_ids": True},
        "data.reset_position_ids",
    ),
    ({"model.activation": "GELU"}, "model.activation"),
    ({"model.normalization": "layernorm"}, "model.normalization"),
    (
        {
            "parallel.tp": 3,
            "parallel.pp": 1,
            "model.ffn_hidden_size": 3,
            "model.num_attention_heads": 12,
            "model.hidden_size": 36,
        },
        "world_size",
    ),
    ({"parallel.vpp": 2, "parallel.pp": 1}, "parallel.vpp"),
    (
        {"parallel.vpp": 3, "parallel.pp": 1, "parallel.num_layers_in_first_pipeline_stage": 8},
        "parallel.vpp",
    ),
    ({"parallel.vpp": 3}, "model.num_layers"),
    ({"parallel.vpp": 2, "global_batch_size": 12}, "global_batch_size"),
    ({"parallel.vpp": 2, "global_batch_size": 4}, "global_batch_size"),
    (
        {"parallel.vpp": 2, "parallel.num_layers_in_first_pipeline_stage": 3},
        "model.num_layers parallel.num_layers_in_first_pipeline_stage",
    ),
    (
        {"parallel.vpp": 2, "parallel.num_layers_in_last_pipeline_stage": 3},
        "model.num_layers parallel.num_layers_in_last_pipeline_stage",
    ),
    ({"parallel.num_layers_in_first_pipeline_stage": 8}, "model.num_layers"),
    (
        {
            "parallel.num_layers_in_first_pipeline_stage": 3,
            "parallel.num_layers_in_last_pipeline_stage": 4,
        },
        "model.num_layers",
    ),
    (
        {
            "parallel.vpp": 2,
            "parallel.num_layers_in_first_pipeline_stage": 4,
            "parallel.num_layers_in_last_pipeline_stage": 4,
        },
        "model.num_layers",
    ),
    ({"parallel.pp": 1, "parallel.num_layers_in_last_pipeline_stage": 4}, "model.num_layers"),
    ({"parallel.ep": 2}, "parallel.ep"),
    ({"parallel.tp": 1, "parallel.sequence_parallel": True}, "parallel.sequence_parallel"),
    ({"parallel.sequence_parallel": True, "model.seq_length": 31}, "model.seq_length"),
    ({"parallel.cp": 2, "model.seq_length": 30}, "model.seq_length"),
    (
        {
            "parallel.cp": 2,
            "parallel.tp": 4,
            "parallel.pp": 1,
            "parallel.sequence_parallel": True,
            "model.seq_length": 28,
        },
        "model.seq_length",
    ),
    ({"parallel.order": "tp-dp"}, "parallel.order"),
    ({"parallel.order": "tp-cp-ep-dp-pp-tp"}, "parallel.order"),
    ({"parallel.order": "tp,pp,dp"}, "parallel.order"),
    ({"parallel.order": ""}, "parallel.order"),
    ({"parallel.order": "tp-pp"}, "parallel.order"),
    ({"micro_batch_size": 3}, "global_batch_size"),
    ({"global_batch_size": 6}, "global_batch_size"),
    ({"optimizer.name": "adamw"}, "optimizer.name"),
    ({"optimizer.name": "sgd", "optimizer.beta2": 0.9}, "optimizer.beta2"),
    ({"optimizer.momentum": 0.5}, "optimizer.momentum"),
    (
        {"optimizer.name": "sgd", "optimizer.use_distributed_optimizer": True},
        "optimizer.use_distributed_optimizer",
    ),
    ({"precision.dtype": "float16"}, "precision.dtype"),
    ({"precision.hysteresis": 1}, "precision.hysteresis"),
    (
        {
            "precision.dtype": "fp16",
            "precision.initial_loss_scale": 2.0,
            "precision.min_loss_scale": 4.0,
        },
        "precision.min_loss_scale",
    ),
    ({"recompute.granularity": "ful"}, "recompute.granularity"),
    ({"recompute.granularity": "full", "recompute.method": "blok"}, "recompute.method"),
    ({"recompute.granularity": "full", "recompute.num_layers": 5}, "recompute.num_layers"),
    (
        {"recompute.granularity": "full", "recompute.num_layers": 3, "parallel.vpp": 2},
        "recompute.num_layers",
    ),
    (
        {
            "recompute.granularity": "full",
            "recompute.num_layers": 7,
            "parallel.num_layers_in_last_pipeline_stage": 6,
        },
        "recompute.num_layers",
    ),
    (
        {"recompute.granularity": "full", "recompute.num_layers": 3},
        "recompute.num_layers",
    ),  # stages of 4: an index out of range
    (
        {
            "recompute.granularity": "full",
            "recompute.num_layers": 6,
            "parallel.num_layers_in_last_pipeline_stage": 6,
        },
        "recompute.num_layers",
    ),
    ({"recompute.num_layers": 2}, "recompute.num_layers"),
    ({"recompute.num_layers": 9}, "recompute.num_layers"),
    ({"recompute.method": "block"}, "recompute.method"),
    ({"recompute.granularity": "selective", "recompute.num_layers": 2}, "recompute.num_layers"),
    ({"train_iters": None}, "train_iters"),
    ({"train_samples": 100}, "train_iters"),
    ({"train_iters": None, "train_samples": 15}, "train_samples"),
    ({"eval_interval": 5, "eval_iters": 0}, "eval_interval"),
    ({"data.split": (1.0, 0.0, 1.0)}, "data.split"),
    ({"schedule.decay": "cosin"}, "schedule.decay"),
    ({"schedule.min_lr": 1.0}, "schedule.min_lr"),
    ({"schedule.warmup_iters": 100}, "schedule.warmup_iters"),
    ({"schedule.warmup_samples": 5, "schedule.warmup_iters": 5}, "schedule.warmup_samples"),
    ({"schedule.decay_iters": 5, "schedule.decay_samples": 5}, "schedule.decay_samples"),
    ({"schedule.weight_decay_incr_style": "linear"}, "schedule.weight_decay_incr_style"),
    ({"schedule.end_weight_decay": 0.1}, "schedule.end_weight_decay"),
    ({"schedule.wsd_decay_iters": 5}, "schedule.wsd_decay_iters"),
    ({"data.sampler": "random"}, "data.sampler"),
    ({"schedule.decay": "constant", "schedule.min_lr": 1e-5}, "schedule.min_lr"),
    ({"schedule.decay": "constant", "schedule.decay_iters": 5}, "schedule.decay_iters"),
    ({"schedule.decay": "constant", "schedule.decay_samples": 96}, "schedule.decay_samples"),
    ({"schedule.init_lr": 1e-5}, "schedule.init_lr"),
    ({"schedule.init_lr": 1e-5, "schedule.warmup_iters": 0}, "schedule.init_lr"),
    ({"schedule.wsd_decay_style": "linear"}, "schedule.wsd_decay_style"),
    ({**RAMP, "schedule.weight_decay": 0.1}, "schedule.weight_decay"),
    ({"data.valid": "b", "data.test": "c", "data.split": (1.0, 1.0, 1.0)}, "data.split"),
    ({"data.valid": "b", "eval_iters": 0}, "data.valid"),
    (
        {**SAVED, "checkpoint.keep_every": 5, "checkpoint.keep_last": 0},
        "checkpoint.keep_every",
    ),
    (
        {**SAVED, "checkpoint.on_damage": "previous", "checkpoint.resume": False},
        "checkpoint.on_damage",
    ),
    (
        {"checkpoint.directory": "a", "checkpoint.asynchronous": True},
        "checkpoint.asynchronous",
    ),
]


@pytest.mark.parametrize("changes, blamed", BAD)
def test_each_bad_config_is_blamed_on_its_field_alone(changes, blamed):
    assert fields_of(validate(changed(CONFIG, changes), 8)) == blamed.split()


GOOD = [  # the last that is not refused
    {"parallel.order": "PP-DP-TP"},
    {"parallel.order": "tp-dp-cp-pp"},
    {"model.hidden_size": 9, "model.kv_channels": 4, "parallel.tp": 4},  # 4 * 9 is what tp cuts
    {"model.num_query_groups": 2},
    {"model.max_position_embeddings": 32},
    {"model.position_embedding": "rope", "model.max_position_embeddings": 8},
    {"model.position_embedding": "rope", "model.rotary_percent": 0.25, "model.rotary_base": 5e5},
    {
        "recompute.granularity": "full",
        "recompute.num_layers": 6,
        "recompute.method": "block",
        "parallel.num_layers_in_last_pipeline_stage": 6,
    },
    {
        "recompute.granularity": "full",
        "recompute.num_layers": 2,
        "parallel.num_layers_in_first_pipeline_stage": 6,
    },
    {"recompute.granularity": "full", "recompute.num_layers": 4, "recompute.method": "block"},
    {"recompute.granularity": "selective"},
    # a fraction of the decay length, which the constant learning rate does not reach
    {
        "schedule.decay": "constant",
        "schedule.decay_iters": 5,
        "schedule.warmup_fraction": 0.4,
        "schedule.init_lr": 1e-5,
    },
    {"schedule.decay": "wsd", "schedule.wsd_decay_style": "linear", "schedule.min_lr": 1e-5},
    RAMP,
    {"data.valid": "b", "data.split": (1.0, 0.0, 1.0)},
    {**SAVED, "checkpoint.on_damage": "previous", "checkpoint.asynchronous": True},
    {
        "precision.dtype": "fp16",
        "precision.initial_loss_scale": 4.0,
        "precision.min_loss_scale": 4.0,
    },
    {"optimizer.name": "sgd", "optimizer.momentum": 0.0},
    {"optimizer.use_distributed_optimizer": True, "optimizer.beta2": 0.999},
    {"train_iters": None, "train_samples": 16},
    {"data": None},
    {"eval_iters": 0, "data.split": (1.0, 0.0, 0.0)},
    {"data.split": (1.0, 0.0, 0.0), "eval_iters": 0},
    {"data.split": (1.0, 0.0, 0.0), "data.valid": "v", "eval_interval": 5},
    {"eval_interval": 5},
    {"model.add_bias_linear": True, "model.add_qkv_bias": True},
    {"model.vocab_size": 1},
    {"model.sliding_window": 1},
    {"model.sliding_window": 4096},
    {"model.parallel_residual": True, "model.softmax_scale": 1.0},
    {
        **ROPE,
        "model.layers_without_rope": tuple(range(1, 8)),
        "model.rope_scaling": RopeScaling(factor=1.0, high_freq_factor=1.5),
    },
    {"parallel.cp": 2, "data.reset_attention_mask": True, "data.reset_position_ids": True},
]


T5 = {
    "model.family": "t5",
    "parallel.tp": 1,
    "parallel.pp": 4,
}  # on 8 processes: dp = 2, split at 2
SPLIT = "parallel.pipeline_model_parallel_split_rank"
BAD_T5 = [
    ({"model.family": "gpt", SPLIT: 2}, SPLIT),
    ({"model.family": "gpt", "model.num_decoder_layers": 4}, "model.num_decoder_layers"),
    ({"model.family": "gpt", "model.decoder_seq_length": 8}, "model.decoder_seq_length"),
    ({"model.family": "gpt", "model.decoder_start_token_id": 1}, "model.decoder_start_token_id"),
    ({"model.family": "gpt", "model.position_embedding": "relative"}, "model.position_embedding"),
    ({"model.relative_attention_num_buckets": 8}, "model.relative_attention_num_buckets"),
    ({"model.relative_attention_max_distance": 8}, "model.relative_attention_max_distance"),
    (
        {"model.position_embedding": "relative", "model.relative_attention_num_buckets": 3},
        "model.relative_attention_num_buckets",
    ),
    (
        {"model.position_embedding": "relative", "model.relative_attention_max_distance": 16},
        "model.relative_attention_max_distance",
    ),
    ({SPLIT: 0}, SPLIT),
    ({SPLIT: 4}, SPLIT),
    ({"parallel.pp": 1, SPLIT: 1}, SPLIT),
    ({SPLIT: 3}, "model.num_layers"),
    ({SPLIT: 1}, "model.num_layers"),  # the decoder has as many
    ({SPLIT: 1, "model.num_decoder_layers": 8}, "model.num_decoder_layers"),
    ({SPLIT: 3, "model.num_layers": 8}, "model.num_layers"),
    ({"parallel.vpp": 2}, "parallel.vpp"),
    ({"parallel.cp": 2, "parallel.pp": 2}, "parallel.cp"),
    (
        {"parallel.num_layers_in_first_pipeline_stage": 2},
        "parallel.num_layers_in_first_pipeline_stage",
    ),
    (
        {"parallel.num_layers_in_last_pipeline_stage": 2},
        "parallel.num_layers_in_last_pipeline_stage",
    ),
    ({"model.num_query_groups": 4}, "model.num_query_groups"),
    ({"model.decoder_start_token_id": 256}, "model.decoder_start_token_id"),
    (
        {"model.max_position_embeddings": 40, "model.decoder_seq_length": 48},
        "model.max_position_embeddings",
    ),
    (
        {
            "parallel.tp": 2,
            "parallel.pp": 2,
            "parallel.sequence_parallel": True,
            "model.decoder_seq_length": 9,
        },
        "model.decoder_seq_length",
    ),
    (
        {"model.num_decoder_layers": 2, "recompute.granularity": "full", "recompute.num_layers": 4},
        "recompute.num_layers",
    ),
]


@pytest.mark.parametrize("changes, blamed", BAD_T5)
def test_each_bad_t5_is_blamed_on_its_field_alone(changes, blamed):
    assert fields_of(validate(changed(CONFIG, T5 | changes), 8)) == blamed.split()


GOOD_T5 = [
    {},
    {"parallel.pp": 1},
    {SPLIT: 1, "model.num_layers": 5, "model.num_decoder_layers": 6},
    {SPLIT: 3, "model.num_layers": 3},
    {"model.decoder_seq_length": 7, "model.max_position_embeddings": 32},
    {"model.num_query_groups": 8},
    {"model.decoder_start_token_id": 255},
    {"model.scale_decoder_outputs": True, "model.output_layer_bias": False},
    {"model.tie_word_embeddings": False, "model.output_layer_bias": False},
    {**ROPE, "model.rope_scaling": RopeScaling(factor=8.0), "model.softmax_scale": 1.0},
    {
        "model.position_embedding": "relative",
        "model.relative_attention_num_buckets": 4,
        "model.relative_attention_max_distance": 3,
    },
    {"recompute.granularity": "full", "recompute.num_layers": 4},
    {"parallel.pp": 2, "parallel.tp": 2, "parallel.sequence_parallel": True},
    {
        "model.num_decoder_layers": 2,
        "recompute.granularity": "full",
        "recompute.num_layers": 4,
        "recompute.method": "block",
    },
]


@pytest.mark.parametrize("changes", GOOD_T5)
def test_a_t5_that_can_run_is_accepted_up_to_the_edge(changes):
    assert validate(changed(CONFIG, T5 | changes), 8) == ()


@pytest.mark.parametrize("changes", GOOD)
def test_what_can_run_is_accepted_up_to_the_edge(changes):
    assert validate(changed(CONFIG, changes), 8) == ()


def test_a_world_size_that_fits_nothing_leaves_the_rest_judged():
    assert fields_of(validate(changed(CONFIG, {"global_batch_size": 2}), 6)) == ["world_size"]
    assert fields_of(validate(changed(CONFIG, {"global_batch_size": 3}), 6)) == [
        "global_batch_size",
        "world_size",
    ]


def test_a_section_of_a_wrong_class_is_one_problem_whatever_it_holds():
    assert fields_of(validate(changed(CONFIG, {"parallel": OptimizerConfig(beta1="x")}), 8)) == [
        "parallel"
    ]


INF, NAN = float("inf"), float("nan")
COUNT, LENGTH = [0, -1], [-1]
FRACTION = ([-0.1, 1, 1.0, NAN], [0, 0.0, 0.999])
# field: (values that are refused, values that are not), whatever else the config holds
OUT_OF_RANGE = {
    **{
        path: (COUNT, [1])
        for path in """
            model.num_layers model.hidden_size model.num_attention_heads model.seq_length
            model.vocab_size model.num_query_groups model.kv_channels model.ffn_hidden_size
            model.max_position_embeddings model.num_decoder_layers model.decoder_seq_length
            parallel.tp parallel.pp parallel.vpp parallel.cp parallel.ep
            parallel.num_layers_in_first_pipeline_stage parallel.num_layers_in_last_pipeline_stage
            model.sliding_window
            recompute.num_layers precision.loss_scale_window precision.hysteresis log.interval
            micro_batch_size global_batch_size train_iters train_samples eval_interval
        """.split()
    },
    **{
        path: (LENGTH, [0])
        for path in """schedule.decay_iters schedule.decay_samples schedule.warmup_iters
            schedule.warmup_samples schedule.wsd_decay_iters schedule.wsd_decay_samples
            data.prefetch eval_iters""".split()
    },
    **{
        path: ([0, 0.0, -1, INF, NAN], [1, 1e-9])
        for path in """model.rotary_base model.softmax_scale model.norm_epsilon optimizer.eps
       precision.initial_loss_scale precision.min_loss_scale timeout_seconds""".split()
    },
    **{
        path: ([-1e-9, INF, NAN], [0, 0.5])
        for path in """model.init_method_std optimizer.clip_grad schedule.lr schedule.min_lr
            schedule.init_lr schedule.weight_decay schedule.start_weight_decay
            schedule.end_weight_decay""".split()
    },
    **{
        path: FRACTION
        for path in """model.hidden_dropout model.attention_dropout optimizer.beta1
            optimizer.beta2 optimizer.momentum schedule.warmup_fraction""".split()
    },
    "model.rotary_percent": ([0, -1, 1.1, NAN], [1, 1.0, 0.5]),
    "seed": ([-1, 2**32], [0, 2**32 - 1]),
    "data.train": (
        ["", (), ("a", ""), ((0.0, "a"),), ((1.0, ""),), ((INF, "a"),), ((NAN, "a"),)],
        ["a", ("a",), ((1, "a"), (0.1, "b"))],
    ),
    "data.valid": ([()], ["a", None]),
    "data.test": ([()], ["a", None]),
    "data.split": (
        [(1.0, 1.0), (), (1.0,) * 4, (0, 1, 1), (1, -1, 1), (1, INF, 1), (1, 1, NAN)],
        [(1, 0, 0), (0.9, 0.1, 0.0)],
    ),
    "data.tokenizer": ([""], ["bytes"]),
    "checkpoint.resume": (["maybe", ""], [True]),
    "data.cache": ([""], ["a", None]),
    "log.tensorboard_dir": ([""], ["a", None]),
    "log.jsonl": ([""], ["a", None]),
}


@pytest.mark.parametrize("path", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_and_the_last_one_within_is_not(path):
    def remedies(value):
        return [
            problem.remedy
            for problem in validate(changed(CONFIG, {path: value}), 8)
            if problem.field == path
        ]

    refused, fine = OUT_OF_RANGE[path]
    said = {remedy for value in refused for remedy in remedies(value)}
    assert all(len(remedies(value)) == 1 for value in refused) and len(said) == 1, said
    assert not any(said & set(remedies(value)) for value in fine)


@pytest.mark.parametrize(
    "path", ["data.cache", "log.tensorboard_dir", "log.jsonl", "checkpoint.directory"]
)
def test_a_path_that_only_a_shell_expands_is_refused(path):
    def remedies(value):
        return [problem.remedy for problem in validate(changed(CONFIG, {path: value}), 8)]

    for value in ("~/a", "~", "~user/a", "$HOME/a", "a/${JOB}/b"):
        (remedy,) = remedies(value)
        assert remedy.startswith("must not begin with ~ or hold a $VARIABLE")
    for value in ("a", "a~", "./~a", "a$", "5$ a"):
        assert remedies(value) == []


@pytest.mark.parametrize("world_size", [0, -8, 6, 2])
def test_a_world_size_that_the_layout_does_not_divide_is_refused(world_size):
    assert fields_of(validate(CONFIG, world_size)) == ["world_size"]


def test_a_choice_that_is_none_is_answered_with_the_nearest():
    told = {
        path: validate(changed(CONFIG, {path: value}), 8)[0].remedy
        for path, value in {
            "model.family": "GTP",
            "model.activation": "swigloo",
            "schedule.decay": "inverse_square_root",
            "precision.dtype": "bfloat16",
        }.items()
    }
    assert (
        told["model.family"]
        == 'choose one of gpt, bert, t5, or give a megafn.Family; did you mean "gpt"?'
    )
    assert (
        told["model.activation"]
        == 'choose one of gelu, gelu_tanh, relu, swiglu, geglu, geglu_tanh; did you mean "swiglu"?'
    )
    assert told["schedule.decay"].endswith('; did you mean "inverse-square-root"?')
    assert told["precision.dtype"].endswith('; did you mean "bf16"?')


def test_the_number_that_is_asked_for_is_accepted():
    for changes, path, number in [
        ({"parallel.vpp": 2, "global_batch_size": 12}, "global_batch_size", 8),
        ({"micro_batch_size": 3}, "global_batch_size", 6),
        (
            {"parallel.cp": 2, "parallel.sequence_parallel": True, "model.seq_length": 30},
            "model.seq_length",
            4,
        ),
    ]:
        config = changed(CONFIG, changes)
        unit = "micro_batch_size * dp * pp = " if "parallel.vpp" in changes else ""
        (problem,) = validate(config, 16 if "parallel.cp" in changes else 8)
        assert f"choose a multiple of {unit}{number}" in problem.remedy
        for k in (1, 3):
            assert (
                validate(changed(config, {path: number * k}), 16 if "parallel.cp" in changes else 8)
                == ()
            )


def test_everything_is_told_at_once():
    assert validate(attrs.evolve(CONFIG, parallel=ParallelConfig(tp=2, pp=4)), 16) == ()
    config = changed(
        CONFIG,
        {
            "parallel.tp": 3,
            "parallel.pp": 5,
            "seed": -1,
            "model.activation": "x",
            "schedule.lr": "1",
            "micro_batch_size": 7,
        },
    )
    assert fields_of(validate(config, 16)) == [
        "global_batch_size",
        "model.activation",
        "model.ffn_hidden_size",
        "model.num_attention_heads",
        "model.num_layers",
        "schedule.lr",
        "seed",
        "world_size",
    ]
    with pytest.raises(ConfigError) as raised:
        check(config, 16)
    assert str(raised.value).splitlines()[1:] == [
        f"  {problem}" for problem in validate(config, 16)
    ]


def test_check_is_silent_or_raises_one_sentence():
    assert check(CONFIG, 8) is None
    with pytest.raises(
        ConfigError, match=r"^world_size = 6: tp \* pp \* cp = 4 must divide it; [^\n]*$"
    ):
        check(CONFIG, 6)


def test_fp16_is_refused_only_where_there_is_known_to_be_no_cuda():
    config = changed(CONFIG, {"precision.dtype": "fp16"})
    assert [fields_of(validate(config, 8, cuda=cuda)) for cuda in (None, True, False)] == [
        [],
        [],
        ["precision.dtype"],
    ]
    assert validate(CONFIG, 8, cuda=False) == ()


# It agrees with those who run the config


@st.composite
def runs(draw):
    """A config and a world size that fit by construction."""

    def at(*choices):
        return draw(st.sampled_from(choices))

    tp, pp, cp, dp = at(1, 2, 3), at(1, 2, 3, 4), at(1, 2), at(1, 2)
    vpp = at(1, 2, 3) if pp > 1 else 1
    stage, first, last = vpp * at(1, 2), at(None, vpp, 2 * vpp), at(None, vpp, 3 * vpp)
    if pp == 1 or pp == 2 and vpp > 1:
        first, last = at((None, None), (first, None), (None, last)) if pp == 2 else (None, None)
    groups = tp * at(1, 2)
    heads, sequence_parallel = groups * at(1, 3), tp > 1 and at(True, False)
    stages = [first or stage, *[stage] * (pp - 2), last or stage] if pp > 1 else [stage]
    micro = at(1, 2)
    schedule = at(
        ScheduleConfig(),
        ScheduleConfig(decay="wsd", warmup_iters=2, wsd_decay_iters=3),
        ScheduleConfig(decay="linear", warmup_fraction=0.5),
        ScheduleConfig(
            weight_decay_incr_style="cosine",
            start_weight_decay=0.0,
            end_weight_decay=0.1,
            decay_samples=50,
        ),
    )
    return TrainConfig(
        model=ModelConfig(
            num_layers=sum(stages),
            hidden_size=heads * 2,
            num_attention_heads=heads,
            num_query_groups=at(None, groups),
            seq_length=2 * tp * cp * at(1, 2),
            ffn_hidden_size=tp * at(1, 8),
            kv_channels=at(None, 4),
            vocab_size=at(2, 7),
            position_embedding=at("learned_absolute", "rope", "none"),
            activation=at("gelu", "swiglu", "relu"),
            normalization=at("LayerNorm", "RMSNorm"),
            add_qkv_bias=at(True, False),
            hidden_dropout=at(0.0, 0.1),
        ),
        parallel=ParallelConfig(
            tp=tp,
            pp=pp,
            vpp=vpp,
            cp=cp,
            sequence_parallel=sequence_parallel,
            order="-".join(draw(st.permutations(AXES))),
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        ),
        optimizer=at(
            OptimizerConfig(use_distributed_optimizer=True),
            OptimizerConfig(name="sgd", momentum=0.0),
        ),
        precision=PrecisionConfig(dtype=at("fp32", "bf16")),
        schedule=schedule,
        train_iters=20,
        recompute=at(
            RecomputeConfig(),
            RecomputeConfig(granularity="selective"),
            RecomputeConfig(granularity="full", method="block", num_layers=max(stages) // vpp),
        ),
        micro_batch_size=micro,
        global_batch_size=micro * dp * at(1, 2) * (pp if vpp > 1 else 1),
    ), tp * pp * cp * dp


def chunks_of(mcore, pp, vpp):
    """(first layer, number of layers) of each model chunk in the order in which a token passes
    them."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    chunks = [dict(vp_stage=chunk, pp_rank=stage) for chunk in range(vpp) for stage in range(pp)]
    return [
        (get_transformer_layer_offset(mcore, **chunk), get_num_layers_to_build(mcore, **chunk))
        for chunk in chunks
    ]


@given(runs())
def test_what_fits_by_construction_is_accepted_and_everyone_takes_it(run):
    from torch import device

    from megafn.runtime.model.layers import transformer_config

    config, world_size = run
    assert validate(config, world_size) == ()
    assert build_groups(config.parallel, world_size).world_size == world_size
    assert make_schedule(config)(0).lr >= 0
    mcore = transformer_config(config, SimpleNamespace(device=device("cpu")))
    assert (
        sum(count for _, count in chunks_of(mcore, config.parallel.pp, config.parallel.vpp))
        == config.model.num_layers
    )


def megatron_config(model, parallel):
    import torch
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        pipeline_dtype=torch.float32,
        sequence_parallel=parallel.sequence_parallel,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
    )


@given(
    layers=st.integers(1, 16),
    pp=st.integers(1, 5),
    vpp=st.integers(1, 3),
    first=st.none() | st.integers(0, 8),
    last=st.none() | st.integers(0, 8),
)
@example(layers=4, pp=2, vpp=2, first=2, last=2)  # megatron-core divides by zero
@example(
    layers=4, pp=1, vpp=1, first=1, last=1
)  # it builds one layer of the four, and says nothing
@example(layers=4, pp=1, vpp=1, first=4, last=None)
@example(layers=4, pp=1, vpp=1, first=4, last=4)
@example(layers=6, pp=3, vpp=2, first=4, last=4)  # less than nothing is left for the middle
@example(layers=12, pp=3, vpp=2, first=2, last=4)
def test_stages_are_accepted_exactly_when_megatron_core_cuts_the_layers_as_asked(
    layers, pp, vpp, first, last
):
    assume(pp > 1 or vpp == 1)  # megatron-core asks for that where it makes its groups
    parallel = ParallelConfig(
        pp=pp,
        vpp=vpp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    config = attrs.evolve(
        CONFIG,
        model=attrs.evolve(MODEL, num_layers=layers),
        parallel=parallel,
        global_batch_size=2 * pp,
    )
    try:
        rows = [
            range(start, start + count)
            for start, count in chunks_of(megatron_config(config.model, parallel), pp, vpp)
        ]
        runs = (
            all(rows)
            and [layer for row in rows for layer in row] == list(range(layers))
            and first in (None, sum(map(len, rows[::pp])))
            and last in (None, sum(map(len, rows[pp - 1 :: pp])))
        )
    except (ValueError, AssertionError, ZeroDivisionError):
        runs = False
    assert (validate(config, pp) == ()) == runs


@given(
    tp=st.integers(1, 6),
    heads=st.integers(1, 12),
    groups=st.none() | st.integers(1, 12),
    sequence_parallel=st.booleans(),
)
def test_what_megatron_cores_config_refuses_of_heads_is_refused(
    tp, heads, groups, sequence_parallel
):
    parallel = ParallelConfig(tp=tp, sequence_parallel=sequence_parallel)
    model = attrs.evolve(
        MODEL,
        hidden_size=heads * 2,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=tp,
        seq_length=60,
    )
    accepted = validate(attrs.evolve(CONFIG, model=model, parallel=parallel), tp) == ()
    try:
        megatron_config(model, parallel)
        # its attention needs whole heads of a group, and a whole group on each rank: the way round
        # asks parallel_state for the rank
        assert accepted == (heads % (groups or heads) == 0 and (groups or heads) % tp == 0)
    except ValueError:
        assert not accepted


@given(
    order=st.permutations(AXES).map("-".join)
    | st.lists(st.sampled_from([*AXES, "TP", "x"]), max_size=6).map("-".join),
    sizes=st.fixed_dictionaries({axis: st.integers(0, 2) for axis in ("tp", "pp", "cp", "ep")}),
    world_size=st.integers(-1, 8),
)
def test_a_layout_is_refused_exactly_when_groups_cannot_be_built(order, sizes, world_size):
    config = attrs.evolve(CONFIG, parallel=ParallelConfig(order=order, **sizes))
    refused = {"world_size", "parallel.order", *(f"parallel.{axis}" for axis in sizes)} & set(
        fields_of(validate(config, world_size))
    )
    try:
        build_groups(config.parallel, world_size)
        assert not refused
    except ValueError:
        assert refused


@given(head=st.integers(1, 24), percent=st.floats(0.01, 1.0))
def test_rotary_is_accepted_exactly_when_megatron_core_turns_the_channels_asked_for(head, percent):
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    model = attrs.evolve(MODEL, position_embedding="rope", kv_channels=head, rotary_percent=percent)
    width = 2 * RotaryEmbedding(head, percent, use_cpu_initialization=True).inv_freq.numel()
    turns = width == int(head * percent) and width and head % 2 == 0
    assert (validate(attrs.evolve(CONFIG, model=model), 8) == ()) == bool(turns)


def test_megatron_core_still_shards_adam_alone():
    import torch
    from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megafn.runtime.parallel.cpu import megatron_on_cpu

    with megatron_on_cpu(), pytest.raises(AssertionError, match="Only Adam"):
        DistributedOptimizer(
            torch.optim.SGD([torch.zeros(1)]),
            McoreOptimizerConfig(optimizer="sgd"),
            None,
            None,
            [SimpleNamespace(ddp_config=None)],
            {},
            None,
            None,
            0,
            0,
        )

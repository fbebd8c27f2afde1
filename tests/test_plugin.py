"""from_plugin: each of accelerate's 40 fields has an effect or is refused by name; from_env."""

import dataclasses
import inspect
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import megafn
from megafn.pure.accelerate.from_models import model_fields
from megafn.pure.accelerate.later_fields import LATER_FIELDS
from megafn.pure.accelerate.plugin import from_plugin
from megafn.pure.accelerate.plugin_fields import PluginFields, from_env
from megafn.pure.accelerate.sources import inherited_step_problem
from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import DataConfig, ModelConfig, RopeScaling, TrainConfig
from megafn.pure.config.serialization import to_dict
from megafn.pure.schedule import make_schedule
from megafn.runtime.families.built_in import step_fn

# The seed page's signature of accelerate.utils.MegatronLMPlugin, in its order.
NAMES = """
tp_degree pp_degree num_micro_batches gradient_clipping sequence_parallelism recompute_activations
use_distributed_optimizer pipeline_model_parallel_split_rank num_layers_per_virtual_pipeline_stage
is_train_batch_min train_iters train_samples
weight_decay_incr_style start_weight_decay end_weight_decay
lr_decay_style lr_decay_iters lr_decay_samples lr_warmup_iters lr_warmup_samples lr_warmup_fraction
min_lr consumed_samples no_wd_decay_cond scale_lr_cond lr_mult
megatron_dataset_flag seq_length encoder_seq_length decoder_seq_length
tensorboard_dir set_all_logging_options eval_iters eval_interval return_logits
custom_train_step_class custom_train_step_kwargs
custom_model_provider_function custom_prepare_model_function
other_megatron_args
""".split()

GPT2 = SimpleNamespace(
    model_type="gpt2", n_layer=8, n_embd=64, n_head=4, n_positions=64, vocab_size=256
)
RUN = dict(model=GPT2, world_size=8, train_iters=100, micro_batch_size=2, lr=1e-2)
DOCUMENT = Path(__file__).parent.parent / "docs" / "accelerate.md"


def made(**changes):
    arguments = {key: value for key, value in (RUN | changes).items() if value is not ...}
    return from_plugin(**arguments)


def condition(name, parameter):
    return True


class AStep:
    def __init__(self, config, scale=1.0):
        self.config, self.scale = config, scale

    def get_batch_func(self, megatron_dataset_flag): ...
    def get_forward_step_func(self): ...
    def get_loss_func(self): ...


STEP = step_fn("gpt")
BASE = TrainConfig(
    model=ModelConfig(num_layers=1, hidden_size=1, num_attention_heads=1, seq_length=1),
    micro_batch_size=1,
    global_batch_size=1,
)


def lr_at(config, iteration):
    return make_schedule(config)(iteration * config.global_batch_size).lr


def wd_at(config, iteration):
    return make_schedule(config)(iteration * config.global_batch_size).weight_decay


# One of each: arguments, what is looked at, what it is with them, and what it is without them.
EFFECTS = {
    "tp_degree": (
        dict(tp_degree=2),
        lambda c: (c.parallel.tp, c.global_batch_size),
        (2, 8),
        (1, 16),
    ),
    "pp_degree": (
        dict(pp_degree=4),
        lambda c: (c.parallel.pp, c.global_batch_size),
        (4, 4),
        (1, 16),
    ),
    "num_micro_batches": (dict(num_micro_batches=3), lambda c: c.global_batch_size, 48, 16),
    "gradient_clipping": (dict(gradient_clipping=0.0), lambda c: c.optimizer.clip_grad, 0.0, 1.0),
    "sequence_parallelism": (
        dict(sequence_parallelism=True, tp_degree=2),
        lambda c: c.parallel.sequence_parallel,
        True,
        False,
    ),
    "recompute_activations": (
        dict(recompute_activations=True),
        lambda c: c.recompute.granularity,
        "selective",
        None,
    ),
    "use_distributed_optimizer": (
        dict(use_distributed_optimizer=True),
        lambda c: c.optimizer.use_distributed_optimizer,
        True,
        False,
    ),
    "num_layers_per_virtual_pipeline_stage": (
        dict(num_layers_per_virtual_pipeline_stage=1, pp_degree=4, num_micro_batches=4),
        lambda c: c.parallel.vpp,
        2,
        1,
    ),
    "is_train_batch_min": (
        dict(
            is_train_batch_min=False,
            micro_batch_size=...,
            dataloaders=[SimpleNamespace(batch_size=4), SimpleNamespace(batch_size=8)],
        ),
        lambda c: (c.micro_batch_size, c.global_batch_size),
        (8, 64),
        (2, 16),
    ),
    "train_iters": (dict(train_iters=7), lambda c: c.iterations, 7, 100),
    "train_samples": (
        dict(train_samples=64, train_iters=...),
        lambda c: (c.iterations, lr_at(c, 4)),
        (4, 0.0),
        (100, 0.0096),
    ),
    "weight_decay_incr_style": (
        dict(weight_decay_incr_style="cosine", start_weight_decay=0.0, end_weight_decay=0.1),
        lambda c: round(wd_at(c, 25), 6),
        0.014645,
        0.01,
    ),
    "start_weight_decay": (
        dict(weight_decay_incr_style="linear", start_weight_decay=0.05, end_weight_decay=0.1),
        lambda c: wd_at(c, 0),
        0.05,
        0.01,
    ),
    "end_weight_decay": (
        dict(weight_decay_incr_style="linear", start_weight_decay=0.0, end_weight_decay=0.2),
        lambda c: wd_at(c, 100),
        0.2,
        0.01,
    ),
    "lr_decay_style": (dict(lr_decay_style="constant"), lambda c: lr_at(c, 100), 0.01, 0.0),
    "lr_decay_iters": (dict(lr_decay_iters=10), lambda c: lr_at(c, 5), 0.005, 0.0095),
    "lr_decay_samples": (dict(lr_decay_samples=160), lambda c: lr_at(c, 5), 0.005, 0.0095),
    "lr_warmup_iters": (dict(lr_warmup_iters=10), lambda c: lr_at(c, 5), 0.005, 0.0095),
    "lr_warmup_samples": (dict(lr_warmup_samples=160), lambda c: lr_at(c, 5), 0.005, 0.0095),
    "lr_warmup_fraction": (dict(lr_warmup_fraction=0.1), lambda c: lr_at(c, 5), 0.005, 0.0095),
    "min_lr": (dict(min_lr=1e-3), lambda c: lr_at(c, 100), 1e-3, 0.0),
    "consumed_samples": (
        dict(consumed_samples=[32, 8, 1]),
        lambda c: c.consumed_samples,
        (32, 8, 1),
        (0, 0, 0),
    ),
    "no_wd_decay_cond": (
        dict(no_wd_decay_cond=condition),
        lambda c: c.optimizer.no_weight_decay_cond,
        condition,
        None,
    ),
    "scale_lr_cond": (
        dict(scale_lr_cond=condition, lr_mult=0.5),
        lambda c: c.optimizer.lr_scale_cond,
        condition,
        None,
    ),
    "lr_mult": (
        dict(scale_lr_cond=condition, lr_mult=0.5),
        lambda c: c.optimizer.lr_mult,
        0.5,
        1.0,
    ),
    "megatron_dataset_flag": (
        dict(
            megatron_dataset_flag=True,
            micro_batch_size=...,
            dataloaders=SimpleNamespace(
                dataset_args={
                    "data_path": ["1", "a", "3", "b"],
                    "splits_string": "8,1,1",
                    "micro_batch_size": 2,
                }
            ),
        ),
        lambda c: c.data and (c.data.train, c.data.split),
        (((1.0, "a"), (3.0, "b")), (8.0, 1.0, 1.0)),
        None,
    ),
    "seq_length": (dict(seq_length=32), lambda c: c.model.seq_length, 32, 64),
    "decoder_seq_length": (dict(decoder_seq_length=16), lambda c: c.model.seq_length, 16, 64),
    "tensorboard_dir": (
        dict(tensorboard_dir="logs"),
        lambda c: c.log.tensorboard_dir,
        "logs",
        None,
    ),
    "set_all_logging_options": (
        dict(set_all_logging_options=True),
        lambda c: c.log.everything,
        True,
        False,
    ),
    "eval_iters": (dict(eval_iters=5), lambda c: c.eval_iters, 5, 100),
    "eval_interval": (dict(eval_interval=5), lambda c: c.eval_interval, 5, 1000),
    "return_logits": (dict(return_logits=True), lambda c: c.return_logits, "last_stage", None),
    "custom_train_step_class": (
        dict(custom_train_step_class=AStep),
        lambda c: c.step_function and type(c.step_function(c)),
        AStep,
        None,
    ),
    "custom_train_step_kwargs": (
        dict(custom_train_step_class=AStep, custom_train_step_kwargs={"scale": 3.0}),
        lambda c: c.step_function and c.step_function(c).scale,
        3.0,
        None,
    ),
    "custom_model_provider_function": (
        dict(custom_model_provider_function=condition),
        lambda c: c.model_function,
        condition,
        None,
    ),
    "custom_prepare_model_function": (
        dict(custom_prepare_model_function=condition),
        lambda c: c.prepare_model,
        condition,
        None,
    ),
    "other_megatron_args": (
        dict(other_megatron_args={"rotary_base": 5e4, "position_embedding_type": "rope"}),
        lambda c: c.model.rotary_base,
        5e4,
        1e4,
    ),
}


def test_the_names_and_defaults_are_accelerates():
    assert len(NAMES) == 40 and [a.name for a in attrs.fields(PluginFields)] == NAMES
    changed = {
        a.name: a.default for a in attrs.fields(PluginFields) if a.default not in (None, 0, 1)
    }
    assert changed == {
        "weight_decay_incr_style": "constant",
        "lr_decay_style": "linear",
        "eval_iters": 100,
        "eval_interval": 1000,
    }


def test_every_name_has_its_case():
    refused_for_gpt = {"pipeline_model_parallel_split_rank", "encoder_seq_length"}
    assert EFFECTS.keys() | refused_for_gpt == set(NAMES)


@pytest.mark.parametrize("name", EFFECTS)
def test_each_name_changes_what_it_is_for(name):
    arguments, look, with_it, without = EFFECTS[name]
    assert name in arguments or name == "megatron_dataset_flag"
    assert (
        look(made(**arguments)) == pytest.approx(with_it)
        if isinstance(with_it, float)
        else look(made(**arguments)) == with_it
    )
    assert look(made()) == without or look(made()) == pytest.approx(without)


@pytest.mark.parametrize("name", NAMES)
def test_none_is_the_default_of_each_name(name):
    arguments = {name: None} | ({"train_samples": 1600} if name == "train_iters" else {})
    assert made(**arguments).iterations == 100


def test_a_gpt_has_no_encoder_and_no_split():
    with pytest.raises(
        ConfigError, match="^encoder_seq_length = 8: gpt has no encoder; use seq_length"
    ):
        made(encoder_seq_length=8)
    with pytest.raises(
        ConfigError,
        match="^pipeline_model_parallel_split_rank = 1: "
        "it is the stage at which T5's decoder begins",
    ):
        made(pipeline_model_parallel_split_rank=1, pp_degree=2)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (dict(tp_degre=2), 'tp_degre = 2: there is no such field; did you mean "tp_degree"?'),
        (dict(tp_degree="2"), "tp_degree = '2': give an integer"),
        (dict(tp_degree=0), "tp_degree = 0: must be at least 1"),
        (dict(sequence_parallelism=1, tp_degree=2), "sequence_parallelism = 1: give true or false"),
        (dict(is_train_batch_min="True"), "is_train_batch_min = 'True': give true or false"),
        (
            dict(tp_degree=3),
            "world_size = 8: tp_degree * pp_degree (* context_parallel_size) = 3 must divide it",
        ),
        (dict(tp_degree=8), "model.num_attention_heads = 4: tp = 8 must divide it"),
        (
            dict(sequence_parallelism=True),
            "sequence_parallelism = True: has no effect with tp = 1",
        ),
        (
            dict(train_samples=320),
            "train_samples = 320: train_iters = 100 is the length of the run already",
        ),
        (
            dict(train_iters=...),
            "train_iters = None: give train_iters, train_samples, or a scheduler",
        ),
        (dict(micro_batch_size=...), "micro_batch_size = None: give it, or dataloaders"),
        (
            dict(dataloaders=SimpleNamespace(batch_size=4)),
            "dataloaders = 4: contradicts micro_batch_size = 2; give one of the two",
        ),
        (
            dict(dataloaders=SimpleNamespace(batch_size=None), micro_batch_size=...),
            "dataloaders: SimpleNamespace has no batch_size",
        ),
        (
            dict(dataloaders=SimpleNamespace(batch_size=2), data=DataConfig(train="a")),
            "data = DataConfig(",
        ),
        (
            dict(is_train_batch_min=False),
            "is_train_batch_min = False: it chooses among the batch sizes of dataloaders",
        ),
        (
            dict(lr_warmup_iters=3, lr_warmup_fraction=0.1),
            "lr_warmup_fraction = 0.1: give only one of warmup_iters and warmup_fraction",
        ),
        (dict(lr_decay_iters=3, lr_decay_samples=90), "lr_decay_samples = 90: give only one of"),
        (
            dict(lr_decay_style="exponential"),
            "lr_decay_style = 'exponential': choose one of constant",
        ),
        (
            dict(start_weight_decay=0.1),
            "start_weight_decay = 0.1: leave it out, or set weight_decay_incr_style",
        ),
        (
            dict(weight_decay_incr_style="linear"),
            "weight_decay_incr_style = 'linear': give start_weight_decay and end_weight_decay",
        ),
        (dict(min_lr=0.1), "min_lr = 0.1: choose 0 to lr"),
        (dict(consumed_samples=[1, 2]), "consumed_samples = [1, 2]: give three integers"),
        (
            dict(consumed_samples=[8, 0, 0]),
            "consumed_samples = (8, 0, 0): a run continues after a whole global batch",
        ),
        (
            dict(consumed_samples=[1616, 0, 0]),
            "consumed_samples = (1616, 0, 0): the run ends after 1600 samples",
        ),
        (dict(lr_mult=2.0), "lr_mult = 2.0: nothing says which parameters it is for"),
        (dict(scale_lr_cond=condition), "scale_lr_cond = <function condition"),
        (dict(no_wd_decay_cond="bias"), "no_wd_decay_cond = 'bias': give a function"),
        (
            dict(megatron_dataset_flag=True),
            "megatron_dataset_flag = True: there are no indexed data; give data = DataConfig",
        ),
        (
            dict(megatron_dataset_flag=False, data=DataConfig(train="a")),
            "megatron_dataset_flag = False: batches would come from loaders of Hugging Face",
        ),
        (
            dict(seq_length=32, decoder_seq_length=16),
            "decoder_seq_length = 16: contradicts seq_length = 32",
        ),
        (
            dict(seq_length=65),
            "model.max_position_embeddings = 64: must be at least seq_length = 65",
        ),
        (
            dict(num_layers_per_virtual_pipeline_stage=2),
            "num_layers_per_virtual_pipeline_stage = 2: interleaving needs pp_degree",
        ),
        (
            dict(num_layers_per_virtual_pipeline_stage=3, pp_degree=2),
            "num_layers_per_virtual_pipeline_stage = 3: pp_degree * 3 = 6 must divide",
        ),
        (
            dict(num_layers_per_virtual_pipeline_stage=1, pp_degree=4),
            "num_micro_batches = 4: these are 1 micro-batches and interleaving",
        ),
        (
            dict(custom_train_step_kwargs={"a": 1}),
            "custom_train_step_kwargs = {'a': 1}: there is no custom_train_step_class",
        ),
        (
            dict(custom_train_step_class=STEP, custom_train_step_kwargs={"a": 1}),
            "custom_train_step_kwargs = {'a': 1}: a Step takes none",
        ),
        (dict(custom_train_step_class=3), "custom_train_step_class = 3: give a class"),
        (
            dict(custom_train_step_kwargs=3, custom_train_step_class=AStep),
            "custom_train_step_kwargs = 3: give a dict",
        ),
        (dict(mixed_precision="fp8"), "mixed_precision = 'fp8': choose one of no, bf16, fp16"),
        (
            dict(other_megatron_args={"rotary_bas": 1.0}),
            "other_megatron_args['rotary_bas'] = 1.0: there is no such argument; "
            'did you mean "rotary_base"?',
        ),
        (
            dict(other_megatron_args={"kv_channels": "3"}),
            "other_megatron_args['kv_channels'] = '3': give an integer",
        ),
        (
            dict(other_megatron_args={"clip_grad": 1.0}),
            "other_megatron_args['clip_grad'] = 1.0: it is the plugin's gradient_clipping",
        ),
        (
            dict(other_megatron_args={"min_lr": 1.0}),
            "other_megatron_args['min_lr'] = 1.0: it is a field of the plugin",
        ),
        (
            dict(other_megatron_args={"eod_mask_loss": True}),
            "other_megatron_args['eod_mask_loss'] = True: it is about indexed data",
        ),
        (
            dict(other_megatron_args={"recompute_granularity": "full"}, recompute_activations=True),
            "other_megatron_args['recompute_granularity'] = 'full': "
            "contradicts recompute_activations = 'selective'",
        ),
        (dict(eval_interval=0), "eval_interval = 0: must be at least 1"),
        (dict(tensorboard_dir=""), "tensorboard_dir = '': must not be empty"),
    ],
)
def test_what_is_wrong_is_told_by_the_plugins_own_name(arguments, told):
    with pytest.raises(ConfigError, match="^" + re.escape(told)):
        made(**arguments)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as raised:
        made(
            train_samples=3,
            is_train_batch_min=False,
            custom_train_step_kwargs={},
            model=SimpleNamespace(model_type="gpt3"),
        )
    assert str(raised.value).startswith("4 problems:") and 'did you mean "gpt2"?' in str(
        raised.value
    )


def test_consumed_samples_are_taken_and_the_callers_list_is_left_alone():
    mine = [16, 0, 0]
    assert made(consumed_samples=mine).consumed_samples == (16, 0, 0) and mine == [16, 0, 0]


def test_the_world_size_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert made(world_size=None, tp_degree=2).global_batch_size == 4
    monkeypatch.delenv("WORLD_SIZE")
    assert made(world_size=None).global_batch_size == 2
    monkeypatch.setenv("WORLD_SIZE", "four")
    with pytest.raises(ConfigError, match="^WORLD_SIZE = 'four': give an integer"):
        made(world_size=None)


def test_a_config_with_callables_is_no_file_and_says_which():
    for arguments, field in (
        (dict(no_wd_decay_cond=condition), "optimizer.no_weight_decay_cond"),
        (dict(custom_train_step_class=AStep), "step_function"),
        (dict(custom_model_provider_function=condition), "model_function"),
        (dict(custom_prepare_model_function=condition), "prepare_model"),
        (dict(scale_lr_cond=condition, lr_mult=2.0), "optimizer.lr_scale_cond"),
    ):
        with pytest.raises(
            ConfigError, match=f"^{field} = .*a function cannot be written to a file"
        ):
            to_dict(made(**arguments))
    assert to_dict(made())["consumed_samples"] == [0, 0, 0]


def test_a_step_record_is_the_step():
    config = made(custom_train_step_class=STEP)
    assert config.step_function(config) is STEP
    config = made(custom_train_step_class=attrs.evolve(STEP, loss=partial(STEP.loss)))
    assert config.step_function(config).batch is STEP.batch


def test_megatrons_arguments_win_over_the_hugging_face_config():
    config = made(
        other_megatron_args={
            "hidden_dropout": 0.0,
            "untie_embeddings_and_output_weights": True,
            "context_parallel_size": 2,
            "seed": 5,
            "distributed_timeout_minutes": 2,
        }
    )
    assert (config.model.hidden_dropout, config.model.attention_dropout) == (0.0, 0.1)
    assert (
        not config.model.tie_word_embeddings
        and config.parallel.cp == 2
        and config.global_batch_size == 8
    )
    assert (config.seed, config.timeout_seconds) == (5, 120.0)
    config = made(
        other_megatron_args={"split": "8, 1, 1", "dataloader_type": "cyclic"},
        data=DataConfig(train="a"),
    )
    assert config.data == DataConfig(train="a", split=(8.0, 1.0, 1.0), sampler="cyclic")


# ---- Objects of other libraries


def test_hugging_face_configs_give_the_model():
    transformers = pytest.importorskip("transformers")
    gpt = made(
        model=transformers.GPT2Config(
            n_layer=8,
            n_embd=64,
            n_head=4,
            n_inner=100,
            activation_function="relu",
            layer_norm_epsilon=1e-3,
            resid_pdrop=0.2,
            embd_pdrop=0.2,
            attn_pdrop=0.3,
            initializer_range=0.1,
        )
    ).model
    assert gpt == ModelConfig(
        num_layers=8,
        hidden_size=64,
        num_attention_heads=4,
        seq_length=1024,
        vocab_size=50257,
        ffn_hidden_size=100,
        max_position_embeddings=1024,
        activation="relu",
        norm_epsilon=1e-3,
        hidden_dropout=0.2,
        attention_dropout=0.3,
        init_method_std=0.1,
    )
    assert made(model=transformers.GPT2Config(n_layer=8)).model.activation == "gelu_tanh"
    llama = transformers.LlamaConfig(
        num_hidden_layers=8,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        vocab_size=128,
        max_position_embeddings=512,
        rms_norm_eps=1e-4,
    )
    assert made(model=llama, seq_length=32).model == ModelConfig(
        num_layers=8,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=32,
        ffn_hidden_size=96,
        vocab_size=128,
        seq_length=32,
        max_position_embeddings=512,
        position_embedding="rope",
        activation="swiglu",
        normalization="RMSNorm",
        norm_epsilon=1e-4,
        add_bias_linear=False,
        tie_word_embeddings=False,
    )
    scaling = dict(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=256,
    )
    llama.rope_parameters = dict(rope_type="llama3", rope_theta=5e5, **scaling)
    scaled = made(model=llama, seq_length=32).model
    assert scaled.rope_scaling == RopeScaling(**scaling) and scaled.rotary_base == 5e5
    for change, told in (
        ({"rope_type": "yarn"}, "only llama3 is"),
        ({"factor": None}, "factor is"),
    ):
        llama.rope_parameters = dict(rope_type="llama3", **scaling) | change
        with pytest.raises(ConfigError, match=f"^model.rope_scaling = .*: .*{told}"):
            model_fields(llama)
    mistral = transformers.MistralConfig(num_hidden_layers=8, sliding_window=48)
    assert made(model=mistral, seq_length=64).model.sliding_window == 48
    bert = model_fields(
        transformers.MegatronBertConfig(
            num_hidden_layers=3, hidden_size=64, num_attention_heads=4, intermediate_size=80
        )
    )
    assert (
        bert["model.family"],
        bert["model.num_layers"],
        bert["model.ffn_hidden_size"],
        bert["model.norm_epsilon"],
    ) == ("bert", 3, 80, 1e-12)
    t5 = model_fields(
        transformers.T5Config(
            num_layers=3,
            d_model=64,
            num_heads=4,
            d_kv=8,
            feed_forward_proj="gated-gelu",
            num_decoder_layers=2,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=64,
            decoder_start_token_id=5,
        )
    )
    assert (
        t5["model.family"],
        t5["model.hidden_size"],
        t5["model.kv_channels"],
        t5["model.activation"],
    ) == ("t5", 64, 8, "geglu_tanh")
    assert [
        t5[f"model.{name}"]
        for name in (
            "num_layers",
            "num_decoder_layers",
            "position_embedding",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
            "decoder_start_token_id",
        )
    ] == [3, 2, "relative", 16, 64, 5]
    with pytest.raises(
        ConfigError,
        match="^model.feed_forward_proj = 'gated-relu': "
        "choose one of relu, gelu, gelu_new, gated-gelu",
    ):
        model_fields(transformers.T5Config(feed_forward_proj="gated-relu"))
    with pytest.raises(
        ConfigError,
        match="^model = 'T5EncoderModel': this head is not built; give T5ForConditionalGeneration",
    ):
        model_fields(transformers.T5Config(architectures=["T5EncoderModel"]))
    with pytest.raises(ConfigError, match="^model.is_encoder_decoder = False"):
        model_fields(transformers.T5Config(is_encoder_decoder=False))
    with pytest.raises(
        ConfigError, match="^model.model_type = 'bert': its norms come after the residual sum"
    ):
        made(model=transformers.BertConfig())
    with pytest.raises(ConfigError, match="^model.scale_attn_by_inverse_layer_idx = True"):
        made(model=transformers.GPT2Config(scale_attn_by_inverse_layer_idx=True))


def test_a_model_is_read_by_its_config_and_what_head_it_has():
    class MegatronBertForSequenceClassification:
        config = SimpleNamespace(
            model_type="megatron-bert",
            num_hidden_layers=1,
            hidden_size=8,
            num_attention_heads=1,
            intermediate_size=8,
            vocab_size=8,
            max_position_embeddings=8,
            num_labels=1,
            type_vocab_size=2,
        )

    found = model_fields(MegatronBertForSequenceClassification())
    assert (
        found["model.num_labels"] == 1
        and found["model.problem_type"] is None
        and found["model.num_tokentypes"] == 2
    )
    MegatronBertForSequenceClassification.__name__ = "MegatronBertForPreTraining"
    assert model_fields(MegatronBertForSequenceClassification())["model.bert_binary_head"] is True
    MegatronBertForSequenceClassification.__name__ = "MegatronBertForTokenClassification"
    with pytest.raises(
        ConfigError,
        match="^model = 'MegatronBertForTokenClassification': "
        "this head is not built; give MegatronBertForMaskedLM, ",
    ):
        model_fields(MegatronBertForSequenceClassification())
    mine = ModelConfig(num_layers=8, hidden_size=64, num_attention_heads=4, seq_length=16)
    assert made(model=mine).model == mine
    with pytest.raises(ConfigError, match="^model.n_layer = None: a gpt2 config has it"):
        made(model=SimpleNamespace(model_type="gpt2"))


def test_every_name_of_t5_reaches_the_config():
    t5 = SimpleNamespace(
        model_type="t5",
        num_layers=3,
        num_decoder_layers=3,
        d_model=64,
        num_heads=4,
        d_kv=16,
        d_ff=128,
        vocab_size=100,
    )
    config = made(
        model=t5,
        world_size=4,
        pp_degree=4,
        pipeline_model_parallel_split_rank=1,
        encoder_seq_length=40,
        decoder_seq_length=12,
    )
    assert (
        config.parallel.pipeline_model_parallel_split_rank,
        config.model.seq_length,
        config.model.decoder_seq_length,
    ) == (1, 40, 12)
    args = {
        "decoder_num_layers": 6,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 50,
        "decoder_start_token_id": 7,
    }
    model = made(model=t5, other_megatron_args=args).model
    assert (
        model.num_layers,
        model.num_decoder_layers,
        model.relative_attention_num_buckets,
        model.relative_attention_max_distance,
        model.decoder_start_token_id,
    ) == (3, 6, 16, 50, 7)
    assert (
        made(model=t5, other_megatron_args={"num_decoder_layers": 5}).model.num_decoder_layers == 5
    )
    with pytest.raises(
        ConfigError, match="encoder_num_layers.* it belongs to the model; give another model config"
    ):
        made(model=t5, other_megatron_args={"encoder_num_layers": 5})
    with pytest.raises(
        ConfigError,
        match="^pipeline_model_parallel_split_rank = 4: "
        "encoder and decoder have at least one stage each",
    ):
        made(model=t5, world_size=4, pp_degree=4, pipeline_model_parallel_split_rank=4)
    with pytest.raises(
        ConfigError, match="num_decoder_layers.*has no effect with model.family = 'gpt'"
    ):
        made(other_megatron_args={"num_decoder_layers": 5})
    with pytest.raises(ConfigError, match="cross-attention has no grouped queries"):
        made(model=t5, other_megatron_args={"num_query_groups": 2})


def parameters(*decays):
    return [
        {"params": [torch.nn.Parameter(torch.zeros(2))], "weight_decay": decay} for decay in decays
    ]


def test_torch_optimizers_give_the_optimizer():
    config = made(
        optimizer=torch.optim.AdamW(parameters(0.3, 0.0), lr=2e-3, betas=(0.8, 0.9), eps=1e-6),
        lr=...,
    )
    assert (
        config.optimizer.name,
        config.optimizer.beta1,
        config.optimizer.beta2,
        config.optimizer.eps,
    ) == ("adam", 0.8, 0.9, 1e-6)
    assert (config.schedule.lr, config.schedule.weight_decay) == (2e-3, 0.3)
    config = made(optimizer=torch.optim.SGD(parameters(0.1), lr=3e-3, momentum=0.7), lr=...)
    assert (
        config.optimizer.name,
        config.optimizer.momentum,
        config.schedule.lr,
        config.schedule.weight_decay,
    ) == ("sgd", 0.7, 3e-3, 0.1)
    assert made(optimizer=torch.optim.Adam(parameters(0.0)), lr=...).optimizer.name == "adam"
    for optimizer, told in (
        (
            torch.optim.Adam(parameters(0.1)),
            "optimizer.weight_decay = 0.1: torch's Adam adds it to the gradient",
        ),
        (
            torch.optim.RMSprop(parameters(0.0)),
            "optimizer = 'RMSprop': megatron-core has no such optimizer; "
            "give torch.optim.AdamW, Adam or SGD",
        ),
        (torch.optim.AdamW(parameters(0.1, 0.2)), r"optimizer.weight_decay = \(0.1, 0.2\)"),
        (torch.optim.AdamW(parameters(0.1), amsgrad=True), "optimizer.amsgrad = True"),
        (
            torch.optim.SGD(parameters(0.1), lr=1.0, momentum=0.9, nesterov=True),
            "optimizer.nesterov = True",
        ),
        (
            torch.optim.AdamW(
                [{"params": parameters(0)[0]["params"], "lr": lr} for lr in (1.0, 2.0)]
            ),
            "optimizer.lr = .*scale_lr_cond",
        ),
    ):
        with pytest.raises(ConfigError, match=f"^{told}"):
            made(optimizer=optimizer, lr=...)
    with pytest.raises(
        ConfigError, match="^optimizer = 0.002: contradicts lr = 0.01; give one of the two"
    ):
        made(optimizer=torch.optim.AdamW(parameters(0.0), lr=2e-3))


def test_a_scheduler_gives_steps_and_accelerates_dummy_counts_micro_batches_of_all_ranks():
    dummy = SimpleNamespace(
        total_num_steps=320, warmup_num_steps=32
    )  # one epoch of 640 samples in micro-batches of 2
    config = made(
        scheduler=dummy, num_micro_batches=2, train_iters=..., lr_decay_style="linear"
    )  # dp 8: 32 samples a step
    assert (
        config.iterations == 20 and lr_at(config, 2) == 1e-2 and lr_at(config, 20) == 0.0
    )  # upstream: half of the peak
    config = made(scheduler=dummy, train_iters=10)
    assert config.iterations == 10 and config.schedule.decay_samples == 640
    optimizer = torch.optim.AdamW(parameters(0.0), lr=1e-2)
    config = made(
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=1e-3),
        train_iters=...,
    )
    assert (
        config.iterations == 50
        and config.schedule.decay == "cosine"
        and lr_at(config, 50) == pytest.approx(1e-3)
    )
    transformers = pytest.importorskip("transformers")
    config = made(
        scheduler=transformers.get_cosine_schedule_with_warmup(optimizer, 5, 40),
        optimizer=optimizer,
        lr=...,
        train_iters=...,
    )
    assert (config.iterations, config.schedule.decay, lr_at(config, 5), lr_at(config, 40)) == (
        40,
        "cosine",
        1e-2,
        0.0,
    )
    with pytest.raises(
        ConfigError, match="^scheduler = 'cosine': contradicts lr_decay_style = 'linear'"
    ):
        made(
            scheduler=transformers.get_cosine_schedule_with_warmup(optimizer, 5, 40),
            lr_decay_style="linear",
        )
    with pytest.raises(ConfigError, match="^scheduler = 'StepLR': its steps cannot be read"):
        made(scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 3))


def test_a_transformers_schedule_is_the_schedule_that_megafn_follows():
    transformers = pytest.importorskip("transformers")
    for make in (
        transformers.get_linear_schedule_with_warmup,
        transformers.get_cosine_schedule_with_warmup,
    ):
        optimizer = torch.optim.AdamW(parameters(0.0), lr=1e-2)
        theirs = make(optimizer, 5, 40)
        config = made(optimizer=optimizer, scheduler=theirs, lr=..., train_iters=...)
        for iteration in range(41):
            assert lr_at(config, iteration) == pytest.approx(
                optimizer.param_groups[0]["lr"], abs=1e-12
            )
            optimizer.step()
            theirs.step()


def test_the_smallest_batch_of_the_loaders_is_the_micro_batch():
    loaders = [torch.utils.data.DataLoader(list(range(20)), batch_size=size) for size in (6, 4)]
    assert made(dataloaders=loaders, micro_batch_size=...).micro_batch_size == 4
    sampler = torch.utils.data.BatchSampler(range(20), 5, False)
    assert (
        made(
            dataloaders=torch.utils.data.DataLoader(list(range(20)), batch_sampler=sampler),
            micro_batch_size=...,
        ).micro_batch_size
        == 5
    )
    with pytest.raises(ConfigError, match="give loaders of one kind"):
        made(
            dataloaders=[*loaders, SimpleNamespace(dataset_args={"data_path": "a"})],
            micro_batch_size=...,
        )


# ---- Environment


def test_the_seven_variables_are_plugin_arguments():
    found = from_env(
        {
            "MEGATRON_LM_TP_DEGREE": "2",
            "MEGATRON_LM_PP_DEGREE": "2",
            "MEGATRON_LM_NUM_MICRO_BATCHES": "4",
            "MEGATRON_LM_GRADIENT_CLIPPING": "0.5",
            "MEGATRON_LM_SEQUENCE_PARALLELISM": "True",
            "MEGATRON_LM_RECOMPUTE_ACTIVATIONS": "0",
            "MEGATRON_LM_USE_DISTRIBUTED_OPTIMIZER": "yes",
            "PATH": "x",
        }
    )
    assert found == dict(
        tp_degree=2,
        pp_degree=2,
        num_micro_batches=4,
        gradient_clipping=0.5,
        sequence_parallelism=True,
        recompute_activations=False,
        use_distributed_optimizer=True,
    )
    config = made(**found)
    assert (
        config.parallel.tp,
        config.parallel.pp,
        config.global_batch_size,
        config.optimizer.clip_grad,
    ) == (2, 2, 16, 0.5)


def test_the_environment_is_the_processs_own(monkeypatch):
    monkeypatch.setenv("MEGATRON_LM_TP_DEGREE", "8")
    assert from_env()["tp_degree"] == 8


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("SEQUENCE_PARALLELISM", "ture", "give true or false"),
        ("SEQUENCE_PARALLELISM", "", "give true or false"),
        ("TP_DEGREE", "2.0", "give an integer"),
        ("GRADIENT_CLIPPING", "one", "give a number"),
        ("TP_DEGRE", "2", 'there is no such variable; did you mean "MEGATRON_LM_TP_DEGREE"?'),
    ],
)
def test_a_variable_that_cannot_be_read_is_named(name, text, told):
    with pytest.raises(ConfigError, match=re.escape(f"MEGATRON_LM_{name} = {text!r}: {told}")):
        from_env({f"MEGATRON_LM_{name}": text})


# ---- Never a surprise


@given(
    st.dictionaries(
        st.sampled_from(NAMES),
        st.none()
        | st.booleans()
        | st.integers(-3, 9)
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.integers(0, 64), max_size=3)
        | st.just(condition)
        | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    )
)
def test_whatever_the_fields_hold_there_is_a_config_or_a_refusal(fields):
    try:
        assert isinstance(made(**fields), TrainConfig)
    except ConfigError as error:
        assert str(error)


def test_the_page_in_the_docs_has_every_field_and_its_default():
    rows = dict(
        re.findall(
            r"^\| `(\w+)` \| ([^|]*?) \|",
            DOCUMENT.read_text().partition("## The forty fields")[2].partition("\n## ")[0],
            re.MULTILINE,
        )
    )
    assert list(rows) == NAMES
    for attribute in attrs.fields(PluginFields):
        assert rows[attribute.name] == f"`{attribute.default!r}`", attribute.name


def test_the_arguments_beside_the_forty_are_in_the_page_too():
    text = DOCUMENT.read_text()
    for name in inspect.signature(from_plugin).parameters:
        assert name == "fields" or f"`{name}`" in text, name


# ---- accelerate after 0.27


def test_variables_of_later_versions_that_say_false_are_accepted_and_others_refused():
    names = [name for name, later in LATER_FIELDS.items() if later.kind is bool]
    assert len(names) == 11
    environ = {f"MEGATRON_LM_{name.upper()}": "False" for name in names}
    assert from_env(environ) == {}
    for name in ("use_custom_fsdp", "no_load_optim", "no_save_optim", "optimizer_cpu_offload"):
        variable = f"MEGATRON_LM_{name.upper()}"
        with pytest.raises(ConfigError, match=f"^{variable} = True: .*; "):
            from_env({variable: "True"})
    assert from_env({"MEGATRON_LM_NOT_YET_INVENTED": "False"}) == {}
    with pytest.raises(ConfigError, match="^MEGATRON_LM_NOT_YET_INVENTED = 'True': there is no"):
        from_env({"MEGATRON_LM_NOT_YET_INVENTED": "True"})
    found = from_env({"MEGATRON_LM_CONTEXT_PARALLEL_SIZE": "2"})
    assert made(**found).parallel.cp == 2


def test_the_mixed_precision_comes_from_the_environment():
    config = made(**from_env({"ACCELERATE_MIXED_PRECISION": "bf16"}))
    assert config.precision.dtype == "bf16"
    with pytest.raises(ConfigError, match="^ACCELERATE_MIXED_PRECISION = 'fp8': choose one of no"):
        from_env({"ACCELERATE_MIXED_PRECISION": "fp8"})


def accelerates_plugin(**fields):
    return pytest.importorskip("accelerate.utils").MegatronLMPlugin(**fields)


def test_a_plugin_object_gives_the_config_of_its_fields():
    fields = dict(tp_degree=2, num_micro_batches=3, lr_warmup_iters=5, consumed_samples=[24, 0, 0])
    plugin = accelerates_plugin(**fields, context_parallel_size=1, other_megatron_args={"seed": 7})
    assert made(plugin=plugin) == made(**fields, other_megatron_args={"seed": 7})
    with pytest.raises(
        ConfigError, match="^tp_degree = 4: contradicts plugin.tp_degree = 2; give one of the two"
    ):
        made(plugin=plugin, tp_degree=4)
    with pytest.raises(ConfigError, match="^plugin = 3: give a MegatronLMPlugin"):
        made(plugin=3)
    plugin.use_custom_fsdp = True
    with pytest.raises(ConfigError, match="^use_custom_fsdp = True: .*use_distributed_optimizer"):
        made(plugin=plugin)


def test_a_plugin_object_without_fields_says_nothing():
    with pytest.warns(UserWarning, match="context_parallel_size = 2 is what accelerate sets"):
        assert made(plugin=accelerates_plugin()) == made()
    plugin = SimpleNamespace(**{a.name: a.default for a in attrs.fields(PluginFields)})
    assert made(plugin=plugin) == made()  # of accelerate 0.27
    recomputed = accelerates_plugin(recompute_method="block", context_parallel_size=1)
    assert made(plugin=recomputed).recompute.granularity == "full"
    plugin.megatron_lm_default_args = {"bf16": True}
    assert made(plugin=plugin).precision.dtype == "bf16"
    assert made(plugin=plugin, mixed_precision="no").precision.dtype == "fp32"


def test_a_later_plugin_has_no_field_that_is_unknown_here():
    for field in dataclasses.fields(accelerates_plugin(context_parallel_size=1)):
        assert field.name in NAMES or field.name in LATER_FIELDS, field.name


def test_no_evaluations_can_be_expressed():
    config = made(eval_iters=0)
    assert (config.eval_iters, config.eval_interval) == (0, None)


def test_the_schedulers_optimizer_gives_the_learning_rate_or_nothing_does():
    optimizer = torch.optim.AdamW(parameters(0.3), lr=2e-3)
    dummy = SimpleNamespace(total_num_steps=320, warmup_num_steps=0, optimizer=optimizer)
    config = made(scheduler=dummy, lr=..., train_iters=...)
    assert (config.schedule.lr, config.schedule.weight_decay) == (2e-3, 0.3)
    dummy.total_num_steps = None  # accelerate takes train_iters then
    assert made(scheduler=dummy, lr=...).iterations == 100
    with pytest.raises(ConfigError, match="^lr = None: give lr, an optimizer, or a scheduler"):
        made(lr=...)


def test_the_constant_schedulers_of_transformers_are_read():
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.AdamW(parameters(0.0), lr=1e-2)
    config = made(scheduler=transformers.get_constant_schedule(optimizer), lr=...)
    assert [lr_at(config, iteration) for iteration in (0, 50, 100)] == [1e-2] * 3
    warmed = transformers.get_constant_schedule_with_warmup(optimizer, 10)
    config = made(scheduler=warmed, optimizer=optimizer, lr=...)
    assert [lr_at(config, iteration) for iteration in (0, 5, 50)] == [0.0, 5e-3, 1e-2]


def test_torch_objects_set_nothing_that_the_schedule_does_not_read():
    dummy = SimpleNamespace(total_num_steps=320, warmup_num_steps=0)
    config = made(scheduler=dummy, lr_decay_style="constant", train_iters=...)
    assert (config.iterations, config.schedule.decay_samples) == (40, None)
    optimizer = torch.optim.AdamW(parameters(0.3), lr=1e-2)
    ramp = dict(weight_decay_incr_style="linear", start_weight_decay=0.0, end_weight_decay=0.1)
    assert wd_at(made(optimizer=optimizer, lr=..., **ramp), 100) == 0.1


@pytest.mark.parametrize(
    "arguments, remedy",
    [
        ({"save_interval": 500}, "it is checkpoint.interval of the config"),
        ({"attention_head_type": "multiquery"}, "give num_query_groups = 1"),
        ({"group_query_attention": True}, "it goes with num_query_groups"),
        ({"rampup_batch_size": [1, 2, 3]}, "the batch size of a run does not change"),
        ({"rampup_batch_sizes": 3}, "there is no such argument"),
    ],
)
def test_hints_name_the_right_field(arguments, remedy):
    with pytest.raises(ConfigError, match=f"= .*: .*{remedy}") as raised:
        made(other_megatron_args=arguments)
    assert '"rampup_batch_size"' not in str(raised.value)


def test_grouped_queries_may_be_said_twice():
    arguments = {"group_query_attention": True, "num_query_groups": 2}
    assert made(other_megatron_args=arguments).model.num_query_groups == 2


def test_t5_1_1_is_not_tied_under_transformers_5():
    transformers = pytest.importorskip("transformers")
    for tied in (True, False):
        config = transformers.T5Config(tie_word_embeddings=tied)
        fields = model_fields(config)
        assert fields["model.tie_word_embeddings"] is tied
        assert fields["model.scale_decoder_outputs"] is tied
        assert fields["model.softmax_scale"] == 1.0
        assert fields["model.output_layer_bias"] is False


def test_a_subclass_of_accelerates_own_step_runs_or_is_refused_with_what_replaces_it():
    utils = pytest.importorskip("accelerate.utils")

    class Loss(utils.GPTTrainStep):
        def get_loss_func(self, accelerator): ...

    with pytest.raises(ConfigError, match="accelerate's GPTTrainStep") as raised:
        made(custom_train_step_class=Loss)
    assert "attrs.evolve(megafn.step_fn('gpt'), loss=loss)" in str(raised.value)

    class CallsIts(utils.T5TrainStep, AStep):
        def __init__(self, config):
            super().__init__(None, config)

        get_batch_func = AStep.get_batch_func
        get_forward_step_func = AStep.get_forward_step_func
        get_loss_func = AStep.get_loss_func

    with pytest.raises(ConfigError, match="accelerate's T5TrainStep"):
        made(custom_train_step_class=CallsIts)
    with pytest.raises(ConfigError, match='it is what a "bert" does anyway; leave it out'):
        made(custom_train_step_class=utils.BertTrainStep)

    class Whole(AStep, utils.GPTTrainStep):
        pass

    config = made(custom_train_step_class=Whole)
    assert isinstance(config.step_function(config), Whole)

    class Abstract(utils.megatron_lm.AbstractTrainStep):
        def __init__(self, config):
            super().__init__("mine")

    config = made(custom_train_step_class=Abstract)
    assert config.step_function(config).name == "mine"


def test_the_lines_that_replace_a_step_are_the_built_in_loss():
    error = str(inherited_step_problem(subclass_of_accelerates()))
    lines = [line[4:] for line in error.splitlines() if line.startswith("    ")]
    scope = {"megafn": megafn, "attrs": attrs}
    exec("\n".join(lines), scope)
    assert scope["custom_train_step_class"].batch is STEP.batch


def subclass_of_accelerates():
    return type("Mine", (pytest.importorskip("accelerate.utils").GPTTrainStep,), {})


def test_accelerates_signature_of_a_model_provider_is_refused_clearly():
    def provider(pre_process=True, post_process=True, add_encoder=True, add_decoder=True): ...

    with pytest.raises(
        ConfigError,
        match=r"^custom_model_provider_function = .*: it takes \(pre_process=True.*"
        r"let it take \(config, pg, \*, pre_process, post_process, vp_stage\)",
    ):
        made(custom_model_provider_function=provider)
    made(custom_model_provider_function=megafn.build_chunk)

"""Adapters on frozen layers: the law, what is refused, and checkpoints."""

import attrs
import pytest
import torch

import megafn as mf
from bert_rows import PAIRS, bert_rows
from equivalence import assert_equal, run_layout, short, uneven
from t5_rows import RELATIVE, T5, pairs

LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
GPT = dict(activation="swiglu", num_query_groups=2, lr=3e-2)
BERT = PAIRS | dict(lr=3e-2)
SMALL_T5 = T5 | RELATIVE | dict(steps=4, lr=3e-2)
MODELS = {
    "gpt": (GPT, uneven, LAYERS),
    "bert": (BERT, bert_rows, (*LAYERS, "lm_head.dense")),
    "t5": (SMALL_T5, pairs, (*LAYERS, "linear_q", "linear_kv")),
}


def run_adapters(config, data):
    """`run_layout`'s result of the adapters; the base must not move."""
    curve, before, after = run_layout(config, data)
    for (name, first, *_), (_, last, *_) in zip(before, after, strict=True):
        assert torch.equal(first, last) != (".lora_" in name), name
    return curve, *([part for part in end if ".lora_" in part[0]] for end in (before, after))


def run_layouts(configs, data):
    """The results of several layouts of one number of processes, one after the other."""
    return [run_adapters(config, data) for config in configs]


UNIFORM = dict(granularity="full", method="uniform")
BLOCK = dict(granularity="full", method="block")
SP = dict(tp=2, sequence_parallel=True)
LAYOUTS = {
    "gpt": {
        1: [UNIFORM, BLOCK],
        2: [
            dict(tp=2),
            SP | BLOCK,
            dict(pp=2) | UNIFORM,
            dict(pp=2, vpp=2) | BLOCK,
            dict(cp=2),
            dict(use_distributed_optimizer=True),
        ],
        4: [
            SP | UNIFORM | dict(pp=2),
            dict(tp=2, use_distributed_optimizer=True),
            dict(pp=2, vpp=2, use_distributed_optimizer=True),
        ],
    },
    "bert": {1: [BLOCK], 2: [SP | UNIFORM, dict(pp=2) | BLOCK]},
    "t5": {1: [UNIFORM], 2: [SP | BLOCK, dict(pp=2) | UNIFORM]},
}
CASES = [(family, processes) for family in LAYOUTS for processes in LAYOUTS[family]]


@pytest.fixture(scope="module")
def singles():
    """The single process's result for each family, once computed."""
    return {}


@pytest.mark.parametrize("family, processes", CASES)
def test_adapters_obey_the_law(family, processes, pool, singles):
    model, data, layers = MODELS[family]
    prepare = mf.lora(rank=4, alpha=8.0, modules=layers)
    if family not in singles:
        singles[family] = pool(1, run_adapters, short(prepare_model=prepare, **model), data)[0]
    configs = [
        short(prepare_model=prepare, **model, **layout) for layout in LAYOUTS[family][processes]
    ]
    for results in zip(*pool(processes, run_layouts, configs, data), strict=True):
        assert_equal(singles[family], results)


# ------------------------------------------------------------------------------ what is built


def chunk_of(config):
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        return mf.setup(config, pg).chunks[0].module


def test_names_of_the_base_are_unchanged_and_only_adapters_are_trained():
    config = short(prepare_model=mf.lora(rank=3, alpha=6.0, modules=("mlp.linear_fc1",)))
    base = dict(chunk_of(attrs.evolve(config, prepare_model=None)).named_parameters())
    adapted = dict(chunk_of(config).named_parameters())
    added = {
        f"decoder.layers.{i}.mlp.linear_fc1.lora_{matrix}.weight"
        for i in range(4)
        for matrix in "ab"
    }
    assert adapted.keys() - base.keys() == added and base.keys() <= adapted.keys()
    assert {name for name, parameter in adapted.items() if parameter.requires_grad} == added
    for name, parameter in base.items():
        assert torch.equal(parameter, adapted[name])
    for name in added:
        is_zero = not adapted[name].any()
        assert is_zero == name.endswith("lora_b.weight")


def test_one_layer_by_its_number_in_the_whole_model_and_a_head_in_whole():
    prepare = mf.lora(
        rank=2,
        alpha=2,
        modules=["decoder.layers.1.self_attention.linear_qkv"],
        train_modules=["output_layer"],
    )
    chunk = chunk_of(short(prepare_model=prepare, tie_word_embeddings=False))
    trained = {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
    adapter = "decoder.layers.1.self_attention.linear_qkv.lora"
    assert trained == {"output_layer.weight", f"{adapter}_a.weight", f"{adapter}_b.weight"}


@pytest.mark.parametrize(
    "settings, error",
    [
        (dict(rank=0), "lora.rank = 0: must be an integer of at least 1"),
        (dict(rank=True), "lora.rank = True"),
        (dict(alpha=0.0), "lora.alpha = 0.0: must be a finite number above 0"),
        (dict(alpha=float("nan")), "lora.alpha = nan"),
        (dict(modules="linear_qkv"), "lora.modules = 'linear_qkv': must be names"),
        (dict(modules=()), "lora.modules = .*: name at least one linear layer"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error):
    with pytest.raises(mf.ConfigError, match=error):
        mf.lora(**dict(rank=4, alpha=8.0, modules=LAYERS) | settings)


@pytest.mark.parametrize(
    "modules, error",
    [
        (("linear_qkv", "fc1"), "lora.modules = 'fc1': no module of the model has this name"),
        (("final_layernorm",), "decoder.final_layernorm is a Norm; name linear layers only"),
        (("output_layer",), "output_layer shares the table of the word embeddings"),
        (("mlp.linear_fc1", "linear_fc1"), "two names match decoder.layers.0.mlp.linear_fc1"),
    ],
)
def test_names_that_cannot_be_adapted_are_refused(modules, error):
    with pytest.raises(mf.ConfigError, match=error):
        chunk_of(short(prepare_model=mf.lora(rank=4, alpha=8.0, modules=modules)))


def test_a_config_with_adapters_shows_them_and_is_written_without_them():
    config = short(prepare_model=mf.lora(rank=4, alpha=8.0, modules=("linear_qkv",)))
    assert "rank=4, alpha=8.0, modules=('linear_qkv',)" in repr(config)
    with pytest.raises(mf.ConfigError, match="prepare_model = .* function cannot be written"):
        mf.to_dict(config)

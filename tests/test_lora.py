"""Adapters on frozen layers: the law, what is refused, and checkpoints."""

import contextlib
import json
import shutil
from pathlib import Path

import attrs
import pytest
import torch
import transformers

import megafn as mf
from bert_rows import PAIRS, bert_rows
from equivalence import assert_equal, local_parts, run_layout, share, short, uneven
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
        (
            ("final_layernorm",),
            "lora.modules = 'decoder.final_layernorm': it is a Norm; name linear layers only",
        ),
        (
            ("output_layer",),
            "lora.modules = 'output_layer': it shares the table of the word embeddings",
        ),
        (
            ("mlp.linear_fc1", "linear_fc1"),
            "lora.modules = 'decoder.layers.0.mlp.linear_fc1': two names match it",
        ),
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


# ------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A directory with a tiny Llama of random weights."""
    path = tmp_path_factory.mktemp("llama") / "base"
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    torch.manual_seed(5)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def on_llama(source, *, save_base=False, rank=4, layers=LAYERS, **layout):
    model = mf.pretrained_model(source)
    prepare = mf.lora(rank=rank, alpha=8.0, modules=layers, save_base=save_base)
    config = short(prepare_model=prepare, lr=3e-2, **layout)
    return attrs.evolve(config, model=model)


def take_step(state, i):
    batch = share(uneven(state.config, i), state.config, state.pg)
    state, metrics = mf.train_step(state, batch, mf.step_fn("gpt"))
    return state, (metrics.loss, metrics.grad_norm)


@contextlib.contextmanager
def opened(config, source=None):
    groups = mf.build_groups(config.parallel, mf.world_size())
    with mf.init_groups(groups, timeout_seconds=60) as pg:
        state = mf.setup(config, pg)
        yield state if source is None else mf.from_pretrained(state, source)


def start_and_save(config, source, directory):
    """Two steps, a checkpoint, and what the third step says."""
    with opened(config, source) as state:
        for i in range(2):
            state, _ = take_step(state, i)
        mf.save(state, directory)
        return take_step(state, 2)[1]


def load_and_step(config, directory):
    """What the third step says, and where the weights beneath came from."""
    with opened(config) as state:
        state = mf.load(state, directory)
        base = state.pretrained
        return take_step(state, 2)[1], base


def export_files(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@pytest.fixture(scope="module")
def adapted(llama, pool, tmp_path_factory):
    """A run in tp 2 with sequence parallelism: its checkpoint, and its third step."""
    directory = tmp_path_factory.mktemp("adapted")
    steps = pool(2, start_and_save, on_llama(llama, **SP), llama, directory)
    return mf.latest(directory), steps[0]


def test_a_checkpoint_of_adapters_holds_them_and_refers_to_the_base(llama, adapted):
    checkpoint, _ = adapted
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    assert all(".lora_" in tensor for tensor in manifest["tensors"])
    assert manifest["adapters"] == {
        "rank": 4,
        "alpha": 8.0,
        "modules": list(LAYERS),
        "train_modules": [],
        "holds_base": False,
    }
    assert manifest["pretrained"]["source"] == str(llama)


def test_a_checkpoint_of_adapters_is_loaded_in_another_layout(llama, adapted, pool):
    checkpoint, expected = adapted
    results = [load_and_step(on_llama(llama), checkpoint)]
    results += pool(2, load_and_step, on_llama(llama, pp=2), checkpoint)
    for step, base in results:
        assert step == pytest.approx(expected, abs=1e-4)
        assert base.source == str(llama)


def test_adapters_are_merged_by_export_and_to_pretrained_alike(llama, adapted, tmp_path):
    checkpoint, _ = adapted
    mf.export(checkpoint, tmp_path / "exported")
    tokens = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(3))
    with opened(on_llama(llama)) as state:
        state = mf.load(state, checkpoint)
        mf.to_pretrained(state, tmp_path / "written")
        logits = mf.logits(state, tokens)
        weights_only = mf.load(mf.setup(state.config, state.pg, for_training=False), checkpoint)
        assert torch.equal(mf.logits(weights_only, tokens), logits)
    assert export_files(tmp_path / "exported") == export_files(tmp_path / "written")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "exported")
    base = transformers.LlamaForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        assert (merged(tokens).logits - logits).abs().max() < 1e-5
        assert (base(tokens).logits - logits).abs().max() > 1e-2


def test_a_base_that_changed_or_is_missing_is_one_sentence(llama, tmp_path):
    source = tmp_path / "base"
    shutil.copytree(llama, source)
    start_and_save(on_llama(source), source, tmp_path / "run")
    torch.manual_seed(6)
    config = transformers.LlamaConfig.from_pretrained(llama)
    transformers.LlamaForCausalLM(config).save_pretrained(source)
    for use in (load_into, export_from):
        with pytest.raises(mf.CheckpointError, match="holds other weights .* than those that"):
            use(on_llama(source), tmp_path)
    shutil.rmtree(source)
    for use in (load_into, export_from):
        with pytest.raises(mf.CheckpointError, match="base does not exist.* put them back there"):
            use(on_llama(llama), tmp_path)


def load_into(config, folder):
    with opened(config) as state:
        mf.load(state, folder / "run")


def export_from(config, folder):
    mf.export(folder / "run", folder / "exported")


def test_a_checkpoint_with_the_base_needs_nothing_else(llama, tmp_path):
    source = tmp_path / "base"
    shutil.copytree(llama, source)
    config = on_llama(source, save_base=True)
    expected = start_and_save(config, source, tmp_path / "run")
    shutil.rmtree(source)
    assert load_and_step(config, tmp_path / "run")[0] == expected
    mf.export(tmp_path / "run", tmp_path / "exported")


def test_a_run_without_a_pretrained_base_saves_everything(tmp_path):
    config = short(prepare_model=mf.lora(rank=4, alpha=8.0, modules=LAYERS))
    with opened(config) as state:
        state, _ = take_step(state, 0)
        path = mf.save(state, tmp_path)
        values = {name: part for name, part, *_ in local_parts(state)}
        loaded = mf.load(mf.setup(attrs.evolve(config), state.pg), path)
        for name, part, *_ in local_parts(loaded):
            assert torch.equal(part, values[name]), name


@pytest.mark.parametrize(
    "change, error",
    [
        (dict(rank=2), "lora.rank = 2: the checkpoint was written with 4; set that"),
        (dict(layers=("linear_qkv",)), "lora.modules = .*the checkpoint was written with"),
        (None, r"prepare_model = None: the checkpoint was written with mf.lora\(rank=4, alpha=8.0"),
    ],
)
def test_other_adapters_than_the_checkpoints_are_refused(change, error, llama, adapted):
    config = on_llama(llama, **change or {})
    if change is None:
        config = attrs.evolve(config, prepare_model=None)
    with opened(config) as state:
        with pytest.raises(mf.ConfigError, match=error):
            mf.load(state, adapted[0])


def test_another_run_starts_from_a_checkpoint_of_adapters(llama, adapted):
    """With the same adapters; for a model without them the error says to export first."""
    checkpoint, _ = adapted
    with opened(on_llama(llama)) as state:
        loaded = {name: part for name, part, *_ in local_parts(mf.load(state, checkpoint))}
    with opened(on_llama(llama), checkpoint) as state:
        assert state.iteration == 0 and state.pretrained.source == str(checkpoint)
        for name, part, *_ in local_parts(state):
            assert torch.equal(part, loaded[name]), name
    plain = attrs.evolve(on_llama(llama), prepare_model=None)
    with pytest.raises(mf.CheckpointError, match="no place for .*lora_a.weight.*export it"):
        with opened(plain, checkpoint):
            pass

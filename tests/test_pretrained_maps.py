"""Each architecture of Hugging Face: its config.json gives the model and comes back from it, and
the slices of the parameters are the tensors that transformers' files have."""

import json
from collections import Counter

import attrs
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import megafn as mf
from equivalence import tiny
from megafn.pure.families.built_in import parameter_shapes
from megafn.pure.pretrained.architecture import canonical, different_fields
from megafn.pure.pretrained.architectures import (
    ARCHITECTURES,
    architecture_for,
    architecture_of,
    exported_config,
    simplest_architecture,
)
from megafn.runtime.model.weights import local_parameters
from megafn.runtime.pretrained.hugging_face import open_hugging_face
from pretrained_configs import NO_IDS, TINY, VARIANTS, WELL_KNOWN, random_configs

NAMES = ["-".join([kind, *([head] if head else []), *changes]) for kind, head, changes in VARIANTS]
every_variant = pytest.mark.parametrize("kind, head, changes", VARIANTS, ids=NAMES)


def reference(kind, head, changes):
    """transformers' config object, with the name of the class in it."""
    config = transformers.AutoConfig.for_model(kind, **TINY[kind] | changes)
    names = [name for name, one in ARCHITECTURES.items() if one.model_type == kind]
    config.architectures = [head or names[0]]
    return config


def saved(config, **how):
    """What save_pretrained would write."""
    return json.loads(config.to_json_string(**how))


def read(config):
    """(architecture, model) of a config.json that is right."""
    architecture = architecture_of(config)
    fields, problems = architecture.read_config(config)
    assert not problems, [str(problem) for problem in problems]
    return architecture, mf.ModelConfig(**fields)


# ------------------------------------------------------------------ parameters of the whole model

FAMILIES = {
    "gpt": {},
    "gpt-llama": dict(
        num_query_groups=2,
        kv_channels=12,
        position_embedding="rope",
        activation="swiglu",
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=True,
        tie_word_embeddings=False,
    ),
    "gpt-neox": dict(position_embedding="rope", parallel_residual=True),
    "gpt-qk": dict(qk_layernorm=True, position_embedding="none", ffn_hidden_size=40),
    "bert": dict(family="bert", num_tokentypes=2, bert_binary_head=True),
    "bert-labels": dict(family="bert", num_labels=3),
    "bert-untied": dict(family="bert", tie_word_embeddings=False),
    "t5": dict(family="t5", num_decoder_layers=3),
    "t5-plain": dict(family="t5", output_layer_bias=False),
    "t5-relative": dict(
        family="t5",
        position_embedding="relative",
        tie_word_embeddings=False,
        normalization="RMSNorm",
        add_bias_linear=False,
        kv_channels=12,
        activation="geglu_tanh",
    ),
}


def shapes_of_chunks(models):
    """For each model, the shapes of the parameters that a process without parallelism builds."""
    shapes = []
    for changes in models:
        config = tiny(**changes)
        with mf.init_groups(mf.build_groups(config.parallel, 1, model=config.model)) as pg:
            (chunk,) = mf.setup(config, pg).chunks
            parts = local_parameters(chunk, config.model, pg)
            shapes.append({part.name: tuple(part.shape) for part in parts})
    return shapes


def test_names_and_shapes_of_parameters_are_those_of_a_real_chunk(pool):
    (chunks,) = pool(1, shapes_of_chunks, list(FAMILIES.values()))
    for (name, changes), shapes in zip(FAMILIES.items(), chunks, strict=True):
        assert parameter_shapes(tiny(**changes).model) == shapes, name


def test_a_family_that_does_not_say_its_parameters_is_named():
    spec = attrs.evolve(mf.family_of("gpt").spec, name="mine", parameter_shapes=None)
    with pytest.raises(mf.ConfigError, match="'mine'.*give it parameter_shapes"):
        parameter_shapes(attrs.evolve(tiny().model, family=spec))


# --------------------------------------------------------------------- against transformers itself


@every_variant
def test_tensors_are_those_of_transformers(kind, head, changes):
    config = reference(kind, head, changes)
    architecture, model = read(saved(config))
    with torch.device("meta"):
        theirs = getattr(transformers, architecture.name)(config).state_dict()
    stored = {architecture.full_name(name): tuple(value.shape) for name, value in theirs.items()}
    tensors = architecture.tensors(model)
    unread = stored.keys() - tensors.keys()
    assert all(architecture.copy_of(name, model) or architecture.is_buffer(name) for name in unread)
    assert tensors == {name: shape for name, shape in stored.items() if name not in unread}


@every_variant
def test_a_config_comes_back_from_transformers_and_from_us(kind, head, changes):
    config = reference(kind, head, changes)
    architecture, model = read(saved(config))
    assert read(saved(config, use_diff=False))[1] == model
    assert read(config.to_dict())[1] == model
    written = architecture.write_config(model)
    assert read(written) == (architecture, model)
    assert read(json.loads(json.dumps(written))) == (architecture, model)
    # what we write is what transformers understands
    assert read(saved(transformers.AutoConfig.for_model(**written)))[1] == model
    assert architecture_for(model, architecture) is architecture
    assert different_fields(read(simplest_architecture(model).write_config(model))[1], model) == []


@every_variant
def test_a_model_that_was_read_is_one_that_megafn_can_train(kind, head, changes):
    model = read(saved(reference(kind, head, changes)))[1]
    config = mf.TrainConfig(model=model, micro_batch_size=1, global_batch_size=1, train_iters=1)
    assert mf.validate(config, 1) == ()


@pytest.mark.parametrize("kind", TINY)
def test_an_absent_key_has_transformers_default(kind):
    """A file holds the sizes; what it leaves out is the default of the model type's class."""
    defaults = transformers.AutoConfig.for_model(kind).to_dict()
    sizes = {key: defaults[key] for key in TINY[kind] if key not in NO_IDS and key in defaults}
    sizes.pop("num_key_value_heads", None)
    sizes.pop("head_dim", None)
    assert read(dict(model_type=kind) | sizes)[1] == read(defaults)[1]


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_a_well_known_model_is_read_as_transformers_reads_it(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(WELL_KNOWN[name]))
    model = mf.pretrained_model(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read(saved(loaded))[1] == model
    assert len(parameter_shapes(model)) > 50
    assert architecture_of(WELL_KNOWN[name]).problems_of(model) == []


@pytest.mark.parametrize(
    "name, fields",
    [
        ("gpt2", dict(seq_length=1024, activation="gelu_tanh", tie_word_embeddings=True)),
        ("Llama-2-7b", dict(norm_epsilon=1e-5, rotary_base=10_000.0, rope_scaling=None)),
        ("Mistral-7B-v0.1", dict(sliding_window=4096, num_query_groups=8)),
        ("Qwen2-0.5B", dict(sliding_window=None, add_qkv_bias=True, tie_word_embeddings=True)),
        ("Phi-3-mini-4k", dict(sliding_window=2047, rotary_percent=1.0)),
        ("SmolLM3-3B", dict(layers_without_rope=tuple(range(3, 36, 4)), rotary_base=5e6)),
        ("pythia-70m", dict(parallel_residual=True, rotary_percent=0.25)),
        (
            "t5-small",
            dict(
                seq_length=512,
                softmax_scale=1.0,
                tie_word_embeddings=True,
                scale_decoder_outputs=True,
                output_layer_bias=False,
            ),
        ),
        (
            "flan-t5-small",
            dict(
                seq_length=512,
                activation="geglu_tanh",
                tie_word_embeddings=False,
                scale_decoder_outputs=False,
            ),
        ),
    ],
)
def test_fields_of_well_known_models(name, fields):
    model = read(WELL_KNOWN[name])[1]
    assert {field: getattr(model, field) for field in fields} == fields


def test_llama_3_s_rotary_scaling():
    model = read(WELL_KNOWN["Llama-3.1-8B"])[1]
    assert model.rope_scaling == mf.RopeScaling(factor=8.0)
    assert model.seq_length == model.max_position_embeddings == 131072


# ----------------------------------------------------------------------------- slices tile tensors


@given(random_configs())
def test_slices_of_all_parameters_tile_every_stored_tensor_once(config):
    architecture, model = read(config)
    tensors = architecture.tensors(model)
    covered = {name: Counter() for name in tensors}
    for name, shape in parameter_shapes(model).items():
        rows = Counter()
        for piece in architecture.slices(name, shape, model):
            rows.update(range(piece.start, piece.start + piece.rows))
            covered[piece.tensor].update(range(piece.at, piece.at + piece.rows))
            stored = tensors[piece.tensor]
            assert shape[1:] == (stored[:-1] if piece.transposed else stored[1:])
        assert rows == Counter(range(shape[0])), f"rows of {name}"
    for tensor, rows in covered.items():
        stored = tensors[tensor]
        transposed = any(
            piece.transposed
            for name, shape in parameter_shapes(model).items()
            for piece in architecture.slices(name, shape, model)
            if piece.tensor == tensor
        )
        assert rows == Counter(range(stored[-1] if transposed else stored[0])), tensor


@given(random_configs())
def test_any_model_is_what_its_config_says(config):
    architecture, model = read(config)
    assert read(architecture.write_config(model)) == (architecture, model)
    assert canonical(model) == canonical(canonical(model))
    assert simplest_architecture(model).problems_of(model) == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_unknown_parameter_is_not_stored(name):
    """Such as an adapter's, a new head's, the bias of megafn's own T5."""
    architecture = ARCHITECTURES[name]
    model = tiny().model
    for unknown in (
        "decoder.layers.0.self_attention.linear_qkv.lora_a.weight",
        "my_head.weight",
        "decoder.layers.0.mlp.linear_fc1.scale",
    ):
        assert architecture.slices(unknown, (4, 4), model) == ()


@pytest.mark.parametrize(
    "kind, stored, full, what",
    [
        ("gpt2", "wte.weight", "transformer.wte.weight", None),
        ("gpt2", "h.0.attn.bias", "transformer.h.0.attn.bias", "buffer"),
        ("gpt2", "transformer.h.11.attn.masked_bias", None, "buffer"),
        ("gpt2", "h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.bias", None),
        ("gpt2", "lm_head.weight", None, "copy"),
        ("llama", "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", None),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", None, "buffer"),
        ("gpt_neox", "lm_head.weight", "embed_out.weight", "copy"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias", None, "buffer"),
        ("gpt_neox", "gpt_neox.layers.0.attention.dense.bias", None, None),
        ("megatron-bert", "pooler.dense.weight", "bert.pooler.dense.weight", "head"),
        ("megatron-bert", "embeddings.position_ids", "bert.embeddings.position_ids", "buffer"),
        ("megatron-bert", "cls.predictions.decoder.weight", None, "copy"),
        ("t5", "encoder.embed_tokens.weight", None, "copy"),
        (
            "t5",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
            None,
            "buffer",
        ),
    ],
)
def test_names_in_files(kind, stored, full, what):
    architecture, model = read(dict(model_type=kind) | TINY[kind] | dict(tie_word_embeddings=True))
    name = architecture.full_name(stored)
    assert name == (full or stored)
    found = {
        "buffer": architecture.is_buffer(name),
        "copy": architecture.copy_of(name, model) in architecture.tensors(model),
        "head": architecture.is_head(name) and architecture.copy_of(name, model) is None,
    }
    assert [key for key, value in found.items() if value] == ([what] if what else [])


def test_a_t5_without_the_output_layer_of_its_config_has_the_word_table_there(tmp_path):
    """As transformers 5 saves a T5 1.1 that it made: tied, and its config.json does not say so."""
    config = transformers.T5Config(**TINY["t5"], tie_word_embeddings=False)
    saved_model = transformers.T5ForConditionalGeneration(config)
    saved_model.save_pretrained(tmp_path)
    model = mf.pretrained_model(tmp_path)
    assert not model.tie_word_embeddings and not model.scale_decoder_outputs
    shape = parameter_shapes(model)["output_layer.weight"]
    target = torch.empty(shape)
    with open_hugging_face(tmp_path, model) as source:
        assert list(source.made_of("output_layer.weight", shape)) == ["shared.weight"]
        source.copy("output_layer.weight", shape, ((0, 0), shape), target)
    assert torch.equal(target, saved_model.lm_head.weight)


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "kind, changes, field",
    [
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        ("gpt2", dict(add_cross_attention=True), "add_cross_attention"),
        ("gpt2", dict(activation_function="tanh"), "activation_function"),
        ("gpt2", dict(embd_pdrop=0.3), "embd_pdrop"),
        ("gpt2", dict(n_embd=33), "n_embd"),
        ("llama", dict(attention_bias=True), "attention_bias"),
        ("llama", dict(hidden_act="relu"), "hidden_act"),
        ("llama", dict(num_key_value_heads=3), "num_key_value_heads"),
        ("llama", dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_scaling.type"),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0)),
            "rope_parameters.rope_type",
        ),
        (
            "llama",
            dict(rope_scaling=dict(rope_type="llama3", low_freq_factor=1, high_freq_factor=4)),
            "rope_scaling.factor = None: must be given",
        ),
        ("llama", dict(rope_parameters=dict(full_attention={})), "rope_parameters.full_attention"),
        (
            "llama",
            dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)),
            "rope_parameters.partial_rotary_factor",
        ),
        ("llama", dict(quantization_config=dict(bits=4)), "quantization_config"),
        ("llama", dict(hidden_size=None), "hidden_size"),
        ("llama", dict(vocab_size="97"), "vocab_size"),
        ("llama", dict(tie_word_embeddings="no"), "tie_word_embeddings"),
        ("llama", dict(rms_norm_eps=-1.0), "rms_norm_eps"),
        ("llama", dict(architectures=["LlamaForSequenceClassification"]), "architectures"),
        ("llama", dict(architectures=["MistralForCausalLM"]), "architectures"),
        ("qwen2", dict(use_sliding_window=True, max_window_layers=2), "max_window_layers"),
        (
            "qwen2",
            dict(use_sliding_window=True, layer_types=["linear_attention"] * 4),
            "layer_types",
        ),
        ("qwen3", dict(attention_bias=True), "attention_bias"),
        (
            "phi3",
            dict(rope_scaling=dict(type="longrope", short_factor=[1.0], long_factor=[1.0])),
            "rope_scaling.type",
        ),
        ("starcoder2", dict(embedding_dropout=0.5), "embedding_dropout"),
        ("smollm3", dict(no_rope_layers=[1]), "no_rope_layers"),
        (
            "smollm3",
            dict(use_sliding_window=True, sliding_window=8),
            "no_rope_layers",
        ),
        ("gpt_neox", dict(attention_bias=False), "attention_bias"),
        ("megatron-bert", dict(hidden_act="relu"), "hidden_act"),
        ("megatron-bert", dict(is_decoder=True), "is_decoder"),
        ("megatron-bert", dict(position_embedding_type="relative_key"), "position_embedding_type"),
        ("megatron-bert", dict(architectures=["MegatronBertForTokenClassification"]), "architectu"),
        ("t5", dict(feed_forward_proj="gated-relu"), "feed_forward_proj"),
        ("t5", dict(is_encoder_decoder=False), "is_encoder_decoder"),
        (
            "t5",
            dict(tie_word_embeddings=False, scale_decoder_outputs=True),
            "scale_decoder_outputs",
        ),
        ("mixtral", {}, "model_type.*experts"),
        ("gemma2", {}, "model_type.*embedding is multiplied"),
        ("olmo2", {}, "model_type.*norms come after"),
        ("bert", {}, "model_type.*megatron-bert"),
        ("lama", {}, 'model_type.*did you mean "llama"'),
        (None, {}, "model_type = None"),
    ],
)
def test_what_megafn_cannot_express_is_refused_by_its_key(kind, changes, field, tmp_path):
    config = dict(model_type=kind) | TINY.get(kind, TINY["llama"]) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(mf.ConfigError, match=rf"config\.json: {field}") as error:
        mf.pretrained_model(tmp_path)
    assert "problems:" not in str(error.value)


def test_all_problems_are_reported_at_once(tmp_path):
    config = dict(model_type="llama") | TINY["llama"]
    config |= dict(hidden_act="tanh", attention_bias=True, hidden_size=0, rope_theta="far")
    del config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(mf.ConfigError, match="5 problems") as error:
        mf.pretrained_model(tmp_path)
    for name in ("hidden_act", "attention_bias", "hidden_size", "rope_theta", "vocab_size"):
        assert f"  {name} = " in str(error.value)


@pytest.mark.parametrize(
    "content, words",
    [(None, "cannot be read"), ("{", "not valid JSON"), ("[1]", "an object"), ("\xff", "JSON")],
)
def test_a_directory_without_a_config_is_named(content, words, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(mf.ConfigError, match=rf"config\.json: .*{words}"):
        mf.pretrained_model(tmp_path)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["silu", "llama3", "default", "full_attention", 10**400, 10**17]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_type", "rope_theta", "factor", "0"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)


@given(st.data())
def test_any_junk_in_a_config_is_a_problem_or_a_value(data):
    kind, head, changes = data.draw(st.sampled_from(VARIANTS))
    config = saved(reference(kind, head, changes))
    keys = data.draw(st.lists(st.sampled_from(sorted(config)), max_size=3))
    for key in keys:
        config[key] = data.draw(JUNK)
    try:
        architecture = architecture_of(config)
    except mf.ConfigError:
        return
    fields, problems = architecture.read_config(config)
    if not problems:
        train = mf.TrainConfig(
            model=mf.ModelConfig(**fields), micro_batch_size=1, global_batch_size=1, train_iters=1
        )
        mf.validate(train, 1)


# ------------------------------------------------------------------------------------------ export


T5_OF_TRANSFORMERS = dict(
    position_embedding="relative",
    softmax_scale=1.0,
    activation="relu",
    normalization="RMSNorm",
    add_bias_linear=False,
    scale_decoder_outputs=True,
    output_layer_bias=False,
)


@pytest.mark.parametrize(
    "changes, field",
    [
        (dict(position_embedding="none"), "position_embedding"),
        (dict(parallel_residual=True), "parallel_residual"),
        (dict(activation="swiglu"), "activation"),
        (
            dict(family="t5", **T5_OF_TRANSFORMERS | dict(output_layer_bias=True)),
            "output_layer_bias",
        ),
        (dict(family="t5", **T5_OF_TRANSFORMERS | dict(softmax_scale=None)), "softmax_scale"),
        (
            dict(family="t5", **T5_OF_TRANSFORMERS | dict(scale_decoder_outputs=False)),
            "scale_decoder_outputs",
        ),
        (dict(family="bert", num_tokentypes=0), "num_tokentypes"),
        (dict(family="bert", normalization="RMSNorm", num_tokentypes=2), "normalization"),
    ],
)
def test_a_model_that_no_architecture_expresses_is_refused_by_its_field(changes, field):
    with pytest.raises(mf.ConfigError, match=rf"model\.{field} = .*of transformers has .*; set it"):
        simplest_architecture(tiny(**changes).model)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "GPT2LMHeadModel"),
        (
            dict(
                position_embedding="rope",
                normalization="RMSNorm",
                activation="swiglu",
                add_bias_linear=False,
            ),
            "LlamaForCausalLM",
        ),
        (
            dict(
                position_embedding="rope",
                normalization="RMSNorm",
                activation="swiglu",
                add_bias_linear=False,
                sliding_window=8,
            ),
            "MistralForCausalLM",
        ),
        (dict(position_embedding="rope", parallel_residual=True), "GPTNeoXForCausalLM"),
        (dict(position_embedding="rope", num_query_groups=2), "Starcoder2ForCausalLM"),
        (dict(family="t5", **T5_OF_TRANSFORMERS), "T5ForConditionalGeneration"),
        (dict(family="bert", num_tokentypes=2), "MegatronBertForMaskedLM"),
        (
            dict(family="bert", num_tokentypes=2, bert_binary_head=True),
            "MegatronBertForPreTraining",
        ),
        (
            dict(family="bert", num_tokentypes=2, num_labels=3),
            "MegatronBertForSequenceClassification",
        ),
    ],
)
def test_a_model_made_from_scratch_has_a_simplest_architecture(changes, name):
    model = tiny(**changes).model
    architecture = simplest_architecture(model)
    assert architecture.name == name
    config = exported_config(architecture, model)
    assert config["eos_token_id"] is None
    with torch.device("meta"):
        loaded = transformers.AutoConfig.for_model(**config)
        getattr(transformers, name)(loaded)


def test_a_family_of_the_user_has_no_architecture():
    spec = attrs.evolve(mf.family_of("gpt").spec, name="mine")
    with pytest.raises(
        mf.ConfigError, match="model.family = 'mine': .*choose one of gpt, bert, t5"
    ):
        simplest_architecture(attrs.evolve(tiny().model, family=spec))


def test_an_export_gives_back_what_the_source_said():
    source = WELL_KNOWN["Llama-3.1-8B"] | dict(eos_token_id=[128001, 128008], use_cache=False)
    architecture, model = read(source)
    shorter = attrs.evolve(model, seq_length=64, hidden_dropout=0.1)
    assert exported_config(architecture, shorter, source) == source


def test_an_export_keeps_special_ids_of_a_model_that_was_changed():
    source = WELL_KNOWN["Llama-3.1-8B"] | dict(eos_token_id=7, bos_token_id=5, use_cache=False)
    source |= dict(rope_parameters=source["rope_scaling"] | dict(rope_theta=5e5))
    architecture, model = read(source)
    changed = attrs.evolve(model, sliding_window=64, rope_scaling=None)
    other = architecture_for(changed, architecture)
    config = exported_config(other, changed, source)
    assert other.name == "MistralForCausalLM" and read(config) == (other, changed)
    assert (config["eos_token_id"], config["bos_token_id"], config["use_cache"]) == (7, 5, False)
    assert read(saved(transformers.AutoConfig.for_model(**config)))[1] == changed


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "smollm3"])
def test_a_model_whose_window_was_taken_away_computes_without_one_in_transformers(model_type):
    windowed = dict(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    windowed |= dict(layer_types=["sliding_attention"] * TINY[model_type]["num_hidden_layers"])
    source = saved(reference(model_type, None, windowed))
    architecture, model = read(source)
    assert model.sliding_window == 8
    config = exported_config(architecture, attrs.evolve(model, sliding_window=None), source)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config)
    )
    tokens = torch.arange(12)[None]
    assert theirs(tokens).logits.shape == (1, 12, model.vocab_size)
    assert read(config)[1].sliding_window is None


def test_a_bert_with_another_head_stays_a_bert():
    source = dict(model_type="megatron-bert", architectures=["MegatronBertForPreTraining"])
    source |= TINY["megatron-bert"] | dict(cls_token_id=4)
    architecture, model = read(source)
    fine_tuned = attrs.evolve(model, bert_binary_head=False, num_labels=5)
    other = architecture_for(fine_tuned, architecture)
    config = exported_config(other, fine_tuned, source)
    assert other.name == "MegatronBertForSequenceClassification"
    assert config["architectures"] == [other.name] and config["cls_token_id"] == 4
    assert read(config)[1].num_labels == 5

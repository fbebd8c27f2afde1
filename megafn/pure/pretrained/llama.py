"""Llama and its relatives: rotary positions, grouped queries, one stack of decoder layers.

What they share is in `_shared_fields` and `_shared_config`; each architecture has two short
functions for the rest: which biases, which norm, which MLP, which windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megafn.pure.config.records import ModelConfig
from megafn.pure.pretrained.activations import GATED, PLAIN, name_in_transformers
from megafn.pure.pretrained.architecture import Architecture, tied_to
from megafn.pure.pretrained.config_reader import ConfigReader
from megafn.pure.pretrained.rotary import read_rotary, rotary_config
from megafn.pure.pretrained.stored_slice import (
    SliceRule,
    fused_query_key_value,
    query_key_value,
    renamed,
    slices_by_name,
    stacked,
)

# ---------------------------------------------------------------------------- what they share


def _shared_fields(reader: ConfigReader, *, groups: int | None, tied: bool) -> dict[str, Any]:
    """Sizes, dropout and tying. groups, tied: what transformers takes if the key is absent."""
    heads = reader.integer("num_attention_heads")
    positions = reader.integer("max_position_embeddings")
    return {
        "family": "gpt",
        "num_layers": reader.layers("num_hidden_layers"),
        "hidden_size": reader.integer("hidden_size"),
        "num_attention_heads": heads,
        "num_query_groups": _query_groups(reader, groups, heads),
        "kv_channels": _head_size(reader),
        "ffn_hidden_size": reader.integer("intermediate_size"),
        "vocab_size": reader.integer("vocab_size"),
        "seq_length": positions,
        "max_position_embeddings": positions,
        "hidden_dropout": 0.0,
        "attention_dropout": reader.number("attention_dropout", 0.0),
        "init_method_std": reader.number("initializer_range", 0.02),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", tied),
    }


def _query_groups(reader: ConfigReader, default: int | None, heads: int) -> int:
    groups = reader.optional_integer("num_key_value_heads", default)
    if groups is None:
        return heads
    if heads % groups:
        reader.refuse(
            "num_key_value_heads",
            groups,
            f"must divide num_attention_heads = {heads}; correct it",
        )
    return groups


def _head_size(reader: ConfigReader) -> int:
    size = reader.optional_integer("head_dim")
    if size is None:
        return reader.head_size("hidden_size", "num_attention_heads")
    return size


def _shared_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_size,
        "intermediate_size": model.ffn_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.position_rows,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.tie_word_embeddings,
    }


def _gated_rms_fields(reader: ConfigReader, *, epsilon: float = 1e-6) -> dict[str, Any]:
    """RMSNorm and a gated MLP, as all but StarCoder2 have them."""
    return {
        "normalization": "RMSNorm",
        "norm_epsilon": reader.number("rms_norm_eps", epsilon),
        "activation": reader.translated("hidden_act", GATED, "silu"),
    }


def _gated_rms_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": name_in_transformers(model.activation, GATED),
    }


def _biases(reader: ConfigReader) -> dict[str, Any]:
    """From `attention_bias` and `mlp_bias`: both or neither, as megafn's layers have them."""
    attention = reader.boolean("attention_bias", False)
    mlp = reader.boolean("mlp_bias", False)
    if attention != mlp:
        reader.refuse(
            "attention_bias",
            attention,
            f"must equal mlp_bias = {mlp}, for megafn's linear layers all have a bias or none has; "
            "choose such a model",
        )
    return {"add_bias_linear": attention}


def _biases_config(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}


def _window(reader: ConfigReader, default: int | None) -> dict[str, Any]:
    return {"sliding_window": reader.optional_integer("sliding_window", default)}


def _window_of_some_layers(
    reader: ConfigReader, default: int | None, *, without_types: tuple[str, tuple[bool, ...]]
) -> dict[str, Any]:
    """From `use_sliding_window` and `layer_types`: the window of all layers, or of none.

    without_types: if there are no `layer_types`, the key that says which layers have the window,
        and what it says of each.
    """
    if not reader.boolean("use_sliding_window", False):
        return {"sliding_window": None}
    window = reader.optional_integer("sliding_window", default)
    if window is None:
        return {"sliding_window": None}
    if reader.get("layer_types") is None:
        key, windowed = without_types
    else:
        key = "layer_types"
        windowed = _windowed_by_types(reader)
    if not any(windowed):
        return {"sliding_window": None}
    if not all(windowed):
        reader.refuse(
            key,
            reader.get(key),
            f"the window of {window} tokens must be that of all layers, "
            "for windows of some layers are not built; choose such a model",
        )
    return {"sliding_window": window}


def _windowed_by_types(reader: ConfigReader) -> tuple[bool, ...]:
    types = reader.get("layer_types")
    layers = reader.layers("num_hidden_layers")
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) < layers or any(t not in known for t in types):
        reader.refuse(
            "layer_types",
            types,
            f"must be a list with {' or '.join(known)} for each of {layers} layers; "
            "choose such a model",
        )
        return ()
    return tuple(kind == "sliding_attention" for kind in types[:layers])


def _upper_layers(reader: ConfigReader) -> tuple[str, tuple[bool, ...]]:
    """Layers from number `max_window_layers` on have the window (Qwen)."""
    full = reader.integer("max_window_layers", 28, at_least=0)
    layers = reader.layers("num_hidden_layers")
    return "max_window_layers", tuple(number >= full for number in range(layers))


def _window_of_all_layers_config(model: ModelConfig) -> dict[str, Any]:
    if model.sliding_window is None:
        return {
            "use_sliding_window": False,
            # those of the config.json that the model came from may name a window
            "layer_types": ["full_attention"] * model.num_layers,
        }
    return {
        "use_sliding_window": True,
        "sliding_window": model.sliding_window,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * model.num_layers,
    }


# ------------------------------------------------------------------------- each architecture


def _llama_fields(reader: ConfigReader) -> dict[str, Any]:
    return {
        **_shared_fields(reader, groups=None, tied=False),
        **_gated_rms_fields(reader),
        **read_rotary(reader),
        **_biases(reader),
    }


def _llama_config(model: ModelConfig) -> dict[str, Any]:
    return {
        **_shared_config(model),
        **_gated_rms_config(model),
        **rotary_config(model),
        **_biases_config(model),
    }


def _mistral_fields(reader: ConfigReader) -> dict[str, Any]:
    return {
        **_shared_fields(reader, groups=8, tied=False),
        **_gated_rms_fields(reader),
        **read_rotary(reader),
        **_window(reader, 4096),
        "add_bias_linear": False,
    }


def _mistral_config(model: ModelConfig) -> dict[str, Any]:
    return {
        **_shared_config(model),
        **_gated_rms_config(model),
        **rotary_config(model),
        "sliding_window": model.sliding_window,
    }


def _qwen2_fields(reader: ConfigReader) -> dict[str, Any]:
    return {
        **_shared_fields(reader, groups=32, tied=False),
        **_gated_rms_fields(reader),
        **read_rotary(reader),
        **_window_of_some_layers(reader, 4096, without_types=_upper_layers(reader)),
        "add_bias_linear": False,
        "add_qkv_bias": True,
    }


def _qwen2_config(model: ModelConfig) -> dict[str, Any]:
    return {
        **_shared_config(model),
        **_gated_rms_config(model),
        **rotary_config(model),
        **_window_of_all_layers_config(model),
    }


def _qwen3_fields(reader: ConfigReader) -> dict[str, Any]:
    reader.require(
        "attention_bias",
        False,
        "must be false, for megafn's linear layers all have a bias or none has; "
        "choose such a model",
    )
    fields = {
        **_shared_fields(reader, groups=32, tied=False),
        **_gated_rms_fields(reader),
        **read_rotary(reader),
        **_window_of_some_layers(reader, 4096, without_types=_upper_layers(reader)),
        "add_bias_linear": False,
        "qk_layernorm": True,
    }
    if "head_dim" not in reader.config:
        fields["kv_channels"] = 128
    return fields


def _phi3_fields(reader: ConfigReader) -> dict[str, Any]:
    dropout = reader.number("resid_pdrop", 0.0)
    reader.require_equal("embd_pdrop", 0.0, "resid_pdrop", dropout)
    return {
        **_shared_fields(reader, groups=None, tied=False),
        **_gated_rms_fields(reader, epsilon=1e-5),
        **read_rotary(reader, percent_key="partial_rotary_factor"),
        **_window(reader, None),
        "add_bias_linear": False,
        "hidden_dropout": dropout,
    }


def _phi3_config(model: ModelConfig) -> dict[str, Any]:
    return {
        **_shared_config(model),
        **_gated_rms_config(model),
        **rotary_config(model, percent_key="partial_rotary_factor"),
        "sliding_window": model.sliding_window,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
    }


def _starcoder2_fields(reader: ConfigReader) -> dict[str, Any]:
    dropout = reader.number("residual_dropout", 0.0)
    reader.require_equal("embedding_dropout", 0.0, "residual_dropout", dropout)
    return {
        **_shared_fields(reader, groups=2, tied=True),
        **read_rotary(reader),
        **_window(reader, None),
        "normalization": "LayerNorm",
        "norm_epsilon": reader.number("norm_epsilon", 1e-5),
        "activation": reader.translated("hidden_act", PLAIN, "gelu_pytorch_tanh"),
        "add_bias_linear": reader.boolean("use_bias", True),
        "hidden_dropout": dropout,
        "init_method_std": reader.number("initializer_range", 0.018042),
    }


def _starcoder2_config(model: ModelConfig) -> dict[str, Any]:
    return {
        **_shared_config(model),
        **rotary_config(model),
        "norm_epsilon": model.norm_epsilon,
        "hidden_act": name_in_transformers(model.activation, PLAIN),
        "use_bias": model.add_bias_linear,
        "sliding_window": model.sliding_window,
        "residual_dropout": model.hidden_dropout,
        "embedding_dropout": model.hidden_dropout,
    }


def _smollm3_fields(reader: ConfigReader) -> dict[str, Any]:
    without_rope = _layers_without_rope(reader)
    layers = reader.layers("num_hidden_layers")
    windowed = tuple(number in without_rope for number in range(layers))
    return {
        **_shared_fields(reader, groups=4, tied=True),
        **_gated_rms_fields(reader),
        **read_rotary(reader, default_base=2_000_000.0),
        **_biases(reader),
        **_window_of_some_layers(reader, None, without_types=("no_rope_layers", windowed)),
        "layers_without_rope": without_rope,
    }


def _layers_without_rope(reader: ConfigReader) -> tuple[int, ...]:
    """From `no_rope_layers`, which means the inverse: its zeros are the layers without."""
    layers = reader.layers("num_hidden_layers")
    rotated = reader.get("no_rope_layers")
    if rotated is None:
        interval = reader.integer("no_rope_layer_interval", 4)
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(rotated, list) or len(rotated) < layers:
        reader.refuse(
            "no_rope_layers",
            rotated,
            f"must be a list with 0 or 1 for each of {layers} layers; correct it",
        )
        return ()
    return tuple(number for number in range(layers) if not rotated[number])


def _smollm3_config(model: ModelConfig) -> dict[str, Any]:
    without = set(model.layers_without_rope)
    return {
        **_llama_config(model),
        **_window_of_all_layers_config(model),
        "no_rope_layers": [int(number not in without) for number in range(model.num_layers)],
    }


# ------------------------------------------------------------------------ where parameters lie

_LAYER = "model.layers.{layer}."
_ATTENTION = f"{_LAYER}self_attn."
_MLP = f"{_LAYER}mlp."
_OUR_ATTENTION = "decoder.layers.*.self_attention."
_OUR_MLP = "decoder.layers.*.mlp."

_RULES: dict[str, SliceRule] = {
    "embedding.word_embeddings": renamed("model.embed_tokens"),
    "decoder.layers.*.input_layernorm": renamed(f"{_LAYER}input_layernorm"),
    f"{_OUR_ATTENTION}linear_qkv": query_key_value(
        f"{_ATTENTION}q_proj", f"{_ATTENTION}k_proj", f"{_ATTENTION}v_proj"
    ),
    f"{_OUR_ATTENTION}q_layernorm": renamed(f"{_ATTENTION}q_norm"),
    f"{_OUR_ATTENTION}k_layernorm": renamed(f"{_ATTENTION}k_norm"),
    f"{_OUR_ATTENTION}linear_proj": renamed(f"{_ATTENTION}o_proj"),
    "decoder.layers.*.pre_mlp_layernorm": renamed(f"{_LAYER}post_attention_layernorm"),
    f"{_OUR_MLP}linear_fc1": stacked(f"{_MLP}gate_proj", f"{_MLP}up_proj"),
    f"{_OUR_MLP}linear_fc2": renamed(f"{_MLP}down_proj"),
    "decoder.final_layernorm": renamed("model.norm"),
    "output_layer": renamed("lm_head"),
}
_PHI3_RULES = _RULES | {
    f"{_OUR_ATTENTION}linear_qkv": fused_query_key_value(f"{_ATTENTION}qkv_proj"),
    f"{_OUR_MLP}linear_fc1": renamed(f"{_MLP}gate_up_proj"),
}
_STARCODER2_RULES = _RULES | {
    f"{_OUR_MLP}linear_fc1": renamed(f"{_MLP}c_fc"),
    f"{_OUR_MLP}linear_fc2": renamed(f"{_MLP}c_proj"),
}


def _architecture(
    name: str,
    model_type: str,
    fields: Callable[[ConfigReader], dict[str, Any]],
    config: Callable[[ModelConfig], dict[str, Any]],
    rules: dict[str, SliceRule] = _RULES,
) -> Architecture:
    return Architecture(
        name=f"{name}ForCausalLM",
        model_type=model_type,
        base_model=f"{name}Model",
        base_prefix="model.",
        fields=fields,
        config=config,
        slice_function=slices_by_name(rules),
        buffers=(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$",),
        copies=tied_to("model.embed_tokens.weight", "lm_head.weight"),
    )


LLAMA = _architecture("Llama", "llama", _llama_fields, _llama_config)
MISTRAL = _architecture("Mistral", "mistral", _mistral_fields, _mistral_config)
QWEN2 = _architecture("Qwen2", "qwen2", _qwen2_fields, _qwen2_config)
QWEN3 = _architecture("Qwen3", "qwen3", _qwen3_fields, _qwen2_config)
PHI3 = _architecture("Phi3", "phi3", _phi3_fields, _phi3_config, _PHI3_RULES)
STARCODER2 = _architecture(
    "Starcoder2", "starcoder2", _starcoder2_fields, _starcoder2_config, _STARCODER2_RULES
)
SMOLLM3 = _architecture("SmolLM3", "smollm3", _smollm3_fields, _smollm3_config)

"""The model that Megatron-LM's arguments, as its checkpoints hold them, describe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from megafn.pure.config.problems import Problem, config_error
from megafn.pure.config.records import ModelConfig, RopeScaling

# Arguments whose value a field takes as it is.
_SAME = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "ffn_hidden_size",
    "kv_channels": "kv_channels",
    "rotary_percent": "rotary_percent",
    "normalization": "normalization",
    "norm_epsilon": "norm_epsilon",
    "layernorm_epsilon": "norm_epsilon",
    "qk_layernorm": "qk_layernorm",
    "add_bias_linear": "add_bias_linear",
    "add_qkv_bias": "add_qkv_bias",
    "position_embedding_type": "position_embedding",
}

# The same of fields that a run may set anew.
_FREE = {
    "seq_length": "seq_length",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "init_method_std": "init_method_std",
}

_FREE_OF_T5 = {"decoder_seq_length": "decoder_seq_length"}

# Arguments that turn on what megafn's layers do not compute.
_NOT_BUILT = (
    "activation_func_clamp_value",
    "apply_layernorm_1p",
    "apply_residual_connection_post_layernorm",
    "glu_linear_offset",
    "heterogeneous_layers_config_path",
    "mtp_num_layers",
    "multi_latent_attention",
    "no_rope_freq",
    "num_experts",
    "quick_geglu",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "squared_relu",
)

_TYPES: dict[type, tuple[type, ...]] = {
    float: (int, float),
    bool: (bool,),
    str: (str,),
}


# Fields whose values no model of Megatron-LM has another of.
_ALWAYS = {
    "parallel_residual": False,
    "layers_without_rope": (),
    "softmax_scale": None,
    "scale_decoder_outputs": False,
}

_REQUIRED = {"num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size"}


def model_of_arguments(
    arguments: Mapping[str, Any],
    from_tensors: Mapping[str, Any],
    model: ModelConfig | None,
    path: str,
) -> ModelConfig | None:
    """The model of a checkpoint at `path`.

    from_tensors: fields that its tensors show, see `fields_of_tensors`. What neither they nor the
    arguments say is taken from `model`, the one to read into. None if that is None and the
    arguments do not describe a whole model.
    Raises ConfigError naming each argument with which megafn's layers would compute something else.

    >>> arguments = {"hidden_size": 64, "num_attention_heads": 4, "swiglu": True,
    ...              "seq_length": 32, "padded_vocab_size": 128, "add_bias_linear": False}
    >>> model = model_of_arguments(arguments, {"family": "gpt", "num_layers": 2}, None, "base")
    >>> model.activation, model.vocab_size, model.add_bias_linear, model.tie_word_embeddings
    ('swiglu', 128, False, True)
    >>> arguments |= {"window_size": (31, 0), "use_rope_scaling": True, "rope_scaling_factor": 4.0}
    >>> model = model_of_arguments(arguments, {"family": "gpt", "num_layers": 2}, None, "base")
    >>> model.sliding_window, model.rope_scaling.factor
    (32, 4.0)
    """
    problems = [
        Problem(
            name,
            arguments[name],
            f"the model of the weights at {path} is not built in megafn; start from others",
        )
        for name in _arguments_not_built(arguments)
    ]
    if problems:
        raise config_error(problems)

    fields = {
        **_fields(arguments, _SAME),
        **_derived(arguments, model),
        **_reach(arguments),
        **_ALWAYS,
        **from_tensors,
    }
    if model is not None:
        return attrs.evolve(model, **fields)
    fields |= _fields(arguments, _FREE)
    if fields["family"] == "t5":
        fields |= _fields(arguments, _FREE_OF_T5)
    if fields["family"] == "bert":
        fields["num_tokentypes"] = 2 if fields.get("bert_binary_head") else 0
    vocab_size = _value(arguments, "vocab_size", int)
    if vocab_size is None:
        vocab_size = _value(arguments, "padded_vocab_size", int)
    if vocab_size is not None:
        fields["vocab_size"] = vocab_size
    return ModelConfig(**fields) if fields.keys() >= _REQUIRED else None


def _arguments_not_built(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Names of arguments with which megafn's layers would compute something else."""
    for name in _NOT_BUILT:
        if arguments.get(name) not in (None, False, 0):
            yield name
    if arguments.get("softmax_type") not in (None, "vanilla"):
        yield "softmax_type"
    window = arguments.get("window_size")
    if window is None:
        return
    if _window(window) is None:
        yield "window_size"
    elif arguments.get("window_attn_skip_freq") not in (None, 0):
        yield "window_attn_skip_freq"


def _window(window_size: Any) -> int | None:
    """How many tokens before its own a token attends to, of a window that ends with its own.

    -1 is all of them. None: it is another window.
    """
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        return None
    before, after = window_size
    if type(before) is not int or before < -1 or type(after) is not int or after != 0:
        return None
    return before


# A layer of either stack, or the second part of a name that torch_dist gives to all layers at once.
_LAYER = re.compile(r"(language_model\.)?(encoder|decoder)\.layers\.(\d+)\.")


def fields_of_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields that names and shapes of stored tensors show: the family, its layers and its head.

    >>> fields_of_tensors({"decoder.layers.3.mlp.linear_fc1.weight": (16, 4)})
    {'family': 'gpt', 'num_layers': 4}
    >>> fields_of_tensors({"language_model.encoder.layers.0.mlp.dense_h_to_4h.bias": (16,),
    ...                    "classification_head.weight": (3, 4)})
    {'family': 'bert', 'num_layers': 1, 'num_labels': 3, 'bert_binary_head': False}
    """
    layers: dict[str, int] = {}
    is_legacy = False
    for name in shapes:
        match = _LAYER.match(name)
        if match:
            stack = match[2]
            layers[stack] = max(layers.get(stack, 0), int(match[3]) + 1)
            is_legacy |= match[1] is not None
    if layers.keys() == {"encoder", "decoder"}:
        return {
            "family": "t5",
            "num_layers": layers["encoder"],
            "num_decoder_layers": layers["decoder"],
        }
    number = max(layers.values(), default=0)
    labels = shapes.get("classification_head.weight")
    has_head = labels is not None or "lm_head.dense.weight" in shapes
    if "decoder" in layers or (is_legacy and not has_head):  # megatron.legacy calls GPT's encoder
        return {"family": "gpt", "num_layers": number}
    return {
        "family": "bert",
        "num_layers": number,
        "num_labels": None if labels is None else labels[0],
        "bert_binary_head": "binary_head.weight" in shapes,
    }


def _fields(arguments: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    fields = {}
    for argument, name in table.items():
        default = attrs.fields_dict(ModelConfig)[name].default
        kind = type(default) if type(default) in _TYPES else int  # sizes: no default, or None
        value = _value(arguments, argument, kind)
        if value is not None:
            fields[name] = value
    return fields


def _derived(arguments: Mapping[str, Any], model: ModelConfig | None) -> dict[str, Any]:
    """Fields that Megatron-LM says in other ways."""
    fields: dict[str, Any] = {}
    activation = _activation(arguments)
    if activation is not None and not _is_either_gelu(activation, model):
        fields["activation"] = activation
    if arguments.get("use_rotary_position_embeddings") is True:
        fields["position_embedding"] = "rope"
    untied = _value(arguments, "untie_embeddings_and_output_weights", bool)
    if untied is not None:
        fields["tie_word_embeddings"] = not untied
    groups = _value(arguments, "num_query_groups", int)
    if groups is not None and arguments.get("group_query_attention") is True:
        fields["num_query_groups"] = groups
    return fields


def _reach(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """How far rotary positions and attention reach, which a run may set anew."""
    fields = _fields(arguments, {"rotary_base": "rotary_base"})
    window = _window(arguments.get("window_size"))
    if window is not None and window >= 0:
        fields["sliding_window"] = window + 1  # with the token itself
    scaled = _value(arguments, "use_rope_scaling", bool)
    if scaled is not None:
        # megatron-core's are the defaults of RopeScaling otherwise
        factor = _value(arguments, "rope_scaling_factor", float) or 8.0
        fields["rope_scaling"] = RopeScaling(factor=float(factor)) if scaled else None
    return fields


def _activation(arguments: Mapping[str, Any]) -> str | None:
    """The activation; None if the arguments say nothing of it.

    Megatron-LM's GELU that is fused with a bias is the approximation by tanh.
    """
    swiglu = _value(arguments, "swiglu", bool)
    if swiglu is None:
        return None
    if swiglu:
        return "swiglu"
    if arguments.get("openai_gelu") is True:
        return "gelu_tanh"
    fused = arguments.get("bias_gelu_fusion") is True and arguments.get("add_bias_linear", True)
    return "gelu_tanh" if fused else "gelu"


def _is_either_gelu(activation: str, model: ModelConfig | None) -> bool:
    """Whether a config chose between the exact GELU and its approximation, which may differ."""
    gelus = ("gelu", "gelu_tanh")
    return model is not None and activation in gelus and model.activation in gelus


def _value(arguments: Mapping[str, Any], name: str, kind: type) -> Any:
    """An argument of this type, or None. A file may hold anything in its place."""
    value = arguments.get(name)
    if kind is int:
        return value if type(value) is int and value > 0 else None  # a size
    if isinstance(value, bool) and kind is not bool:
        return None
    return value if isinstance(value, _TYPES[kind]) else None

"""Hugging Face model configs as `model.*` fields.

Read by their attributes only; transformers is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from attrs import frozen

from megafn.pure.config.problems import (
    ConfigError,
    Problem,
    choice_problem,
    config_error,
    did_you_mean,
)
from megafn.pure.config.records import ModelConfig, RopeScaling
from megafn.pure.pretrained.activations import OF_T5, PLAIN

_BERT_HEADS = ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification")

_REQUIRED = object()


def model_fields(model: Any) -> dict[str, Any]:
    """`model.*` fields of a Hugging Face config, or of a model that has one, or of a ModelConfig.

    gpt2, llama, mistral, megatron-bert and t5 are known. Dropout is that of the config. Sequence
    lengths are left to the caller, who knows the data; "model.max_position_embeddings" is the
    length of the position table.

    Raises ConfigError if the model has what megatron-core's layers do not have.

    >>> from types import SimpleNamespace
    >>> model_fields(SimpleNamespace(model_type="bert"))
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: model.model_type = 'bert': its norms come after the \
residual sum, megatron-core's before it, so its weights would mean something else; choose \
megatron-bert, which has megatron-core's order
    """
    if isinstance(model, ModelConfig):
        fields = {a.name: getattr(model, a.name) for a in attrs.fields(ModelConfig)}
    else:
        source = _source(model)
        fields = _READERS[source.model_type](source)
    return {f"model.{name}": value for name, value in fields.items()}


@frozen
class _Source:
    """A Hugging Face config to read, and the class name of its model, "" if that is not known."""

    config: Any
    model_type: str
    head: str


def _source(model: Any) -> _Source:
    config = getattr(model, "config", model)
    model_type = getattr(config, "model_type", None)
    if model_type == "bert":
        raise _refusal(
            "model_type",
            model_type,
            "its norms come after the residual sum, megatron-core's before it, so its weights "
            "would mean something else; choose megatron-bert, which has megatron-core's order",
        )
    if model_type not in _READERS:
        raise _refusal(
            "model_type",
            model_type,
            f"give a Hugging Face config or model of {', '.join(_READERS)}, "
            f"or a ModelConfig{did_you_mean(str(model_type), _READERS)}",
        )
    if model is not config:
        return _Source(config, model_type, head=type(model).__name__)
    architectures = getattr(config, "architectures", None) or [""]
    return _Source(config, model_type, head=architectures[0] or "")


def _read(source: _Source, name: str, default: Any = _REQUIRED) -> Any:
    value = getattr(source.config, name, default)
    if value is _REQUIRED:
        raise _refusal(name, None, f"a {source.model_type} config has it; give one")
    return value


def _refuse_unless(source: _Source, name: str, *allowed: Any) -> None:
    """The first of the allowed values is the default of transformers."""
    value = _read(source, name, allowed[0])
    if value not in allowed:
        raise _refusal(
            name,
            value,
            f"megatron-core's layers do not have it; only {allowed[0]!r} can be trained",
        )


def _refusal(name: str, value: Any, remedy: str) -> ConfigError:
    return config_error([Problem(f"model.{name}", value, remedy)])


def _unknown_head(head: str, known: str) -> ConfigError:
    return config_error([Problem("model", head, f"this head is not built; give {known}")])


def _activation(value: Any) -> str:
    if value not in PLAIN:
        raise config_error([choice_problem("model's activation", value, PLAIN)])
    return PLAIN[value]


def _gpt2(source: _Source) -> dict[str, Any]:
    _refuse_unless(source, "scale_attn_weights", True)
    _refuse_unless(source, "scale_attn_by_inverse_layer_idx", False)
    _refuse_unless(source, "add_cross_attention", False)
    dropout = _read(source, "resid_pdrop", 0.1)
    _refuse_unless(source, "embd_pdrop", dropout)  # megatron-core has one hidden dropout
    return dict(
        family="gpt",
        num_layers=_read(source, "n_layer"),
        hidden_size=_read(source, "n_embd"),
        num_attention_heads=_read(source, "n_head"),
        vocab_size=_read(source, "vocab_size"),
        max_position_embeddings=_read(source, "n_positions"),
        ffn_hidden_size=_read(source, "n_inner", None),
        activation=_activation(_read(source, "activation_function", "gelu_new")),
        norm_epsilon=_read(source, "layer_norm_epsilon", 1e-5),
        hidden_dropout=dropout,
        attention_dropout=_read(source, "attn_pdrop", 0.1),
        init_method_std=_read(source, "initializer_range", 0.02),
        tie_word_embeddings=_read(source, "tie_word_embeddings", True),
    )


def _llama(source: _Source) -> dict[str, Any]:
    _refuse_unless(source, "mlp_bias", False)
    _refuse_unless(source, "attention_bias", False)
    return _llama_or_mistral(source)


def _mistral(source: _Source) -> dict[str, Any]:
    return _llama_or_mistral(source) | {"sliding_window": _read(source, "sliding_window", None)}


def _llama_or_mistral(source: _Source) -> dict[str, Any]:
    _refuse_unless(source, "hidden_act", "silu")
    rope = _rotary_parameters(source)
    return dict(
        family="gpt",
        num_layers=_read(source, "num_hidden_layers"),
        hidden_size=_read(source, "hidden_size"),
        num_attention_heads=_read(source, "num_attention_heads"),
        num_query_groups=_read(source, "num_key_value_heads", None),
        kv_channels=_read(source, "head_dim", None),
        ffn_hidden_size=_read(source, "intermediate_size"),
        vocab_size=_read(source, "vocab_size"),
        max_position_embeddings=_read(source, "max_position_embeddings"),
        position_embedding="rope",
        rotary_base=float(rope.get("rope_theta") or _read(source, "rope_theta", None) or 10_000.0),
        rope_scaling=_rope_scaling(source, rope),
        activation="swiglu",
        normalization="RMSNorm",
        norm_epsilon=_read(source, "rms_norm_eps", 1e-6),
        add_bias_linear=False,
        tie_word_embeddings=_read(source, "tie_word_embeddings", False),
        attention_dropout=_read(source, "attention_dropout", 0.0),
        init_method_std=_read(source, "initializer_range", 0.02),
    )


def _rotary_parameters(source: _Source) -> dict[str, Any]:
    """transformers 5 has rope_parameters, transformers 4 rope_scaling beside rope_theta."""
    return _read(source, "rope_parameters", None) or _read(source, "rope_scaling", None) or {}


def _rope_scaling(source: _Source, rope: dict[str, Any]) -> RopeScaling | None:
    """That of rope_type "llama3"; no other is built."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise _refusal(
            "rope_scaling", rope, "of scaled rotary positions only llama3 is built; give that"
        )
    names = [field.name for field in attrs.fields(RopeScaling)]
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise _refusal("rope_scaling", rope, f"{missing[0]} is missing; give it")
    return RopeScaling(**{name: rope[name] for name in names})


def _megatron_bert(source: _Source) -> dict[str, Any]:
    _refuse_unless(source, "position_embedding_type", "absolute")
    _refuse_unless(source, "is_decoder", False)
    head = source.head
    if head not in ("", "MegatronBertModel") and not head.endswith(_BERT_HEADS):
        raise _unknown_head(
            head, "MegatronBertForMaskedLM, ForPreTraining or ForSequenceClassification"
        )
    fields = dict(
        family="bert",
        num_layers=_read(source, "num_hidden_layers"),
        hidden_size=_read(source, "hidden_size"),
        num_attention_heads=_read(source, "num_attention_heads"),
        ffn_hidden_size=_read(source, "intermediate_size"),
        vocab_size=_read(source, "vocab_size"),
        max_position_embeddings=_read(source, "max_position_embeddings"),
        num_tokentypes=_read(source, "type_vocab_size", 2),
        activation=_activation(_read(source, "hidden_act", "gelu")),
        norm_epsilon=_read(source, "layer_norm_eps", 1e-12),
        hidden_dropout=_read(source, "hidden_dropout_prob", 0.1),
        attention_dropout=_read(source, "attention_probs_dropout_prob", 0.1),
        init_method_std=_read(source, "initializer_range", 0.02),
        bert_binary_head=head.endswith("ForPreTraining"),
    )
    if head.endswith("ForSequenceClassification"):
        fields["num_labels"] = _read(source, "num_labels", 2)
        fields["problem_type"] = _read(source, "problem_type", None)
    else:
        fields["tie_word_embeddings"] = _read(source, "tie_word_embeddings", True)
    return fields


def _t5(source: _Source) -> dict[str, Any]:
    _refuse_unless(source, "is_encoder_decoder", True)
    if source.head not in ("", "T5Model", "T5ForConditionalGeneration"):
        raise _unknown_head(source.head, "T5ForConditionalGeneration")
    activation = _read(source, "feed_forward_proj", "relu")
    if activation not in OF_T5:
        raise config_error([choice_problem("model.feed_forward_proj", activation, OF_T5)])
    start = _read(source, "decoder_start_token_id", None)
    if start is None:
        start = _read(source, "pad_token_id", None) or 0
    tied = _t5_is_tied(source)
    return dict(
        family="t5",
        num_layers=_read(source, "num_layers"),
        num_decoder_layers=_read(source, "num_decoder_layers", None) or _read(source, "num_layers"),
        hidden_size=_read(source, "d_model"),
        num_attention_heads=_read(source, "num_heads"),
        kv_channels=_read(source, "d_kv"),
        ffn_hidden_size=_read(source, "d_ff"),
        vocab_size=_read(source, "vocab_size"),
        max_position_embeddings=_read(source, "n_positions", 512),
        position_embedding="relative",
        relative_attention_num_buckets=_read(source, "relative_attention_num_buckets", 32),
        relative_attention_max_distance=_read(source, "relative_attention_max_distance", 128),
        activation=OF_T5[activation],
        normalization="RMSNorm",
        norm_epsilon=_read(source, "layer_norm_epsilon", 1e-6),
        add_bias_linear=False,
        hidden_dropout=_read(source, "dropout_rate", 0.1),
        attention_dropout=_read(source, "dropout_rate", 0.1),
        softmax_scale=1.0,
        tie_word_embeddings=tied,
        scale_decoder_outputs=tied,
        output_layer_bias=False,
        decoder_start_token_id=start,
    )


def _t5_is_tied(source: _Source) -> bool:
    """Whether T5's output layer shares the word embeddings' table, and reads scaled outputs.

    transformers 5 says tie_word_embeddings = True of every T5, T5 1.1 and Flan too, and keeps what
    their config said in scale_decoder_outputs: T5 1.0, which is tied, scales by d_model**-0.5.
    """
    scaled = _read(source, "scale_decoder_outputs", None)
    if scaled is not None:
        return bool(scaled)
    return _read(source, "tie_word_embeddings", True)


_READERS: dict[str, Callable[[_Source], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "megatron-bert": _megatron_bert,
    "t5": _t5,
}

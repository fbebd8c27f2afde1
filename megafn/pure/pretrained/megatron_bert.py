"""MegatronBert, BERT with norms before the sublayers: its masked-token heads, and its labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megafn.pure.config.problems import choice_problem
from megafn.pure.config.records import ModelConfig
from megafn.pure.pretrained.activations import PLAIN, name_in_transformers
from megafn.pure.pretrained.architecture import Architecture
from megafn.pure.pretrained.config_reader import ConfigReader
from megafn.pure.pretrained.sizes import read_sizes, sizes_config
from megafn.pure.pretrained.stored_slice import (
    Shape,
    SliceRule,
    Slices,
    query_key_value,
    renamed,
    slices_by_name,
)

_DEFAULT_LABELS = 2
_PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


def _shared_fields(reader: ConfigReader) -> dict[str, Any]:
    reader.require(
        "position_embedding_type",
        "absolute",
        "other positions than learned ones are not built for this architecture; "
        "choose a model with absolute ones",
    )
    reader.require(
        "is_decoder",
        False,
        "a decoder of this architecture is not built; choose an encoder",
    )
    return {
        "family": "bert",
        **read_sizes(reader),
        "num_tokentypes": reader.integer("type_vocab_size", 2),
        "norm_epsilon": reader.number("layer_norm_eps", 1e-12),
        "hidden_dropout": reader.number("hidden_dropout_prob", 0.1),
        "attention_dropout": reader.number("attention_probs_dropout_prob", 0.1),
        "init_method_std": reader.number("initializer_range", 0.02),
    }


def _shared_config(model: ModelConfig) -> dict[str, Any]:
    return {
        **sizes_config(model),
        "type_vocab_size": model.num_tokentypes,
        "hidden_act": name_in_transformers(model.activation, PLAIN),
        "layer_norm_eps": model.norm_epsilon,
        "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.tie_word_embeddings,
    }


def _masked_fields(reader: ConfigReader, *, binary_head: bool) -> dict[str, Any]:
    reader.require(
        "hidden_act",
        "gelu",
        "megafn's masked-token head has gelu; choose a model with gelu, or with another head",
    )
    return {
        **_shared_fields(reader),
        "activation": "gelu",
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", True),
        "bert_binary_head": binary_head,
    }


def _label_fields(reader: ConfigReader) -> dict[str, Any]:
    labels = reader.mapping("id2label")
    return {
        **_shared_fields(reader),
        "activation": reader.translated("hidden_act", PLAIN, "gelu"),
        "num_labels": len(labels) or reader.integer("num_labels", _DEFAULT_LABELS),
        "problem_type": _problem_type(reader),
    }


def _problem_type(reader: ConfigReader) -> str | None:
    kind = reader.get("problem_type")
    if kind is not None and kind not in _PROBLEM_TYPES:
        reader.problems.append(choice_problem("problem_type", kind, _PROBLEM_TYPES))
    return kind


def _label_config(model: ModelConfig) -> dict[str, Any]:
    labels = {str(number): f"LABEL_{number}" for number in range(model.num_labels or 0)}
    return {
        **_shared_config(model),
        "id2label": labels,
        "label2id": {label: int(number) for number, label in labels.items()},
        "problem_type": model.problem_type,
    }


# ------------------------------------------------------------------------ where parameters lie

_LAYER = "bert.encoder.layer.{layer}."
_ATTENTION = f"{_LAYER}attention.self."
_IN_OUR_LAYER = "encoder.layers.*."
_DECODER = "cls.predictions.decoder"

_RULES: dict[str, SliceRule] = {
    "embedding.word_embeddings": renamed("bert.embeddings.word_embeddings"),
    "embedding.position_embeddings": renamed("bert.embeddings.position_embeddings"),
    "embedding.tokentype_embeddings": renamed("bert.embeddings.token_type_embeddings"),
    f"{_IN_OUR_LAYER}input_layernorm": renamed(f"{_LAYER}attention.ln"),
    f"{_IN_OUR_LAYER}self_attention.linear_qkv": query_key_value(
        f"{_ATTENTION}query", f"{_ATTENTION}key", f"{_ATTENTION}value"
    ),
    f"{_IN_OUR_LAYER}self_attention.linear_proj": renamed(f"{_LAYER}attention.output.dense"),
    f"{_IN_OUR_LAYER}pre_mlp_layernorm": renamed(f"{_LAYER}ln"),
    f"{_IN_OUR_LAYER}mlp.linear_fc1": renamed(f"{_LAYER}intermediate.dense"),
    f"{_IN_OUR_LAYER}mlp.linear_fc2": renamed(f"{_LAYER}output.dense"),
    "encoder.final_layernorm": renamed("bert.encoder.ln"),
    "pooler.dense": renamed("bert.pooler.dense"),
    "lm_head.dense": renamed("cls.predictions.transform.dense"),
    "lm_head.layer_norm": renamed("cls.predictions.transform.LayerNorm"),
    "binary_head": renamed("cls.seq_relationship"),
    "classification_head": renamed("classifier"),
}
_TIED = slices_by_name(_RULES | {"output_layer": renamed("cls.predictions")})
_UNTIED = slices_by_name(_RULES | {"output_layer": renamed(_DECODER)})


def _slices(name: str, shape: Shape, model: ModelConfig) -> Slices:
    """The output layer's bias lies beside a tied layer, and in the layer if it is not tied."""
    rules = _TIED if model.tie_word_embeddings else _UNTIED
    return rules(name, shape, model)


def _copies(model: ModelConfig) -> dict[str, str]:
    if model.num_labels is not None or not model.tie_word_embeddings:
        return {}
    return {
        f"{_DECODER}.weight": "bert.embeddings.word_embeddings.weight",
        f"{_DECODER}.bias": "cls.predictions.bias",
    }


def _architecture(
    head: str,
    fields: Callable[[ConfigReader], dict[str, Any]],
    config: Callable[[ModelConfig], dict[str, Any]],
) -> Architecture:
    return Architecture(
        name=f"MegatronBert{head}",
        model_type="megatron-bert",
        family="bert",
        base_model="MegatronBertModel",
        base_prefix="bert.",
        fields=fields,
        config=config,
        slice_function=_slices,
        heads=("cls.", "classifier.", "bert.pooler."),
        # the second beside a layer that is not tied, whose bias is its own: nothing reads it then
        buffers=(r"\.embeddings\.position_ids$", r"^cls\.predictions\.bias$"),
        copies=_copies,
    )


MASKED_LM = _architecture("ForMaskedLM", partial(_masked_fields, binary_head=False), _shared_config)
PRETRAINING = _architecture(
    "ForPreTraining", partial(_masked_fields, binary_head=True), _shared_config
)
SEQUENCE_CLASSIFICATION = _architecture("ForSequenceClassification", _label_fields, _label_config)

"""What Megatron-LM calls the parameters of a whole model in its checkpoints.

GPT is megatron-core's GPTModel, and so are newer BERT and T5 models: their names are megafn's own,
apart from norms that Transformer Engine joins with the layer after them. Older models, among them
BERT and T5 as accelerate trains them, are of megatron.legacy, with other names and the same layout
of each tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from attrs import frozen

# The prefix that all layers of megatron.legacy have.
LEGACY = "language_model."

# Norms as Transformer Engine's layers hold them. Files of torch_dist always name them so.
_JOINED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}

_LEGACY_LAYER = {
    "input_layernorm.": "input_norm.",
    "self_attention.linear_qkv.": "self_attention.query_key_value.",
    "self_attention.linear_proj.": "self_attention.dense.",
    "pre_cross_attn_layernorm.": "post_attention_norm.",
    "cross_attention.linear_q.": "inter_attention.query.",
    "cross_attention.linear_kv.": "inter_attention.key_value.",
    "cross_attention.linear_proj.": "inter_attention.dense.",
    "pre_mlp_layernorm.": "post_attention_norm.",
    "mlp.linear_fc1.": "mlp.dense_h_to_4h.",
    "mlp.linear_fc2.": "mlp.dense_4h_to_h.",
}

_LEGACY_OUTSIDE_LAYERS = {
    "embedding.": f"{LEGACY}embedding.",
    "encoder.final_layernorm.": f"{LEGACY}encoder.final_norm.",
    "decoder.final_layernorm.": f"{LEGACY}decoder.final_norm.",
    "pooler.": f"{LEGACY}pooler.",
    "output_layer.weight": f"{LEGACY}output_layer.weight",
    "output_layer.bias": "lm_head.bias",
    "lm_head.layer_norm.": "lm_head.norm.",
}

_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.+)")


def core_names(name: str) -> tuple[str, ...]:
    """What megatron-core may call a parameter of megafn, in the order of preference.

    >>> core_names("decoder.layers.3.input_layernorm.weight")
    ('decoder.layers.3.input_layernorm.weight',
     'decoder.layers.3.self_attention.linear_qkv.layer_norm_weight')
    """
    names = [name]
    for ours, theirs in _JOINED_NORMS.items():
        if f".{ours}" in name:
            names.append(name.replace(f".{ours}", f".{theirs}"))
    if name.startswith("output_layer."):
        names.append(f"lm_head.{name}")  # T5
    return tuple(names)


def legacy_name(name: str, family: str) -> str:
    """What megatron.legacy calls a parameter of megafn.

    >>> legacy_name("decoder.layers.3.pre_mlp_layernorm.bias", "t5")
    'language_model.decoder.layers.3.post_inter_attention_norm.bias'
    >>> legacy_name("decoder.layers.3.mlp.linear_fc1.bias", "gpt")
    'language_model.encoder.layers.3.mlp.dense_h_to_4h.bias'
    """
    if family == "gpt" and name.startswith("decoder."):
        name = name.replace("decoder.", "encoder.", 1)
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return _replace_beginning(name, _LEGACY_OUTSIDE_LAYERS)
    stack, number, rest = layer.groups()
    if stack == "decoder" and rest.startswith("pre_mlp_layernorm."):
        rest = rest.replace("pre_mlp_layernorm.", "post_inter_attention_norm.")
    return f"{LEGACY}{stack}.layers.{number}.{_replace_beginning(rest, _LEGACY_LAYER)}"


def _replace_beginning(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def modern_legacy_name(stored: str) -> str:
    """A name of megatron.legacy as its newest version has it; it was renamed over the years.

    >>> modern_legacy_name("language_model.transformer.layers.0.attention.dense.bias")
    'language_model.encoder.layers.0.self_attention.dense.bias'
    """
    name = stored.replace(f"{LEGACY}transformer.", f"{LEGACY}encoder.")
    return name.replace(".attention.", ".self_attention.").replace("layernorm", "norm")


# --------------------------------------------------------------- how a tensor is cut over tp ranks


@frozen
class Cut:
    """Along which dimension a tensor is cut (None: every rank holds all of it).

    stride: in how many blocks, each of which is cut.
    """

    dim: int | None
    stride: int = 1


_NORM = re.compile(r"\.layer_norm_(weight|bias)$")
_COLUMN_PARALLEL = re.compile(
    r"(word_embeddings|output_layer|linear_(qkv|q|kv|fc1)"
    r"|query_key_value|query|key_value|dense_h_to_4h)\.(weight|bias)$"
)
_ROW_PARALLEL = re.compile(r"(linear_(proj|fc2)|attention\.dense|dense_4h_to_h)\.weight$")
_FIRST_OF_MLP = re.compile(r"(linear_fc1|dense_h_to_4h)\.")
_VOCABULARY = re.compile(r"(word_embeddings\.weight|output_layer\.(weight|bias)|^lm_head\.bias)$")


def cut_of(stored: str, gated: bool) -> Cut:
    """How a stored tensor, by its name in either table, is cut over tensor-parallel ranks.

    >>> cut_of("decoder.layers.0.mlp.linear_fc1.weight", gated=True)
    Cut(dim=0, stride=2)
    >>> cut_of("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", gated=True)
    Cut(dim=None, stride=1)
    """
    if _NORM.search(stored):
        return Cut(None)
    if _COLUMN_PARALLEL.search(stored) or _VOCABULARY.search(stored):
        return Cut(0, 2 if gated and _FIRST_OF_MLP.search(stored) else 1)
    if _ROW_PARALLEL.search(stored):
        return Cut(1)
    return Cut(None)


def is_cut_over_vocabulary(stored: str) -> bool:
    """Whether the rows of a stored tensor are token ids; Megatron-LM pads their number."""
    return _VOCABULARY.search(stored) is not None


# ------------------------------------------------------------------------------ what is no weight

_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
_BUFFER = re.compile(r"(_extra_state|inv_freq)(/|$)")
_HEAD = re.compile(
    rf"({re.escape(LEGACY)})?(output_layer|lm_head|pooler|binary_head|classification_head)\."
)


def is_of_optimizer(stored: str) -> bool:
    return _OPTIMIZER.match(stored) is not None


def is_buffer(stored: str) -> bool:
    """Whether a stored tensor is a state of Transformer Engine or rotary frequencies."""
    return _BUFFER.search(stored) is not None


def is_stored_head(stored: str) -> bool:
    """Whether a stored tensor belongs to the model's head."""
    return _HEAD.match(stored) is not None


# Names of a table or a bias that has another name too.
_SECOND_NAMES = {
    "word_embeddings_for_head.weight": f"{LEGACY}embedding.word_embeddings.weight",
    "position_embeddings.weight": "embedding.position_embeddings.weight",  # T5
    "lm_head.output_layer.weight": "output_layer.weight",  # T5
    "lm_head.output_layer.bias": "output_layer.bias",
}


def is_second_name(stored: str, names: Collection[str]) -> bool:
    """Whether a stored tensor is also there under a name that `core_names` prefers.

    >>> is_second_name("lm_head.output_layer.bias", {"lm_head.output_layer.bias"})
    False
    """
    return _SECOND_NAMES.get(stored) in names

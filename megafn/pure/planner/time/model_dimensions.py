"""The dimensions of a model that decide how long its layers and its output layer take."""

from __future__ import annotations

from functools import lru_cache

from attrs import frozen

from megafn.pure.config.records import ModelConfig
from megafn.pure.families.built_in import spec_of


@frozen(kw_only=True)
class StackDimensions:
    """One stack of equal layers. Lengths are in tokens, for one sequence."""

    layers: int
    length: int
    # Keys that a query attends to on average, and those that a kernel without masks computes.
    attended: float
    keys: int
    # Of the sequence that cross-attention reads; 0: no cross-attention.
    context: int


@frozen(kw_only=True)
class ModelDimensions:
    """Widths and stacks of a model. Of a T5, the last stack is the decoder."""

    hidden: int
    heads: int
    # Widths of all queries, of all keys and values together, of the MLP's first and second input.
    query: int
    key_value: int
    up: int
    ffn: int
    vocab: int
    # Tokens of the output layer for one sequence, 0 if it has none, and width of a layer before it.
    head_length: int
    head_inner: int
    stacks: tuple[StackDimensions, ...]
    # Copies of the word table in a pipeline.
    word_tables: int
    gated: bool
    # Share of the layers that rotate queries and keys.
    rotated: float
    bias: bool
    dropout: bool


@lru_cache(maxsize=64)
def model_dimensions(model: ModelConfig) -> ModelDimensions:
    """The widths of a model. Raises ConfigError for an unknown family."""
    spec = spec_of(model)
    query = model.num_attention_heads * model.head_size
    has_output_layer = model.family != "bert" or model.num_labels is None
    stacks = []
    for i, name in enumerate(spec.stacks):
        stacks.append(_stack_dimensions(model, name, decoder=i > 0))
    return ModelDimensions(
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        query=query,
        key_value=2 * model.query_groups * model.head_size,
        up=model.ffn_size * (2 if model.gated else 1),
        ffn=model.ffn_size,
        vocab=model.vocab_size,
        head_length=stacks[-1].length if has_output_layer else 0,
        head_inner=model.hidden_size if model.family == "bert" else 0,
        stacks=tuple(stacks),
        # one at the beginning of each stack, and one in the output layer
        word_tables=len(stacks) + (model.tie_word_embeddings and has_output_layer),
        gated=model.gated,
        rotated=_rotated_share(model),
        bias=model.add_bias_linear,
        dropout=model.hidden_dropout > 0,
    )


def _rotated_share(model: ModelConfig) -> float:
    if model.position_embedding != "rope":
        return 0.0
    return 1 - len(model.layers_without_rope) / model.num_layers


def _stack_dimensions(model: ModelConfig, name: str, *, decoder: bool) -> StackDimensions:
    """`decoder`: a second stack, which attends to what the first one computed."""
    length = model.decoder_length if decoder else model.seq_length
    window = length if model.sliding_window is None else min(length, model.sliding_window)
    causal = name == "decoder"
    return StackDimensions(
        layers=model.decoder_layers if decoder else model.num_layers,
        length=length,
        attended=window - window * window / (2 * length) if causal else length,
        keys=window,
        context=model.seq_length if decoder else 0,
    )

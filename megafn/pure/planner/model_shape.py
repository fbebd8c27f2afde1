"""A model as the planner sees it: stacks of equal layers, tables, and how stages divide them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from attrs import frozen

from megafn.pure.config.records import ModelConfig
from megafn.pure.families.built_in import parameter_shapes, spec_of


@frozen(kw_only=True)
class StackShape:
    """One stack of equal layers. Lengths are in tokens, for one sequence."""

    layers: int
    length: int
    # Keys that a query attends to on average, and those that a kernel without masks computes.
    attended: float
    keys: int
    # Of the sequence that cross-attention reads; 0: no cross-attention.
    context: int
    # Elements of a layer that tensor parallelism cuts, and those that every rank holds.
    matrices: float
    vectors: float


@frozen(kw_only=True)
class ModelShape:
    """Widths, stacks and tables of a model. Of a T5, the last stack is the decoder."""

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
    stacks: tuple[StackShape, ...]
    word_table: float
    tied: bool
    gated: bool
    rope: bool
    bias: bool
    dropout: bool


@cache
def model_shape(model: ModelConfig) -> ModelShape:
    """Raises ConfigError if the family does not say which parameters its models have."""
    shapes = parameter_shapes(model)
    spec = spec_of(model)
    query = model.num_attention_heads * model.head_size
    has_output_layer = model.family != "bert" or model.num_labels is None
    stacks = []
    for i, name in enumerate(spec.stacks):
        stacks.append(_stack_shape(model, shapes, name, decoder=i > 0))
    return ModelShape(
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
        word_table=model.vocab_size * model.hidden_size,
        tied=model.tie_word_embeddings,
        gated=model.gated,
        rope=model.position_embedding == "rope",
        bias=model.add_bias_linear,
        dropout=model.hidden_dropout > 0,
    )


def _stack_shape(
    model: ModelConfig, shapes: dict[str, tuple[int, ...]], name: str, *, decoder: bool
) -> StackShape:
    """`decoder`: a second stack, which attends to what the first one computed."""
    first_layer = f"{name}.layers.0."
    of_a_layer = [shape for key, shape in shapes.items() if key.startswith(first_layer)]
    length = model.decoder_length if decoder else model.seq_length
    window = length if model.sliding_window is None else min(length, model.sliding_window)
    causal = name == "decoder"
    return StackShape(
        layers=model.decoder_layers if decoder else model.num_layers,
        length=length,
        attended=window - window * window / (2 * length) if causal else length,
        keys=window,
        context=model.seq_length if decoder else 0,
        matrices=_total(shape for shape in of_a_layer if len(shape) > 1),
        vectors=_total(shape for shape in of_a_layer if len(shape) == 1),
    )


def _total(shapes: Iterable[tuple[int, ...]]) -> float:
    return sum(_elements(shape) for shape in shapes)


def _elements(shape: tuple[int, ...]) -> float:
    elements = 1
    for size in shape:
        elements *= size
    return elements


# --------------------------------------------------------------------------------------- stages


@frozen(kw_only=True)
class StageLoad:
    """Stages that hold the same, and how many there are of them."""

    # Layers of each stack.
    layers: tuple[float, ...]
    has_embedding: bool
    has_head: bool
    stages: int


@cache
def stage_loads(
    layers: tuple[int, ...],
    pp: int,
    first: int | None = None,
    last: int | None = None,
    split: int | None = None,
) -> tuple[StageLoad, ...]:
    """How `layers` of each stack are divided over `pp` stages.

    first, last: layers of the outer stages, if given. split: the first stage of the second stack.
    A layout that does not divide the layers is priced with a fraction of a layer.

    >>> [(load.layers, load.stages) for load in stage_loads((32,), pp=4)]
    [((8.0,), 1), ((8.0,), 2), ((8.0,), 1)]
    """
    if pp == 1:
        whole = tuple(float(count) for count in layers)
        return (StageLoad(layers=whole, has_embedding=True, has_head=True, stages=1),)
    if len(layers) > 1:
        return _two_stack_loads(layers, pp, pp // 2 if split is None else split)
    middle = pp - (first is not None) - (last is not None)
    left = layers[0] - (first or 0) - (last or 0)
    share = left / middle if middle else 0.0
    outer_first = share if first is None else float(first)
    outer_last = share if last is None else float(last)
    loads = [StageLoad(layers=(outer_first,), has_embedding=True, has_head=False, stages=1)]
    if pp > 2:
        loads.append(StageLoad(layers=(share,), has_embedding=False, has_head=False, stages=pp - 2))
    loads.append(StageLoad(layers=(outer_last,), has_embedding=False, has_head=True, stages=1))
    return tuple(loads)


def _two_stack_loads(layers: tuple[int, ...], pp: int, split: int) -> tuple[StageLoad, ...]:
    """Encoder stages, then decoder stages. The first of each has an embedding."""
    of_encoder = layers[0] / max(1, split)
    of_decoder = layers[1] / max(1, pp - split)
    encoder = StageLoad(
        layers=(of_encoder, 0.0), has_embedding=True, has_head=False, stages=max(1, split)
    )
    decoder = StageLoad(
        layers=(0.0, of_decoder), has_embedding=True, has_head=True, stages=max(1, pp - split)
    )
    return (encoder, decoder)

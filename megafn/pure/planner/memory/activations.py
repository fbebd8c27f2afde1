"""Bytes that a forward pass keeps for its backward pass, and the most that a backward pass adds.

Counted tensor by tensor, as autograd keeps them of the layers in `megafn.runtime.model.layers`, for
one micro-batch on one rank. After arXiv 2205.05198, with these differences: attention is torch's
fused kernel, which keeps no scores (so "selective" recomputation saves nearly nothing), gates and
rotary positions are not fused (`implementation="megatron"`: they are), and keys and values are
whole under context parallelism. Kernels are those of GPUs: dropout keeps a byte for each element,
RMSNorm its input and one number a token.
"""

from __future__ import annotations

from functools import lru_cache

from attrs import frozen

from megafn.pure.config.records import ModelConfig, RecomputeConfig, padded_vocab_size
from megafn.pure.families.built_in import spec_of
from megafn.pure.planner.implementation import implementation_of
from megafn.pure.planner.records import Layout

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# Queries that attend at once to a sliding window smaller than this.
_LEAST_BLOCK = 128
# Logits that the loss works on at once, on a GPU.
_LOSS_BLOCK = 2**24


@frozen(kw_only=True)
class Cut:
    """How a micro-batch is cut, and what computes it: all that decides its activations."""

    dtype: str
    # Gates and rotary positions by one kernel each.
    fused: bool
    micro_batch_size: int
    tp: int
    cp: int
    sequence_parallel: bool

    @property
    def element(self) -> int:
        """Bytes of a number."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def share(self) -> float:
        """Of the sequence, in norms and dropout."""
        return 1 / self.tp if self.sequence_parallel else 1.0


def cut_of(layout: Layout, dtype: str, implementation: str) -> Cut:
    return Cut(
        dtype=dtype,
        fused=implementation_of(implementation).fused,
        micro_batch_size=layout.micro_batch_size,
        tp=layout.tp,
        cp=layout.cp,
        sequence_parallel=layout.sequence_parallel,
    )


@frozen(kw_only=True)
class LayerActivations:
    """Bytes of one layer for one micro-batch."""

    # Kept until its backward pass, without and with "selective" recomputation.
    whole: float
    selective: float
    # Its input: what "full" recomputation keeps.
    input: float
    # What the backward pass adds at most to `whole`, before it has freed as much.
    backward: float


@frozen(kw_only=True)
class EndActivations:
    """Bytes of what is before the first layer or after the last one, for one micro-batch."""

    # Kept until the backward pass.
    kept: float
    # What the backward pass adds at most.
    backward: float


@frozen(kw_only=True)
class MicroBatchActivations:
    """All that one micro-batch needs anywhere in the pipeline. Tuples are by stack."""

    layers: tuple[LayerActivations, ...]
    # What the layers of a stage share: T5's relative positions.
    shared: tuple[float, ...]
    # What recomputed layers share: rotary angles.
    shared_recomputed: float
    embeddings: tuple[EndActivations, ...]
    head: EndActivations
    # The gradient of one rank's part of the word table.
    word_table: float
    # The hidden state of each stack, on one rank.
    hidden: tuple[float, ...]
    # The buffer in which megatron-core gathers a matrix's input under sequence parallelism.
    gathered: float

    @property
    def message(self) -> float:
        """What one stage sends to the next: for T5 both halves, one after the other."""
        return sum(self.hidden)


@lru_cache(maxsize=4096)
def micro_batch_activations(model: ModelConfig, cut: Cut) -> MicroBatchActivations:
    """Of a micro-batch that is cut in this way."""
    stacks = range(len(spec_of(model).stacks))
    lengths = (model.seq_length, model.decoder_length)
    position = cut.micro_batch_size * model.hidden_size * cut.element / cut.cp
    gathers = cut.sequence_parallel and cut.tp > 1
    return MicroBatchActivations(
        layers=tuple(layer_activations(model, cut, stack) for stack in stacks),
        shared=tuple(relative_positions(model, cut, stack) for stack in stacks),
        shared_recomputed=rotary_angles(model, cut),
        embeddings=tuple(embedding_activations(model, cut, stack) for stack in stacks),
        head=head_activations(model, cut),
        word_table=_word_table(model, cut),
        hidden=tuple(lengths[stack] * position * cut.share for stack in stacks),
        gathered=max(lengths[stack] for stack in stacks) * position if gathers else 0.0,
    )


# ------------------------------------------------------------------------------------- layers


def layer_activations(model: ModelConfig, cut: Cut, stack: int) -> LayerActivations:
    """Of one layer of a stack, `FamilySpec.stacks[stack]`, the mean over its layers."""
    decoder = stack == 1
    length = model.decoder_length if decoder else model.seq_length
    tokens = length * cut.micro_batch_size / cut.cp
    hidden = tokens * model.hidden_size * cut.share * cut.element

    attention, recomputed_attention = _self_attention(model, cut, length)
    cross, recomputed_cross = _cross_attention(model, cut, tokens) if decoder else (0.0, 0.0)
    norms = 3 if decoder else 2
    # of each block: its norm's input and output, which the first matrix reads
    blocks = norms * (2 * hidden + _norm_statistics(model) * tokens * cut.share)
    if model.parallel_residual:
        # both norms have the same input
        blocks -= hidden
    if model.hidden_dropout:
        blocks += norms * hidden / cut.element
    blocks += _mlp(model, cut) * tokens * cut.element
    return LayerActivations(
        whole=blocks + attention + cross,
        selective=blocks + recomputed_attention + recomputed_cross,
        input=hidden,
        backward=_layer_backward(model, cut, tokens),
    )


def _norm_statistics(model: ModelConfig) -> int:
    """Bytes a token: the mean and the inverse of the deviation, in fp32; RMSNorm has no mean."""
    return 8 if model.normalization == "LayerNorm" else 4


@frozen(kw_only=True)
class _Heads:
    """Widths of one rank's part of an attention."""

    queries: int
    # Keys, and as many values.
    keys: int
    count: int
    # Queries are copied to be one after the other.
    regrouped: bool


def _heads(model: ModelConfig, tp: int) -> _Heads:
    count = model.num_attention_heads // tp
    groups = max(1, model.query_groups // tp)
    return _Heads(
        queries=count * model.head_size,
        keys=groups * model.head_size,
        count=count,
        regrouped=groups > 1 and count > groups,
    )


def _self_attention(model: ModelConfig, cut: Cut, length: int) -> tuple[float, float]:
    """Bytes that are kept, and those that are kept if the core is recomputed."""
    heads = _heads(model, cut.tp)
    tokens = length * cut.micro_batch_size / cut.cp
    # queries, keys and values come as one tensor, of which values, at least, are views
    mixed = heads.queries + 2 * heads.keys
    if cut.fused:
        kept = tokens * (mixed + heads.queries) * cut.element
        return kept + tokens * 4 * heads.count, kept

    rotated = 0.0
    if model.position_embedding == "rope":
        rotated = 1 - len(model.layers_without_rope) / model.num_layers
    # how often queries and keys are new tensors, made from parts of the mixed one
    new = 1.0 if model.qk_layernorm else rotated
    regrouped = float(heads.regrouped)
    new_queries = (new + (1 - new) * regrouped) * heads.queries
    new_keys = new * heads.keys
    beside = heads.queries * tokens * cut.element
    if rotated:
        # cosines and sines, for queries and for keys
        width = int(model.head_size * model.rotary_percent)
        beside += rotated * 4 * length / cut.cp * width * cut.element
    if model.qk_layernorm:
        # what the norms read
        beside += regrouped * heads.queries * tokens * cut.element
        normed_heads = (heads.queries + heads.keys) / model.head_size
        beside += _norm_statistics(model) * normed_heads * tokens
    recomputed = beside + (mixed + new_queries + new_keys) * tokens * cut.element

    inputs = mixed + new_queries + new_keys
    if cut.cp > 1:
        # keys and values are copied as they are gathered, and kept whole
        mixed_is_read = 1.0 if model.qk_layernorm else (1 - new) * (1 - regrouped)
        inputs = mixed_is_read * mixed + new_queries + 2 * cut.cp * heads.keys
        beside += 8 * length
    kept = beside + inputs * tokens * cut.element
    # for each query the logarithm of its sum of exponentials, in fp32
    kept += 4 * heads.count * tokens
    if _is_cut_into_parts(model, cut):
        # each part's output, beside the whole
        kept += heads.queries * tokens * cut.element
    return kept + _band_bytes(model, cut), recomputed


def _is_cut_into_parts(model: ModelConfig, cut: Cut) -> bool:
    """Whether queries attend in several calls, whose outputs are joined."""
    causal = spec_of(model).stacks == ("decoder",)
    return (causal and cut.cp > 1) or _is_banded(model)


def _is_banded(model: ModelConfig) -> bool:
    return model.sliding_window is not None and model.sliding_window < model.seq_length


def _band_bytes(model: ModelConfig, cut: Cut) -> float:
    """Of a sliding window's masks, on the context-parallel rank with the most."""
    if not _is_banded(model) or model.sliding_window is None:
        return 0.0
    length = model.seq_length
    if cut.cp == 1:
        return cut.element * _masked_pairs(0, length, model.sliding_window)
    # each rank has a chunk from the front and one from the back
    half = length // (2 * cut.cp)
    pairs = [
        _masked_pairs(rank * half, half, model.sliding_window)
        + _masked_pairs((2 * cut.cp - rank - 1) * half, half, model.sliding_window)
        for rank in range(cut.cp)
    ]
    return cut.element * max(pairs)


def _masked_pairs(first: int, count: int, window: int) -> int:
    """Queries at positions `first`, first + 1, ...: the size of their blocks' masks."""
    if first + count <= window:
        return 0
    block = max(window, _LEAST_BLOCK)
    pairs = 0
    for start in range(first, first + count, block):
        stop = min(start + block, first + count)
        keys = stop - max(0, start - window + 1)
        pairs += (stop - start) * keys
    return pairs


def _cross_attention(model: ModelConfig, cut: Cut, tokens: float) -> tuple[float, float]:
    """T5's: queries of the decoder, keys and values of the encoder's output."""
    heads = _heads(model, cut.tp)
    encoder_tokens = model.seq_length * cut.micro_batch_size / cut.cp
    projected = tokens * 2 * heads.queries + encoder_tokens * 2 * heads.queries
    recomputed = projected * cut.element
    return recomputed + 4 * heads.count * tokens, recomputed


def _mlp(model: ModelConfig, cut: Cut) -> float:
    """Numbers a token between the two matrices."""
    inner = model.ffn_size / cut.tp
    if model.gated:
        # both halves as one tensor and their product; unfused, also the activated half and the
        # other half, to which an offset is added
        return 3 * inner if cut.fused else 5 * inner
    if model.activation == "relu":
        return inner
    return 2 * inner


def _layer_backward(model: ModelConfig, cut: Cut, tokens: float) -> float:
    """The second matrix of the MLP comes first: at its backward pass the most is alive."""
    inner = model.ffn_size / cut.tp
    # the gradient of its output, and under sequence parallelism that of the whole sequence too
    outputs = tokens * model.hidden_size
    if cut.sequence_parallel and cut.tp > 1:
        outputs *= 1 + 2 * cut.share
    matrix = tokens * inner + model.hidden_size * inner
    activation = 1.0 * tokens * inner
    if model.gated or model.activation == "relu":
        # gradients on both sides of the product or of the function, of which one's result is free
        activation *= 2
    return (outputs + max(matrix, activation)) * cut.element


def rotary_angles(model: ModelConfig, cut: Cut) -> float:
    """Bytes of the angles that recomputed layers keep together, in fp32."""
    if model.position_embedding != "rope":
        return 0.0
    return 4 * model.seq_length / cut.cp * int(model.head_size * model.rotary_percent)


def relative_positions(model: ModelConfig, cut: Cut, stack: int) -> float:
    """Bytes of T5's biases of relative positions, which the layers of a stage share."""
    if model.position_embedding != "relative":
        return 0.0
    length = model.decoder_length if stack == 1 else model.seq_length
    # the bias of each head, the bucket of each distance, and where the decoder must not look
    of_a_pair = cut.element * model.num_attention_heads / cut.tp + 8 + (1 if stack == 1 else 0)
    return of_a_pair * length**2


# ---------------------------------------------------------------------------------------- ends


def embedding_activations(model: ModelConfig, cut: Cut, stack: int) -> EndActivations:
    """Of the tables of words and positions; their output is the first layer's input."""
    length = model.decoder_length if stack == 1 else model.seq_length
    tokens = length * cut.micro_batch_size / cut.cp
    # token ids, and places in the table
    kept = 16 * tokens
    if model.hidden_dropout:
        kept += tokens * model.hidden_size * cut.share
    return EndActivations(
        kept=kept, backward=_word_table(model, cut) + tokens * model.hidden_size * cut.element
    )


def head_activations(model: ModelConfig, cut: Cut) -> EndActivations:
    """Of the final norm, the output layer and the cross-entropy."""
    stacks = spec_of(model).stacks
    length = model.decoder_length if len(stacks) == 2 else model.seq_length
    tokens = length * cut.micro_batch_size / cut.cp
    hidden = tokens * model.hidden_size * cut.share * cut.element
    norm = 2 * hidden + _norm_statistics(model) * tokens * cut.share
    if model.num_labels is not None:
        return EndActivations(kept=norm, backward=hidden)
    if stacks == ("encoder",):
        # a matrix, the activation and another norm
        norm += 3 * hidden + _norm_statistics(model) * tokens * cut.share
    rows = _vocabulary_rows(model, cut)
    logits = tokens * rows * cut.element
    if cut.fused:
        # Megatron-LM's loss keeps the softmax, in fp32, and makes its gradient of that
        kept_logits = tokens * rows * 4
        block = 0.0
    else:
        # the gradient of the logits is computed in blocks of rows, in fp32
        kept_logits = logits
        block = 4 * min(tokens * rows, _LOSS_BLOCK)
    # largest logit, sum of exponentials, label's column, and whether it is here and counts
    statistics = 18 * tokens
    whole_input = tokens * model.hidden_size * cut.element
    matrix = _word_table(model, cut) + 2 * whole_input
    return EndActivations(
        kept=norm + kept_logits + statistics,
        backward=max(logits + block, matrix),
    )


def _vocabulary_rows(model: ModelConfig, cut: Cut) -> int:
    return padded_vocab_size(model.vocab_size, cut.tp) // cut.tp


def _word_table(model: ModelConfig, cut: Cut) -> float:
    """Bytes of one rank's part of a table of words, or of its gradient in a backward pass."""
    return _vocabulary_rows(model, cut) * model.hidden_size * cut.element


# ------------------------------------------------------------------------------------ in a chunk


def chunk_activations(
    layer: LayerActivations, layers: float, recompute: RecomputeConfig
) -> tuple[float, float]:
    """Bytes that a chunk of `layers` keeps for one micro-batch, and what backward adds to them."""
    if recompute.granularity == "selective":
        return layers * layer.selective, layer.backward
    if recompute.granularity != "full":
        return layers * layer.whole, layer.backward
    if recompute.method == "block":
        recomputed = min(recompute.num_layers, layers)
        not_recomputed = layers - recomputed
        kept = recomputed * layer.input + not_recomputed * layer.whole
        # their backward pass comes last, when the others are free
        # and the gradient that was received is still there
        again = layer.whole + layer.input - not_recomputed * layer.whole
        return kept, layer.backward + max(0.0, again)
    units = layers / recompute.num_layers
    # all of a unit, its input left out, its output counted
    return units * layer.input, recompute.num_layers * layer.whole + layer.backward

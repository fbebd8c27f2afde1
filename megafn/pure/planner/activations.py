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
from megafn.pure.planner.records import Layout

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# Queries that attend at once to a sliding window smaller than this.
_LEAST_BLOCK = 128


@frozen(kw_only=True)
class Cut:
    """How a micro-batch is cut, and what computes it: all that decides its activations."""

    dtype: str
    implementation: str
    micro_batch_size: int
    tp: int
    cp: int
    sequence_parallel: bool

    @property
    def element(self) -> int:
        """Bytes of a number."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def fused(self) -> bool:
        return self.implementation == "megatron"

    @property
    def share(self) -> float:
        """Of the sequence, in norms and dropout."""
        return 1 / self.tp if self.sequence_parallel else 1.0


def cut_of(layout: Layout, dtype: str, implementation: str) -> Cut:
    return Cut(
        dtype=dtype,
        implementation=implementation,
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
    # What of that remains until the backward pass of the first stage's table: the gradient of a
    # tied table, if it is on the same stage.
    remains: float = 0.0


# ------------------------------------------------------------------------------------- layers


@lru_cache(maxsize=65536)
def layer_activations(model: ModelConfig, cut: Cut, stack: int) -> LayerActivations:
    """Of one layer of a stack, `FamilySpec.stacks[stack]`, the mean over its layers."""
    decoder = stack == 1
    length = model.decoder_length if decoder else model.seq_length
    tokens = length * cut.micro_batch_size / cut.cp
    hidden = tokens * model.hidden_size * cut.share * cut.element

    attention, core = _self_attention(model, cut, length)
    cross = _cross_attention(model, cut, tokens) if decoder else 0.0
    mlp = _mlp(model, cut) * tokens * cut.element
    norms = 3 if decoder else 2
    # of each block: its norm's input and output, which the first matrix reads
    blocks = norms * (2 * hidden + _norm_statistics(model) * tokens * cut.share)
    dropout = norms * _dropout_mask(model, hidden / cut.element, cut)
    whole = blocks + dropout + attention + core + cross + mlp
    return LayerActivations(
        whole=whole,
        selective=whole - core,
        input=hidden,
        backward=_layer_backward(model, cut, tokens),
    )


def _norm_statistics(model: ModelConfig) -> int:
    """Bytes a token: the mean and the inverse of the deviation, in fp32; RMSNorm has no mean."""
    return 8 if model.normalization == "LayerNorm" else 4


def _dropout_mask(model: ModelConfig, elements: float, cut: Cut) -> float:
    return elements if model.hidden_dropout else 0.0


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
    """Bytes that the projections keep, and those that the core keeps beside its inputs."""
    heads = _heads(model, cut.tp)
    tokens = length * cut.micro_batch_size / cut.cp
    rotated = 0.0
    if model.position_embedding == "rope":
        rotated = 1 - len(model.layers_without_rope) / model.num_layers
    # queries, keys and values come as one tensor, of which values, at least, are views
    mixed = heads.queries + 2 * heads.keys
    if cut.fused:
        return tokens * (mixed + heads.queries) * cut.element, 4.0 * tokens * heads.count

    # queries and keys that are new tensors, made from parts of the mixed one
    new = 1.0 if model.qk_layernorm else rotated
    regrouped = float(heads.regrouped)
    kept: float = new * (heads.queries + heads.keys) + heads.queries
    statistics = 0.0
    if model.qk_layernorm:
        # what the norms read
        kept += regrouped * heads.queries
        statistics = _norm_statistics(model) * (heads.queries + heads.keys) / model.head_size
        mixed_is_read = 1.0
    else:
        kept += (1 - new) * regrouped * heads.queries
        mixed_is_read = (1 - new) * (1 - regrouped)
    core: float = 0.0
    if cut.cp > 1:
        # keys and values are copied as they are gathered, and kept whole
        core += 2 * cut.cp * heads.keys
        kept -= new * heads.keys
    else:
        # values are part of the mixed tensor
        mixed_is_read = 1.0
    kept += mixed_is_read * mixed
    bytes_kept = tokens * (kept * cut.element + statistics)
    bytes_core = tokens * (core * cut.element + 4 * heads.count)
    if _is_cut_into_parts(model, cut):
        # each part's output, beside the whole
        bytes_core += tokens * heads.queries * cut.element
    bytes_core += _band_bytes(model, cut)
    rotation = 4 * length / cut.cp * int(model.head_size * model.rotary_percent) * cut.element
    return bytes_kept + rotated * rotation, bytes_core


def _is_cut_into_parts(model: ModelConfig, cut: Cut) -> bool:
    """Whether queries attend in several calls, whose outputs are joined."""
    causal = spec_of(model).stacks == ("decoder",)
    return (causal and cut.cp > 1) or _is_banded(model)


def _is_banded(model: ModelConfig) -> bool:
    return model.sliding_window is not None and model.sliding_window < model.seq_length


def _band_bytes(model: ModelConfig, cut: Cut) -> float:
    """Of a sliding window's masks: for each block of queries, the keys that its windows cover."""
    if not _is_banded(model) or model.sliding_window is None:
        return 0.0
    block = max(model.sliding_window, _LEAST_BLOCK)
    queries = model.seq_length / cut.cp
    keys = min(model.seq_length, block + model.sliding_window - 1)
    return queries * keys * cut.element


def _cross_attention(model: ModelConfig, cut: Cut, tokens: float) -> float:
    """T5's: queries of the decoder, keys and values of the encoder's output."""
    heads = _heads(model, cut.tp)
    encoder_tokens = model.seq_length * cut.micro_batch_size / cut.cp
    kept = tokens * 2 * heads.queries + encoder_tokens * 2 * heads.queries
    return kept * cut.element + 4 * tokens * heads.count


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
    inner = model.ffn_size / cut.tp
    hidden = model.hidden_size
    gradients = tokens * (2 * inner + hidden * (1 + cut.share))
    return (gradients + hidden * inner) * cut.element


# ---------------------------------------------------------------------------------------- ends


@lru_cache(maxsize=65536)
def embedding_activations(model: ModelConfig, cut: Cut, stack: int) -> EndActivations:
    """Of the tables of words and positions; their output is the first layer's input."""
    length = model.decoder_length if stack == 1 else model.seq_length
    tokens = length * cut.micro_batch_size / cut.cp
    hidden = tokens * model.hidden_size * cut.share
    # token ids, and places in the table
    kept = 16 * tokens + _dropout_mask(model, hidden, cut)
    rows = padded_vocab_size(model.vocab_size, cut.tp) / cut.tp
    table = rows * model.hidden_size * cut.element
    return EndActivations(kept=kept, backward=table + tokens * model.hidden_size * cut.element)


@lru_cache(maxsize=65536)
def head_activations(model: ModelConfig, cut: Cut, *, tied_here: bool) -> EndActivations:
    """Of the final norm, the output layer and the cross-entropy.

    tied_here: the output layer is the word table of the same stage.
    """
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
    rows = padded_vocab_size(model.vocab_size, cut.tp) / cut.tp
    logits = tokens * rows * cut.element
    # largest logit, sum of exponentials, label's column, and whether it is here and counts
    statistics = 18 * tokens
    table = rows * model.hidden_size * cut.element
    whole_input = tokens * model.hidden_size * cut.element
    matrix = table + 2 * whole_input
    return EndActivations(
        kept=norm + logits + statistics,
        backward=max(logits, matrix),
        remains=table if tied_here else 0.0,
    )


# ------------------------------------------------------------------------------------ in a chunk


def chunk_activations(
    layer: LayerActivations, layers: float, recompute: RecomputeConfig
) -> tuple[float, float]:
    """Bytes that a chunk of `layers` keeps for one micro-batch, and what backward adds to them."""
    if recompute.granularity == "selective":
        return layers * layer.selective, layer.backward + layer.whole - layer.selective
    if recompute.granularity != "full":
        return layers * layer.whole, layer.backward
    if recompute.method == "block":
        recomputed = min(recompute.num_layers, layers)
        kept = recomputed * layer.input + (layers - recomputed) * layer.whole
        # recomputed layers come last in the backward pass, when the others are free
        again = layer.whole - layer.input - (layers - recomputed) * layer.whole
        return kept, layer.backward + max(0.0, again)
    units = layers / recompute.num_layers
    again = recompute.num_layers * layer.whole - layer.input
    return units * layer.input, again + layer.backward

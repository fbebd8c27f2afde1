"""What chunks are composed from: functions that build a part, and functions that compute with it.

Each part is megatron-core's and is given its process groups. Tensors are [sequence, batch, hidden]
between parts; under sequence parallelism each tp rank has its share of the sequence.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megafn.pure.config.records import ModelConfig, TrainConfig, padded_vocab_size
from megafn.runtime.model.chunk import Chunk, ChunkPlan
from megafn.runtime.model.key_value_cache import KeyValueCache
from megafn.runtime.model.layers import Norm
from megafn.runtime.model.rotary import rotary_angles_at, rotation_by
from megafn.runtime.parallel.context import cp_positions
from megafn.runtime.parallel.groups import ProcessGroups

# ------------------------------------------------------------------------------------ building


def token_embedding(plan: ChunkPlan) -> LanguageModelEmbedding:
    """Tables of words, learned positions and token types, as far as the config has them."""
    model = plan.config.model
    return LanguageModelEmbedding(
        plan.mcore,
        padded_vocab_size(model.vocab_size, plan.config.parallel.tp),
        model.position_rows,
        model.position_embedding,
        num_tokentypes=model.num_tokentypes,
        tp_group=plan.pg.tp,
    )


def one_stack_block(plan: ChunkPlan, layer: ModuleSpec) -> TransformerBlock:
    """The chunk's layers of a model that is one stack, and after the last one the final norm."""
    count = get_num_layers_to_build(plan.mcore, vp_stage=plan.vp_stage, pp_rank=plan.pg.place.pp)
    return TransformerBlock(
        plan.mcore,
        TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm),
        pre_process=plan.pre_process,
        post_process=plan.post_process,
        pg_collection=plan.pg.collection,
        vp_stage=plan.vp_stage,
    )


def output_layer(
    plan: ChunkPlan, *, beside_embedding: bool, bias: bool = False
) -> ColumnParallelLinear:
    """The layer that gives logits, cut over the vocabulary.

    beside_embedding: whether the chunk has an embedding too, so that a tied layer needs no weight
    of its own.
    """
    model = plan.config.model
    return ColumnParallelLinear(
        model.hidden_size,
        padded_vocab_size(model.vocab_size, plan.config.parallel.tp),
        config=plan.mcore,
        init_method=plan.mcore.init_method,
        bias=bias,
        skip_bias_add=False,
        gather_output=False,
        skip_weight_param_allocation=beside_embedding and model.tie_word_embeddings,
        tp_group=plan.pg.tp,
    )


def tie_word_tables(chunk: Chunk) -> None:
    """megatron-core's marks on the output layer and on the word table of the first stage."""
    embeds_only = chunk.pre_process and not chunk.post_process
    if embeds_only or hasattr(chunk, "output_layer"):
        chunk.setup_embeddings_and_output_layer()


# ----------------------------------------------------------------------------------- computing


def embed(
    chunk: Chunk,
    tokens: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    tokentype_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embedding [sequence / cp (/ tp), batch, hidden] of tokens [batch, sequence / cp].

    At the positions given, or at the tokens' places in the whole sequence.
    """
    if position_ids is None:
        cp = chunk.cp_group.size()
        sequence = tokens.size(1) * cp
        _check_position_table(sequence, chunk.plan.config.model)
        places = cp_positions(sequence, cp, chunk.plan.pg.place.cp, tokens.device)
        position_ids = places.expand_as(tokens)
    return chunk.embedding(tokens, position_ids, tokentype_ids)


def _check_position_table(sequence: int, model: ModelConfig) -> None:
    if model.position_embedding == "learned_absolute" and sequence > model.position_rows:
        raise ValueError(
            f"sequence length = {sequence}: the position table has {model.position_rows} rows; "
            f"raise model.max_position_embeddings or shorten the sequence."
        )


def rotary_angles(
    chunk: Chunk, tokens: torch.Tensor, position_ids: torch.Tensor | None
) -> torch.Tensor | None:
    """Angles [sequence / cp, 1, 1, width] of the tokens' places; None without rotary positions.

    Of positions given: [sequence / cp, batch, 1, width].
    """
    model = chunk.plan.config.model
    if model.position_embedding != "rope":
        return None
    if position_ids is None:
        cp = chunk.cp_group.size()
        position_ids = cp_positions(tokens.size(1) * cp, cp, chunk.plan.pg.place.cp, tokens.device)
    return rotary_angles_at(position_ids, model)


def one_stack_hidden(
    chunk: Chunk,
    block: TransformerBlock,
    tokens: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    tokentype_ids: torch.Tensor | None = None,
    cache: KeyValueCache | None = None,
) -> torch.Tensor:
    """The hidden state after the chunk's layers, of the embedding or of what the block received.

    cache: keys and values of the tokens before these, when generating.
    """
    hidden = None
    if chunk.pre_process:
        hidden = embed(chunk, tokens, position_ids, tokentype_ids)
    angles = rotary_angles(chunk, tokens, position_ids)
    if cache is not None and angles is not None:
        # once for all layers, which turn queries and keys by it
        rotation = rotation_by(angles, chunk.plan.mcore.params_dtype)
        cache = attrs.evolve(cache, rotation=rotation)
        angles = None
    return block(hidden, attention_mask, rotary_pos_emb=angles, packed_seq_params=cache)


def vocabulary_logits(chunk: Chunk, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [sequence / cp, batch, padded vocabulary / tp] of the last hidden state.

    The logits of padding are the dtype's minimum.
    """
    shared = chunk.shared_embedding_or_output_weight() if chunk.plan.ties_output else None
    logits, _ = chunk.output_layer(hidden, weight=shared)
    padding = padding_columns(chunk.plan.config, chunk.plan.pg)
    return _HidePadding.apply(logits, padding) if padding else logits


def padding_columns(config: TrainConfig, pg: ProcessGroups) -> int:
    """How many of this tp rank's columns of the vocabulary only pad it."""
    tp = config.parallel.tp
    columns = padded_vocab_size(config.model.vocab_size, tp) // tp
    tokens_from_here_on = config.model.vocab_size - pg.place.tp * columns
    tokens = min(max(tokens_from_here_on, 0), columns)
    return columns - tokens


class _HidePadding(torch.autograd.Function):
    """The last columns become the dtype's minimum, in place; their gradient is zero."""

    @staticmethod
    def forward(context: Any, logits: torch.Tensor, count: int) -> torch.Tensor:
        context.count = count
        context.mark_dirty(logits)
        logits[..., logits.size(-1) - count :] = torch.finfo(logits.dtype).min
        return logits

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        first = gradient.size(-1) - context.count
        # A softmax gives zeros there. On a CPU it is cheap to see that; on a GPU the look would
        # wait until the device has done everything before it, so the copy is always made.
        if gradient.device.type == "cpu" and not gradient[..., first:].any():
            return gradient, None
        gradient = gradient.clone()  # another function may read the one that was given
        gradient[..., first:] = 0
        return gradient, None

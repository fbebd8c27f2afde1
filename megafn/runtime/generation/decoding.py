"""Passes of a batch over the pipeline with a key-value cache: the next tokens' logits.

megatron-core's schedules are for training: here each stage computes, sends and returns, and one
batch may be in each stage at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.distributed as dist
from attrs import define, frozen

from megafn.pure.config.records import TrainConfig
from megafn.pure.config.sequence_unit import sequence_unit
from megafn.runtime.families.built_in import family_of
from megafn.runtime.generation.prompts import PaddedBatch
from megafn.runtime.generation.stage_messages import receive_hidden, send_hidden, unwrapped
from megafn.runtime.model.chunk import Chunk
from megafn.runtime.model.key_value_cache import KeyValueCache
from megafn.runtime.model.layers import Attention
from megafn.runtime.model.state import State
from megafn.runtime.parallel.tensor_collectives import gather_rows

# Packages whose modules compute each position by itself, but for attention, which is looked at.
_KNOWN_PACKAGES = ("torch", "megatron", "megafn")


def can_use_a_cache(state: State) -> bool:
    """Whether every module of the model, on all ranks, works on new tokens alone.

    Not if a custom family's forward takes no `cache`, nor with modules of a user's, which may look
    at other positions in ways that the cache does not know. Every rank must call it.
    """
    has_decode = family_of(state.config.model.family).encoder_decoder is not None
    here = all(_takes_a_cache(unwrapped(chunk), has_decode) for chunk in state.chunks)
    everywhere = torch.tensor(int(here), device=state.pg.device)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=state.pg.world)
    return bool(everywhere)


def _takes_a_cache(module: torch.nn.Module, has_decode: bool) -> bool:
    """has_decode: the family has a function of its own that is called with the cache."""
    if not isinstance(module, Chunk):
        return False
    if not has_decode and "cache" not in inspect.signature(module.functions.forward).parameters:
        return False
    for part in module.modules():
        if type(part).__module__.partition(".")[0] not in _KNOWN_PACKAGES:
            return False
        attention = getattr(part, "core_attention", None)
        if attention is not None and not isinstance(attention, Attention):
            return False
    return True


@define(kw_only=True, eq=False)
class Decoding:
    """A part of the prompts on its way: its tokens until now, and their keys and values.

    call: what a chunk computes of a pass. first_stage: the pipeline stage that embeds the tokens;
    those before it have no part in the decoder.
    """

    batch: PaddedBatch
    cache: KeyValueCache
    call: Callable[[Any, Pass], torch.Tensor]
    first_stage: int = 0

    def append(self, ids: torch.Tensor) -> None:
        """Add the next token [batch] of each row."""
        tokens = torch.cat([self.batch.tokens, ids[:, None]], dim=1)
        self.batch = attrs.evolve(self.batch, tokens=tokens)


@frozen(kw_only=True, eq=False)
class Pass:
    """The new tokens of one batch, as every chunk of this pass gets them."""

    tokens: torch.Tensor  # [batch, sequence], filled up for sequence parallelism
    positions: torch.Tensor
    hidden: torch.Tensor | None
    cache: KeyValueCache


def next_pass(decoding: Decoding, config: TrainConfig) -> Pass:
    """The pass over all tokens that are not in the cache yet, which then counts them as cached."""
    batch = decoding.batch
    start = decoding.cache.start + decoding.cache.new
    end = batch.tokens.size(1)
    parallel = config.parallel
    # context-parallel ranks all hold the whole sequence
    unit = sequence_unit(parallel.tp, 1, parallel.sequence_parallel)
    filling = -(end - start) % unit
    fill = torch.nn.functional.pad
    decoding.cache = attrs.evolve(decoding.cache, start=start, new=end - start)
    return Pass(
        tokens=fill(batch.tokens[:, start:], (0, filling)),
        positions=fill(batch.positions(start, end), (0, filling)),
        hidden=batch.hidden(start, end, end - start + filling, config.model.sliding_window),
        cache=decoding.cache,
    )


def run_chunk(
    number: int, part: Decoding, one_pass: Pass, state: State, sends: list[dist.Work]
) -> torch.Tensor:
    """What the `number`th chunk of this stage computes; received and sent on as needed.

    Nothing on a stage that has no part in the decoder. `sends` collects what is still being sent.
    """
    pg = state.pg
    if pg.place.pp < part.first_stage:
        return torch.empty(0)
    chunk = unwrapped(state.chunks[number])
    is_first = pg.place.pp == part.first_stage and number == 0
    is_last = pg.is_last_stage and number == len(state.chunks) - 1
    if not is_first:
        chunk.set_input_tensor(receive_hidden(one_pass.tokens.shape, state))
    output = part.call(chunk, one_pass)
    if not is_last:
        send_hidden(output, pg, sends)
    return output


def last_logits(output: torch.Tensor, one_pass: Pass, state: State) -> torch.Tensor:
    """Logits [batch, vocabulary] after the last token, from the last stage's output.

    output: [sequence, batch, padded vocabulary / tp], or its last position only.
    """
    last = output[-1] if output.size(0) == 1 else output[one_pass.cache.new - 1]
    parts = gather_rows(last.contiguous(), state.pg.tp).unbind(0)
    return torch.cat(parts, dim=-1)[:, : state.config.model.vocab_size]

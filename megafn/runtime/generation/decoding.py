"""Passes of a batch over the pipeline with a key-value cache: the next tokens' logits.

megatron-core's schedules are for training: here each stage computes, sends and returns, and one
batch may be in each stage at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from attrs import define, frozen
from megatron.core.distributed import DistributedDataParallel

from megafn.pure.config.records import TrainConfig
from megafn.pure.config.sequence_unit import sequence_unit
from megafn.runtime.generation.prompts import PaddedBatch
from megafn.runtime.model.chunk import Chunk
from megafn.runtime.model.key_value_cache import KeyValueCache
from megafn.runtime.model.layers import DTYPES, Attention
from megafn.runtime.model.state import State
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.tensor_collectives import gather_rows

# Packages whose modules compute each position by itself, but for attention, which is looked at.
_KNOWN_PACKAGES = ("torch", "megatron", "megafn")


def can_use_a_cache(state: State) -> bool:
    """Whether every module of the model, on all ranks, works on new tokens alone.

    Not if a custom family's forward takes no `cache`, nor with modules of a user's, which may look
    at other positions in ways that the cache does not know. Every rank must call it.
    """
    here = all(_takes_a_cache(_unwrapped(chunk)) for chunk in state.chunks)
    everywhere = torch.tensor(int(here), device=state.pg.device)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=state.pg.world)
    return bool(everywhere)


def _takes_a_cache(module: torch.nn.Module) -> bool:
    if not isinstance(module, Chunk):
        return False
    if "cache" not in inspect.signature(module.functions.forward).parameters:
        return False
    for part in module.modules():
        if type(part).__module__.partition(".")[0] not in _KNOWN_PACKAGES:
            return False
        attention = getattr(part, "core_attention", None)
        if attention is not None and not isinstance(attention, Attention):
            return False
    return True


def _unwrapped(chunk: torch.nn.Module) -> Any:
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


@define(eq=False)
class Decoding:
    """A part of the prompts on its way: its tokens until now, and their keys and values."""

    batch: PaddedBatch
    cache: KeyValueCache

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
    chunk: torch.nn.Module, number: int, one_pass: Pass, state: State, sends: list[dist.Work]
) -> torch.Tensor:
    """What a chunk, the `number`th of this stage, computes; received and sent on as needed.

    `sends` collects what is still being sent.
    """
    pg = state.pg
    is_first = pg.is_first_stage and number == 0
    is_last = pg.is_last_stage and number == len(state.chunks) - 1
    if not is_first:
        _unwrapped(chunk).set_input_tensor(_receive(one_pass, state))
    output = chunk(one_pass.tokens, one_pass.positions, one_pass.hidden, cache=one_pass.cache)
    if not is_last:
        _send(output, pg, sends)
    return output


def _receive(one_pass: Pass, state: State) -> torch.Tensor:
    """The previous stage's hidden state [sequence (/ tp), batch, hidden]."""
    pg = state.pg
    parallel = state.config.parallel
    rows, length = one_pass.tokens.shape
    hidden = torch.empty(
        length // parallel.tp if parallel.sequence_parallel else length,
        rows,
        state.config.model.hidden_size,
        dtype=DTYPES[state.config.precision.dtype],
        device=pg.device,
    )
    if pg.pp.size() > 1:
        dist.recv(hidden, _neighbour(pg, -1), group=pg.pp)
    return hidden


def _send(hidden: torch.Tensor, pg: ProcessGroups, sends: list[dist.Work]) -> None:
    while sends and sends[0].is_completed():
        sends.pop(0)
    sending = dist.isend(hidden.contiguous(), _neighbour(pg, 1), group=pg.pp)
    assert sending is not None  # it is for ranks outside the group
    sends.append(sending)


def _neighbour(pg: ProcessGroups, distance: int) -> int:
    """The global rank of the stage after (1) or before (-1) this one, in a ring."""
    ranks: Sequence[int] = dist.get_process_group_ranks(pg.pp)
    return ranks[(pg.place.pp + distance) % len(ranks)]


def last_logits(output: torch.Tensor, one_pass: Pass, state: State) -> torch.Tensor:
    """Logits [batch, vocabulary] after the last token, from the last stage's output.

    output: [sequence, batch, padded vocabulary / tp], or its last position only.
    """
    last = output[-1] if output.size(0) == 1 else output[one_pass.cache.new - 1]
    parts = gather_rows(last.contiguous(), state.pg.tp).unbind(0)
    return torch.cat(parts, dim=-1)[:, : state.config.model.vocab_size]

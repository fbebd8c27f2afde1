"""Whole logits of micro-batches, gathered over tensor and context parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, overload

import torch
import torch.distributed as dist

from megafn.pure.config.records import TrainConfig
from megafn.runtime.parallel.context import cp_positions
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.tensor_collectives import gather_rows
from megafn.runtime.training.forward_backward import Output


@overload
def whole_logits(
    outputs: Sequence[Output], config: TrainConfig, pg: ProcessGroups, *, every_stage: Literal[True]
) -> tuple[Output, ...]: ...


@overload
def whole_logits(
    outputs: Sequence[Output], config: TrainConfig, pg: ProcessGroups, *, every_stage: bool
) -> tuple[Output, ...] | None: ...


@torch.no_grad()
def whole_logits(
    outputs: Sequence[Output], config: TrainConfig, pg: ProcessGroups, *, every_stage: bool
) -> tuple[Output, ...] | None:
    """Logits [batch, sequence, vocabulary] of each micro-batch, from the last stage's outputs.

    outputs: on the last pipeline stage, one for each micro-batch: [sequence / cp, batch, padded
    vocabulary / tp], or a tensor [batch, ...] that is already whole on the ranks of the first
    context-parallel position, or a tuple of such tensors, which is returned as a tuple. () on
    other stages.
    The result is the same on every rank of tp and cp. Earlier stages get it too if every_stage,
    else None. Every rank must call this.
    """
    logits = None
    if pg.is_last_stage:
        join = partial(_join, vocab_size=config.model.vocab_size, pg=pg)
        logits = tuple(_map(join, output) for output in outputs)
    if every_stage and pg.pp.size() > 1:
        logits = _broadcast_from_last_stage(logits, pg)
    return logits


def _map(function: Callable[[torch.Tensor], torch.Tensor], value: Output) -> Output:
    """`value` with the function applied to each of its tensors."""
    if isinstance(value, tuple):
        return tuple(function(tensor) for tensor in value)
    return function(value)


def _join(output: torch.Tensor, *, vocab_size: int, pg: ProcessGroups) -> torch.Tensor:
    """[batch, sequence, vocabulary] from every rank's [sequence / cp, batch, padded vocab / tp].

    A tensor of fewer dimensions is that of the first context-parallel position.
    """
    if output.dim() < 3:
        return gather_rows(output.contiguous(), pg.cp)[0]
    slices_of_vocabulary = gather_rows(output.contiguous(), pg.tp).unbind(0)
    all_columns = torch.cat(slices_of_vocabulary, dim=-1)
    all_positions = gather_rows(all_columns, pg.cp).flatten(0, 1)
    order = _positions_of_rows(len(all_positions), pg)
    return all_positions[order.argsort(), :, :vocab_size].transpose(0, 1).contiguous()


def _positions_of_rows(sequence: int, pg: ProcessGroups) -> torch.Tensor:
    """Which position of the sequence each row is, when context-parallel parts are concatenated."""
    size = pg.cp.size()
    return torch.cat([cp_positions(sequence, size, rank, pg.device) for rank in range(size)])


def _broadcast_from_last_stage(
    logits: tuple[Output, ...] | None, pg: ProcessGroups
) -> tuple[Output, ...]:
    """The last stage's logits, on every stage; other stages pass None."""
    last = dist.get_process_group_ranks(pg.pp)[-1]
    on_meta = tuple(_map(_to_meta, item) for item in logits or ())
    received = [on_meta]
    dist.broadcast_object_list(received, src=last, group=pg.pp, device=pg.device)
    if logits is None:
        allocate = partial(torch.empty_like, device=pg.device)
        logits = tuple(_map(allocate, item) for item in received[0])

    def broadcast(tensor: torch.Tensor) -> torch.Tensor:
        dist.broadcast(tensor, src=last, group=pg.pp)
        return tensor

    return tuple(_map(broadcast, item) for item in logits)


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    """Shape and dtype, without data."""
    return tensor.to("meta")

"""Logits of micro-batches, whole again: gathered over tensor and context parallel, and sent over the pipeline if asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megafn.pure.config.records import TrainConfig
from megafn.runtime.parallel.context import cp_positions
from megafn.runtime.parallel.groups import ProcessGroups


def _parts(tensor: torch.Tensor, group) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def _each(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Of each tensor in a tuple, nested or not, what a function makes of it; None of None."""
    return (
        tuple(_each(function, one) for one in value)
        if isinstance(value, tuple)
        else None
        if value is None
        else function(value)
    )


@torch.no_grad()
def whole_logits(
    outputs: Sequence[Any], config: TrainConfig, pg: ProcessGroups, *, every_stage: bool
) -> tuple[Any, ...] | None:
    """Logits [batch, sequence, vocabulary] of each micro-batch, from what the last stage put out for each.

    outputs: on the last pipeline stage, [sequence / cp, batch, padded vocabulary / tp] for each micro-batch; or a tensor
    [batch, ...] that is whole on the ranks of the first cp position already, or a tuple of such tensors, which comes back
    as one. () elsewhere. The same on every rank of tp and cp; those of earlier stages get them too where `every_stage`
    says so, else None. Every rank calls it.
    """
    found, vocabulary = None, config.model.vocab_size

    def whole(output: torch.Tensor) -> torch.Tensor:
        if output.dim() < 3:
            return _parts(output, pg.cp)[0]
        joined = torch.cat(_parts(torch.cat(_parts(output, pg.tp), dim=-1), pg.cp))
        order = torch.cat(
            [
                cp_positions(len(joined), pg.cp.size(), rank, pg.device)
                for rank in range(pg.cp.size())
            ]
        )
        return joined[order.argsort(), :, :vocabulary].transpose(0, 1).contiguous()

    if pg.is_last_stage:
        found = _each(whole, tuple(outputs))
    if every_stage and pg.pp.size() > 1:
        last = dist.get_process_group_ranks(pg.pp)[-1]
        shapes = [_each(lambda one: one.to("meta"), found)]
        dist.broadcast_object_list(shapes, src=last, group=pg.pp, device=pg.device)
        if found is None:
            found = _each(lambda one: torch.empty_like(one, device=pg.device), shapes[0])
        _each(lambda one: dist.broadcast(one, src=last, group=pg.pp), found)
    return found

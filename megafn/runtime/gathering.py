"""Logits of micro-batches, whole again: gathered over tensor and context parallel, and sent over the pipeline if asked."""
from __future__ import annotations

from typing import Sequence

import torch
import torch.distributed as dist

from megafn.pure.config import TrainConfig
from megafn.runtime.groups import ProcessGroups
from megafn.runtime.layers import DTYPES, cp_positions


def _parts(tensor: torch.Tensor, group) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


@torch.no_grad()
def whole_logits(outputs: Sequence[torch.Tensor], config: TrainConfig, pg: ProcessGroups, *, every_stage: bool) -> tuple[torch.Tensor, ...] | None:
    """Logits [batch, sequence, vocabulary] of each micro-batch, from what the last stage put out for each.

    outputs: [sequence / cp, batch, padded vocabulary / tp] on the last pipeline stage, () elsewhere. The same on every
    rank of tp and cp; those of earlier stages get them too where `every_stage` says so, else None. Every rank calls it.
    """
    found, vocabulary = None, config.model.vocab_size
    if pg.is_last_stage:
        found = []
        for output in outputs:
            whole = torch.cat(_parts(torch.cat(_parts(output, pg.tp), dim=-1), pg.cp))
            order = torch.cat([cp_positions(len(whole), pg.cp.size(), rank, pg.device) for rank in range(pg.cp.size())])
            found.append(whole[order.argsort(), :, :vocabulary].transpose(0, 1).contiguous())
    if every_stage and pg.pp.size() > 1:
        last = dist.get_process_group_ranks(pg.pp)[-1]
        shapes = [[one.shape for one in found] if found is not None else None]
        dist.broadcast_object_list(shapes, src=last, group=pg.pp, device=pg.device)
        if found is None:
            found = [torch.empty(shape, dtype=DTYPES[config.precision.dtype], device=pg.device) for shape in shapes[0]]
        for one in found:
            dist.broadcast(one, src=last, group=pg.pp)
    return tuple(found) if found is not None else None

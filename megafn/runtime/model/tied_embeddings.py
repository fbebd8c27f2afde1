"""Tables of which several pipeline stages hold a copy: their marks, and their gradients' sum."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection


def mark_copy(
    table: torch.Tensor, *, original: bool, group: dist.ProcessGroup | None = None
) -> None:
    """Marks a table as one of several copies, for megatron-core's optimizer and gradient buffers.

    It gets a bucket of its own, so that the distributed optimizer cuts each copy alike, and only
    the original counts in norms. group: the stages that hold a copy, if `finalize_grads` is to sum
    over them; None if megatron-core does.
    """
    table.shared_embedding = True
    table.shared = not original
    if group is not None:
        table.copies = group


def finalize_grads(
    chunks: list[torch.nn.Module],
    *arguments: Any,
    pg_collection: ProcessGroupCollection,
    **options: Any,
) -> None:
    """megatron-core's `finalize_model_grads`, then the sums over copies of other tables.

    megatron-core itself sums over the groups `embd` and `pos_embd`; over the latter even if the
    table is frozen and has no gradient, so that the group is left out then.
    """
    if any(_has_frozen_positions(chunk) for chunk in chunks):
        pg_collection = copy.copy(pg_collection)
        pg_collection.pos_embd = None
    finalize_model_grads(chunks, *arguments, pg_collection=pg_collection, **options)
    for chunk in chunks:
        for parameter in chunk.parameters():
            group = getattr(parameter, "copies", None)
            if group is not None and parameter.requires_grad:
                dist.all_reduce(parameter.main_grad, group=group)


def _has_frozen_positions(chunk: torch.nn.Module) -> bool:
    table = getattr(getattr(chunk, "module", chunk), "position_embeddings", None)
    return table is not None and not table.weight.requires_grad

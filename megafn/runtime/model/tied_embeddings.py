"""Tables of which several pipeline stages hold a copy: their marks, and their gradients' sum."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads


def mark_copy(
    table: torch.nn.Parameter, *, original: bool, group: dist.ProcessGroup | None = None
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


def finalize_grads(chunks: list[torch.nn.Module], *arguments: Any, **options: Any) -> None:
    """megatron-core's `finalize_model_grads`, then the sums over copies of other tables.

    megatron-core itself sums over the groups `embd` and `pos_embd`.
    """
    finalize_model_grads(chunks, *arguments, **options)
    for chunk in chunks:
        for parameter in chunk.parameters():
            group = getattr(parameter, "copies", None)
            if group is not None:
                dist.all_reduce(parameter.main_grad, group=group)

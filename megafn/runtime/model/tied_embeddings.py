"""Tables that several pipeline stages hold a copy of: marked, and their gradients summed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads


def mark_copy(table: torch.nn.Parameter, *, original: bool, group: Any = None) -> None:
    """One table in several stages: counted once in norms, and in a bucket of its own, so that the distributed optimizer
    cuts each copy alike. group: the stages, where `finalize_grads` is to sum over them, not megatron-core."""
    table.shared_embedding = True
    table.shared = not original
    if group is not None:
        table.copies = group


def finalize_grads(chunks: list[torch.nn.Module], *arguments: Any, **options: Any) -> None:
    """megatron-core's `finalize_model_grads`, which sums over `embd` and `pos_embd`; and the sum over other tables' stages."""
    finalize_model_grads(chunks, *arguments, **options)
    for chunk in chunks:
        for parameter in chunk.parameters():
            if (group := getattr(parameter, "copies", None)) is not None:
                dist.all_reduce(parameter.main_grad, group=group)

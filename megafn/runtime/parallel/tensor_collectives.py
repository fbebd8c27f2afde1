"""Tensors of all ranks of a group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def gather_rows(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks of `group`, [ranks, *tensor.shape], without gradient.

    `tensor` is contiguous, and of one shape and dtype on every rank.
    """
    if group.size() == 1:
        return tensor[None].clone()
    rows = tensor.new_empty(group.size(), *tensor.shape)
    # Not all_gather_into_tensor, which newer versions of torch call by another name.
    dist.all_gather(list(rows.unbind(0)), tensor, group=group)
    return rows

"""Means and concatenations over the ranks of a group, as accelerate has them for Megatron-LM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megafn.runtime.parallel.tensor_collectives import gather_rows

Tree = TypeVar("Tree")  # a tensor, or lists, tuples and dicts of trees

_DESCRIPTION_LENGTH = 16


def avg_losses(losses: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Average each of `losses` (one-element tensors) over the ranks of `group`.

    Returns [len(losses)], without gradient. This is a mean of means, as accelerate's
    `avg_losses_across_data_parallel_group`: ranks count equally however many tokens they hold.
    Training uses sum over count instead.
    """
    means = torch.cat([loss.detach().reshape(1) for loss in losses])
    if group.size() > 1:
        dist.all_reduce(means, group=group)
    return means / group.size()


@torch.no_grad()
def gather(tensors: Tree, group: dist.ProcessGroup) -> Tree:
    """Concatenate the tensors of all ranks of `group` along the first dimension, in rank order.

    `tensors`: a tensor, or lists, tuples and dicts of them, nested in any way; the result, without
    gradient, is nested alike. A scalar becomes [ranks]. As accelerate's
    `gather_across_data_parallel_groups`.
    Raises TypeError for anything else, and ValueError if shapes or dtypes differ over the ranks
    (the collective itself would end the process).
    """
    return _gather_tree(tensors, group)


def _gather_tree(tensors: Any, group: dist.ProcessGroup) -> Any:
    same_type: Callable[..., Any] = type(tensors)
    if isinstance(tensors, Tensor):
        return _gather_tensor(tensors, group)
    if isinstance(tensors, Mapping):
        return same_type({key: _gather_tree(value, group) for key, value in tensors.items()})
    if isinstance(tensors, tuple) and hasattr(tensors, "_fields"):  # a named tuple
        return same_type(*(_gather_tree(value, group) for value in tensors))
    if isinstance(tensors, (tuple, list)):
        return same_type(_gather_tree(value, group) for value in tensors)
    raise TypeError(
        f"gather: expected a tensor, or a list, tuple or dict of tensors, "
        f"got {type(tensors).__name__}"
    )


def _gather_tensor(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor.contiguous()
    _check_same_shapes(tensor, group)
    return gather_rows(tensor, group).flatten(0, 1)


def _check_same_shapes(tensor: Tensor, group: dist.ProcessGroup) -> None:
    description = [tensor.element_size(), tensor.ndim, *tensor.shape]
    description += [0] * (_DESCRIPTION_LENGTH - len(description))
    descriptions = gather_rows(torch.tensor(description, device=tensor.device), group).tolist()
    if any(other != descriptions[0] for other in descriptions):
        shapes = sorted({tuple(other[2 : 2 + other[1]]) for other in descriptions})
        raise ValueError(
            f"gather: shapes {shapes} (or dtypes) differ over the ranks; "
            "pad them, or drop the surplus"
        )

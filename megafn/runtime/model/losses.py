"""Losses over a vocabulary that is cut over the tensor-parallel group, which is an argument."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from attrs import field, frozen
from torch import Tensor

from megafn.runtime.parallel.cpu import has_values_at_hand
from megafn.runtime.parallel.tensor_collectives import gather_rows

IGNORE = -100  # a label without loss, as in torch's cross_entropy

# A count on a GPU that is not a whole number; it makes the global count negative.
FRACTIONAL = -(2**62)
_CPU_BLOCK = 2**20  # elements worked on at once: 4 MiB of fp32, which stays in the cache
_GPU_BLOCK = 2**24  # 64 MiB of fp32: enough to fill a GPU

# rows and columns of the first two dimensions of logits
_Block = tuple[slice, slice]


class _HasTensorParallelGroup(Protocol):
    """Megafn's ProcessGroups, megatron-core's ProcessGroupCollection, or the like."""

    @property
    def tp(self) -> dist.ProcessGroup: ...


def cross_entropy(logits: Tensor, labels: Tensor, pg: _HasTensorParallelGroup) -> Tensor:
    """Cross-entropy of each token, [batch, sequence], in natural units (nats).

    From logits [sequence, batch, vocab / tp]: each rank of `pg.tp` holds one contiguous slice of
    the vocabulary, in rank order. `labels` [batch, sequence] are ids of the whole vocabulary, the
    same on every rank, and so are the losses. A label of -100 gives loss 0 and gradient 0.

        losses[b, s] = log(sum_v exp(logits[s, b, v])) - logits[s, b, labels[b, s]]

    The arithmetic is fp32 (fp64 for fp64 logits) and the gradient has the dtype of `logits`. Kept
    for the backward pass are `logits` itself (untouched, not a copy) and tensors of the labels'
    size; blocks of rows are worked on in turn, so that nothing else of the logits' size ever
    exists but their gradient. One all-gather of three numbers a token runs over the group (none
    for tp = 1), and no communication in the backward pass. After the vocabulary-parallel loss of
    Megatron-LM (arXiv 1909.08053, section 3), with the partial sums of arXiv 1805.02867.

    Raises ValueError for shapes that don't fit and, on CPU, for a label outside the vocabulary and
    for logits that are the same on every rank, that is, already gathered. On a GPU, where a check
    would stall the queue, such a label makes its loss (not its gradient) NaN, and such logits make
    every loss and gradient NaN.

    >>> import torch, megafn as mf
    >>> logits = torch.tensor([[[0.0, 0.0]], [[1.0, 3.0]]])  # 2 positions, 1 sequence, 2 token ids
    >>> with mf.init_groups(mf.build_groups(mf.ParallelConfig(), world_size=1)) as pg:
    ...     print(cross_entropy(logits, torch.tensor([[1, 0]]), pg))
    tensor([[0.6931, 2.1269]])
    """
    _check(logits, labels, pg.tp)
    return _CrossEntropy.apply(logits, labels, pg.tp)


def logsumexp(logits: Tensor, pg: _HasTensorParallelGroup) -> Tensor:
    """log(sum over the whole vocabulary of exp(logits)), [batch, sequence].

    From logits [sequence, batch, vocab / tp]. Differentiable; precision, memory, communication and
    the logits it refuses are those of `cross_entropy`.
    """
    return _LogSumExp.apply(logits, pg.tp)


@torch.no_grad()
def argmax(logits: Tensor, pg: _HasTensorParallelGroup) -> Tensor:
    """The most likely id of the whole vocabulary, [batch, sequence].

    From logits [sequence, batch, vocab / tp]. Of equal logits the lowest id wins, so the answer is
    the same for every tp. One all-gather over `pg.tp`.
    """
    largest, ids = logits.max(-1)  # of equals, the first
    ids += pg.tp.rank() * logits.shape[-1]
    if pg.tp.size() > 1:
        # fp64 is exact for both: ids are below 2**53
        gathered = gather_rows(torch.stack([largest.double(), ids.double()]), pg.tp)
        largest_of_ranks = gathered[:, 0]
        ids_of_ranks = gathered[:, 1]
        best_rank = largest_of_ranks.max(0).indices  # of equals the first, with the lowest ids
        ids = ids_of_ranks.gather(0, best_rank[None])[0].long()
    return ids.t().contiguous()


# -------------------------------------------------------------------- what a step's loss returns


def _scalar(name: str, value: Any) -> Tensor:
    tensor = torch.as_tensor(value)
    if tensor.numel() != 1:
        raise ValueError(f"{name}: expected a scalar, got shape {tuple(tensor.shape)}; sum it")
    return tensor.reshape(())


def _as_sum(value: Any) -> Tensor:
    return _scalar("Loss.sum", value)


def _as_count(value: Any) -> Tensor:
    count = _scalar("Loss.count", value)
    if not count.is_floating_point():
        return count
    if not has_values_at_hand(count):  # looking at it would wait for the GPU
        return torch.where(count == count.round(), count.long(), FRACTIONAL)
    if not float(count).is_integer():
        raise ValueError(
            f"Loss.count = {float(count)}: not a whole number; count tokens or samples, and put "
            "weights into Loss.sum"
        )
    return count.long()


def _as_report(report: Mapping[str, Any]) -> Mapping[str, Tensor]:
    return {
        name: _scalar(f"Loss.report[{name!r}]", value).detach() for name, value in report.items()
    }


@frozen(eq=False)
class Loss:
    """What a step's loss function returns for one micro-batch.

    The optimizer sees sum / count over the global batch.

    sum: a differentiable scalar, the sum over this rank's tokens (or samples).
    count: how many there were, a whole number: an int, or a scalar tensor of any dtype (a float
        mask's sum is converted to int64).
    report: scalars by name, sums as well; metrics show them divided by the count.

    Raises ValueError if `sum` or a report is not a scalar, or the count is fractional (on a GPU,
    where looking at it would wait for the device, `train_step` and `evaluate` raise instead).

    >>> import torch
    >>> Loss(sum=torch.tensor(6.0), count=torch.tensor([1.0, 0.0, 1.0]).sum()).count
    tensor(2)
    >>> Loss(sum=torch.tensor(6.0), count=2.5)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: Loss.count = 2.5: not a whole number; count tokens or samples, and put weights ...
    """

    sum: Tensor = field(converter=_as_sum)
    count: Tensor = field(converter=_as_count)
    report: Mapping[str, Tensor] = field(factory=dict, converter=_as_report)

    @sum.validator
    def _is_floating(self, attribute: Any, value: Tensor) -> None:
        if not value.is_floating_point():
            raise ValueError(
                f"Loss.sum: dtype {value.dtype} has no gradient; sum floating-point losses"
            )


def token_loss(logits: Tensor, batch: Mapping[str, Tensor], pg: _HasTensorParallelGroup) -> Loss:
    """The loss of GPT: cross-entropy of `batch["labels"]`, summed over the tokens that count.

    `batch["loss_mask"]` [batch, sequence] is 1 for a token that counts, else 0.
    """
    losses = cross_entropy(logits, batch["labels"], pg)
    mask = batch["loss_mask"]
    return Loss(sum=(losses * mask).sum(), count=mask.sum())


# -------------------------------------------------------------- the functions that autograd calls


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        labels = labels.t()  # [sequence, batch], as the logits lie
        counts = labels != IGNORE

        # the label's column, if it is in this rank's slice of the vocabulary
        size = logits.shape[-1]
        column = labels - group.rank() * size
        in_slice = (column >= 0) & (column < size)
        column = torch.where(in_slice, column, 0)
        target = logits.gather(-1, column[..., None])[..., 0]
        target = torch.where(in_slice, target, 0)

        top, total, target = _reduce(logits, group, target)
        # (top - target) first: exact if all logits lie far from 0
        losses = (top - target) + total.log()
        losses = torch.where(counts, losses, 0)
        outside = _outside(labels, vocabulary=group.size() * size)
        losses = torch.where(outside, torch.nan, losses)

        ctx.save_for_backward(logits, top, total, column, in_slice, counts)
        return losses.t().contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, top, total, column, in_slice, counts = ctx.saved_tensors
        grad = torch.where(counts, grad.t(), 0).to(top.dtype)
        grad_of_target = torch.where(in_slice, -grad, 0)
        grad_of_logits = _softmax_times(logits, top, grad / total, (column, grad_of_target))
        return grad_of_logits, None, None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        no_target = logits.new_zeros(logits.shape[:2])
        top, total, _ = _reduce(logits, group, no_target)
        ctx.save_for_backward(logits, top, total)
        return (top + total.log()).t().contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, top, total = ctx.saved_tensors
        return _softmax_times(logits, top, grad.t() / total), None


def _reduce(
    logits: Tensor, group: dist.ProcessGroup, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(largest logit, sum of exp(logit - largest), sum of the ranks' targets), the same on all
    ranks: over the whole vocabulary, each [sequence, batch].
    """
    top, total = _reduce_slice(logits)
    target = target.to(top.dtype)
    if group.size() == 1:
        return top, total, target

    tops, totals, targets = gather_rows(torch.stack([top, total, target]), group).unbind(1)
    already_gathered = _same_on_all_ranks(tops, totals, logits.shape[-1])
    # On a GPU, where looking at it would wait, every loss becomes NaN instead.
    if has_values_at_hand(logits) and already_gathered:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} are the same on all {group.size()} ranks of "
            "tp: each rank gives its slice of the vocabulary, [sequence, batch, vocab / tp]; "
            "don't gather them"
        )
    top = torch.where(already_gathered, torch.nan, tops.amax(0))
    # each rank's sum is of exp(logit - its own largest)
    total = (totals * (tops - top).exp()).sum(0)
    return top, total, targets.sum(0)


def _reduce_slice(logits: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's largest logit and sum of exp(logit - largest), each [sequence, batch]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    low = torch.finfo(dtype).min  # a slice of -inf only must not give inf - inf
    top = logits.new_empty(logits.shape[:2], dtype=dtype)
    total = torch.empty_like(top)
    for block, scratch in _blocks(logits, dtype):
        largest = torch.amax(logits[block], -1)
        top[block] = largest.to(dtype).clamp_(min=low)
        exponentials = _exp_below(logits[block], top[block], scratch)
        torch.sum(exponentials, -1, out=total[block])
    return top, total


def _same_on_all_ranks(tops: Tensor, totals: Tensor, size: int) -> Tensor:
    """Whether every token's largest logit and sum are the same on every rank, a bool scalar.

    Then each rank holds the whole vocabulary, and the loss would be log(tp) too large. Rows of
    equal logits, whose sum is their length, prove nothing.
    """
    same = (tops == tops[0]) & (totals == totals[0])
    return same.all() & (totals != size).any()


def _softmax_times(
    logits: Tensor, top: Tensor, scale: Tensor, add: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """exp(logits - top) * scale, in the dtype of logits.

    add: (columns, values), each [sequence, batch], added to the product at these columns.
    """
    result = torch.empty_like(logits)
    for block, scratch in _blocks(logits, top.dtype):
        product = _exp_below(logits[block], top[block], scratch)
        product.mul_(scale[block][..., None])
        if add is not None:
            columns, values = add
            product.scatter_add_(-1, columns[block][..., None], values[block][..., None])
        result[block] = product
    return result


def _exp_below(logits: Tensor, top: Tensor, out: Tensor) -> Tensor:
    """exp(logits - top), written into `out`."""
    torch.sub(logits, top[..., None], out=out)
    return out.exp_()


def _blocks(logits: Tensor, dtype: torch.dtype) -> Iterator[tuple[_Block, Tensor]]:
    """Blocks that cover the first two dimensions, each small (or one row).

    With each comes a scratch tensor of its shape; all share one memory.
    """
    sequence, batch, size = logits.shape
    elements = _CPU_BLOCK if logits.device.type == "cpu" else _GPU_BLOCK
    rows = max(1, elements // max(1, size))
    width = min(rows, max(batch, 1))
    height = max(1, rows // max(batch, 1))
    scratch = logits.new_empty(min(height, sequence), min(width, batch), size, dtype=dtype)
    for i in range(0, sequence, height):
        for j in range(0, batch, width):
            block = slice(i, i + height), slice(j, j + width)
            yield block, scratch[: sequence - i, : batch - j]


def _check(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> None:
    if logits.ndim != 3 or labels.shape != logits.shape[1::-1]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} don't fit logits of shape "
            f"{tuple(logits.shape)}: expected logits [sequence, batch, vocab / tp] and labels "
            "[batch, sequence]"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels of dtype {labels.dtype}: give token ids as integers")
    vocabulary = group.size() * logits.shape[-1]
    if has_values_at_hand(labels):
        outside = labels[_outside(labels, vocabulary)]
        if len(outside):
            raise ValueError(
                f"label {int(outside[0])} is outside the vocabulary of {vocabulary} ids; "
                f"use 0 to {vocabulary - 1}, or {IGNORE} for a token that does not count"
            )


def _outside(labels: Tensor, vocabulary: int) -> Tensor:
    """Which labels are neither ids of the vocabulary nor ignored."""
    is_id = (labels >= 0) & (labels < vocabulary)
    return ~is_id & (labels != IGNORE)

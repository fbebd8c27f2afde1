"""Losses over a vocabulary that is cut over the tensor-parallel group: the group is an argument, never a global."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from attrs import field, frozen
from torch import Tensor

IGNORE = -100  # a label that takes no part, as in torch's cross_entropy
FRACTIONAL = -(
    2**62
)  # a count on a GPU that is not a whole number: makes the global count negative
_CPU_BLOCK = 2**20  # elements worked on at once: 4 MiB of fp32, which stays in the cache
_GPU_BLOCK = 2**24  # 64 MiB of fp32: enough to fill a GPU


def cross_entropy(logits: Tensor, labels: Tensor, pg: Any) -> Tensor:
    """Cross-entropy of each token, [batch, sequence], from logits [sequence, batch, vocab / tp] in natural units (nats).

    Each rank of `pg.tp` holds one contiguous slice of the vocabulary, in rank order; `labels` [batch, sequence] are ids
    of the whole vocabulary, the same on every rank, and so are the losses. A label of -100 gives loss 0 and gradient 0.

        losses[b, s] = log(sum_v exp(logits[s, b, v])) - logits[s, b, labels[b, s]]

    The arithmetic is fp32 (fp64 for fp64 logits) and the gradient has the dtype of `logits`. Kept for the backward
    pass are `logits` itself (untouched, not a copy) and tensors of the labels' size; blocks of rows are worked on in
    turn, so that nothing else of the logits' size ever exists but their gradient. One all-gather of three numbers a
    token runs over the group (none for tp = 1), and no communication in the backward pass. After the
    vocabulary-parallel loss of Megatron-LM (arXiv 1909.08053, section 3), with the partial sums of arXiv 1805.02867.

    Raises ValueError for shapes that don't fit and, on CPU, for a label outside the vocabulary and for logits that are
    the same on every rank, gathered already; on a GPU, where asking would stall the queue, such a label makes its loss
    (not its gradient) NaN, such logits every loss and gradient.

    >>> import torch, megafn as mf
    >>> logits = torch.tensor([[[0.0, 0.0]], [[1.0, 3.0]]])         # 2 positions, 1 sequence, 2 token ids
    >>> with mf.init_groups(mf.build_groups(mf.ParallelConfig(), world_size=1)) as pg:
    ...     print(cross_entropy(logits, torch.tensor([[1, 0]]), pg))
    tensor([[0.6931, 2.1269]])
    """
    _check(logits, labels, pg.tp)
    return _CrossEntropy.apply(logits, labels, pg.tp)


def logsumexp(logits: Tensor, pg: Any) -> Tensor:
    """log(sum over the whole vocabulary of exp(logits)), [batch, sequence], of logits [sequence, batch, vocab / tp].

    Differentiable; precision, memory, communication and the logits it refuses are those of `cross_entropy`.
    """
    return _LogSumExp.apply(logits, pg.tp)


@torch.no_grad()
def argmax(logits: Tensor, pg: Any) -> Tensor:
    """The most likely id of the whole vocabulary, [batch, sequence], of logits [sequence, batch, vocab / tp].

    Equal logits go to the lowest id, so the answer is the same for every tp. One all-gather over `pg.tp`.
    """
    value, index = logits.max(-1)  # of equals, the first
    index += pg.tp.rank() * logits.shape[-1]
    if pg.tp.size() > 1:
        both = _gather_rows(
            torch.stack([value.double(), index.double()]), pg.tp
        )  # exact: ids are below 2**53
        first = both[:, 0].max(0).indices  # ranks are in the order of ids
        index = both[:, 1].gather(0, first[None])[0].long()
    return index.t().contiguous()


@frozen(eq=False)
class Loss:
    """What a step's loss function returns for one micro-batch. The optimizer sees sum / count over the global batch.

    `sum`: a differentiable scalar, the sum over this rank's tokens (or samples). `count`: how many there were, a whole
    number: an int, or a scalar tensor of any dtype (a float mask's sum is turned into int64).
    `report`: scalars by name, sums as well; metrics show them divided by the count.

    Raises ValueError if `sum` or a report is not a scalar, or the count is fractional (on a GPU,
    where looking at it would wait for the device, `train_step` and `evaluate` raise instead).

    >>> import torch
    >>> Loss(sum=torch.tensor(6.0), count=torch.tensor([1.0, 0.0, 1.0]).sum()).count
    tensor(2)
    >>> Loss(sum=torch.tensor(6.0), count=2.5)
    Traceback (most recent call last):
    ValueError: Loss.count = 2.5: not a whole number; count tokens or samples, and put weights into Loss.sum.
    """

    sum: Tensor = field(converter=lambda value: _scalar("Loss.sum", value))
    count: Tensor = field(converter=lambda value: _whole(value))
    report: Mapping[str, Tensor] = field(
        factory=dict,
        converter=lambda report: {
            name: _scalar(f"Loss.report[{name!r}]", value).detach()
            for name, value in report.items()
        },
    )

    @sum.validator
    def _is_floating(self, attribute: Any, value: Tensor) -> None:
        if not value.is_floating_point():
            raise ValueError(
                f"Loss.sum: dtype {value.dtype} has no gradient; sum floating-point losses."
            )


def token_loss(logits: Tensor, batch: Mapping[str, Tensor], pg: Any) -> Loss:
    """The loss of GPT: cross-entropy of `batch["labels"]`, summed where `batch["loss_mask"]` [batch, sequence] is 1."""
    losses, mask = cross_entropy(logits, batch["labels"], pg), batch["loss_mask"]
    return Loss(sum=(losses * mask).sum(), count=mask.sum())


def avg_losses(losses: Sequence[Tensor], group: Any) -> Tensor:
    """Each of `losses` (one-element tensors) averaged over the ranks of `group`, [len(losses)], without gradient.

    A mean of means, as accelerate's `avg_losses_across_data_parallel_group`: ranks count alike however many tokens
    they hold. Training uses sum over count instead.
    """
    means = torch.cat([loss.detach().reshape(1) for loss in losses])
    if group.size() > 1:
        dist.all_reduce(means, group=group)
    return means / group.size()


@torch.no_grad()
def gather(tensors: Any, group: Any) -> Any:
    """Tensors of all ranks of `group`, concatenated along the first dimension in rank order, without gradient.

    `tensors`: a tensor of one shape on every rank, or lists, tuples and dicts of them, nested at will; the result is
    nested alike. A scalar becomes [ranks]. As accelerate's `gather_across_data_parallel_groups`.
    Raises TypeError for anything else, and ValueError where shapes differ over the ranks (which would end the process).
    """
    if isinstance(tensors, Tensor):
        tensor = tensors.reshape(1) if tensors.ndim == 0 else tensors.contiguous()
        shape = [tensor.element_size(), tensor.ndim, *tensor.shape]
        shapes = _gather_rows(
            torch.tensor(shape + [0] * (16 - len(shape)), device=tensor.device), group
        ).tolist()
        if shapes != [shapes[0]] * len(shapes):
            raise ValueError(
                f"gather: shapes {sorted({tuple(x[2 : 2 + x[1]]) for x in shapes})} (or dtypes) differ over the ranks; "
                "pad, or drop what is over."
            )
        return _gather_rows(tensor, group).flatten(0, 1)
    if isinstance(tensors, Mapping):
        return type(tensors)({key: gather(value, group) for key, value in tensors.items()})
    if isinstance(tensors, tuple) and hasattr(tensors, "_fields"):  # a named tuple
        return type(tensors)(*(gather(value, group) for value in tensors))
    if isinstance(tensors, (tuple, list)):
        return type(tensors)(gather(value, group) for value in tensors)
    raise TypeError(
        f"gather: {type(tensors).__name__} is neither a tensor nor a list, tuple or dict of tensors."
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Any) -> Tensor:
        size = logits.shape[-1]
        labels = labels.t()  # [s, b], as the logits lie
        column = labels - group.rank() * size  # in this rank's slice, if 0 <= column < size
        mine, kept = (column >= 0) & (column < size), labels != IGNORE
        column = torch.where(mine, column, 0)
        target = logits.gather(-1, column[..., None])[..., 0]
        top, total, target = _reduce(logits, group, torch.where(mine, target, 0))
        # (top - target) first: exact where all logits lie far from 0
        losses = torch.where(kept, (top - target) + total.log(), 0)
        losses = torch.where(
            kept & ((labels < 0) | (labels >= group.size() * size)), torch.nan, losses
        )
        ctx.save_for_backward(logits, top, total, column, mine, kept)
        return losses.t().contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, top, total, column, mine, kept = ctx.saved_tensors
        grad = torch.where(kept, grad.t(), 0).to(top.dtype)
        return (
            _softmax_times(logits, top, grad / total, (column, torch.where(mine, -grad, 0))),
            None,
            None,
        )


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: Any) -> Tensor:
        top, total, _ = _reduce(logits, group, logits.new_zeros(logits.shape[:2]))
        ctx.save_for_backward(logits, top, total)
        return (top + total.log()).t().contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, top, total = ctx.saved_tensors
        return _softmax_times(logits, top, grad.t() / total), None


def _reduce(logits: Tensor, group: Any, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of exp(logit - largest) and sum of the ranks' targets, over the whole vocabulary, each [s, b]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    low = torch.finfo(dtype).min  # a slice of -inf alone must not give inf - inf
    top = logits.new_empty(logits.shape[:2], dtype=dtype)
    total = torch.empty_like(top)
    for block, scratch in _blocks(logits, dtype):
        top[block] = torch.amax(logits[block], -1).to(dtype).clamp_(min=low)
        y = torch.sub(logits[block], top[block][..., None], out=scratch)
        torch.sum(y.exp_(), -1, out=total[block])
    if group.size() == 1:
        return top, total, target.to(dtype)
    tops, totals, targets = _gather_rows(torch.stack([top, total, target.to(dtype)]), group).unbind(
        1
    )
    # The same largest and sum of every token on every rank: whole vocabularies, whose loss would be log(tp) too much. A row of
    # equal logits, whose sum is its length, says nothing.
    gathered = ((tops == tops[0]) & (totals == totals[0])).all() & (
        totals != logits.shape[-1]
    ).any()
    if logits.device.type == "cpu" and gathered:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} are the same on all {group.size()} ranks of tp: each rank gives "
            "its slice of the vocabulary, [sequence, batch, vocab / tp]; don't gather them."
        )
    top = torch.where(gathered, torch.nan, tops.amax(0))
    return top, (totals * (tops - top).exp()).sum(0), targets.sum(0)


def _softmax_times(
    logits: Tensor, top: Tensor, scale: Tensor, add: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """exp(logits - top) * scale, then add[1] [s, b] added at column add[0] [s, b], in the dtype of logits."""
    result = torch.empty_like(logits)
    for block, scratch in _blocks(logits, top.dtype):
        y = torch.sub(logits[block], top[block][..., None], out=scratch)
        y.exp_().mul_(scale[block][..., None])
        if add is not None:
            y.scatter_add_(-1, add[0][block][..., None], add[1][block][..., None])
        result[block] = y
    return result


def _blocks(logits: Tensor, dtype: torch.dtype) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Slices that cover the first two dimensions, each small (or one row), and for each a scratch tensor of its shape."""
    s, b, size = logits.shape
    rows = max(1, (_CPU_BLOCK if logits.device.type == "cpu" else _GPU_BLOCK) // max(1, size))
    wide, deep = min(rows, max(b, 1)), max(1, rows // max(b, 1))
    scratch = logits.new_empty(min(deep, s), min(wide, b), size, dtype=dtype)
    for i in range(0, s, deep):
        for j in range(0, b, wide):
            yield (slice(i, i + deep), slice(j, j + wide)), scratch[: s - i, : b - j]


def _gather_rows(tensor: Tensor, group: Any) -> Tensor:
    """The tensors of all ranks, [ranks, *tensor.shape]."""
    if group.size() == 1:
        return tensor[None].clone()
    rows = tensor.new_empty(group.size(), *tensor.shape)
    dist.all_gather_into_tensor(rows.flatten(0, 1), tensor, group=group)
    return rows


def _check(logits: Tensor, labels: Tensor, group: Any) -> None:
    if logits.ndim != 3 or labels.shape != logits.shape[1::-1]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} don't fit logits of shape {tuple(logits.shape)}: "
            "logits are [sequence, batch, vocab / tp], labels [batch, sequence]."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels of dtype {labels.dtype}: give token ids as integers.")
    vocab = group.size() * logits.shape[-1]
    if labels.device.type == "cpu":
        bad = labels[((labels < 0) | (labels >= vocab)) & (labels != IGNORE)]
        if len(bad):
            raise ValueError(
                f"label {int(bad[0])} is outside the vocabulary of {vocab} ids; use 0 to {vocab - 1}, "
                f"or {IGNORE} for a token that does not count."
            )


def _scalar(name: str, value: Any) -> Tensor:
    tensor = torch.as_tensor(value)
    if tensor.numel() != 1:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; give the sum, a scalar.")
    return tensor.reshape(())


def _whole(value: Any) -> Tensor:
    count = _scalar("Loss.count", value)
    if not count.is_floating_point():
        return count
    if count.device.type != "cpu":  # looking at it would wait for the GPU
        return torch.where(count == count.round(), count.long(), FRACTIONAL)
    if not float(count).is_integer():
        raise ValueError(
            f"Loss.count = {float(count)}: not a whole number; count tokens or samples, and put "
            "weights into Loss.sum."
        )
    return count.long()

"""Sums over all micro-batches and ranks: one fixed tensor, one collective, one move to the host.

Earlier pipeline stages know neither a step's reports nor their names. The names are agreed on once,
by an object collective, and kept in the `State`; from then on every rank knows how long the tensor
is. A step that reports other names raises a flag in it, so that no rank waits for another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from attrs import frozen

from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.object_collectives import gather_from_all_ranks
from megafn.runtime.training.forward_backward import MicroBatchSums


@frozen(kw_only=True)
class Totals:
    """Sums over a global batch (or several), the same on every rank.

    `squared_norm`: of the whole model's gradient, 0 if no share of it was given. `names`: those of
    the report, for the next call.
    """

    loss: float
    count: int
    report: Mapping[str, float]
    squared_norm: float
    names: tuple[str, ...]


def sum_over_ranks(
    sums: Sequence[MicroBatchSums],
    names: tuple[str, ...] | None,
    pg: ProcessGroups,
    *,
    squared_norm: torch.Tensor | None = None,
) -> Totals:
    """Sum micro-batches over data and context parallelism, on every rank; every rank calls it.

    sums: of this rank's micro-batches, [] before the last pipeline stage. names: the report's, as
    agreed before, or None. squared_norm: this rank's share of the gradient's, a scalar.
    Raises ValueError, on every rank, if the names differ between micro-batches or ranks, if a count
    is not a whole number, or if no token counts.
    """
    numbers = None
    if names is not None:
        numbers = _all_reduced(sums, names, pg, squared_norm)
    if names is None or numbers is None:
        # The first step, or a step that reports other names than the one before.
        names = agree_on_names(sums, pg)
        numbers = _all_reduced(sums, names, pg, squared_norm)
    if numbers is None:
        raise RuntimeError(f"report names = {names}: ranks that agreed on them do not have them")
    squared, loss, count, *report = numbers
    _check_count(count)
    return Totals(
        loss=loss,
        count=int(count),
        report=dict(zip(names, report, strict=True)),
        squared_norm=squared,
        names=names,
    )


def _all_reduced(
    sums: Sequence[MicroBatchSums],
    names: tuple[str, ...],
    pg: ProcessGroups,
    squared_norm: torch.Tensor | None,
) -> list[float] | None:
    """[squared norm, loss, count, *report] summed over all ranks; None if a rank has other names.

    A rank with other names puts NaN in front, which every sum keeps. The ranks of one
    tensor-parallel group report the same numbers, of which the first one's count.
    """
    total = torch.zeros(4 + len(names), dtype=torch.float64, device=pg.device)
    if any(micro_batch.names != names for micro_batch in sums):
        total[0] = math.nan
    elif sums and pg.place.tp == 0:
        total[2:] = torch.stack([micro_batch.values for micro_batch in sums]).sum(0)
    if squared_norm is not None:
        total[1] = squared_norm
    dist.all_reduce(total, group=pg.world)
    disagreeing, *numbers = total.tolist()
    return None if math.isnan(disagreeing) else numbers


def agree_on_names(sums: Sequence[MicroBatchSums], pg: ProcessGroups) -> tuple[str, ...]:
    """The names of the step's report, on every rank; ValueError if they differ anywhere."""
    here = sorted({micro_batch.names for micro_batch in sums})
    everywhere = {names for rank in gather_from_all_ranks(here, pg) for names in rank}
    if len(everywhere) != 1:
        listed = " and ".join(str(list(names)) for names in sorted(everywhere))
        raise ValueError(
            f"step.loss: the report's names differ between micro-batches or ranks: {listed}; "
            "report the same names for each, 0 where there is nothing to report."
        )
    return everywhere.pop()


def _check_count(count: float) -> None:
    if count < 0:  # see `Loss.count`
        raise ValueError(
            "Loss.count: not a whole number in some micro-batch; count tokens or samples, and put "
            "weights into Loss.sum."
        )
    if count == 0:
        raise ValueError(
            "loss_mask: 0 tokens count in this whole global batch, so it has no mean loss; give at "
            "least one token a label."
        )

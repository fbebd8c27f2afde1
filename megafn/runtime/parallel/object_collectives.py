"""What ranks tell each other: rank zero's value, everyone's, and that a user's own batches fit together."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megafn.runtime.parallel.groups import ProcessGroups


def _wait_for_all_ranks(during: str | None, pg: ProcessGroups) -> None:
    """Wait for all ranks. Where one does not come in time, the error says which, and what was going on."""
    if (
        during is None or pg.device.type == "cuda"
    ):  # NCCL has no such barrier: its watchdog ends the process with its own report
        return
    try:
        dist.monitored_barrier(pg.world, timedelta(seconds=pg.timeout_seconds), wait_all_ranks=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"{during}: a rank hangs or is gone (timeout_seconds = {pg.timeout_seconds:g}): {error}"
        ) from None


def broadcast_from_rank_zero(value: Any, pg: ProcessGroups, *, during: str | None = None) -> Any:
    """Rank zero's value, on every rank. during: what the error says where a rank does not come."""
    _wait_for_all_ranks(during, pg)
    values = [value]
    dist.broadcast_object_list(values, src=0, group=pg.world, device=pg.device)
    return values[0]


def gather_from_all_ranks(value: Any, pg: ProcessGroups, *, during: str | None = None) -> list[Any]:
    """The values of all ranks, on every rank. during: what the error says where a rank does not come."""
    _wait_for_all_ranks(during, pg)
    values = [None] * pg.world_size
    dist.all_gather_object(values, value, group=pg.world)
    return values

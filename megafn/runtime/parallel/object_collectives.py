"""Python objects from rank to rank: one rank's object on all ranks, or all ranks' on every rank.

For control (paths, manifests, errors), not for the training step: each call pickles its object and
waits for every rank of the layout.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from megafn.runtime.parallel.groups import ProcessGroups

T = TypeVar("T")


def broadcast_from_rank_zero(value: T, pg: ProcessGroups, *, during: str | None = None) -> T:
    """Rank zero's value, on every rank; the values that other ranks pass are not looked at.

    Every rank must call it. The value must be picklable. Two broadcasts over `pg.world`: the size
    of the pickle, then the pickle (through GPU memory if the groups are NCCL's).

    If a rank is missing, the others wait for `pg.timeout_seconds`. Then gloo raises a RuntimeError
    and NCCL's watchdog ends the process. With `during` (what is being done, as in "saving to
    /runs/7") a barrier comes first on gloo, and its RuntimeError says what was going on and which
    ranks are missing.
    """
    pg.check_open()
    if during is not None:
        _wait_for_all_ranks(during, pg)
    values = [value]
    dist.broadcast_object_list(values, src=0, group=pg.world, device=pg.device)
    return values[0]


def gather_from_all_ranks(value: T, pg: ProcessGroups, *, during: str | None = None) -> list[T]:
    """The values of all ranks in the order of the ranks, on every rank.

    Every rank must call it. The values must be picklable. Two all-gathers over `pg.world`: the
    sizes of the pickles, then the pickles, each padded to the largest, so that every rank receives
    world_size * largest bytes. A missing rank is handled as in `broadcast_from_rank_zero`.
    """
    pg.check_open()
    if during is not None:
        _wait_for_all_ranks(during, pg)
    # placeholders, all of which are replaced
    values = [value] * pg.world_size
    dist.all_gather_object(values, value, group=pg.world)
    return values


def _wait_for_all_ranks(during: str, pg: ProcessGroups) -> None:
    """Wait for all ranks; if one does not come in time, the error says which, and during what."""
    if pg.device.type == "cuda":
        # NCCL has no such barrier: its watchdog ends the process with a report of its own.
        return
    timeout = timedelta(seconds=pg.timeout_seconds)
    try:
        dist.monitored_barrier(pg.world, timeout, wait_all_ranks=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"{during}: a rank hangs or is gone (timeout_seconds = {pg.timeout_seconds:g}): {error}"
        ) from None

"""What ranks tell each other: rank zero's value, everyone's, and that a user's own batches fit together."""
from __future__ import annotations

import zlib
from datetime import timedelta
from typing import Any, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist

from megafn.pure.layout import coordinates
from megafn.runtime.groups import ProcessGroups


def _meet(during: str | None, pg: ProcessGroups) -> None:
    """Wait for all ranks. Where one does not come in time, the error says which, and what was going on."""
    if during is None or pg.device.type == "cuda":          # NCCL has no such barrier: its watchdog ends the process with its own report
        return
    try:
        dist.monitored_barrier(pg.world, timedelta(seconds=pg.timeout_seconds), wait_all_ranks=True)
    except RuntimeError as error:
        raise RuntimeError(f"{during}: a rank hangs or is gone (timeout_seconds = {pg.timeout_seconds:g}): {error}") from None


def told(value: Any, pg: ProcessGroups, *, during: str | None = None) -> Any:
    """Rank zero's value, on every rank. during: what the error says where a rank does not come."""
    _meet(during, pg)
    values = [value]
    dist.broadcast_object_list(values, src=0, group=pg.world, device=pg.device)
    return values[0]


def everyones(value: Any, pg: ProcessGroups, *, during: str | None = None) -> list[Any]:
    """The values of all ranks, on every rank. during: what the error says where a rank does not come."""
    _meet(during, pg)
    values = [None] * pg.world_size
    dist.all_gather_object(values, value, group=pg.world)
    return values


def fingerprint(value: Any, start: int = 0) -> int:
    """A number of the tensors, numbers and texts within a value; other things do not count.

    >>> fingerprint({"a": torch.tensor([1, 2])}) == fingerprint({"a": torch.tensor([1, 2])}) != fingerprint({"a": torch.tensor([2, 1])})
    True
    """
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        return zlib.crc32(data.flatten().view(torch.uint8).numpy() if data.numel() else b"", zlib.crc32(repr(data.shape).encode(), start))
    if isinstance(value, Mapping):
        for key in value:
            start = fingerprint(value[key], zlib.crc32(str(key).encode(), start))
    elif isinstance(value, (list, tuple)):
        for item in value:
            start = fingerprint(item, start)
    elif isinstance(value, (str, int, float)):
        start = zlib.crc32(repr(value).encode(), start)
    return start


def agreed(batches: Iterable[Any], pg: ProcessGroups, *, count: int) -> Iterator[Any]:
    """At most `count` of the batches, ending on every rank as soon as one rank has no more.

    Raises ValueError, on every rank, where ranks that differ only in tp, cp or pp read different batches.
    """
    iterator = iter(batches)
    for _ in range(count):
        batch = next(iterator, None)
        mark = torch.tensor([-1 if batch is None else fingerprint(batch)], device=pg.device)
        marks = [torch.empty_like(mark) for _ in range(pg.world_size)]
        dist.all_gather(marks, mark, group=pg.world)
        marks = [int(mark) for mark in marks]
        if min(marks) < 0:
            return
        for dp in range(pg.dp_size):
            ranks = [rank for rank in range(pg.world_size) if coordinates(pg.groups, rank).dp == dp]
            other = next((rank for rank in ranks if marks[rank] != marks[ranks[0]]), None)
            if other is not None:
                raise ValueError(f"batches: ranks {ranks[0]} and {other} read different batches, but both hold data-parallel position {dp}; "
                                 f"seed and shard the loader by pg.dp_rank, not by rank.")
        yield batch

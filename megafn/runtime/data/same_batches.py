"""Ranks that must read the same batches do: compared by fingerprints before each step."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megafn.pure.layout import coordinates
from megafn.runtime.parallel.groups import ProcessGroups


def first_sample(batch: Any) -> int:
    """A fingerprint of the first row of a global batch's share: on rank zero, whatever the layout, the first sample of the global batch."""
    micro_batch = next(iter(batch))
    if isinstance(micro_batch, Mapping):
        micro_batch = {
            key: value[0]
            for key, value in micro_batch.items()
            if isinstance(value, torch.Tensor) and value.dim() and len(value)
        }
    return fingerprint(micro_batch)


def fingerprint(value: Any, start: int = 0) -> int:
    """A number of the tensors, numbers and texts within a value; other things do not count.

    >>> fingerprint({"a": torch.tensor([1, 2])}) == fingerprint({"a": torch.tensor([1, 2])}) != fingerprint({"a": torch.tensor([2, 1])})
    True
    """
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        return zlib.crc32(
            data.flatten().view(torch.uint8).numpy() if data.numel() else b"",
            zlib.crc32(repr(data.shape).encode(), start),
        )
    if isinstance(value, Mapping):
        for key in value:
            start = fingerprint(value[key], zlib.crc32(str(key).encode(), start))
    elif isinstance(value, (list, tuple)):
        for item in value:
            start = fingerprint(item, start)
    elif isinstance(value, (str, int, float)):
        start = zlib.crc32(repr(value).encode(), start)
    return start


def check_same_batches(batches: Iterable[Any], pg: ProcessGroups, *, count: int) -> Iterator[Any]:
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
                raise ValueError(
                    f"batches: ranks {ranks[0]} and {other} read different batches, but both hold data-parallel position {dp}; "
                    f"seed and shard the loader by pg.dp_rank, not by rank."
                )
        yield batch

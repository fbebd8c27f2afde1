"""Fingerprints of batches, and a check that ranks which must read the same batches do.

The fingerprints of a step are not added to the sums that it makes over all ranks before its update.
Those come after the forward pass, in which ranks with other shapes, or without a batch, would wait
for each other for ever.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from megafn.pure.layout import Groups, coordinates
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.object_collectives import errors_on_all_ranks
from megafn.runtime.parallel.tensor_collectives import gather_rows

T = TypeVar("T")

# instead of a fingerprint, which is 0 or more
_ENDED = -1
_FAILED = -2


def fingerprint(value: Any, start: int = 0) -> int:
    """A checksum (CRC-32) of the tensors, arrays, numbers and strings in nested dicts and lists.

    Tensors count with their shape, objects of other types are ignored. start: the checksum of what
    comes before.

    >>> a = fingerprint({"a": torch.tensor([1, 2])})
    >>> a == fingerprint({"a": torch.tensor([1, 2])}), a == fingerprint({"a": torch.tensor([2, 1])})
    (True, False)
    """
    if isinstance(value, torch.Tensor):
        return _fingerprint_of_tensor(value, start)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return zlib.crc32(value.tobytes(), zlib.crc32(repr(value.shape).encode(), start))
    if isinstance(value, Mapping):
        for key in value:
            start = fingerprint(value[key], zlib.crc32(str(key).encode(), start))
    elif isinstance(value, (list, tuple)):
        for item in value:
            start = fingerprint(item, start)
    elif isinstance(value, (str, int, float)):
        start = zlib.crc32(repr(value).encode(), start)
    return start


def _fingerprint_of_tensor(tensor: torch.Tensor, start: int) -> int:
    data = tensor.detach().cpu().contiguous()
    start = zlib.crc32(repr(data.shape).encode(), start)
    if data.numel() == 0:
        return start
    return zlib.crc32(data.flatten().view(torch.uint8).numpy().data, start)


def first_sample(batch: Iterable[Any]) -> int:
    """The fingerprint of the first row of the first micro-batch of this rank's share.

    On rank zero this is the first sample of the global batch, in every layout. Checkpoints store
    it, so that a resumed run recognises whether its data are those read before.
    """
    micro_batch = next(iter(batch))
    if isinstance(micro_batch, Mapping):
        micro_batch = {
            key: value[0]
            for key, value in micro_batch.items()
            if isinstance(value, torch.Tensor) and value.dim() and len(value)
        }
    return fingerprint(micro_batch)


def check_same_batches(
    batches: Iterable[T], pg: ProcessGroups, *, count: int, for_training: bool = True
) -> Iterator[T]:
    """At most `count` of the batches, ending on every rank as soon as one rank has no more.

    Each batch costs one all-gather of a number over all ranks. If data-parallel ranks read the same
    first batch for training, rank zero warns.
    Raises ValueError, on every rank, if ranks that differ only in tp, cp or pp read different
    batches. An exception of one rank's batches is raised on every rank.
    """
    iterator = iter(batches)
    first_ranks = _first_rank_of_each_position(pg.groups)
    for i in range(count):
        batch = None
        failure = None
        try:
            batch = next(iterator, None)
            mark = _ENDED if batch is None else fingerprint(batch)
        except Exception as error:
            failure = error
            mark = _FAILED
        marks = gather_rows(torch.tensor([mark], device=pg.device), pg.world).flatten().cpu()
        if (marks == _FAILED).any():
            _raise_failure(failure, pg)
        if batch is None or (marks == _ENDED).any():
            return
        _check_same_marks(marks, first_ranks, pg.groups)
        if i == 0 and for_training and pg.is_rank_zero and _is_visible(batch):
            _warn_of_equal_shares(marks, first_ranks, pg.groups)
        yield batch


def _raise_failure(failure: Exception | None, pg: ProcessGroups) -> None:
    """Raise the exception of this rank's batches, or that of another rank's."""
    with errors_on_all_ranks(pg):
        if failure is not None:
            raise failure


def _first_rank_of_each_position(groups: Groups) -> torch.Tensor:
    """For each rank the first rank of its data-parallel position, which reads the same, [ranks]."""
    first_of_position: dict[int, int] = {}
    first_ranks = []
    for rank in range(groups.world_size):
        position = coordinates(groups, rank).dp
        first_of_position.setdefault(position, rank)
        first_ranks.append(first_of_position[position])
    return torch.tensor(first_ranks)


def _check_same_marks(marks: torch.Tensor, first_ranks: torch.Tensor, groups: Groups) -> None:
    different = (marks != marks[first_ranks]).nonzero().flatten().tolist()
    if different:
        rank = different[0]
        raise ValueError(
            f"batches: ranks {int(first_ranks[rank])} and {rank} read different batches, but both "
            f"hold data-parallel position {coordinates(groups, rank).dp}; seed and shard the "
            "loader by pg.dp_rank, not by rank"
        )


def _is_visible(value: Any) -> bool:
    """Whether `fingerprint` sees all that is in a batch, so that equal ones are the same."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return all(map(_is_visible, value))
    if isinstance(value, np.ndarray):
        return value.dtype != object
    return value is None or isinstance(value, (torch.Tensor, str, int, float))


def _warn_of_equal_shares(marks: torch.Tensor, first_ranks: torch.Tensor, groups: Groups) -> None:
    """Warn if ranks of different data-parallel positions read the same first batch."""
    rank_of_mark: dict[int, int] = {}
    for rank in sorted(set(first_ranks.tolist())):
        same_as = rank_of_mark.setdefault(int(marks[rank]), rank)
        if same_as == rank:
            continue
        positions = f"{coordinates(groups, same_as).dp} and {coordinates(groups, rank).dp}"
        warnings.warn(
            f"batches: ranks {same_as} and {rank} read the same first batch, but hold the "
            f"data-parallel positions {positions} of {groups.dp_size}, so samples count twice. "
            "Give each position its own share: shard the loader by mf.coordinates(mf.build_groups("
            "config.parallel, mf.world_size(), model=config.model), rank).dp, for instance with a "
            "DistributedSampler. If that is on purpose, ignore this.",
            stacklevel=5,  # the caller of `train`
        )
        return

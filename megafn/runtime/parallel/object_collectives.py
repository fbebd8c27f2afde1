"""Python objects from rank to rank: one rank's object on all ranks, or all ranks' on every rank.

For control (paths, manifests, errors), not for the training step: each call pickles its object and
waits for every rank of the layout. What is more than a few hundred bytes of each rank goes through
`gather_on_rank_zero` or `decide_on_rank_zero`: `gather_from_all_ranks` gives every rank all of it.

What can fail on one rank (a file that only rank zero reads, a copy of the data that only one host
has) and is followed by a collective goes through `call_on_rank_zero` or `errors_on_all_ranks`:
else the other ranks would wait for that rank until the timeout.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from attrs import frozen

from megafn.pure.layout import group_of
from megafn.runtime.parallel.groups import ProcessGroups

T = TypeVar("T")
R = TypeVar("R")


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


def gather_on_rank_zero(
    value: T, pg: ProcessGroups, *, during: str | None = None
) -> list[T] | None:
    """The values of all ranks in the order of the ranks, on rank zero; None on the other ranks.

    Every rank must call it. The values must be picklable; those with equal pickles are one object.
    Two steps, so that no rank but zero receives something of the whole world: the data-parallel
    replicas (`pg.dp_cp`) send to the first of them, and these first ones, which are one copy of the
    model (`pg.mp`), send to rank zero what is distinct. A missing rank is handled as in
    `broadcast_from_rank_zero`.
    """
    pg.check_open()
    if during is not None:
        _wait_for_all_ranks(during, pg)
    replicas = _gather_bytes(pickle.dumps(value), pg.dp_cp, pg.device)
    if replicas is None:
        return None
    model_copy = _gather_bytes(pickle.dumps(_without_repetition(replicas)), pg.mp, pg.device)
    if model_copy is None:
        return None

    values: list[Any] = [None] * pg.world_size
    by_pickle: dict[bytes, T] = {}
    for ranks, pickled in zip(_replicas_of_model_copy(pg), model_copy, strict=True):
        distinct, numbers = pickle.loads(pickled)
        for rank, number in zip(ranks, numbers, strict=True):
            key = distinct[number]
            if key not in by_pickle:
                by_pickle[key] = pickle.loads(key)
            values[rank] = by_pickle[key]
    return values


def scatter_from_rank_zero(values: Sequence[T] | None, pg: ProcessGroups) -> T:
    """To each rank its own of the values that rank zero passes, in the order of the ranks.

    Every rank must call it, all but rank zero with None. The values must be picklable. They go the
    way of `gather_on_rank_zero` back: over `pg.mp`, then over `pg.dp_cp`.
    """
    pg.check_open()
    by_replicas = None
    if values is not None:
        by_replicas = [[values[rank] for rank in ranks] for ranks in _replicas_of_model_copy(pg)]
    replicas = None
    if dist.get_rank(pg.dp_cp) == 0:
        replicas = _scatter_object(by_replicas, pg.mp)
    return _scatter_object(replicas, pg.dp_cp)


def _replicas_of_model_copy(pg: ProcessGroups) -> list[tuple[int, ...]]:
    """The ranks of each `dp_cp` group, in the order of their first ranks.

    These are the model copy that rank zero belongs to: its `mp` group.
    """
    return [group_of(pg.groups, "dp_cp", first) for first in group_of(pg.groups, "mp", 0)]


def _without_repetition(pickles: Sequence[bytes]) -> tuple[list[bytes], list[int]]:
    """The distinct pickles, and the number of each rank's among them."""
    number_of: dict[bytes, int] = {}
    numbers = [number_of.setdefault(pickled, len(number_of)) for pickled in pickles]
    return list(number_of), numbers


def _gather_bytes(
    sent: bytes, group: dist.ProcessGroup, device: torch.device
) -> list[bytes] | None:
    """What the ranks of a group send, in their order, on the first of them; None on the others.

    Unlike `dist.gather_object`, which tells every rank the sizes of all.
    """
    largest = torch.tensor([len(sent)], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    padded = len(sent).to_bytes(_SIZE_BYTES, "little") + sent.ljust(int(largest), b"\0")
    own = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(device)
    is_first = dist.get_rank(group) == 0
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))] if is_first else None
    dist.gather(own, parts, dst=dist.get_global_rank(group, 0), group=group)
    return None if parts is None else [_unpadded(part) for part in parts]


def _unpadded(part: torch.Tensor) -> bytes:
    received = part.cpu().numpy().tobytes()
    size = int.from_bytes(received[:_SIZE_BYTES], "little")
    return received[_SIZE_BYTES : _SIZE_BYTES + size]


_SIZE_BYTES = 8


def _scatter_object(values: Sequence[T] | None, group: dist.ProcessGroup) -> T:
    """To each rank of a group its own of the values that the first of them passes."""
    received: list[Any] = [None]
    given = None if values is None else list(values)
    dist.scatter_object_list(received, given, src=dist.get_global_rank(group, 0), group=group)
    return received[0]


@frozen(kw_only=True, eq=False)
class _Outcome(Generic[T]):
    """What a function returned on rank zero, or the exception that it raised."""

    value: T | None = None
    error: Exception | None = None


def call_on_rank_zero(function: Callable[[], T], pg: ProcessGroups) -> T:
    """What a function returns on rank zero, which alone calls it, on every rank.

    An exception that it raises is raised on every rank. Every rank must call this; the function
    must not communicate, and what it returns must be picklable. Communicates as
    `broadcast_from_rank_zero`.
    """
    outcome: _Outcome[T] = _Outcome()
    if pg.is_rank_zero:
        try:
            outcome = _Outcome(value=function())
        except Exception as error:
            broadcast_from_rank_zero(_Outcome(error=picklable(error)), pg)
            raise
    outcome = broadcast_from_rank_zero(outcome, pg)
    if outcome.error is not None:
        raise outcome.error
    return outcome.value  # type: ignore[return-value]


def decide_on_rank_zero(value: T, decide: Callable[[list[T]], R], pg: ProcessGroups) -> R:
    """What a function makes of the values of all ranks, on every rank; rank zero alone calls it.

    For values that are too many for `gather_from_all_ranks`. An exception that the function raises
    is raised on every rank. Communicates as `gather_on_rank_zero` and `call_on_rank_zero`.
    """
    values = gather_on_rank_zero(value, pg)
    return call_on_rank_zero(lambda: decide(values or []), pg)


@contextlib.contextmanager
def errors_on_all_ranks(pg: ProcessGroups, *, during: str | None = None) -> Iterator[None]:
    """An exception in the body of the `with`, on any rank, is raised on every rank at its end.

    Every rank must enter it; the body should not communicate, since a rank that fails no longer
    does. If several ranks fail, each raises its own exception, and the others that of the first of
    them, with a note that says on which rank it was. Communicates as `gather_from_all_ranks`.
    """
    try:
        yield
    except Exception as error:
        gather_from_all_ranks(picklable(error), pg, during=during)
        raise
    errors = gather_from_all_ranks(None, pg, during=during)
    for rank, error_of_rank in enumerate(errors):
        if error_of_rank is not None:
            error_of_rank.add_note(f"raised on rank {rank}")
            raise error_of_rank


def all_ranks_arrive(meeting: str, pg: ProcessGroups, *, seconds: float) -> bool:
    """Whether every rank calls this for the same meeting, each within that time of the first.

    Unlike a collective it may be called by a rank that does not know whether the others come, for
    instance after an exception. meeting: a name that is used once. Communicates through the store
    where the processes met, not through `pg`.
    """
    end = time.monotonic() + seconds
    key = f"megafn/meeting/{meeting}"
    try:
        store = dist.distributed_c10d._get_default_store()
        arrived = store.add(key, 1)
        while arrived < pg.world_size and time.monotonic() < end:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            arrived = store.add(key, 0)
    except (dist.DistError, RuntimeError):  # the process that holds the store is gone
        return False
    return arrived == pg.world_size


_SECONDS_BETWEEN_LOOKS = 0.05


def picklable(error: Exception) -> Exception:
    """The exception itself, or one that says the same if it cannot be pickled and read again."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


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

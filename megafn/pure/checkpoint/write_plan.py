"""Which rank writes what of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from math import prod

from attrs import frozen

from megafn.pure.checkpoint.boxes import Box, Index

# A box of a tensor that a rank holds: the tensor's name, its whole shape, the box, its bytes.
Holding = tuple[str, Index, Box, int]

# Per tensor its whole shape, and each box with the rank that writes it.
WritePlan = dict[str, tuple[Index, list[tuple[Box, int]]]]


@frozen(kw_only=True, cache_hash=True)
class Listing:
    """What a rank holds. Replicas have equal ones."""

    # pipeline stage
    stage: int
    holdings: tuple[Holding, ...]


def plan_writes(listings: Sequence[Listing]) -> WritePlan:
    """Who writes which box, so that every element of every tensor is written once.

    `listings` are those of every rank in order. If several stages hold a tensor (a tied table), the
    first stage's copy is written. Each distinct box is written by one of the ranks that hold it:
    the one with the fewest bytes so far, so that replicas share the work. Raises ValueError if the
    boxes do not cover a tensor exactly.

    Ranks with one and the same listing are looked at together: what it costs grows with what the
    ranks hold that is distinct, and little with their number.

    >>> first = Listing(stage=0, holdings=(("table", (4, 2), ((0, 0), (2, 2)), 16),))
    >>> second = Listing(stage=0, holdings=(("table", (4, 2), ((2, 0), (2, 2)), 16),))
    >>> tied = Listing(stage=1, holdings=first.holdings)
    >>> plan_writes([first, second, first, tied])
    {'table': ((4, 2), [(((0, 0), (2, 2)), 0), (((2, 0), (2, 2)), 1)])}
    """
    bytes_of_rank = [0] * len(listings)
    plan: WritePlan = {}
    for (tensor, shape, box, size), replicas in _holders(listings).items():
        writer = min(chain(*replicas), key=lambda rank: (bytes_of_rank[rank], rank))
        bytes_of_rank[writer] += size
        _, writes = plan.setdefault(tensor, (shape, []))
        writes.append((box, writer))
    _check_coverage(plan)
    return plan


def boxes_by_rank(plan: WritePlan, num_ranks: int) -> list[list[tuple[str, Index]]]:
    """What each rank writes: the tensor and the offset of each box.

    >>> boxes_by_rank({"table": ((4, 2), [(((0, 0), (2, 2)), 0), (((2, 0), (2, 2)), 1)])}, 2)
    [[('table', (0, 0))], [('table', (2, 0))]]
    """
    boxes: list[list[tuple[str, Index]]] = [[] for _ in range(num_ranks)]
    for tensor, (_, writes) in plan.items():
        for (offset, _), writer in writes:
            boxes[writer].append((tensor, offset))
    return boxes


def _holders(listings: Sequence[Listing]) -> Mapping[Holding, list[list[int]]]:
    """The ranks of the first stage that holds a tensor, by what they hold.

    Lists of ranks, each of the replicas with one listing.
    """
    replicas: dict[Listing, list[int]] = {}
    for rank, listing in enumerate(listings):
        replicas.setdefault(listing, []).append(rank)

    first_stage = _first_stages(replicas)
    holders: dict[Holding, list[list[int]]] = {}
    for listing, ranks in replicas.items():
        for holding in listing.holdings:
            tensor = holding[0]
            if listing.stage == first_stage[tensor]:
                holders.setdefault(holding, []).append(ranks)
    return holders


def _first_stages(listings: Iterable[Listing]) -> Mapping[str, int]:
    first: dict[str, int] = {}
    for listing in listings:
        for tensor, *_ in listing.holdings:
            first[tensor] = min(first.get(tensor, listing.stage), listing.stage)
    return first


def _check_coverage(plan: WritePlan) -> None:
    for tensor, (shape, writes) in plan.items():
        covered = sum(prod(size) for (_, size), _ in writes)
        if covered != prod(shape):
            raise ValueError(
                f"{tensor}: its boxes hold {covered} elements, expected {prod(shape)}; "
                "nothing is saved"
            )

"""Which rank writes what of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from megafn.pure.checkpoint.boxes import Box, Index

# A box of a tensor that a rank holds: the tensor's name, its whole shape, the box, its bytes.
Holding = tuple[str, Index, Box, int]

# Per tensor its whole shape, and each box with the rank that writes it.
WritePlan = dict[str, tuple[Index, list[tuple[Box, int]]]]


def plan_writes(ranks: Sequence[tuple[int, Sequence[Holding]]]) -> WritePlan:
    """Who writes which box, so that every element of every tensor is written once.

    `ranks` holds (pipeline stage, what the rank holds) for every rank in order. If several stages
    hold a tensor (a tied table), the first stage's copy is written. Each distinct box is written by
    one of the ranks that hold it: the one with the fewest bytes so far, so that replicas share the
    work. Raises ValueError if the boxes do not cover a tensor exactly.

    >>> first = [("table", (4, 2), ((0, 0), (2, 2)), 16)]
    >>> second = [("table", (4, 2), ((2, 0), (2, 2)), 16)]
    >>> plan_writes([(0, first), (0, second), (0, first), (1, second)])
    {'table': ((4, 2), [(((0, 0), (2, 2)), 0), (((2, 0), (2, 2)), 1)])}
    """
    bytes_of_rank = [0] * len(ranks)
    plan: WritePlan = {}
    for (tensor, shape, box, size), holders in _holders(ranks).items():
        writer = min(holders, key=bytes_of_rank.__getitem__)
        bytes_of_rank[writer] += size
        _, writes = plan.setdefault(tensor, (shape, []))
        writes.append((box, writer))
    _check_coverage(plan)
    return plan


def _holders(ranks: Sequence[tuple[int, Sequence[Holding]]]) -> Mapping[Holding, list[int]]:
    """The ranks of the first stage that holds a tensor, by what they hold."""
    first_stage = _first_stages(ranks)
    holders: dict[Holding, list[int]] = {}
    for rank, (stage, holdings) in enumerate(ranks):
        for holding in holdings:
            tensor = holding[0]
            if stage == first_stage[tensor]:
                holders.setdefault(holding, []).append(rank)
    return holders


def _first_stages(ranks: Iterable[tuple[int, Sequence[Holding]]]) -> Mapping[str, int]:
    first: dict[str, int] = {}
    for stage, holdings in ranks:
        for tensor, *_ in holdings:
            first[tensor] = min(first.get(tensor, stage), stage)
    return first


def _check_coverage(plan: WritePlan) -> None:
    for tensor, (shape, writes) in plan.items():
        covered = sum(prod(size) for (_, size), _ in writes)
        if covered != prod(shape):
            raise ValueError(
                f"{tensor}: its boxes hold {covered} elements, expected {prod(shape)}; "
                "nothing is saved"
            )

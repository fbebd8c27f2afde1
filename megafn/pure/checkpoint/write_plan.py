"""Which rank writes what of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from megafn.pure.checkpoint.boxes import Box, Index

Holding = tuple[str, Index, Box, int]  # tensor, its whole shape, a box of it, bytes of that


def plan_writes(
    ranks: Sequence[tuple[int, Sequence[Holding]]],
) -> dict[str, tuple[Index, list[tuple[Box, int]]]]:
    """Of each tensor its whole shape and who writes which box: (pipeline stage, what it holds) of every rank in, and every element once out.

    Of a tensor that several stages hold (a tied table) the first stage's copy is written. Of equal boxes one rank writes one: that with the
    fewest bytes so far, so that replicas share the work. Raises ValueError where boxes do not cover a tensor exactly.

    >>> half = [("table", (4, 2), ((0, 0), (2, 2)), 16)], [("table", (4, 2), ((2, 0), (2, 2)), 16)]
    >>> plan_writes([(0, half[0]), (0, half[1]), (0, half[0]), (1, half[1])])
    {'table': ((4, 2), [(((0, 0), (2, 2)), 0), (((2, 0), (2, 2)), 1)])}
    """
    first: dict[str, int] = {}
    for stage, holdings in ranks:
        for tensor, *_ in holdings:
            first[tensor] = min(first.get(tensor, stage), stage)
    holders: dict[tuple[str, Index, Box, int], list[int]] = {}
    for rank, (stage, holdings) in enumerate(ranks):
        for holding in holdings:
            if stage == first[holding[0]]:
                holders.setdefault(holding, []).append(rank)
    load, shared = [0] * len(ranks), {}
    for (tensor, shape, box, size), able in holders.items():
        writer = min(able, key=load.__getitem__)
        load[writer] += size
        shared.setdefault(tensor, (shape, []))[1].append((box, writer))
    for tensor, (shape, written) in shared.items():
        covered = sum(prod(size) for (_, size), _ in written)
        if covered != prod(shape):
            raise ValueError(
                f"{tensor}: its boxes hold {covered} elements, the whole {prod(shape)}; nothing is saved"
            )
    return shared

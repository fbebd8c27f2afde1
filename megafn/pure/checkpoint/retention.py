"""Which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Iterable


def iterations_to_keep(
    iterations: Iterable[int], *, keep_last: int, keep_every: int | None
) -> frozenset[int]:
    """Which of the iterations that have a complete checkpoint are kept.

    The last `keep_last` (0: all of them) and every multiple of `keep_every`. The newest is always
    among them.

    >>> sorted(iterations_to_keep([10, 20, 30, 40, 50], keep_last=2, keep_every=20))
    [20, 40, 50]
    """
    ordered = sorted(iterations)
    kept = set(ordered[-keep_last:])
    if keep_every is not None:
        kept.update(iteration for iteration in ordered if iteration % keep_every == 0)
    return frozenset(kept)

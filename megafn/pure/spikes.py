"""Which gradient norms are spikes: a pure function of the norms before."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from statistics import median

WINDOW = 32  # norms that are looked at
LEAST = 8  # before so many are known nothing is a spike


def spike_limit(norms: Sequence[float], factor: float | None) -> float:
    """The largest gradient norm that is no spike after these: `factor` times their median; infinity where factor is None.

    >>> spike_limit([1.0, 2.0, 3.0] * 3, 10.0), spike_limit([1.0, 2.0, 3.0], 10.0)
    (20.0, inf)
    """
    return inf if factor is None or len(norms) < LEAST else factor * median(norms)


def append_norm(norms: Sequence[float], norm: float | None) -> tuple[float, ...]:
    """The last norms, this one too. A spike counts as well: norms that rise for good are spikes for half a window at most.

    >>> append_norm((1.0, 2.0), 3.0), append_norm((1.0, 2.0), float("nan"))
    ((1.0, 2.0, 3.0), (1.0, 2.0))
    """
    return tuple(norms) if norm is None or not isfinite(norm) else (*norms, norm)[-WINDOW:]

"""Which gradient norms are spikes: a pure function of the norms before."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from statistics import median

# The number of norms that are compared with.
WINDOW = 32
# As long as fewer norms are known, nothing is a spike.
LEAST = 8


def spike_limit(norms: Sequence[float], factor: float | None) -> float:
    """The largest gradient norm that is not a spike after these: `factor` times their median.

    Infinity if `factor` is None or fewer than `LEAST` norms are known.

    >>> spike_limit([1.0, 2.0, 3.0] * 3, 10.0), spike_limit([1.0, 2.0, 3.0], 10.0)
    (20.0, inf)
    """
    if factor is None or len(norms) < LEAST:
        return inf
    return factor * median(norms)


def append_norm(norms: Sequence[float], norm: float | None) -> tuple[float, ...]:
    """The last `WINDOW` norms, the new one included; a norm that is None or not finite is left out.

    A spike is included too: norms that rise for good then count as spikes for at most half a
    window.

    >>> append_norm((1.0, 2.0), 3.0), append_norm((1.0, 2.0), float("nan"))
    ((1.0, 2.0, 3.0), (1.0, 2.0))
    """
    if norm is None or not isfinite(norm):
        return tuple(norms)
    return (*norms, norm)[-WINDOW:]

"""Which lengths of a sequence can be cut over the ranks."""

from __future__ import annotations

from math import lcm


def sequence_unit(tp: int, cp: int, sequence_parallel: bool) -> int:
    """The number of tokens of which every sequence must be a multiple.

    Context parallelism cuts a sequence into 2 * cp pieces (two for each rank, so that causal
    attention is balanced), sequence parallelism cuts each rank's share once more over tp.

    >>> sequence_unit(tp=4, cp=1, sequence_parallel=False)
    1
    >>> sequence_unit(tp=4, cp=2, sequence_parallel=True)
    8
    """
    over_context = 2 * cp if cp > 1 else 1
    over_tensor = tp * cp if sequence_parallel else 1
    return lcm(over_context, over_tensor)

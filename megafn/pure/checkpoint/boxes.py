"""Rectangles of a tensor: what of a whole parameter a process holds, whatever the layout that cut it.

A box is (offset, size), one number of each per dimension. An optimizer's shard is a range of flattened elements,
which a few boxes cover; tensor parallelism says where in the whole parameter they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

Index = tuple[int, ...]
Box = tuple[Index, Index]


def boxes(shape: Index, start: int, end: int) -> Iterator[Box]:
    """The fewest boxes in order that cover the elements start to end - 1 of a flattened tensor: rows, and parts of the first and last.

    >>> list(boxes((4, 5), 3, 17))
    [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows are first to last - 1
    if start // row == (end - 1) // row and first >= last:  # within one row
        spans = [(start // row, start % row, start % row + end - start)]
        first = last = 0
    else:
        spans = [(start // row, start % row, row)] * (start % row > 0) + [(last, 0, end % row)] * (
            end % row > 0
        )
    inner = [
        [((at, *offset), (1, *size)) for offset, size in boxes(shape[1:], low, high)]
        for at, low, high in spans
    ]
    if first < last:
        inner.insert(
            int(start % row > 0), [((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))]
        )
    for part in inner:
        yield from part


def in_whole(
    box: Box,
    local: Index,
    whole: Index,
    dim: int | None,
    *,
    stride: int = 1,
    tp: int = 1,
    tp_rank: int = 0,
) -> Iterator[tuple[Box, Index]]:
    """Where a box of a process's part lies in the whole tensor: (box there, offset in the part), one for each block that it meets.

    The whole is cut over tp along `dim` (None: not at all), in `stride` blocks cut one by one. What only pads `dim` is left out.

    >>> list(in_whole(((0, 0), (4, 3)), (4, 3), (8, 3), 0, stride=2, tp=2, tp_rank=1))
    [(((2, 0), (2, 3)), (0, 0)), (((6, 0), (2, 3)), (2, 0))]
    >>> list(in_whole(((0,), (4,)), (4,), (7,), 0, tp=2, tp_rank=1))            # 7 padded to 8
    [(((4,), (3,)), (0,))]
    """
    if dim is None:
        yield box, box[0]
        return
    offset, size = box
    block = local[dim] // stride
    for i in range(stride):
        low, high = max(offset[dim], i * block), min(offset[dim] + size[dim], (i + 1) * block)
        shift = (
            i * block * tp + tp_rank * block - i * block
        )  # from a place in this block to the whole's
        high = min(high, whole[dim] - shift)
        if low < high:
            at, extent = list(offset), list(size)
            at[dim], extent[dim] = low, high - low
            there = list(at)
            there[dim] += shift
            yield (tuple(there), tuple(extent)), tuple(at)


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes have in common, or None.

    >>> overlap(((0, 2), (4, 4)), ((3, 0), (4, 3)))
    ((3, 2), (1, 1))
    """
    low = tuple(map(max, one[0], other[0]))
    size = tuple(min(a + n, b + m) - at for a, n, b, m, at in zip(*one, *other, low))
    return (low, size) if all(n > 0 for n in size) else None


def flat(offset: Index, shape: Index) -> int:
    """The place of an index in the flattened tensor.

    >>> flat((2, 3), (4, 5))
    13
    """
    at = 0
    for i, n in zip(offset, shape):
        at = at * n + i
    return at

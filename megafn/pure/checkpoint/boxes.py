"""Rectangles of a tensor: the part of a whole parameter that a process holds, in any layout.

A box is (offset, size), one number of each per dimension. An optimizer's shard is a range of
flattened elements, which a few boxes cover; tensor parallelism says where in the whole parameter
they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

Index = tuple[int, ...]
Box = tuple[Index, Index]


def boxes(shape: Index, start: int, end: int) -> Iterator[Box]:
    """The fewest boxes that cover the elements start to end - 1 of a flattened tensor, in order.

    These are whole rows, and parts of the first and of the last row.

    >>> list(boxes((4, 5), 3, 17))
    [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
    """
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return

    row_size = prod(shape[1:])
    first_row, start_in_row = divmod(start, row_size)
    last_row, end_in_row = divmod(end, row_size)
    if first_row == last_row:
        yield from _boxes_in_row(shape, first_row, start_in_row, end_in_row)
        return
    if start_in_row > 0:
        yield from _boxes_in_row(shape, first_row, start_in_row, row_size)
        first_row += 1
    if first_row < last_row:
        yield (first_row, *(0 for _ in shape[1:])), (last_row - first_row, *shape[1:])
    yield from _boxes_in_row(shape, last_row, 0, end_in_row)


def _boxes_in_row(shape: Index, row: int, start: int, end: int) -> Iterator[Box]:
    """The boxes that cover the elements start to end - 1 of one row."""
    for offset, size in boxes(shape[1:], start, end):
        yield (row, *offset), (1, *size)


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
    """Where a box of a process's part lies in the whole tensor.

    `local` and `whole` are the shapes of the part and of the whole tensor, which is cut over tp
    along `dim` (None: not at all), in `stride` blocks that are each cut. Yields (box in the whole,
    its offset in the part) for each block that the box meets; rows that only pad `dim` to a
    multiple of tp are left out.

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
        block_start = i * block
        # What is added to a position in this block of the part to get that in the whole.
        shift = (i * tp + tp_rank) * block - block_start
        low = max(offset[dim], block_start)
        high = min(offset[dim] + size[dim], block_start + block, whole[dim] - shift)
        if low < high:
            in_part = _with(offset, dim, low)
            extent = _with(size, dim, high - low)
            yield (_with(offset, dim, low + shift), extent), in_part


def _with(index: Index, dim: int, value: int) -> Index:
    return (*index[:dim], value, *index[dim + 1 :])


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes have in common, or None.

    >>> overlap(((0, 2), (4, 4)), ((3, 0), (4, 3)))
    ((3, 2), (1, 1))
    """
    low = []
    size = []
    for start, length, other_start, other_length in zip(*one, *other, strict=True):
        common_start = max(start, other_start)
        common_end = min(start + length, other_start + other_length)
        if common_start >= common_end:
            return None
        low.append(common_start)
        size.append(common_end - common_start)
    return tuple(low), tuple(size)


def slices_of(box: Box, origin: Index | None = None) -> tuple[slice, ...]:
    """The index of a box in a tensor whose first element stands at `origin`; None: at zeros.

    >>> slices_of(((3, 2), (1, 4)), (3, 0))
    (slice(0, 1, None), slice(2, 6, None))
    """
    offset, size = box
    if origin is None:
        origin = tuple(0 for _ in offset)
    return tuple(
        slice(first - start, first - start + count)
        for first, count, start in zip(offset, size, origin, strict=True)
    )


def flat(offset: Index, shape: Index) -> int:
    """The position of an index in the flattened tensor.

    >>> flat((2, 3), (4, 5))
    13
    """
    position = 0
    for index, length in zip(offset, shape, strict=True):
        position = position * length + index
    return position

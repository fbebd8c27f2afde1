"""Boxes cover what a process holds, at its place in the whole tensor, exactly once.

And who writes them, and which checkpoints are kept.
"""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megafn.pure.checkpoint.boxes import boxes, flat, in_whole, overlap
from megafn.pure.checkpoint.retention import iterations_to_keep
from megafn.pure.checkpoint.write_plan import Listing, plan_writes
from megafn.runtime.model.weights import LocalParameter

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def at(tensor, box):
    return tensor[tuple(slice(start, start + n) for start, n in zip(*box, strict=True))]


@st.composite
def cuts(draw):
    """(a tensor of its own element numbers, [(part of a tp rank, its values)], dim, stride, tp)"""
    shape = list(draw(SHAPES))
    tp = draw(st.integers(1, 4))
    stride = draw(st.sampled_from([1, 1, 2]))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] *= tp * stride
    if dim == 0 and stride == 1 and draw(st.booleans()):
        # The part is then padded to a multiple of tp.
        shape[0] = max(1, shape[0] - draw(st.integers(0, tp - 1)))
    whole = torch.arange(1, prod(shape) + 1).reshape(shape)
    local = list(shape)
    local[dim] = -(-shape[dim] // tp)
    parts = [
        LocalParameter(
            name="",
            parameter=torch.empty(local),
            shape=tuple(shape),
            dim=dim,
            stride=stride,
            tp=tp,
            tp_rank=rank,
        )
        for rank in range(tp)
    ]
    return whole, [(part, part.cut(whole)) for part in parts], dim, stride, tp


@given(SHAPES, st.data())
def test_boxes_cover_a_range_of_elements_in_order(shape, data):
    start = data.draw(st.integers(0, prod(shape)))
    end = data.draw(st.integers(start, prod(shape)))
    numbers = torch.arange(prod(shape)).reshape(shape)
    cover = list(boxes(shape, start, end))
    assert [int(i) for box in cover for i in at(numbers, box).flatten()] == list(range(start, end))
    assert len(cover) <= 2 * len(shape) - 1
    assert all(flat(offset, shape) == int(numbers[offset]) for offset, _ in cover)


@given(cuts(), st.data())
def test_a_box_of_a_part_lies_where_the_part_was_cut_from(cut, data):
    whole, ranks, dim, stride, tp = cut
    times = torch.zeros_like(whole)
    for part, values in ranks:
        # two shards of the distributed optimizer
        middle = data.draw(st.integers(0, values.numel()))
        for start, end in ((0, middle), (middle, values.numel())):
            for box in boxes(tuple(values.shape), start, end):
                for there, offset in in_whole(
                    box,
                    tuple(values.shape),
                    tuple(whole.shape),
                    dim,
                    stride=stride,
                    tp=tp,
                    tp_rank=part.tp_rank,
                ):
                    assert torch.equal(at(whole, there), at(values, (offset, there[1])))
                    at(times, there).add_(1)
    assert (times == 1).all()


@given(SHAPES, st.data())
def test_overlap_is_what_two_boxes_have_in_common(shape, data):
    def draw():
        offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        return offset, tuple(
            data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True)
        )

    one, other = draw(), draw()
    times = torch.zeros(shape)
    at(times, one).add_(1)
    at(times, other).add_(1)
    common = overlap(one, other)
    assert (times == 2).sum() == (prod(common[1]) if common else 0)
    assert common is None or (at(times, common) == 2).all()


@given(
    st.lists(st.integers(1, 200), unique=True, min_size=1),
    st.integers(0, 5),
    st.none() | st.integers(1, 30),
)
def test_the_newest_is_always_kept(iterations, last, every):
    left = iterations_to_keep(iterations, keep_last=last, keep_every=every)
    assert max(iterations) in left and left <= set(iterations)
    assert left == {
        i
        for i in iterations
        if last == 0 or i in sorted(iterations)[-last:] or every and i % every == 0
    }


def test_replicas_share_the_work_and_what_does_not_cover_the_whole_is_refused():
    rows = tuple((f"t{i}", (4, 2), ((0, 0), (4, 2)), 32) for i in range(8))
    plan = plan_writes([Listing(stage=0, holdings=rows)] * 4)
    writers = [writer for _, written in plan.values() for _, writer in written]
    assert sorted(writers) == [0, 0, 1, 1, 2, 2, 3, 3]
    too_little = (("t", (4, 2), ((0, 0), (3, 2)), 24),)
    too_much = (("t", (4, 2), ((0, 0), (4, 2)), 32), ("t", (4, 2), ((1, 0), (1, 2)), 8))
    for wrong in (too_little, too_much):
        with pytest.raises(ValueError, match=r"^t: its boxes hold \d+ elements, expected 8; "):
            plan_writes([Listing(stage=0, holdings=wrong)])

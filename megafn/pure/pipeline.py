"""The order of forwards and backwards of each pipeline stage as data: its bubble, its memory, its picture.

Nothing here runs anything: megatron-core's schedules do, and this order is tested equal to theirs. Without interleaving
it is 1F1B (PipeDream-Flush, arXiv 2006.09503), with it the interleaved 1F1B of arXiv 2104.04473. Stages and chunks count
from 0; a stage holds vpp chunks of the model, and chunk c of stage s is the (c * pp + s)-th piece that a micro-batch
passes. Times are in any one unit; sending takes none.
"""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen


@frozen
class Op:
    """A forward ("F") or backward ("B") of one micro-batch through one chunk of a stage."""

    kind: str
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}" + (f" of chunk {self.chunk}" if self.chunk else "")


Order = tuple[tuple[Op, ...], ...]  # per stage, its ops in turn
Cell = tuple[int, Op]  # an op on a stage


def pipeline_order(pp: int, vpp: int, num_micro_batches: int) -> Order:
    """Per stage, its 2 * num_micro_batches * vpp ops in the order in which it runs them.

    Equal to megatron-core's `forward_backward_pipelining_without_interleaving` (vpp 1) and `_with_interleaving`
    (with `microbatch_group_size_per_vp_stage` = pp, its default).

    Raises:
        ValueError: a size below 1, vpp > 1 with pp 1, or vpp > 1 with micro-batches that pp does not divide.

    >>> for ops in pipeline_order(pp=2, vpp=1, num_micro_batches=3):
    ...     print(*ops)
    F0 F1 B0 F2 B1 B2
    F0 B0 F1 B1 F2 B2
    """
    _check_sizes(pp, vpp, num_micro_batches)
    group = (
        pp if vpp > 1 else num_micro_batches
    )  # so many micro-batches pass a chunk before the next chunk's turn
    turns = [
        (micro_batch, chunk)
        for first in range(0, num_micro_batches, group)
        for chunk in range(vpp)
        for micro_batch in range(first, first + group)
    ]
    forwards = [Op("F", micro_batch, chunk) for micro_batch, chunk in turns]
    backwards = [Op("B", micro_batch, vpp - 1 - chunk) for micro_batch, chunk in turns]

    def ops(stage: int) -> tuple[Op, ...]:
        behind = pp - 1 - stage  # stages behind this one: their answers take a while
        warm_up = min(behind if vpp == 1 else 2 * behind + (vpp - 1) * pp, len(turns))
        steady = [op for pair in zip(forwards[warm_up:], backwards) for op in pair]
        return (*forwards[:warm_up], *steady, *backwards[len(turns) - warm_up :])

    return tuple(map(ops, range(pp)))


def bubble(pp: int, vpp: int, num_micro_batches: int) -> float:
    """The share of a step's time, from 0 to 1, in which a stage idles: (pp - 1) / (num_micro_batches * vpp + pp - 1).

    The same for every stage and for any ratio of forward to backward time. arXiv 2104.04473 divides by the ideal time
    num_micro_batches * vpp instead of the whole. Raises as `pipeline_order`.

    >>> bubble(pp=4, vpp=1, num_micro_batches=9), bubble(pp=4, vpp=2, num_micro_batches=8)
    (0.25, 0.15789473684210525)
    """
    _check_sizes(pp, vpp, num_micro_batches)
    return (pp - 1) / (num_micro_batches * vpp + pp - 1)


def peak_activations(pp: int, vpp: int, num_micro_batches: int) -> tuple[int, ...]:
    """Per stage, the most forwards whose backward is yet to come: activations held at once.

    The unit is one micro-batch's activations in one chunk, 1 / vpp of a stage's layers. Counted from the order; raises
    as `pipeline_order`.

    >>> peak_activations(pp=4, vpp=1, num_micro_batches=8), peak_activations(pp=4, vpp=2, num_micro_batches=8)
    ((4, 3, 2, 1), (11, 9, 7, 5))
    """

    def peak(ops: tuple[Op, ...]) -> int:
        held = most = 0
        for op in ops:
            held += 1 if op.kind == "F" else -1
            most = max(most, held)
        return most

    return tuple(map(peak, pipeline_order(pp, vpp, num_micro_batches)))


def timeline(
    order: Order, forward_time: float, backward_time: float
) -> tuple[tuple[tuple[float, float], ...], ...]:
    """Per stage and op its (start, end), where each op starts as soon as its stage is free and its input is there.

    Times are those of one chunk; the last end is the makespan, (num_micro_batches * vpp + pp - 1) * (forward_time +
    backward_time) for a `pipeline_order`. Raises as `check_order`, and on a negative time.

    >>> timeline(pipeline_order(pp=2, vpp=1, num_micro_batches=1), forward_time=1, backward_time=2)
    (((0, 1), (4, 6)), ((1, 2), (2, 4)))
    """
    for name, time in (("forward_time", forward_time), ("backward_time", backward_time)):
        if time < 0:
            raise ValueError(f"{name} = {time} is no duration: set it to 0 or more")
    _check_rows(order)
    duration = {"F": forward_time, "B": backward_time}
    needs = _needs(order)
    ends: dict[Cell, float] = {}
    slots: list[list[tuple[float, float]]] = [[] for _ in order]
    moved = True
    while moved:
        moved = False
        for stage, ops in enumerate(order):
            for op in ops[len(slots[stage]) :]:
                inputs = list(needs(stage, op))
                if any(cell not in ends for cell in inputs):
                    break
                free = slots[stage][-1][1] if slots[stage] else 0
                start = max([free, *(ends[cell] for cell in inputs)])
                ends[stage, op] = start + duration[op.kind]
                slots[stage].append((start, ends[stage, op]))
                moved = True
    if any(len(done) < len(ops) for done, ops in zip(slots, order)):
        raise ValueError(_deadlock(order, [len(done) for done in slots], ends))
    return tuple(map(tuple, slots))


def check_order(order: Order) -> None:
    """Returns if the stages, run side by side, can finish `order`: every forward and backward once, none in a deadlock.

    What is complete follows from the order itself: every stage has a forward and a backward of every micro-batch up to
    the highest one anywhere, for every chunk up to the highest.

    Raises:
        ValueError: one sentence that points at the wrong cell by its stage and its index in that stage's ops.

    >>> check_order(((Op("F", 0), Op("B", 0)), (Op("B", 0), Op("F", 0))))
    Traceback (most recent call last):
    ValueError: stage 1, index 0: B0 stands before its forward; put F0 before it
    """
    timeline(order, 1, 1)


def draw_pipeline(pp: int, vpp: int, num_micro_batches: int) -> str:
    """The timeline as text, a row per stage, a backward drawn twice as long as a forward. Raises as `pipeline_order`.

    >>> print(draw_pipeline(pp=2, vpp=1, num_micro_batches=4))
    stage 0 |0 1 · · [0 ]2 [1 ]3 [2 ]· [3 ]|
    stage 1 |· 0 [0 ]1 [1 ]2 [2 ]3 [3 ]· · |
    n forward of micro-batch n, [n] its backward, · idle
    bubble 20.0% of the step; peak activations by stage 2 1 (micro-batches)
    """
    order = pipeline_order(pp, vpp, num_micro_batches)
    slots = timeline(order, 1, 2)
    width = len(str(num_micro_batches - 1)) + len(
        str(vpp - 1)
    )  # of one unit of time: a number and its chunk's mark
    total = max(row[-1][1] for row in slots)

    def cell(op: Op) -> str:
        text = str(op.micro_batch) + (str(op.chunk).translate(_SUPERSCRIPT) if op.chunk else "")
        return text.ljust(width) if op.kind == "F" else f"[{text.center(2 * width - 2)}]"

    def row(stage: int) -> str:
        line, now = "", 0
        for op, (start, end) in zip(order[stage], slots[stage]):
            line, now = line + "·".ljust(width) * (start - now) + cell(op), end
        return f"stage {stage:<{len(str(pp - 1))}} |{line}{'·'.ljust(width) * (total - now)}|"

    unit = "micro-batches" if vpp == 1 else f"micro-batches of one chunk, 1/{vpp} of a stage"
    legend = (
        "n forward of micro-batch n, [n] its backward"
        + (", n¹ in chunk 1" if vpp > 1 else "")
        + ", · idle"
    )
    return "\n".join(
        [
            *map(row, range(pp)),
            legend,
            f"bubble {bubble(pp, vpp, num_micro_batches):.1%} of the step; peak activations by stage "
            f"{' '.join(map(str, peak_activations(pp, vpp, num_micro_batches)))} ({unit})",
        ]
    )


_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _check_sizes(pp: int, vpp: int, num_micro_batches: int) -> None:
    for name, size in (("pp", pp), ("vpp", vpp), ("num_micro_batches", num_micro_batches)):
        if size < 1:
            raise ValueError(f"{name} = {size} is no size: set it to 1 or more")
    if vpp > 1 and pp == 1:
        raise ValueError(
            f"vpp = {vpp} interleaves the chunks of a pipeline, but pp = 1: set vpp to 1 or pp to 2 or more"
        )
    if vpp > 1 and num_micro_batches % pp:
        raise ValueError(
            f"num_micro_batches = {num_micro_batches} is not divisible by pp = {pp}, which interleaving "
            f"(vpp = {vpp}) needs: set it to a multiple of {pp}, or vpp to 1"
        )


def _chunks(order: Order) -> int:
    return 1 + max((op.chunk for ops in order for op in ops), default=-1)


def _needs(order: Order):
    """(stage, op) -> the cells whose ends the op waits for."""
    last_stage, last_chunk = len(order) - 1, _chunks(order) - 1

    def needs(stage: int, op: Op) -> Iterator[Cell]:
        if op.kind == "F":
            if stage > 0:
                yield stage - 1, op
            elif op.chunk > 0:
                yield last_stage, Op("F", op.micro_batch, op.chunk - 1)
        else:
            yield stage, Op("F", op.micro_batch, op.chunk)
            if stage < last_stage:
                yield stage + 1, op
            elif op.chunk < last_chunk:
                yield 0, Op("B", op.micro_batch, op.chunk + 1)

    return needs


def _check_rows(order: Order) -> None:
    """What can be seen by looking at each stage alone."""
    micro_batches = 1 + max((op.micro_batch for ops in order for op in ops), default=-1)
    every = [
        (micro_batch, chunk)
        for micro_batch in range(micro_batches)
        for chunk in range(_chunks(order))
    ]
    for stage, ops in enumerate(order):
        seen: dict[Op, int] = {}
        for index, op in enumerate(ops):
            at, forward = f"stage {stage}, index {index}: ", Op("F", op.micro_batch, op.chunk)
            if op.kind not in ("F", "B") or op.micro_batch < 0 or op.chunk < 0:
                raise ValueError(
                    f'{at}{op!r} is no op: give kind "F" or "B", and micro_batch and chunk from 0'
                )
            if op in seen:
                raise ValueError(
                    f"{at}{op} has run before, at index {seen[op]}; remove one of them"
                )
            if op.kind == "B" and forward not in seen:
                raise ValueError(f"{at}{op} stands before its forward; put {forward} before it")
            seen[op] = index
        for kind in "FB":
            for micro_batch, chunk in every:
                if Op(kind, micro_batch, chunk) not in seen:
                    raise ValueError(
                        f"stage {stage}, index {len(ops)}: the ops end without "
                        f"{Op(kind, micro_batch, chunk)}; add it"
                    )


def _deadlock(order: Order, done: list[int], ends: dict[Cell, float]) -> str:
    """One sentence on a cycle of stages that wait for each other: follow who waits for whom until one comes twice."""
    needs, waits = _needs(order), {}
    stage = next(stage for stage, ops in enumerate(order) if done[stage] < len(ops))
    while stage not in waits:
        waits[stage] = next(
            cell for cell in needs(stage, order[stage][done[stage]]) if cell not in ends
        )
        stage = waits[stage][0]
    cycle = list(waits)[list(waits).index(stage) :]
    return "deadlock: " + ", while ".join(
        f"stage {s}, index {done[s]}: {order[s][done[s]]} waits for {waits[s][1]} of stage {waits[s][0]}"
        for s in cycle
    )

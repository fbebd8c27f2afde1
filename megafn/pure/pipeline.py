"""The order of forwards and backwards of each pipeline stage: its bubble, its memory, its picture.

Nothing here runs anything: megatron-core's schedules do, and this order is tested equal to theirs.
Without interleaving it is 1F1B (PipeDream-Flush, arXiv 2006.09503), with it the interleaved 1F1B of
arXiv 2104.04473. Stages and chunks count from 0; a stage holds vpp chunks of the model, and chunk c
of stage s is the (c * pp + s)-th that a micro-batch passes. Times are in any one unit; sending
takes none.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen


@frozen
class Op:
    """A forward ("F") or backward ("B") of one micro-batch through one chunk of a stage."""

    kind: str
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        chunk = f" of chunk {self.chunk}" if self.chunk else ""
        return f"{self.kind}{self.micro_batch}{chunk}"


# Per stage, its ops in turn.
Order = tuple[tuple[Op, ...], ...]

# An op on a stage.
Cell = tuple[int, Op]

# Start and end of an op.
Slot = tuple[float, float]


def pipeline_order(pp: int, vpp: int, num_micro_batches: int) -> Order:
    """Per stage, its 2 * num_micro_batches * vpp ops in the order in which it runs them.

    Equal to megatron-core's `forward_backward_pipelining_without_interleaving` (vpp 1) and
    `_with_interleaving` (with `microbatch_group_size_per_vp_stage` = pp, its default).

    Raises:
        ValueError: a size below 1, vpp > 1 with pp 1, or vpp > 1 with a number of micro-batches
            that pp does not divide.

    >>> for ops in pipeline_order(pp=2, vpp=1, num_micro_batches=3):
    ...     print(*ops)
    F0 F1 B0 F2 B1 B2
    F0 B0 F1 B1 F2 B2
    """
    _check_sizes(pp, vpp, num_micro_batches)
    # So many micro-batches pass a chunk before the next chunk's turn.
    group = pp if vpp > 1 else num_micro_batches
    turns = [
        (micro_batch, chunk)
        for first in range(0, num_micro_batches, group)
        for chunk in range(vpp)
        for micro_batch in range(first, first + group)
    ]
    forwards = [Op("F", micro_batch, chunk) for micro_batch, chunk in turns]
    backwards = [Op("B", micro_batch, vpp - 1 - chunk) for micro_batch, chunk in turns]
    return tuple(
        _one_forward_one_backward(forwards, backwards, _warm_up(pp, vpp, stage))
        for stage in range(pp)
    )


def _warm_up(pp: int, vpp: int, stage: int) -> int:
    """The number of forwards before a stage's first pair of forward and backward."""
    later_stages = pp - 1 - stage
    if vpp == 1:
        return later_stages
    return 2 * later_stages + (vpp - 1) * pp


def _one_forward_one_backward(
    forwards: Sequence[Op], backwards: Sequence[Op], warm_up: int
) -> tuple[Op, ...]:
    warm_up = min(warm_up, len(forwards))
    steady = len(forwards) - warm_up
    pairs = zip(forwards[warm_up:], backwards[:steady], strict=True)
    return (
        *forwards[:warm_up],
        *(op for pair in pairs for op in pair),
        *backwards[steady:],
    )


def bubble(pp: int, vpp: int, num_micro_batches: int) -> float:
    """The share of a step's time, from 0 to 1, in which a stage idles.

    It is (pp - 1) / (num_micro_batches * vpp + pp - 1), the same for every stage and for any ratio
    of forward to backward time. arXiv 2104.04473 divides by the ideal time num_micro_batches * vpp
    instead of the whole. Raises as `pipeline_order`.

    >>> bubble(pp=4, vpp=1, num_micro_batches=9), bubble(pp=4, vpp=2, num_micro_batches=8)
    (0.25, 0.15789473684210525)
    """
    _check_sizes(pp, vpp, num_micro_batches)
    return (pp - 1) / (num_micro_batches * vpp + pp - 1)


def peak_activations(pp: int, vpp: int, num_micro_batches: int) -> tuple[int, ...]:
    """Per stage, the most forwards whose backward is yet to come: activations held at once.

    The unit is one micro-batch's activations in one chunk, 1 / vpp of a stage's layers. Raises as
    `pipeline_order`.

    >>> peak_activations(pp=4, vpp=1, num_micro_batches=8)
    (4, 3, 2, 1)
    >>> peak_activations(pp=4, vpp=2, num_micro_batches=8)
    (11, 9, 7, 5)
    """
    _check_sizes(pp, vpp, num_micro_batches)
    return tuple(peak_of_stage(pp, vpp, num_micro_batches, stage) for stage in range(pp))


def peak_of_stage(pp: int, vpp: int, num_micro_batches: int, stage: int) -> int:
    """`peak_activations` of one stage, for sizes that it accepts.

    The forwards of the warm-up, and the first one after it; or all that there are.

    >>> peak_of_stage(pp=4, vpp=2, num_micro_batches=8, stage=1)
    9
    """
    return min(num_micro_batches * vpp, _warm_up(pp, vpp, stage) + 1)


def timeline(
    order: Order, forward_time: float, backward_time: float
) -> tuple[tuple[Slot, ...], ...]:
    """Per stage and op its (start, end): an op starts as soon as its stage and its input are ready.

    Times are those of one chunk; the last end is the makespan, which for a `pipeline_order` is
    (num_micro_batches * vpp + pp - 1) * (forward_time + backward_time). Raises as `check_order`,
    and for a negative time.

    >>> timeline(pipeline_order(pp=2, vpp=1, num_micro_batches=1), forward_time=1, backward_time=2)
    (((0, 1), (4, 6)), ((1, 2), (2, 4)))
    """
    for name, time in (("forward_time", forward_time), ("backward_time", backward_time)):
        if time < 0:
            raise ValueError(f"{name} = {time}: must be 0 or more")
    _check_rows(order)

    duration = {"F": forward_time, "B": backward_time}
    chunks = _num_chunks(order)
    ends: dict[Cell, float] = {}
    slots: list[list[Slot]] = [[] for _ in order]
    progress = True
    while progress:
        progress = False
        for stage, ops in enumerate(order):
            for op in ops[len(slots[stage]) :]:
                inputs = _inputs(stage, op, len(order), chunks)
                if any(cell not in ends for cell in inputs):
                    break
                stage_is_free = slots[stage][-1][1] if slots[stage] else 0
                start = max([stage_is_free, *(ends[cell] for cell in inputs)])
                end = start + duration[op.kind]
                slots[stage].append((start, end))
                ends[stage, op] = end
                progress = True

    done = [len(row) for row in slots]
    if done != [len(ops) for ops in order]:
        raise ValueError(_deadlock(order, done, ends))
    return tuple(map(tuple, slots))


def check_order(order: Order) -> None:
    """Raises ValueError unless the stages, run side by side, can finish `order`.

    They can if every forward and every backward is there once and none is in a deadlock. What must
    be there follows from the order itself: every stage has a forward and a backward of every
    micro-batch up to the highest one anywhere, for every chunk up to the highest.

    Raises:
        ValueError: one sentence that points at the wrong cell by its stage and its index in that
            stage's ops.

    >>> check_order(((Op("F", 0), Op("B", 0)), (Op("B", 0), Op("F", 0))))
    Traceback (most recent call last):
    ValueError: stage 1, index 0: B0 comes before its forward; put F0 before it
    """
    timeline(order, 1, 1)


def draw_pipeline(pp: int, vpp: int, num_micro_batches: int) -> str:
    """The timeline as text: a row per stage, a backward drawn twice as long as a forward.

    Raises as `pipeline_order`.

    >>> print(draw_pipeline(pp=2, vpp=1, num_micro_batches=4))
    stage 0 |0 1 · · [0 ]2 [1 ]3 [2 ]· [3 ]|
    stage 1 |· 0 [0 ]1 [1 ]2 [2 ]3 [3 ]· · |
    n forward of micro-batch n, [n] its backward, · idle
    bubble 20.0% of the step; peak activations by stage 2 1 (micro-batches)
    """
    order = pipeline_order(pp, vpp, num_micro_batches)
    slots = timeline(order, 1, 2)
    # The columns of one unit of time: the highest micro-batch and the mark of its chunk.
    width = len(str(num_micro_batches - 1)) + len(str(vpp - 1))
    total = max(row[-1][1] for row in slots)

    lines = []
    for stage, (ops, row) in enumerate(zip(order, slots, strict=True)):
        label = f"stage {stage:<{len(str(pp - 1))}}"
        lines.append(f"{label} |{_drawn_row(ops, row, width, total)}|")

    chunks = ", n¹ in chunk 1" if vpp > 1 else ""
    lines.append(f"n forward of micro-batch n, [n] its backward{chunks}, · idle")

    idle = bubble(pp, vpp, num_micro_batches)
    peaks = " ".join(map(str, peak_activations(pp, vpp, num_micro_batches)))
    unit = "micro-batches" if vpp == 1 else f"micro-batches of one chunk, 1/{vpp} of a stage"
    lines.append(f"bubble {idle:.1%} of the step; peak activations by stage {peaks} ({unit})")
    return "\n".join(lines)


def _drawn_row(ops: Sequence[Op], row: Sequence[Slot], width: int, total: float) -> str:
    """A stage's row; all times are whole numbers, of units that are `width` columns wide."""
    idle = "·".ljust(width)
    line = ""
    now = 0.0
    for op, (start, end) in zip(ops, row, strict=True):
        line += idle * int(start - now) + _drawn_op(op, width)
        now = end
    return line + idle * int(total - now)


def _drawn_op(op: Op, width: int) -> str:
    text = str(op.micro_batch)
    if op.chunk:
        text += str(op.chunk).translate(_SUPERSCRIPT)
    if op.kind == "F":
        return text.ljust(width)
    return f"[{text.center(2 * width - 2)}]"


_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _check_sizes(pp: int, vpp: int, num_micro_batches: int) -> None:
    for name, size in (("pp", pp), ("vpp", vpp), ("num_micro_batches", num_micro_batches)):
        if size < 1:
            raise ValueError(f"{name} = {size}: must be at least 1")
    if vpp > 1 and pp == 1:
        raise ValueError(
            f"vpp = {vpp}: interleaving needs a pipeline, but pp = 1; "
            "set vpp to 1 or pp to 2 or more"
        )
    if vpp > 1 and num_micro_batches % pp:
        raise ValueError(
            f"num_micro_batches = {num_micro_batches}: interleaving (vpp = {vpp}) needs a multiple "
            f"of pp = {pp}; set it to one, or vpp to 1"
        )


def _num_chunks(order: Order) -> int:
    return 1 + max((op.chunk for ops in order for op in ops), default=-1)


def _num_micro_batches(order: Order) -> int:
    return 1 + max((op.micro_batch for ops in order for op in ops), default=-1)


def _inputs(stage: int, op: Op, stages: int, chunks: int) -> list[Cell]:
    """The cells whose ends an op waits for, in an order of so many stages and chunks."""
    last_stage = stages - 1
    if op.kind == "F":
        if stage > 0:
            return [(stage - 1, op)]
        if op.chunk > 0:
            return [(last_stage, Op("F", op.micro_batch, op.chunk - 1))]
        return []

    forward = (stage, Op("F", op.micro_batch, op.chunk))
    if stage < last_stage:
        return [forward, (stage + 1, op)]
    if op.chunk < chunks - 1:
        return [forward, (0, Op("B", op.micro_batch, op.chunk + 1))]
    return [forward]


def _check_rows(order: Order) -> None:
    """Raises ValueError for what can be seen by looking at each stage on its own."""
    expected = [
        Op(kind, micro_batch, chunk)
        for kind in "FB"
        for micro_batch in range(_num_micro_batches(order))
        for chunk in range(_num_chunks(order))
    ]
    for stage, ops in enumerate(order):
        index_of: dict[Op, int] = {}
        for index, op in enumerate(ops):
            problem = _op_problem(op, index_of)
            if problem is not None:
                raise ValueError(f"stage {stage}, index {index}: {problem}")
            index_of[op] = index
        for op in expected:
            if op not in index_of:
                raise ValueError(
                    f"stage {stage}, index {len(ops)}: the ops end without {op}; add it"
                )


def _op_problem(op: Op, index_of: dict[Op, int]) -> str | None:
    """What is wrong with an op after those of `index_of` on its stage; None if nothing is."""
    if op.kind not in ("F", "B") or op.micro_batch < 0 or op.chunk < 0:
        return f'{op!r} is not an op; expected kind "F" or "B", and micro_batch and chunk from 0'
    if op in index_of:
        return f"{op} is repeated, first at index {index_of[op]}; remove one of them"
    if op.kind == "B":
        forward = Op("F", op.micro_batch, op.chunk)
        if forward not in index_of:
            return f"{op} comes before its forward; put {forward} before it"
    return None


def _deadlock(order: Order, done: Sequence[int], ends: dict[Cell, float]) -> str:
    """One sentence on a cycle of stages that wait for each other.

    Found by following who waits for whom until a stage comes twice.
    """
    chunks = _num_chunks(order)
    waits_for: dict[int, Cell] = {}
    stage = next(stage for stage, ops in enumerate(order) if done[stage] < len(ops))
    while stage not in waits_for:
        op = order[stage][done[stage]]
        inputs = _inputs(stage, op, len(order), chunks)
        missing = [cell for cell in inputs if cell not in ends]
        waits_for[stage] = missing[0]
        stage = missing[0][0]

    visited = list(waits_for)
    cycle = visited[visited.index(stage) :]
    sentences = []
    for stage in cycle:
        op = order[stage][done[stage]]
        other, missing_op = waits_for[stage]
        sentences.append(
            f"stage {stage}, index {done[stage]}: {op} waits for {missing_op} of stage {other}"
        )
    return "deadlock: " + ", while ".join(sentences)

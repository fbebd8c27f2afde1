"""The shapes that neighbours in the pipeline announce, if micro-batches differ in length.

Stages then send each other the shape of a tensor before the tensor. In a dry run no neighbour
exists, but what it would announce is known: the shape of the micro-batch whose turn it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megafn.pure.config.records import TrainConfig
from megafn.pure.pipeline import Op, pipeline_order
from megafn.runtime.parallel.exchanged import Exchange
from megafn.runtime.parallel.groups import ProcessGroups

# Rows and length of each micro-batch, before context parallelism cuts it.
Shapes = Sequence[tuple[int, int]]
_NOTHING_RECEIVED = [0, 0, 0]


def announced_shapes(shapes: Shapes, config: TrainConfig, pg: ProcessGroups) -> Exchange:
    """In place of megatron-core's function that asks the neighbours; it runs for its messages.

    shapes: those of the global batch's micro-batches; they may be filled in later, before the
    schedule starts.
    """
    ask = P2PCommunicator._communicate_shapes
    from_previous = _shapes_in_order(shapes, config, pg, kind="F")
    from_next = _shapes_in_order(shapes, config, pg, kind="B")

    def answer(
        communicator: Any, send_next: Any, send_previous: Any, recv_previous: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        ask(communicator, send_next, send_previous, recv_previous, recv_next)
        return (
            next(from_previous) if recv_previous else _NOTHING_RECEIVED,
            next(from_next) if recv_next else _NOTHING_RECEIVED,
        )

    return (P2PCommunicator, "_communicate_shapes", answer)


def _shapes_in_order(
    shapes: Shapes, config: TrainConfig, pg: ProcessGroups, *, kind: str
) -> Iterator[list[int]]:
    """[sequence, batch, hidden] of what this stage receives for its forwards or its backwards."""
    parallel = config.parallel
    parts = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
    for op in pipeline_order(parallel.pp, parallel.vpp, len(shapes))[pg.place.pp]:
        if op.kind == kind and not _is_at_the_end(op, config, pg):
            rows, length = shapes[op.micro_batch]
            yield [length // parts, rows, config.model.hidden_size]


def _is_at_the_end(op: Op, config: TrainConfig, pg: ProcessGroups) -> bool:
    """Whether nothing is received: the model's first forward, or its last chunk's backward."""
    if op.kind == "F":
        return pg.is_first_stage and op.chunk == 0
    return pg.is_last_stage and op.chunk == config.parallel.vpp - 1

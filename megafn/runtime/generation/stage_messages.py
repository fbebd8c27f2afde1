"""Hidden states sent from pipeline stage to stage, outside megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megafn.runtime.model.layers import DTYPES
from megafn.runtime.model.state import State
from megafn.runtime.parallel.groups import ProcessGroups


def unwrapped(chunk: torch.nn.Module) -> Any:
    """The chunk in megatron-core's wrapper, with the methods of its own class."""
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def empty_hidden(shape: Sequence[int], state: State) -> torch.Tensor:
    """Room for the hidden state [sequence (/ tp), batch, hidden] of tokens [batch, sequence]."""
    parallel = state.config.parallel
    rows, length = shape
    return torch.empty(
        length // parallel.tp if parallel.sequence_parallel else length,
        rows,
        state.config.model.hidden_size,
        dtype=DTYPES[state.config.precision.dtype],
        device=state.pg.device,
    )


def receive_hidden(shape: Sequence[int], state: State) -> torch.Tensor:
    """The previous stage's hidden state of tokens of this shape, [batch, sequence]."""
    hidden = empty_hidden(shape, state)
    if state.pg.pp.size() > 1:
        dist.recv(hidden, _neighbour(state.pg, -1), group=state.pg.pp)
    return hidden


def send_hidden(hidden: torch.Tensor, pg: ProcessGroups, sends: list[dist.Work]) -> None:
    """Begin to send a hidden state to the next stage; `sends` collects what is not yet sent."""
    while sends and sends[0].is_completed():
        sends.pop(0)
    sending = dist.isend(hidden.contiguous(), _neighbour(pg, 1), group=pg.pp)
    assert sending is not None  # it is for ranks outside the group
    sends.append(sending)


def _neighbour(pg: ProcessGroups, distance: int) -> int:
    """The global rank of the stage after (1) or before (-1) this one, in a ring."""
    ranks: Sequence[int] = dist.get_process_group_ranks(pg.pp)
    return ranks[(pg.place.pp + distance) % len(ranks)]

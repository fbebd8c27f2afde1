"""Hidden states sent from pipeline stage to stage, outside megatron-core's schedules.

NCCL runs what one rank does over one communicator in the order in which it was started, and a send
ends only when its receiver has reached it. gloo's sends wait for nothing, so a CPU does not show
what could follow:

- With interleaving the last stage sends back to the first. Over one communicator two stages could
  each wait in a send for the other to receive.
- The ranks start the broadcast of new tokens over `pg.world` before different messages to the
  next stage, and `pg.world` is `pg.pp` where nothing but the pipeline is cut.

So messages to the next stage go through torch's default group, as megatron-core's do with two
stages, and those back to the first stage through `pg.pp`: every rank starts these and the
broadcasts in one order.
"""

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
    pg = state.pg
    hidden = empty_hidden(shape, state)
    if pg.pp.size() > 1:
        group = _group_of_messages(pg, from_last_stage=pg.is_first_stage)
        dist.recv(hidden, _neighbour(pg, -1), group=group)
    return hidden


def send_hidden(hidden: torch.Tensor, pg: ProcessGroups, sends: list[dist.Work]) -> None:
    """Begin to send a hidden state to the next stage; `sends` collects what is not yet sent."""
    while sends and sends[0].is_completed():
        sends.pop(0)
    group = _group_of_messages(pg, from_last_stage=pg.is_last_stage)
    sending = dist.isend(hidden.contiguous(), _neighbour(pg, 1), group=group)
    assert sending is not None  # it is for ranks outside the group
    sends.append(sending)


def _group_of_messages(pg: ProcessGroups, *, from_last_stage: bool) -> dist.ProcessGroup | None:
    """from_last_stage: for messages back to the first stage, else to the next one."""
    return pg.pp if from_last_stage else dist.group.WORLD


def _neighbour(pg: ProcessGroups, distance: int) -> int:
    """The global rank of the stage after (1) or before (-1) this one, in a ring."""
    ranks: Sequence[int] = dist.get_process_group_ranks(pg.pp)
    return ranks[(pg.place.pp + distance) % len(ranks)]

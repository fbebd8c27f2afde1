"""What a rank sends and receives: every tensor that is given to a collective, by kind of group.

Counted are collectives over groups of several ranks, with torch's own operations (`c10d`), which
the functions of torch.distributed call on every backend. Barriers move no tensor, and collectives
of objects move pickles, whose size a dry run does not know: both are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from attrs import define, field, frozen

from megafn.pure.layout import GROUP_KINDS, group_of
from megafn.runtime.dry_run.nested import tensors_in
from megafn.runtime.dry_run.records import Messages
from megafn.runtime.parallel.groups import ProcessGroups


@frozen
class _Collective:
    """An operation of c10d: the name it is counted by, and its argument with the whole tensors.

    For an all-gather these are the outputs, for a reduce-scatter the inputs: the larger of the two,
    as in the sizes that NCCL's tests print.
    """

    name: str
    argument: int = 0


_COLLECTIVES: Mapping[str, _Collective] = {
    "allreduce_": _Collective("all_reduce"),
    "allreduce_coalesced_": _Collective("all_reduce"),
    "broadcast_": _Collective("broadcast"),
    "reduce_": _Collective("reduce"),
    "allgather_": _Collective("all_gather"),
    "allgather_coalesced_": _Collective("all_gather"),
    "_allgather_base_": _Collective("all_gather"),
    "allgather_into_tensor_coalesced_": _Collective("all_gather"),
    "reduce_scatter_": _Collective("reduce_scatter", 1),
    "_reduce_scatter_base_": _Collective("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": _Collective("reduce_scatter", 1),
    "gather_": _Collective("gather", 1),
    "scatter_": _Collective("scatter"),
    "alltoall_": _Collective("all_to_all", 1),
    "alltoall_base_": _Collective("all_to_all", 1),
    "send": _Collective("send"),
    "recv_": _Collective("recv"),
    "recv_any_source_": _Collective("recv"),
}


_BETWEEN_TWO = ("send", "recv")


@frozen
class Message:
    collective: str
    bytes: int
    # All ranks of the group, or the two of a message from one rank to another.
    ranks: frozenset[int]


@define(eq=False)
class MessageLog:
    """Every message of a step, in the order of time."""

    messages: list[Message] = field(factory=list)

    def see(self, operation: Any, arguments: Sequence[Any]) -> _Collective | None:
        """Log an operation of c10d before it runs; what it is, or None if it is not counted."""
        name = operation._opname
        collective = _COLLECTIVES.get(name)
        if collective is None or _moves_an_object():
            return None
        ranks = _ranks_of(operation, arguments)
        if len(ranks) > 1:
            size = sum(tensor.nbytes for tensor in tensors_in(arguments[collective.argument]))
            self.messages.append(Message(collective=collective.name, bytes=size, ranks=ranks))
        return collective


def messages_by_kind(messages: Sequence[Message], pg: ProcessGroups) -> dict[str, Messages]:
    """The messages over each kind of `GROUP_KINDS`, every kind included.

    Kinds of the same ranks are one group (over tp = 2 alone, tp is the world too): its messages are
    those of the first of them in `GROUP_KINDS`. So are messages from one rank to another: they are
    those of the first kind that has both. Messages over ranks that no kind has are under "others",
    if there are any.
    """
    own = {kind.name: group_of(pg.groups, kind.name, pg.rank) for kind in GROUP_KINDS}
    by_kind: dict[str, list[Message]] = {kind: [] for kind in own}
    kinds: dict[tuple[bool, frozenset[int]], str] = {}
    for message in messages:
        key = (message.collective in _BETWEEN_TWO, message.ranks)
        if key not in kinds:
            kinds[key] = _kind_of(message, own)
        by_kind.setdefault(kinds[key], []).append(message)
    return {kind: _sums(of_kind) for kind, of_kind in by_kind.items()}


def _kind_of(message: Message, own: Mapping[str, Sequence[int]]) -> str:
    for kind, ranks in own.items():
        if message.ranks == frozenset(ranks):
            return kind
        if message.collective in _BETWEEN_TWO and message.ranks <= frozenset(ranks):
            return kind
    return "others"


def _sums(messages: Sequence[Message]) -> Messages:
    by_collective: dict[str, int] = {}
    for message in messages:
        before = by_collective.get(message.collective, 0)
        by_collective[message.collective] = before + message.bytes
    return Messages(
        count=len(messages), bytes=sum(by_collective.values()), by_collective=by_collective
    )


def tensors_received(collective: _Collective, arguments: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The tensors that a message from one rank is received in."""
    if collective.name == "recv":
        yield from tensors_in(arguments[0])


def tensors_sent(collective: _Collective, arguments: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The tensors that are sent to one rank."""
    if collective.name == "send":
        yield from tensors_in(arguments[0])


def _ranks_of(operation: Any, arguments: Sequence[Any]) -> frozenset[int]:
    """The ranks between which an operation of c10d moves tensors."""
    place = [_is_group(argument) for argument in arguments].index(True)
    ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(arguments[place]))
    if operation._opname in ("send", "recv_"):
        # The other rank's number in the group follows the group.
        return frozenset({dist.get_rank(), ranks[arguments[place + 1]]})
    return frozenset(ranks)


def _is_group(argument: Any) -> bool:
    return isinstance(argument, torch.ScriptObject) and _class_of(argument) == "ProcessGroup"


def _class_of(argument: Any) -> str:
    return argument._type().name()


def _code_of(function: Callable[..., Any]) -> Any:
    # torch's functions are wrapped for logging.
    return getattr(function, "__wrapped__", function).__code__


def _moves_an_object() -> bool:
    """Whether one of torch's collectives of objects is what called the operation."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code in _CODE_OF_OBJECT_COLLECTIVES:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


_CODE_OF_OBJECT_COLLECTIVES = frozenset(
    _code_of(getattr(dist.distributed_c10d, name))
    for name in (
        "all_gather_object",
        "gather_object",
        "broadcast_object_list",
        "scatter_object_list",
        "send_object_list",
        "recv_object_list",
    )
)

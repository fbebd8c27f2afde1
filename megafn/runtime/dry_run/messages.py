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

from megafn.pure.layout import GROUP_KINDS
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


@frozen
class Message:
    collective: str
    bytes: int
    # Which torch process group, and of how many ranks.
    group_name: str
    group_size: int


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
        group = _group_of(arguments)
        if group.size() > 1:
            message = Message(
                collective=collective.name,
                bytes=sum(tensor.nbytes for tensor in tensors_in(arguments[collective.argument])),
                group_name=group.group_name,
                group_size=group.size(),
            )
            self.messages.append(message)
        return collective


def messages_by_kind(messages: Sequence[Message], pg: ProcessGroups) -> dict[str, Messages]:
    """The messages over each kind of `GROUP_KINDS`, every kind included.

    Kinds of the same ranks share one torch process group (over tp = 2 alone, tp is the world too):
    its messages are those of the first of them in `GROUP_KINDS`. Messages over groups that are not
    of this layout are under "others", if there are any.
    """
    kinds: dict[str, str] = {}
    for kind in reversed(GROUP_KINDS):
        group = getattr(pg, kind.name)
        if group is not None:
            kinds[group.group_name] = kind.name
    by_kind: dict[str, list[Message]] = {kind.name: [] for kind in GROUP_KINDS}
    for message in messages:
        by_kind.setdefault(kinds.get(message.group_name, "others"), []).append(message)
    return {kind: _sums(of_kind) for kind, of_kind in by_kind.items()}


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


def _group_of(arguments: Sequence[Any]) -> dist.ProcessGroup:
    """The process group among the arguments of an operation of c10d."""
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject) and _class_of(argument) == "ProcessGroup":
            return dist.ProcessGroup.unbox(argument)
    raise RuntimeError("an operation of c10d without a process group")


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

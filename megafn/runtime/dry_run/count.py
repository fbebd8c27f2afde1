"""Counts what a training step needs: bytes alive, messages, FLOP; alike on real and fake tensors.

    with counting() as counter:
        state = setup(config, pg)
        counter.start_step(state)
        state, metrics = train_step(state, batch, step)
        counter.end_step(state)
    print(counter.memory().peak, counter.messages(pg)["tp"], counter.flops)

Everything is read from the operations that torch dispatches; what the step computes stays the same.
What runs outside of torch's operations is not seen: temporary memory inside a kernel, what
libraries allocate for themselves (NCCL, cuBLAS), and fragmentation.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from megafn.runtime.dry_run import live_bytes
from megafn.runtime.dry_run.cpu_kernels import Kept, every_kernel
from megafn.runtime.dry_run.live_bytes import Allocation, KernelCall, MemoryLog
from megafn.runtime.dry_run.messages import (
    MessageLog,
    messages_by_kind,
    tensors_received,
    tensors_sent,
)
from megafn.runtime.dry_run.nested import tensors_in
from megafn.runtime.dry_run.operations import Operations
from megafn.runtime.dry_run.records import DryRunMemory, LargeTensor, Messages
from megafn.runtime.dry_run.state_tensors import module_names, state_tensors
from megafn.runtime.model.state import State
from megafn.runtime.parallel import cpu
from megafn.runtime.parallel.groups import ProcessGroups


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Count everything that runs in the `with`, and leave torch as it was.

    Under a FakeTensorMode enter this after it: operations are then counted before they are faked.
    """
    counter = Counter()
    hooks = [
        register_module_forward_pre_hook(counter._enter_module),
        register_module_forward_hook(counter._leave_module, always_call=True),
        register_optimizer_step_pre_hook(counter._enter_optimizer),
    ]
    try:
        with every_kernel(counter._see_kernel), _EveryOperation(counter._see):
            yield counter
    finally:
        for hook in hooks:
            hook.remove()


@define(eq=False)
class Counter:
    """What was counted. Made by `counting`.

    Memory is that of a run's later steps, which is what has to fit: tensors that the optimizer
    makes in its first step and keeps (Adam's moments) count as if they had been there before.
    """

    _memory: MemoryLog = field(factory=MemoryLog)
    _messages: MessageLog = field(factory=MessageLog)
    _operations: Operations = field(factory=Operations)
    _names: dict[torch.nn.Module, str] = field(factory=dict)
    # The modules whose forward passes run, the innermost last.
    _running: list[str] = field(factory=list)
    # Whether the last operation was one of a backward pass.
    _in_backward: bool = False
    # By the number of each node of the graph that backward passes walk, what made it.
    _module_of_node: dict[int, str] = field(factory=dict)
    # Number of changes of memory before the step, and at its end.
    _step_start: int = 0
    _step_end: int | None = None
    _thread: int = field(factory=threading.get_ident)
    _device_type: str = field(factory=lambda: cpu.device().type)

    # -------------------------------------------------------------------------- while it runs

    def start_step(self, state: State) -> None:
        """A step begins: messages and FLOP are counted from here on, and set-up has ended."""
        self._names = module_names(state.chunks)
        self._memory.runs = live_bytes.BATCH
        self._note_kinds(state)
        self._module_of_node.clear()
        self._messages = MessageLog()
        self._operations = Operations()
        self._step_start = len(self._memory.changes)

    def end_step(self, state: State) -> None:
        """The step is over. `state` is what it returned, with what its optimizer now holds."""
        self._note_kinds(state)
        self._step_end = len(self._memory.changes)
        self._memory.runs = live_bytes.BETWEEN_STEPS

    # ------------------------------------------------------------------------- what was counted

    @property
    def flops(self) -> int:
        """FLOP of the step by torch.utils.flop_counter's formulas, recomputation included."""
        return self._operations.flops

    @property
    def matmuls(self) -> int:
        """Matrix products of the step (mm, bmm, addmm, baddbmm), without those in attention."""
        return self._operations.matmuls

    @property
    def attention_calls(self) -> int:
        """Forward calls of attention kernels in the step; each holds two matrix products."""
        return self._operations.attention_calls

    def messages(self, pg: ProcessGroups) -> Mapping[str, Messages]:
        """What the step sent and received, for each kind of group. See `messages_by_kind`."""
        return messages_by_kind(self._messages.messages, pg)

    def memory(self) -> DryRunMemory:
        """Bytes alive at the start of the step, at its peak, and over it.

        All with what the optimizer holds from the first step on.
        """
        step = self._step_memory()
        return DryRunMemory(
            setup=live_bytes.at_start(step),
            peak=live_bytes.at_peak(step),
            cpu_only=live_bytes.cpu_only_at_peak(step) if self._device_type == "cpu" else 0,
            timeline=tuple(live_bytes.timeline(step)),
        )

    def largest_tensors(self, count: int = 20) -> tuple[LargeTensor, ...]:
        """The largest tensors at the peak, the largest first."""
        return live_bytes.largest_at_peak(self._step_memory(), count)

    def _step_memory(self) -> live_bytes.StepMemory:
        if self._step_end is None:
            raise RuntimeError("no step was counted: call start_step before it and end_step after")
        changes = self._memory.changes[: self._step_end]
        return live_bytes.memory_of_step(changes, self._step_start)

    # -------------------------------------------------------------------------- what torch calls

    def _see(
        self,
        operation: Any,
        arguments: Sequence[Any],
        named: Mapping[str, Any],
        run: Callable[[], Any],
    ) -> Any:
        """One operation of torch."""
        if torch._C._current_graph_task_id() != -1:
            self._memory.runs = live_bytes.BACKWARD
            self._memory.pass_number += not self._in_backward
            self._in_backward = True
        elif threading.get_ident() != self._thread:
            # gloo's threads work on copies of their own. (Backward passes may have threads too.)
            return run()
        else:
            self._in_backward = False
            # The node that is the newest now, if it is that of this operation.
            node = torch.autograd._get_sequence_nr() - 1
            self._module_of_node.setdefault(node, self._module())
        if operation.namespace == "c10d":
            self._see_message(operation, arguments)
            return run()
        result = run()
        self._operations.see(operation, arguments, named, result)
        for tensor in tensors_in(result):
            if self._memory.knows(tensor) or not _is_of_another(tensor, operation, arguments):
                self._allocation(tensor)
        return result

    def _see_message(self, operation: Any, arguments: Sequence[Any]) -> None:
        collective = self._messages.see(operation, arguments)
        if collective is None:
            return
        for tensor in tensors_received(collective, arguments):
            # The first of a step is received before the first forward pass.
            allocation = self._allocation(tensor)
            if allocation is not None and allocation.known_kind is None:
                allocation.known_kind = "activations"
        for tensor in tensors_sent(collective, arguments):
            allocation = self._allocation(tensor)
            # What a backward pass sends are gradients, which are freed everywhere.
            if allocation is not None and self._memory.runs == live_bytes.FORWARD:
                allocation.is_sent = True

    def _see_kernel(self, kept: Kept, run: Callable[[], Any]) -> Any:
        """A call of a function that is one kernel on a GPU."""
        inputs = []
        for tensor in kept.inputs:
            allocation = self._allocation(tensor)
            if allocation is not None:
                inputs.append((allocation, int(tensor.storage_offset()), tensor.nbytes))
        self._memory.kernel = KernelCall(inputs=tuple(inputs), bytes_kept=kept.bytes)
        try:
            output = run()
        finally:
            self._memory.kernel = None
        allocation = self._allocation(output)
        if allocation is not None:
            allocation.kernel = None
        return output

    def _allocation(self, tensor: torch.Tensor) -> Allocation | None:
        if tensor.device.type != self._device_type or _is_random_state(tensor):
            return None
        return self._memory.see(tensor, self._module())

    def _module(self) -> str:
        """The module whose forward pass runs, or whose backward pass."""
        if self._running:
            return self._running[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        return self._module_of_node.get(node._sequence_nr(), "")

    def _note_kinds(self, state: State) -> None:
        self._memory.look_for_resized()
        for kind, tensor in state_tensors(state):
            allocation = self._allocation(tensor)
            if allocation is not None and allocation.known_kind is None:
                allocation.known_kind = kind

    def _enter_module(self, module: torch.nn.Module, _: Any) -> None:
        in_step = self._memory.runs not in (live_bytes.SETUP, live_bytes.BETWEEN_STEPS)
        if in_step and torch._C._current_graph_task_id() == -1:
            self._memory.runs = live_bytes.FORWARD
            self._memory.pass_number += not self._running
        self._running.append(self._names.get(module, self._module()))

    def _leave_module(self, *_: Any) -> None:
        if self._running:
            self._running.pop()

    def _enter_optimizer(self, *_: Any) -> None:
        self._memory.runs = live_bytes.OPTIMIZER


def _is_of_another(tensor: torch.Tensor, operation: Any, arguments: Sequence[Any]) -> bool:
    """Whether it is a view of memory that no operation made.

    Such is what gloo copies for itself, and what a user's batch was read into.
    """
    if operation is torch.ops.aten.lift_fresh.default:
        # How torch.tensor ends.
        return False
    address = tensor.untyped_storage()._cdata
    return any(other.untyped_storage()._cdata == address for other in tensors_in(arguments))


def _is_random_state(tensor: torch.Tensor) -> bool:
    """Whether it is the state of a CPU's random numbers: on a GPU these are not in its memory."""
    return tensor.dtype == torch.uint8 and tensor.shape == _RANDOM_STATE_SHAPE


_RANDOM_STATE_SHAPE = torch.get_rng_state().shape


class _EveryOperation(TorchDispatchMode):
    """Shows every operation that torch dispatches to a function, which runs it."""

    def __init__(self, see: Callable[..., Any]):
        super().__init__()
        self.see = see

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        named = named or {}
        return self.see(operation, arguments, named, lambda: operation(*arguments, **named))

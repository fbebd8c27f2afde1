"""Which tensors are alive at which moment: a log of allocations and frees, and what follows of it.

The log is written while a step runs. What a tensor holds is often known only later (Adam makes its
moments at the end of the first step), so bytes are added up afterwards, from the log.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from attrs import define, field, frozen

from megafn.pure.planner.records import Memory
from megafn.runtime.dry_run.records import LargeTensor

# What runs. Tensors that are made in forward and backward passes are activations.
SETUP = "setup"
BATCH = "batch"
FORWARD = "forward"
BACKWARD = "backward"
OPTIMIZER = "optimizer"
BETWEEN_STEPS = "between steps"

KINDS = ("parameters", "gradients", "optimizer_state", "activations", "other")


@define(eq=False, kw_only=True)
class KernelCall:
    """A call of a function that is one kernel on a GPU: see `cpu_kernels`."""

    # (memory, offset in it, bytes) of each input that the kernel on a GPU keeps
    inputs: tuple[tuple[Allocation, int, int], ...]
    # of what else it keeps, besides its output
    bytes_kept: int


@define(eq=False, kw_only=True)
class Allocation:
    """The memory of one tensor and of all its views."""

    bytes: int
    # Of the tensor that was seen first.
    shape: tuple[int, ...]
    dtype: torch.dtype
    # Dotted name of the module whose forward or backward pass made it, "" outside of all modules.
    module: str
    # What ran when it was made.
    made_in: str
    # A field of `Memory`, if it is known what the tensor is for.
    known_kind: str | None = None
    # The kernel inside which it was made, unless it is the kernel's output.
    kernel: KernelCall | None = None
    # It was sent to the next pipeline stage, which on a GPU ends its life.
    is_sent: bool = False

    @property
    def kind(self) -> str:
        if self.known_kind is not None:
            return self.known_kind
        return "activations" if self.made_in in (FORWARD, BACKWARD) else "other"


@frozen(kw_only=True)
class Change:
    """Bytes of an allocation that were added or, if negative, freed; and what ran then."""

    bytes: int
    allocation: Allocation
    runs: str
    # Tells one forward pass from the next, and one backward pass.
    pass_number: int = 0


@define(eq=False)
class MemoryLog:
    """Every change of the memory that is alive, in the order of time."""

    changes: list[Change] = field(factory=list)
    runs: str = SETUP
    # How many forward and backward passes have begun.
    pass_number: int = 0
    # The kernel that runs.
    kernel: KernelCall | None = None
    # Each storage that is alive, by its address.
    _alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], Allocation]] = field(factory=dict)

    def see(self, tensor: torch.Tensor, module: str = "") -> Allocation:
        """The memory of a tensor, which is logged if it is new or has another size than before."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self._alive.get(address)
        if known is not None:
            allocation = known[1]
            self._resize(allocation, storage.nbytes())
            return allocation
        allocation = Allocation(
            bytes=storage.nbytes(),
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            module=module,
            made_in=self.runs,
            kernel=self.kernel,
        )
        # torch keeps the Python object of a storage for as long as the storage itself.
        reference = weakref.ref(storage, partial(self._freed, address))
        self._alive[address] = (reference, allocation)
        self._changed(allocation, allocation.bytes)
        return allocation

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a tensor was seen before."""
        return tensor.untyped_storage()._cdata in self._alive

    def look_for_resized(self) -> None:
        """Log storages that were resized without an operation (`untyped_storage().resize_`)."""
        for reference, allocation in list(self._alive.values()):
            storage = reference()
            if storage is not None:
                self._resize(allocation, storage.nbytes())

    def _freed(self, address: int, _: object) -> None:
        # Removed at once, because the address is soon that of another storage.
        _, allocation = self._alive.pop(address)
        self._changed(allocation, -allocation.bytes)

    def _resize(self, allocation: Allocation, size: int) -> None:
        if size != allocation.bytes:
            self._changed(allocation, size - allocation.bytes)
            allocation.bytes = size

    def _changed(self, allocation: Allocation, size: int) -> None:
        change = Change(
            bytes=size, allocation=allocation, runs=self.runs, pass_number=self.pass_number
        )
        self.changes.append(change)


# ------------------------------------------------------------------------ what follows of the log


@frozen(kw_only=True)
class StepMemory:
    """The changes up to the end of a step, the number of those before it, and up to its peak."""

    changes: Sequence[Change]
    start: int
    peak: int


def memory_of_step(changes: Sequence[Change], start: int) -> StepMemory:
    """A step whose changes begin with number `start`, as every later step will be.

    What the optimizer makes in it and keeps was there from the beginning.
    """
    # A dict, whose order is that of time: equal runs give equal reports.
    kept = dict.fromkeys(
        allocation
        for allocation in _alive_after(changes[start:])
        if allocation.kind == "optimizer_state"
    )
    before = [change for change in changes[:start] if change.allocation not in kept]
    for allocation in kept:
        before.append(Change(bytes=allocation.bytes, allocation=allocation, runs=SETUP))
    during = [change for change in changes[start:] if change.allocation not in kept]
    everything = before + during
    return StepMemory(
        changes=everything, start=len(before), peak=_peak_of(everything, start=len(before))
    )


def at_start(step: StepMemory) -> Memory:
    return Memory(**_bytes_by_kind(step.changes[: step.start]))


def at_peak(step: StepMemory) -> Memory:
    return Memory(**_bytes_by_kind(step.changes[: step.peak]))


def cpu_only_at_peak(step: StepMemory) -> int:
    """Bytes that are alive at the peak on a CPU only: see `cpu_kernels`."""
    alive = _alive_after(step.changes[: step.peak])
    only = sum(size for allocation, size in alive.items() if allocation.is_sent)
    by_kernel: dict[KernelCall, int] = {}
    for allocation, size in alive.items():
        if allocation.kernel is not None and not allocation.is_sent:
            by_kernel[allocation.kernel] = by_kernel.get(allocation.kernel, 0) + size
    # Two kernels with one input, as of a parallel residual, keep it once.
    inputs_kept_on_a_gpu = set()
    for kernel, size in by_kernel.items():
        excess = size - kernel.bytes_kept
        for part in kernel.inputs:
            if part[0] not in alive and part not in inputs_kept_on_a_gpu:
                inputs_kept_on_a_gpu.add(part)
                excess -= part[2]
        only += max(0, excess)
    return only


def largest_at_peak(step: StepMemory, count: int) -> tuple[LargeTensor, ...]:
    """The largest of what is alive at the peak, the largest first."""
    alive = _alive_after(step.changes[: step.peak])
    largest = sorted(alive, key=lambda allocation: -alive[allocation])[:count]
    return tuple(
        LargeTensor(
            bytes=alive[allocation],
            shape=allocation.shape,
            dtype=str(allocation.dtype).removeprefix("torch."),
            kind=allocation.kind,
            module=allocation.module,
        )
        for allocation in largest
    )


def timeline(step: StepMemory) -> Iterator[tuple[str, Memory]]:
    """(what runs, bytes alive): the moment with the most of each pass, and the end of it."""
    totals = _bytes_by_kind(step.changes[: step.start])
    during = step.changes[step.start :]
    for (runs, _), changes in groupby(during, key=lambda change: (change.runs, change.pass_number)):
        alive = most = sum(totals.values())
        at_most = dict(totals)
        for change in changes:
            totals[change.allocation.kind] += change.bytes
            alive += change.bytes
            if alive > most:
                most = alive
                at_most = dict(totals)
        yield runs, Memory(**at_most)
        yield runs, Memory(**totals)


def _bytes_by_kind(changes: Iterable[Change]) -> dict[str, int]:
    totals = dict.fromkeys(KINDS, 0)
    for change in changes:
        totals[change.allocation.kind] += change.bytes
    return totals


def _alive_after(changes: Iterable[Change]) -> dict[Allocation, int]:
    """The bytes of each allocation that is alive after these changes."""
    sizes: dict[Allocation, int] = {}
    for change in changes:
        sizes[change.allocation] = sizes.get(change.allocation, 0) + change.bytes
    return {allocation: size for allocation, size in sizes.items() if size > 0}


def _peak_of(changes: Sequence[Change], start: int) -> int:
    """After how many changes the most bytes are alive, `start` or more."""
    alive = sum(change.bytes for change in changes[:start])
    most = alive
    peak = start
    for number, change in enumerate(changes[start:], start + 1):
        alive += change.bytes
        if alive > most:
            most = alive
            peak = number
    return peak

"""What a dry run counts: plain numbers, in bytes and calls."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from attrs import field, frozen

from megafn.pure.planner.records import Memory


@frozen(kw_only=True)
class LargeTensor:
    """A tensor that is alive at the peak."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    # A field of `Memory`: "parameters", "activations" and so on.
    kind: str
    # Dotted name of the module whose forward or backward pass made it; "" outside of all modules.
    module: str


@frozen(kw_only=True)
class DryRunMemory:
    """Bytes that are alive on the rank."""

    setup: Memory
    # At the moment of the step with the most.
    peak: Memory
    # Of the peak's activations, those that only a CPU keeps: torch's kernels for GPUs do not.
    cpu_only: float = 0
    # (what runs, bytes alive) at each change of the step worth drawing, in the order of time.
    timeline: tuple[tuple[str, Memory], ...] = field(default=(), repr=False)

    @property
    def peak_on_gpu(self) -> Memory:
        """The peak without what only a CPU keeps: what a GPU has to hold.

        >>> memory = DryRunMemory(setup=Memory(), peak=Memory(activations=5), cpu_only=2)
        >>> memory.peak_on_gpu.activations
        3
        """
        return attrs.evolve(self.peak, activations=self.peak.activations - self.cpu_only)


@frozen(kw_only=True)
class Messages:
    """What the rank sends and receives over one kind of group in one step."""

    count: int = 0
    # Of the tensors that are given to the collectives.
    bytes: int = 0
    # Bytes by the name of the collective: "all_reduce", "reduce_scatter", "send" and so on.
    by_collective: Mapping[str, int] = field(factory=dict)

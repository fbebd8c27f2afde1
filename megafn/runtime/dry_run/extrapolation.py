"""A step of many equal micro-batches from two steps of few: each one more adds the same.

Once the pipeline is full, one more micro-batch sends the same messages and computes the same
products again, and of memory adds only what is kept of it until the end of the step (its tokens,
its loss). So all counts are linear in the number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
from attrs import frozen

from megafn.pure.config.records import ParallelConfig, TrainConfig
from megafn.pure.planner.records import Memory
from megafn.runtime.dry_run.records import DryRunMemory, Messages
from megafn.runtime.dry_run.report import DryRun

# With fewer micro-batches than this many times those of both short steps, one long step is as fast.
_WORTH_IT = 2


@frozen(kw_only=True)
class ShortSteps:
    """How many micro-batches the two short steps have, and the long one that they stand for."""

    first: int
    second: int
    whole: int

    def extended(self, first: float, second: float) -> float:
        """A number of the long step from those of the short ones. Exact for whole numbers."""
        more = (second - first) * (self.whole - self.second)
        return second + more / (self.second - self.first)


def short_steps(parallel: ParallelConfig, num_micro_batches: int) -> ShortSteps | None:
    """Two short steps in which the pipeline is filled; None if the step itself is short.

    >>> short_steps(ParallelConfig(pp=4), num_micro_batches=100)
    ShortSteps(first=6, second=7, whole=100)
    >>> short_steps(ParallelConfig(pp=4, vpp=2), num_micro_batches=100)
    ShortSteps(first=8, second=12, whole=100)
    >>> short_steps(ParallelConfig(pp=8), num_micro_batches=16)
    """
    if parallel.vpp > 1:
        # Interleaving runs as many micro-batches as stages in turn.
        first = 2 * parallel.pp
        second = 3 * parallel.pp
    else:
        first = parallel.pp + 2
        second = parallel.pp + 3
    if num_micro_batches < _WORTH_IT * (first + second):
        return None
    return ShortSteps(first=first, second=second, whole=num_micro_batches)


def extrapolated(first: DryRun, second: DryRun, steps: ShortSteps, config: TrainConfig) -> DryRun:
    """The dry run of a config's step from those of two short steps."""

    def extended(first: float, second: float) -> int:
        return round(steps.extended(first, second))

    return attrs.evolve(
        second,
        config=config,
        num_micro_batches=steps.whole,
        memory=_extended_memory(first.memory, second.memory, extended),
        flops=extended(first.flops, second.flops),
        matmuls=extended(first.matmuls, second.matmuls),
        messages={
            name: _extended_messages(first.messages[name], messages, extended)
            for name, messages in second.messages.items()
        },
    )


_Extended = Callable[[float, float], int]


def _extended_memory(
    first: DryRunMemory, second: DryRunMemory, extended: _Extended
) -> DryRunMemory:
    """The timeline stays that of the second step: the others would repeat its middle."""
    return attrs.evolve(
        second,
        setup=_extended_bytes(first.setup, second.setup, extended),
        peak=_extended_bytes(first.peak, second.peak, extended),
        cpu_only=extended(first.cpu_only, second.cpu_only),
    )


def _extended_bytes(first: Memory, second: Memory, extended: _Extended) -> Memory:
    before = attrs.asdict(first)
    after = attrs.asdict(second)
    return Memory(**{kind: extended(before[kind], after[kind]) for kind in after})


def _extended_messages(first: Messages, second: Messages, extended: _Extended) -> Messages:
    before: Mapping[str, int] = first.by_collective
    return Messages(
        count=extended(first.count, second.count),
        bytes=extended(first.bytes, second.bytes),
        by_collective={
            name: extended(before[name], number) for name, number in second.by_collective.items()
        },
    )

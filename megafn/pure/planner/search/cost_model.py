"""What layouts of one config cost on one machine: bytes and seconds, and which layouts fit."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from attrs import field, frozen

from megafn.pure.config.records import TrainConfig
from megafn.pure.families.built_in import stage_layout
from megafn.pure.planner.machine import Machine
from megafn.pure.planner.memory.stage_memory import memory_by_stage
from megafn.pure.planner.records import Layout, Memory
from megafn.pure.planner.search.layout_search import Layouts, search_layouts
from megafn.pure.planner.time.step_time import step_time

# A rank must keep so many tokens of a sequence if context parallelism goes beyond a node.
_FEWEST_TOKENS = 1024
# How often `devices_that_fit` doubles the number of devices.
_DOUBLINGS = 10


@frozen(kw_only=True)
class CostModel:
    """Prices layouts of one config on one machine. Bytes are computed once for each layout."""

    config: TrainConfig
    machine: Machine
    implementation: str
    # Caches: bytes by layout, and `candidate_stages` by pp.
    bytes_of: dict[Layout, float] = field(factory=dict, repr=False, eq=False)
    candidates: dict[int, tuple[int, ...]] = field(factory=dict, repr=False, eq=False)

    def memory(self, layout: Layout) -> tuple[Memory, ...]:
        """Memory of every stage."""
        return memory_by_stage(self.config, layout, implementation=self.implementation)

    def needed(self, layout: Layout) -> float:
        """Bytes of the fullest stage."""
        if layout not in self.bytes_of:
            self.bytes_of[layout] = self._needed(layout)
        return self.bytes_of[layout]

    def _needed(self, layout: Layout) -> float:
        if layout.pp not in self.candidates:
            self.candidates[layout.pp] = candidate_stages(self.config, layout.pp)
        memory = memory_by_stage(
            self.config,
            layout,
            implementation=self.implementation,
            stages=self.candidates[layout.pp],
        )
        return max(stage.total for stage in memory)

    def fits(self, layout: Layout) -> bool:
        return self.needed(layout) <= self.machine.usable_bytes

    def seconds(self, layout: Layout) -> float:
        """Seconds of a step."""
        time = step_time(self.config, layout, self.machine, implementation=self.implementation)
        return time.total


def candidate_stages(config: TrainConfig, pp: int) -> tuple[int, ...]:
    """The stages of which one is the fullest: of each stack its first two and its last.

    The stages between hold as many layers as the second, and no more micro-batches.
    """
    parallel = attrs.evolve(config.parallel, pp=pp)
    stages: set[int] = set()
    for stack in stage_layout(parallel, config.model).stacks:
        stages.update((*stack[:2], stack[-1]))
    return tuple(sorted(stages))


def usual_layouts(costs: CostModel, world_size: int) -> Layouts:
    """The layouts that are worth a search.

    Tensor parallelism stays within a node, and so does context parallelism unless a rank keeps
    `_FEWEST_TOKENS` of a sequence. Degrees that the config has are searched in any case.
    """
    parallel = costs.config.parallel
    node = costs.machine.devices_per_node
    long = costs.config.model.seq_length // _FEWEST_TOKENS
    return search_layouts(
        costs.config,
        world_size,
        largest_tp=max(node, parallel.tp),
        largest_cp=max(node, parallel.cp, long),
    )


def all_layouts(costs: CostModel, world_size: int) -> Layouts:
    """Those with tensor and context parallelism beyond a node too."""
    return search_layouts(costs.config, world_size, largest_tp=world_size, largest_cp=world_size)


def some_fit(costs: CostModel, layouts: Sequence[Layout]) -> bool:
    """Whether any of the layouts fits; lean ones are tried first."""
    return any(map(costs.fits, leanest(layouts))) or any(map(costs.fits, layouts))


def devices_that_fit(costs: CostModel, world_size: int) -> int | None:
    """A larger number of devices, by doubling, on which some layout fits; None if none is found.

    Looks only at layouts that save memory wherever they can.
    """
    for _ in range(_DOUBLINGS):
        world_size *= 2
        found = usual_layouts(costs, world_size)
        if any(map(costs.fits, leanest(found.accepted))):
            return world_size
    return None


def leanest(layouts: Sequence[Layout]) -> list[Layout]:
    """The layouts that save memory wherever they can without another number of devices."""
    sharded = any(layout.use_distributed_optimizer for layout in layouts)
    return [
        layout
        for layout in layouts
        if layout.vpp == 1
        and layout.micro_batch_size == 1
        and layout.recompute.granularity == "full"
        and layout.sequence_parallel == (layout.tp > 1)
        and layout.use_distributed_optimizer == sharded
    ]

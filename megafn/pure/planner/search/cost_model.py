"""Whether layouts fit into the memory of their devices, and how long a step takes."""

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

# Of a sequence, that a context-parallel rank beyond its node keeps.
_FEWEST_TOKENS = 1024
# How often more devices are tried.
_DOUBLINGS = 10

# (first, last) layers of the outer stages.
OuterStages = tuple[int | None, int | None]


@frozen(kw_only=True)
class CostModel:
    """Weighs layouts of one config; remembers what many of them have in common."""

    config: TrainConfig
    machine: Machine
    implementation: str
    # The config with other outer stages, which pricing reads from it.
    configs: dict[OuterStages, TrainConfig] = field(factory=dict, repr=False, eq=False)
    weights: dict[Layout, float] = field(factory=dict, repr=False, eq=False)
    # Those of which one is the fullest, by pp.
    stages: dict[int, tuple[int, ...]] = field(factory=dict, repr=False, eq=False)

    def config_of(self, layout: Layout) -> TrainConfig:
        """The config with the layout's outer stages."""
        outer = (
            layout.num_layers_in_first_pipeline_stage,
            layout.num_layers_in_last_pipeline_stage,
        )
        if outer not in self.configs:
            self.configs[outer] = with_outer_stages(self.config, layout)
        return self.configs[outer]

    def memory(self, layout: Layout) -> tuple[Memory, ...]:
        """Of every stage."""
        return memory_by_stage(self.config_of(layout), layout, implementation=self.implementation)

    def needed(self, layout: Layout) -> float:
        """Bytes of the fullest stage, those in reserve included."""
        if layout not in self.weights:
            self.weights[layout] = self._needed(layout)
        return self.weights[layout]

    def _needed(self, layout: Layout) -> float:
        if layout.pp not in self.stages:
            self.stages[layout.pp] = telling_stages(self.config, layout.pp)
        memory = memory_by_stage(
            self.config_of(layout),
            layout,
            implementation=self.implementation,
            stages=self.stages[layout.pp],
        )
        return max(stage.total for stage in memory) + self.machine.reserved_bytes

    def seconds(self, layout: Layout) -> float:
        """Of a step."""
        config = self.config_of(layout)
        return step_time(config, layout, self.machine, implementation=self.implementation).total

    def fits(self, layout: Layout) -> bool:
        return self.needed(layout) <= self.machine.memory_bytes


def with_outer_stages(config: TrainConfig, layout: Layout) -> TrainConfig:
    """The config with the numbers of layers that the layout has in its outer stages."""
    parallel = attrs.evolve(
        config.parallel,
        num_layers_in_first_pipeline_stage=layout.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=layout.num_layers_in_last_pipeline_stage,
    )
    return attrs.evolve(config, parallel=parallel)


def telling_stages(config: TrainConfig, pp: int) -> tuple[int, ...]:
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
    """Those beyond a node too."""
    return search_layouts(costs.config, world_size, largest_tp=world_size, largest_cp=world_size)


def some_fit(costs: CostModel, layouts: Sequence[Layout]) -> bool:
    """Whether any of the layouts fits; lean ones are tried first."""
    return any(map(costs.fits, leanest(layouts))) or any(map(costs.fits, layouts))


def devices_that_fit(costs: CostModel, world_size: int) -> int | None:
    """A larger number of devices, by doubling, on which some layout fits; None if none was found.

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

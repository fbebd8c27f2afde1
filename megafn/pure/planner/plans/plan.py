"""What a config costs on a machine: `plan`, and `apply_plan`, which gives the config of a plan."""

from __future__ import annotations

import math
from functools import lru_cache

from megafn.pure.config.problems import ConfigError, Problem, config_error
from megafn.pure.config.records import ModelConfig, TrainConfig
from megafn.pure.families.built_in import parameter_shapes, sample_tokens
from megafn.pure.flops import training_flops
from megafn.pure.planner.implementation import implementation_of
from megafn.pure.planner.layout import layout_of, with_layout
from megafn.pure.planner.machine import Machine
from megafn.pure.planner.plans.records import Plan, check_plan
from megafn.pure.planner.plans.remedies import (
    fewest_changes,
    memory_problem,
    neighbours_among,
    nothing_fits,
    one_change,
)
from megafn.pure.planner.plans.table import gigabytes
from megafn.pure.planner.published.error_bands import band_of
from megafn.pure.planner.records import Layout, Memory
from megafn.pure.planner.search.cost_model import CostModel, all_layouts, some_fit, usual_layouts
from megafn.pure.planner.time.step_time import host_seconds, step_time
from megafn.pure.validation.validate import check


def plan(
    config: TrainConfig, machine: Machine, world_size: int, *, implementation: str = "megafn"
) -> Plan:
    """What a config costs on `world_size` devices, in the layout that it has.

    If it does not fit into memory, `problems` of the plan says why and what would help. Pure:
    nothing runs, and no torch is needed.

    implementation: "megafn", as this library runs it, or "megatron", with the overlap and the fused
        kernels of Megatron-LM, which published results measure.

    Raises ConfigError if the config cannot run on so many devices, as `check` does, if the machine
    is not a Machine, and for an unknown implementation.

    >>> from megafn.pure.config.records import ModelConfig
    >>> from megafn.pure.planner.machine import MACHINES
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=1, global_batch_size=8, train_iters=9)
    >>> plan(config, MACHINES["h100"], world_size=8).fits
    True
    """
    check_inputs(config, machine, implementation)
    check(config, world_size)
    costs = CostModel(config=config, machine=machine, implementation=implementation)
    layout = layout_of(config, world_size)
    memory = costs.memory(layout)
    stage = fullest_stage(memory)
    needed = memory[stage].total
    problems: tuple[Problem, ...] = ()
    if needed > machine.usable_bytes:
        remedy = _remedy(costs, layout, needed)
        problems = (memory_problem(layout, stage, needed, machine, remedy),)
    return priced_plan(costs, layout, memory, problems)


def apply_plan(config: TrainConfig, plan: Plan) -> TrainConfig:
    """The config in the layout of a plan that was made for it.

    Raises ConfigError if the layout does not suit the config, and TypeError for a Ranking.

    >>> import attrs
    >>> from megafn.pure.config.records import ModelConfig, ParallelConfig
    >>> from megafn.pure.planner.machine import MACHINES
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=1, global_batch_size=8, train_iters=9)
    >>> cut = attrs.evolve(config, parallel=ParallelConfig(tp=2))
    >>> apply_plan(config, plan(cut, MACHINES["h100"], world_size=8)) == cut
    True
    """
    check_plan(plan)
    ready = with_layout(config, plan.layout)
    check(ready, plan.world_size)
    if layout_of(ready, plan.world_size) != plan.layout:
        raise ConfigError(
            f"global_batch_size = {config.global_batch_size}: the plan is for one of "
            f"{plan.layout.num_micro_batches} micro-batches of {plan.layout.micro_batch_size} on "
            f"{plan.layout.dp} data-parallel ranks; plan this config anew"
        )
    return ready


def check_inputs(config: TrainConfig, machine: Machine, implementation: str) -> None:
    """Raises ConfigError unless these can be priced."""
    if not isinstance(config, TrainConfig):
        raise config_error([Problem("config", config, "give a TrainConfig")])
    if not isinstance(machine, Machine):
        remedy = 'give a Machine, such as megafn.MACHINES["h100"]'
        raise config_error([Problem("machine", machine, remedy)])
    implementation_of(implementation)


def fullest_stage(memory: tuple[Memory, ...]) -> int:
    return max(range(len(memory)), key=lambda stage: memory[stage].total)


def priced_plan(
    costs: CostModel, layout: Layout, memory: tuple[Memory, ...], problems: tuple[Problem, ...] = ()
) -> Plan:
    """The plan of a layout."""
    machine = costs.machine
    config = costs.config
    time = step_time(config, layout, machine, implementation=costs.implementation)
    world_size = layout.world_size
    tokens = config.global_batch_size * sample_tokens(config.model)
    flops = _flops(config)
    return Plan(
        machine=machine,
        world_size=world_size,
        layout=layout,
        implementation=costs.implementation,
        memory=memory,
        time=time,
        host_seconds=host_seconds(
            config, layout, machine, time, implementation=costs.implementation
        ),
        num_parameters=_num_parameters(config.model),
        step_flops=flops,
        iterations=config.iterations,
        tokens_per_second=tokens / time.total / world_size,
        mfu=flops / time.total / world_size / _peak(config, machine),
        band=band_of(config, layout, machine, costs.implementation),
        problems=problems,
        assumptions=_assumptions(config, machine, costs.implementation, runs=not problems),
    )


def _flops(config: TrainConfig) -> float:
    flops = training_flops(config.model, config.global_batch_size)
    if flops is None:
        raise ConfigError(
            f"model.family = {config.model.family!r}: its FamilySpec does not know its operations; "
            "give it training_flops"
        )
    return flops


def _peak(config: TrainConfig, machine: Machine) -> float:
    """FLOP/s of which MFU is a share."""
    return machine.fp32_flops if config.precision.dtype == "fp32" else machine.peak_flops


@lru_cache(maxsize=64)
def _num_parameters(model: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())


def _remedy(costs: CostModel, layout: Layout, needed: float) -> str:
    """What would make the layout fit."""
    world_size = layout.world_size
    layouts = usual_layouts(costs, world_size).accepted
    if not some_fit(costs, layouts):
        layouts = all_layouts(costs, world_size).accepted
        if not some_fit(costs, layouts):
            return nothing_fits(costs, layouts, world_size)
    neighbours = neighbours_among(layouts, costs)
    enough, changes = one_change(layout, needed, neighbours)
    return changes if enough else fewest_changes(layout, neighbours, costs.seconds)


_KERNELS = {
    "megafn": "communication waits for computation, and kernels are not fused",
    "megatron": "communication is overlapped and kernels are fused, as in Megatron-LM with "
    "Transformer Engine",
}


def _assumptions(
    config: TrainConfig, machine: Machine, implementation: str, *, runs: bool
) -> tuple[str, ...]:
    """What is taken for granted, in words; of a plan that cannot run, as far as it is memory."""
    of_memory = (
        _KERNELS[implementation],
        f"every sample is full: {sample_tokens(config.model):,} tokens",
        f"CUDA, NCCL and workspaces of kernels take {gigabytes(machine.reserved_bytes)} GB, which "
        "are reserved",
    )
    if not runs:
        return of_memory
    dtype = "fp32" if config.precision.dtype == "fp32" else "bf16"
    return (
        *of_memory,
        f"each device has {gigabytes(machine.link_bandwidth)} GB/s to others of its node of "
        f"{machine.devices_per_node}, and {gigabytes(machine.network_bandwidth)} GB/s to other "
        "nodes",
        "a layer takes at least as long as the host needs to launch its kernels: "
        f"{1e3 * machine.launch_seconds:.3g} ms for each micro-batch (launch_seconds)",
        "reading data, evaluations and checkpoints take no time",
        f"MFU is the model's FLOP as a share of {_peak(config, machine) / 1e12:,.4g} TFLOP/s, the "
        f"peak in {dtype}; attention is counted in full, without the causal mask, so long "
        "sequences show a high MFU; padding and recomputation are not counted",
    )

"""All layouts of a config on a machine, the fastest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import itemgetter

from attrs import field, frozen

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig
from megafn.pure.planner.machine import Machine
from megafn.pure.planner.plans.lazy_sequence import LazySequence
from megafn.pure.planner.plans.plan import check_inputs, fullest_stage, priced_plan
from megafn.pure.planner.plans.records import Plan, Ranking, Refusal
from megafn.pure.planner.plans.remedies import (
    Neighbours,
    memory_problem,
    neighbours_among,
    nothing_fits,
    one_change,
)
from megafn.pure.planner.plans.table import gigabytes
from megafn.pure.planner.records import Layout
from megafn.pure.planner.search.cost_model import CostModel, all_layouts, usual_layouts
from megafn.pure.planner.search.layout_search import Layouts, RefusedChoice

# The bytes that it needs, and the layout.
HeavyLayout = tuple[float, Layout]


def rank_plans(
    config: TrainConfig, machine: Machine, world_size: int, *, implementation: str = "megafn"
) -> Ranking:
    """Every layout of a config on `world_size` devices, priced; the fastest that fits comes first.

    Of layouts whose times agree to four digits, the one with the smallest cp comes first, then pp,
    then tp.

    Searched are tp, pp, vpp, cp, the micro-batch size, sequence parallelism, the distributed
    optimizer and recomputation; the config's own values of these do not count, all else of it
    stays. Tensor and context parallelism stay within a node while anything fits there (context
    parallelism goes beyond it for sequences of which each rank keeps 1,024 tokens). If the stages
    cannot hold equally many layers, the first and the last hold fewer.

    implementation: as in `plan`.

    Raises ConfigError for problems that the config has in any layout, and if it has no layout of so
    many devices. If no layout fits into memory, `plans` is empty and `advice` says what would help.

    >>> from megafn.pure.config.records import ModelConfig
    >>> from megafn.pure.planner.machine import MACHINES
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=1, global_batch_size=8, train_iters=9)
    >>> ranking = rank_plans(config, MACHINES["h100"], world_size=8)
    >>> ranking.plans[0].time.total < ranking.plans[-1].time.total
    True
    """
    check_inputs(config, machine, implementation)
    costs = CostModel(config=config, machine=machine, implementation=implementation)
    found = usual_layouts(costs, world_size)
    fitting, heavy = _weighed(costs, found)
    if not fitting:
        found = all_layouts(costs, world_size)
        fitting, heavy = _weighed(costs, found)
    if not found.accepted:
        raise ConfigError(_no_layout(costs, world_size))

    advice = None if fitting else nothing_fits(costs, found.accepted, world_size)
    refused: tuple[HeavyLayout | RefusedChoice, ...] = (*heavy, *found.refused)
    return Ranking(
        machine=machine,
        world_size=world_size,
        implementation=implementation,
        plans=LazySequence(
            build=_plan,
            context=costs,
            seeds=_fastest_first(fitting, costs),
            if_empty=advice or "",
        ),
        refused=LazySequence(
            build=_refusal,
            context=_Refusals(costs=costs, layouts=found.accepted),
            seeds=refused,
            if_empty="no layout is refused",
        ),
        reasons=_reasons(heavy, found.refused, machine),
        advice=advice,
    )


def _weighed(costs: CostModel, found: Layouts) -> tuple[list[Layout], list[HeavyLayout]]:
    """The layouts that fit, and those that need too much memory, the least first."""
    fitting = []
    heavy = []
    for layout in found.accepted:
        needed = costs.needed(layout)
        if needed <= costs.machine.usable_bytes:
            fitting.append(layout)
        else:
            heavy.append((needed, layout))
    return fitting, sorted(heavy, key=itemgetter(0))


def _fastest_first(layouts: Sequence[Layout], costs: CostModel) -> tuple[Layout, ...]:
    """Times that agree to four digits count as equal, and the simpler layout comes first.

    cp above all: its messages can hide under attention, and published results with it are few.
    """
    keys = []
    for index, layout in enumerate(layouts):
        seconds = costs.seconds(layout)
        rounded = float(f"{seconds:.3e}")
        keys.append((rounded, layout.cp, layout.pp, layout.tp, seconds, index))
    return tuple(layouts[key[-1]] for key in sorted(keys))


def _plan(costs: CostModel, layout: Layout) -> Plan:
    return priced_plan(costs, layout, costs.memory(layout))


@frozen(kw_only=True)
class _Refusals:
    """What reasons of refused layouts are made of."""

    costs: CostModel
    layouts: tuple[Layout, ...]
    # Made for the first reason that is read.
    neighbours: list[Neighbours] = field(factory=list, repr=False, eq=False)


def _refusal(context: _Refusals, seed: RefusedChoice | HeavyLayout) -> Refusal:
    if isinstance(seed, RefusedChoice):
        return Refusal(layout=seed.layout, problems=(seed.problem,))
    if not context.neighbours:
        context.neighbours.append(neighbours_among(context.layouts, context.costs))
    needed, layout = seed
    stage = fullest_stage(context.costs.memory(layout))
    enough, remedy = one_change(layout, needed, context.neighbours[0])
    if not enough:
        helpful = f"{remedy}; " if remedy else ""
        remedy = f"{helpful}no single change is enough"
    problem = memory_problem(layout, stage, needed, context.costs.machine, remedy)
    return Refusal(layout=layout, problems=(problem,))


def _reasons(
    heavy: Sequence[HeavyLayout], choices: Sequence[RefusedChoice], machine: Machine
) -> tuple[tuple[int, str], ...]:
    """(how many, what they do wrong)"""
    reasons = []
    if heavy:
        least, _ = heavy[0]
        limit = gigabytes(machine.usable_bytes)
        reasons.append(
            (len(heavy), f"need more than {limit} GB (the least of them {least / 1e9:,.2f} GB)")
        )
    if choices:
        fields = Counter(choice.problem.field for choice in choices).most_common()
        named = ", ".join(f"{name} ({count:,})" for name, count in fields)
        reasons.append((len(choices), f"break a rule: {named}"))
    return tuple(reasons)


def _no_layout(costs: CostModel, world_size: int) -> str:
    """Why a config has no layout of so many devices, with numbers of which it has one."""
    config = costs.config
    model = config.model
    near = _numbers_near(world_size)
    others = [str(size) for size in near if usual_layouts(costs, size).accepted]
    choose = "change global_batch_size"
    if others:
        choose = f"choose another number, such as {' or '.join(others)}"
    return (
        f"world_size = {world_size}: no tp * pp * cp * dp with this product divides "
        f"num_attention_heads = {model.num_attention_heads}, num_layers = {model.num_layers}, "
        f"seq_length = {model.seq_length} and global_batch_size = {config.global_batch_size}; "
        f"{choose}"
    )


def _numbers_near(world_size: int) -> list[int]:
    """The powers of two below and above."""
    above = 1 << world_size.bit_length()
    # Integers of a config have 64 bits.
    return [number for number in (above // 2, above) if number < 2**63]

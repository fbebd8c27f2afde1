"""A plan, and a ranking of plans, as records that print themselves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from attrs import field, frozen

from megafn.pure.config.problems import Problem, config_error
from megafn.pure.planner.machine import Machine
from megafn.pure.planner.plans.table import RankingRow, plan_text, ranking_text
from megafn.pure.planner.records import Band, Layout, Memory, StepTime

# Plans that are looked at for each one that a ranking shows.
_LOOKED_AT = 10


@frozen(kw_only=True)
class Plan:
    """What a config costs on a number of devices, priced before any of them runs.

    `print` of it shows memory by stage, seconds by kind, and what was assumed.
    """

    machine: Machine
    world_size: int
    layout: Layout
    # "megafn", or "megatron": with its overlap and fusions.
    implementation: str
    # Of the rank with the most, by pipeline stage.
    memory: tuple[Memory, ...]
    time: StepTime
    # Of time.total, seconds in which devices wait for the host to launch kernels.
    host_seconds: float
    # Of the whole model; shared ones count once.
    num_parameters: int
    # FLOP of the model in a step on all devices, as `training_flops` counts them.
    step_flops: float
    # Steps of the run.
    iterations: int
    # Per second and device.
    tokens_per_second: float
    # Share of the machine's peak in the config's dtype, from 0 to 1.
    mfu: float
    band: Band
    problems: tuple[Problem, ...] = ()
    assumptions: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def run_seconds(self) -> float:
        """Seconds of all steps of the run, without evaluations, checkpoints and restarts."""
        return self.iterations * self.time.total

    @property
    def device_hours(self) -> float:
        """Hours of the run, times the number of devices: what is paid for."""
        return self.run_seconds / 3600 * self.world_size

    def __str__(self) -> str:
        return plan_text(
            machine=self.machine,
            world_size=self.world_size,
            layout=self.layout,
            implementation=self.implementation,
            memory=self.memory,
            time=self.time,
            host_seconds=self.host_seconds,
            num_parameters=self.num_parameters,
            step_flops=self.step_flops,
            iterations=self.iterations,
            run_seconds=self.run_seconds,
            device_hours=self.device_hours,
            tokens_per_second=self.tokens_per_second,
            mfu=self.mfu,
            band=self.band,
            problems=self.problems,
            assumptions=self.assumptions,
        )


@frozen(kw_only=True)
class Refusal:
    """A layout that cannot run, and why."""

    layout: Layout
    problems: tuple[Problem, ...]


@frozen(kw_only=True)
class Ranking:
    """The layouts of a config on a number of devices. `print` of it shows the best ones.

    Plans and refusals are built when they are read: there may be tens of thousands.
    """

    machine: Machine
    world_size: int
    # "megafn", or "megatron": with its overlap and fusions.
    implementation: str
    # Those that fit, the fastest first; of those whose times agree to four digits, the one with
    # the smallest cp, then pp, then tp.
    plans: Sequence[Plan]
    # Those that need too much memory, the least first; then those that break a rule.
    refused: Sequence[Refusal]
    # (how many are refused, what they do wrong)
    reasons: tuple[tuple[int, str], ...] = field(default=(), repr=False)
    # If nothing fits: by how much, and what would help.
    advice: str | None = None

    def __str__(self) -> str:
        return self.table()

    def table(self, top: int = 10) -> str:
        """The best layouts as text; of those that differ in switches only, the best."""
        return ranking_text(
            machine=self.machine,
            world_size=self.world_size,
            implementation=self.implementation,
            rows=_best_rows(self.plans, top),
            num_plans=len(self.plans),
            reasons=self.reasons,
            advice=self.advice,
        )


def check_plan(plan: object) -> None:
    """Raises unless it is a Plan: TypeError for a whole ranking, ConfigError for anything else."""
    if isinstance(plan, Ranking):
        raise TypeError("plan is a Ranking: give one of its plans, as in ranking.plans[0]")
    if not isinstance(plan, Plan):
        raise config_error([Problem("plan", plan, "give a Plan, as rank_plans(...).plans[0]")])


def _best_rows(plans: Sequence[Plan], top: int) -> list[RankingRow]:
    """Of the best plans, those whose degrees or micro-batch size differ from a better one's."""
    rows: dict[tuple[int, ...], RankingRow] = {}
    for index, plan in enumerate(islice(plans, _LOOKED_AT * top)):
        layout = plan.layout
        sizes = (layout.tp, layout.pp, layout.vpp, layout.cp, layout.micro_batch_size)
        if sizes not in rows:
            rows[sizes] = _row(index, plan)
        if len(rows) == top:
            break
    return list(rows.values())


def _row(index: int, plan: Plan) -> RankingRow:
    return RankingRow(
        index=index,
        layout=plan.layout,
        memory=max(memory.total for memory in plan.memory),
        seconds=plan.time.total,
        tokens_per_second=plan.tokens_per_second,
        mfu=plan.mfu,
        band=plan.band,
    )

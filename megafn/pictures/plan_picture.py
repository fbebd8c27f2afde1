"""A plan as a PNG. Needs matplotlib, and no torch."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING

import attrs

from megafn.pure.planner.plans.records import Plan
from megafn.pure.planner.plans.table import in_seconds, layout_in_words
from megafn.pure.planner.records import Memory, StepTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Kinds of memory that are a smaller share of the fullest stage are not drawn.
_VISIBLE = 0.001


def plot_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draw memory by stage against the device's line, and the time of a step, as a PNG.

    The same as `draw_plan`, for a page or a slide. Raises OSError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    # In inches: bars are narrower if there are many stages.
    height = 1.5 + min(0.3 * len(plan.memory), 4)
    figure = Figure(figsize=(9, height + 3), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(_title(plan), 100)), fontsize="medium")
    memory, time = figure.subplots(2, 1, height_ratios=(height, 3))
    _draw_memory(memory, plan)
    _draw_time(time, plan.time)
    figure.savefig(path, dpi=120, format="png")


def _title(plan: Plan) -> str:
    fits = "fits" if plan.fits else "does not fit"
    layout = layout_in_words(plan.layout)
    return f"{plan.world_size:,} x {plan.machine.name}, {layout}: {fits}"


def _draw_memory(panel: Axes, plan: Plan) -> None:
    from matplotlib.ticker import MaxNLocator

    machine = plan.machine
    stages = range(len(plan.memory))
    visible = _VISIBLE * max(memory.total for memory in plan.memory) / 1e9
    ends = [0.0] * len(plan.memory)
    for kind in _kinds(Memory):
        amounts = [getattr(memory, kind) / 1e9 for memory in plan.memory]
        if max(amounts) > visible:
            panel.barh(stages, amounts, left=ends, label=kind.replace("_", " "))
            ends = [end + amount for end, amount in zip(ends, amounts, strict=True)]
    usable = (machine.memory_bytes - machine.reserved_bytes) / 1e9
    panel.axvline(usable, color="black", linestyle="--", label="without the reserve")
    panel.axvline(machine.memory_bytes / 1e9, color="black", label=f"memory of {machine.name}")
    panel.invert_yaxis()
    panel.margins(y=0.02)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.set_xlabel("GB of the fullest rank")
    panel.set_ylabel("pipeline stage")
    panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_time(panel: Axes, time: StepTime) -> None:
    seconds = {kind: getattr(time, kind) for kind in _kinds(StepTime)}
    shown = {kind: amount for kind, amount in seconds.items() if amount}
    bars = panel.barh(list(shown), list(shown.values()))
    panel.bar_label(bars, [f"{amount / time.total:.1%}" for amount in shown.values()], padding=3)
    panel.margins(x=0.1)
    panel.invert_yaxis()
    panel.set_xlabel(f"seconds of a step, {in_seconds(time.total)} in all")


def _kinds(record: type[attrs.AttrsInstance]) -> list[str]:
    return [attribute.name for attribute in attrs.fields(record)]

"""A plan as a PNG. Needs matplotlib, and no torch."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING

from megafn.pictures.memory_kinds import COLOURS, words
from megafn.pure.planner.plans.records import Plan, check_plan
from megafn.pure.planner.plans.table import (
    devices_in_words,
    in_seconds,
    layout_in_words,
    seconds_in_words,
)
from megafn.pure.planner.records import StepTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Kinds of memory that are a smaller share of the fullest stage are not drawn.
_VISIBLE = 0.005


def plot_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draw memory by stage against the device's line, and the time of a step, as a PNG.

    The same as `draw_plan`, for a page or a slide. Raises OSError if the file cannot be written.
    """
    check_plan(plan)
    from matplotlib.figure import Figure

    # In inches; bars are narrower if there are many stages.
    memory_height = 1.3 + min(0.3 * len(plan.memory), 4)
    time_height = 0.7 + 0.25 * len(seconds_in_words(plan.time))
    figure = Figure(figsize=(8, memory_height + time_height + 0.6), layout="constrained")
    figure.suptitle(_title(plan), fontsize="medium")
    memory, time = figure.subplots(2, 1, height_ratios=(memory_height, time_height))
    _draw_memory(memory, plan)
    _draw_time(time, plan.time)
    figure.savefig(path, dpi=120, format="png")


def _title(plan: Plan) -> str:
    fits = "fits" if plan.fits else "does not fit"
    devices = devices_in_words(plan.world_size, plan.machine)
    layout = textwrap.wrap(layout_in_words(plan.layout), 90, break_on_hyphens=False)
    return "\n".join([f"{devices}: {fits}", *layout])


def _draw_memory(panel: Axes, plan: Plan) -> None:
    from matplotlib.ticker import MaxNLocator

    machine = plan.machine
    stages = range(len(plan.memory))
    visible = _VISIBLE * max(memory.total for memory in plan.memory) / 1e9
    ends = [0.0] * len(plan.memory)
    for kind, colour in COLOURS.items():
        amounts = [getattr(memory, kind) / 1e9 for memory in plan.memory]
        if max(amounts) > visible:
            panel.barh(stages, amounts, left=ends, label=words(kind), color=colour)
            ends = [end + amount for end, amount in zip(ends, amounts, strict=True)]
    usable = machine.usable_bytes / 1e9
    whole = machine.memory_bytes / 1e9
    panel.axvline(usable, color="black", linestyle="--", label=f"{usable:,.4g} GB usable")
    panel.axvline(whole, color="black", label=f"{whole:,.4g} GB in all")
    panel.invert_yaxis()
    panel.margins(y=0.02)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.set_xlabel("GB on the fullest rank of each stage")
    panel.set_ylabel("pipeline stage")
    panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))


def _draw_time(panel: Axes, time: StepTime) -> None:
    seconds_of = seconds_in_words(time)
    bars = panel.barh(list(seconds_of), list(seconds_of.values()), color="#56B4E9")
    shares = [f"{seconds / time.total:.1%}" for seconds in seconds_of.values()]
    panel.bar_label(bars, shares, padding=3, fontsize="small")
    panel.margins(x=0.1)
    panel.invert_yaxis()
    panel.set_xlabel(f"seconds of a step, {in_seconds(time.total)} s in all")

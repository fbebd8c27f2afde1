"""Memory over a step, as a PNG. Needs matplotlib."""

from __future__ import annotations

import os

from megafn.pictures.memory_kinds import COLOURS, words
from megafn.pure.planner.plans.table import BYTES_IN, in_unit, memory_unit
from megafn.runtime.dry_run.report import DryRun


def plot_dry_run(report: DryRun, path: str | os.PathLike[str]) -> None:
    """Draw bytes alive over the step by kind, as a PNG; time goes to the right.

    The same as `draw_dry_run`, for a page or a slide. Each pass is as wide as any other, however
    long it takes. Raises OSError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    memories = [memory for _, memory in report.memory.timeline]
    most = max((memory.total for memory in memories), default=0)
    unit = memory_unit(most)
    amounts = [[getattr(memory, kind) / BYTES_IN[unit] for memory in memories] for kind in COLOURS]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panel = figure.subplots()
    panel.stackplot(
        range(len(memories)),
        amounts,
        labels=[words(kind) for kind in COLOURS],
        colors=list(COLOURS.values()),
        step="mid",
    )
    panel.margins(x=0)
    panel.set_xticks([])
    panel.set_xlabel("forward and backward passes in turn, then the optimizer")
    panel.set_ylabel(f"{unit} alive")
    panel.set_title(
        f"one step of rank {report.rank:,} of {report.world_size:,}: "
        f"{in_unit(most, unit)} {unit} at the peak"
    )
    panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120, format="png")

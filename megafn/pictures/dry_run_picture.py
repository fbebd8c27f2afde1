"""Memory over a step, as a PNG. Needs matplotlib."""

from __future__ import annotations

import os

from megafn.pictures.dry_run_drawing import notes_of
from megafn.pictures.memory_kinds import COLOURS, words
from megafn.pure.planner.machine import Machine
from megafn.pure.planner.plans.table import BYTES_IN, in_unit, memory_unit, usable_in_words
from megafn.runtime.dry_run.report import DryRun

# Kinds of memory that are always a smaller share of the peak are not drawn.
_VISIBLE = 0.005


def plot_dry_run(
    report: DryRun, path: str | os.PathLike[str], machine: Machine | None = None
) -> None:
    """Draw bytes alive over the step by kind, as a PNG; time goes to the right.

    The same as `draw_dry_run`, for a page or a slide. Each pass is as wide as any other, however
    long it takes. machine: what a training step may fill of a device is drawn as a line.
    Raises OSError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    memories = [memory for _, memory in report.memory.timeline]
    most = max((memory.total for memory in memories), default=0)
    unit = memory_unit(most)
    kinds = [
        kind
        for kind in COLOURS
        if any(getattr(memory, kind) > _VISIBLE * most for memory in memories)
    ]
    amounts = [[getattr(memory, kind) / BYTES_IN[unit] for memory in memories] for kind in kinds]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panel = figure.subplots()
    panel.stackplot(
        range(len(memories)),
        amounts,
        labels=[words(kind) for kind in kinds],
        colors=[COLOURS[kind] for kind in kinds],
        step="mid",
    )
    panel.margins(x=0)
    panel.set_xticks([])
    on_gpu = report.memory.peak_on_gpu.total
    if report.memory.cpu_only:
        panel.axhline(on_gpu / BYTES_IN[unit], color="black", linestyle="--", linewidth=1)
    if machine is not None:
        panel.axhline(
            machine.usable_bytes / BYTES_IN[unit],
            color="black",
            label=f"{machine.name}: {usable_in_words(machine).partition(' (')[0]}",
        )
    passes = "forward and backward passes in turn, then the optimizer"
    panel.set_xlabel("\n".join([passes, *notes_of(report)]))
    panel.set_ylabel(f"{unit} alive")
    panel.set_title(
        f"one step of rank {report.rank:,} of {report.world_size:,}: "
        f"{in_unit(on_gpu, unit)} {unit} at the peak, on a GPU"
    )
    panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120, format="png")

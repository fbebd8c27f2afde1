"""Memory over a step, as a picture in text."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from megafn.pictures.memory_kinds import legend_of, stacked
from megafn.pure.planner.machine import Machine
from megafn.pure.planner.plans.table import usable_in_words
from megafn.pure.planner.records import Memory
from megafn.runtime.dry_run.report import DryRun
from megafn.runtime.dry_run.table import in_units

_HEIGHT = 16
# Columns at most; of a longer step, neighbours share one.
_WIDTH = 80
# The mark of each pass.
_PASSES = {"forward": "f", "backward": "b", "optimizer": "o"}

# (what runs, bytes alive)
Moment = tuple[str, Memory]


def draw_dry_run(report: DryRun, machine: Machine | None = None) -> str:
    """Bytes alive over the step by kind, as columns of text; time goes to the right.

    Each pass is as wide as any other, however long it takes: a dry run knows no times.
    machine: what a training step may fill of a device is drawn as a line.
    """
    moments = columns_of(report.memory.timeline)
    most = max((memory.total for _, memory in moments), default=0)
    if not most:
        return "no memory is alive in this step"
    # A device with far more room would leave no rows for the kinds.
    is_near = machine is not None and machine.usable_bytes <= 2 * most
    usable = machine.usable_bytes if machine is not None and is_near else 0
    scale = _HEIGHT / max(most, usable)
    columns = [stacked(attrs.asdict(memory), scale).ljust(_HEIGHT) for _, memory in moments]

    # The labels of rows, and what fills the blanks of those that are lines; the later win.
    labels = {_row_of(most, scale): in_units(most)}
    blanks: dict[int, str] = {}
    on_gpu = report.memory.peak_on_gpu.total
    drawn = [(on_gpu, "-")] if report.memory.cpu_only else []
    drawn += [(usable, "=")] if usable else []
    for number, mark in drawn:
        labels[_row_of(number, scale)] = in_units(number)
        blanks[_row_of(number, scale)] = mark

    width = max(map(len, labels.values()))
    lines = []
    for row in reversed(range(_HEIGHT)):
        marks = "".join(column[row] for column in columns).replace(" ", blanks.get(row, " "))
        lines.append(f"{labels.get(row, ''):>{width}} |{marks}".rstrip())
    passes = "".join(_PASSES.get(runs, " ") for runs, _ in moments)
    lines.append(f"{'0':>{width}} +{passes}".rstrip())
    lines.append(legend_of("".join(columns)))
    lines.append("below: f forward, b backward, o optimizer; passes are in order, not to scale")
    lines += notes_of(report)
    if machine is not None:
        mark = "===" if is_near else "above the picture:"
        lines.append(f"{mark} {machine.name}, {usable_in_words(machine)}")
    return "\n".join(lines)


def notes_of(report: DryRun) -> list[str]:
    """What a picture of the step does not show, or shows otherwise than a GPU has it."""
    notes = []
    drawn = report.num_micro_batches_in_timeline
    if drawn < report.num_micro_batches:
        notes.append(
            f"drawn: {drawn:,} of the {report.num_micro_batches:,} micro-batches, which are alike"
        )
    if report.memory.cpu_only:
        on_gpu = in_units(report.memory.peak_on_gpu.total)
        notes.append(f"--- {on_gpu}: the peak on a GPU, without what only a CPU keeps")
    return notes


def _row_of(number: float, scale: float) -> int:
    """The row in which a column of so many bytes ends."""
    return max(0, round(number * scale) - 1)


def columns_of(timeline: Sequence[Moment], most: int = _WIDTH) -> list[Moment]:
    """At most so many moments: of neighbours that share a column, the one with the most bytes."""
    width = -(-len(timeline) // most) or 1
    return [
        max(timeline[first : first + width], key=lambda moment: moment[1].total)
        for first in range(0, len(timeline), width)
    ]

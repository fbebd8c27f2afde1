"""Memory over a step, as a picture in text."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from megafn.pictures.memory_kinds import legend_of, stacked
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


def draw_dry_run(report: DryRun) -> str:
    """Bytes alive over the step by kind, as columns of text; time goes to the right.

    Each pass is as wide as any other, however long it takes: a dry run knows no times.
    """
    moments = columns_of(report.memory.timeline)
    most = max((memory.total for _, memory in moments), default=0)
    if not most:
        return "no memory is alive in this step"
    scale = _HEIGHT / most
    columns = [stacked(attrs.asdict(memory), scale).ljust(_HEIGHT) for _, memory in moments]
    label = in_units(most)
    lines = []
    for row in reversed(range(_HEIGHT)):
        margin = label if row == _HEIGHT - 1 else ""
        marks = "".join(column[row] for column in columns)
        lines.append(f"{margin:>{len(label)}} |{marks}".rstrip())
    passes = "".join(_PASSES.get(runs, " ") for runs, _ in moments)
    lines.append(f"{'0':>{len(label)}} +{passes}".rstrip())
    lines.append(legend_of("".join(columns)))
    lines.append("below: f forward, b backward, o optimizer; passes are in order, not to scale")
    return "\n".join(lines)


def columns_of(timeline: Sequence[Moment], most: int = _WIDTH) -> list[Moment]:
    """At most so many moments: of neighbours that share a column, the one with the most bytes."""
    width = -(-len(timeline) // most) or 1
    return [
        max(timeline[first : first + width], key=lambda moment: moment[1].total)
        for first in range(0, len(timeline), width)
    ]

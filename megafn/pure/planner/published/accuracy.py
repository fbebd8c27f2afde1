"""The error of the planner's times on every published row. `make plan-check` prints it.

`report` is the text, in Markdown, that docs/planner-accuracy.md holds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from attrs import frozen

from megafn.pure.planner.memory.stage_memory import memory_by_stage
from megafn.pure.planner.published.error_bands import RowError, row_errors
from megafn.pure.planner.published.rows import SOURCES, PublishedRow

# Measured times closer than this are not told apart.
_CLOSE = 0.05


def report() -> str:
    """Summary by source, ranking of vTrain's sweeps, memory, and the time of every row."""
    errors = row_errors()
    parts = [
        _table(
            ("source", "rows", "mean error", "largest", "bias", "left out: mean", "largest"),
            [_summary(source, errors) for source in SOURCES],
        ),
        _table(
            ("sweep", "layouts", "pairs in order", "chosen", "fastest", "regret"),
            [_sweep_cells(sweep) for sweep in sweeps()],
        ),
        _table(
            ("row", "layout", "state GB", "computed", "error", "peak GB", "computed", "error"),
            [_memory_cells(measured.row) for measured in errors if measured.row.peak_bytes],
        ),
        _table(
            ("row", "layout", "measured s", "computed s", "error", "left out", "assumed"),
            [_row_cells(measured) for measured in errors],
        ),
    ]
    return "\n\n".join(parts)


def mean_error(errors: Iterable[float]) -> float:
    """Mean of the absolute values."""
    sizes = [abs(error) for error in errors]
    return sum(sizes) / len(sizes)


def _summary(source: str, errors: Sequence[RowError]) -> list[str]:
    of_source = [measured for measured in errors if measured.row.source == source]
    sizes = [measured.error for measured in of_source]
    left_out = [measured.left_out for measured in of_source if measured.left_out is not None]
    cells = [
        SOURCES[source].title,
        str(len(of_source)),
        f"{mean_error(sizes):.1%}",
        f"{max(map(abs, sizes)):.1%}",
        _signed(sum(sizes) / len(sizes)),
    ]
    if not left_out:
        return [*cells, "not fitted", ""]
    return [*cells, f"{mean_error(left_out):.1%}", f"{max(map(abs, left_out)):.1%}"]


def _row_cells(measured: RowError) -> list[str]:
    row = measured.row
    computed = row.seconds * (1 + measured.error)
    return [
        row.name,
        _layout_cell(row),
        f"{row.seconds:.3f}",
        f"{computed:.3f}",
        _signed(measured.error),
        "" if measured.left_out is None else f"fitted; {_signed(measured.left_out)}",
        ", ".join(row.assumed),
    ]


def _layout_cell(row: PublishedRow) -> str:
    layout = row.layout
    sizes = {
        "tp": layout.tp,
        "pp": layout.pp,
        "vpp": layout.vpp,
        "cp": layout.cp,
        "dp": layout.dp,
    }
    shown = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
    return f"{shown} mbs{layout.micro_batch_size}".strip()


def memory_errors(row: PublishedRow) -> tuple[float, float]:
    """Of the state and of the peak of the last stage: computed over measured bytes, less 1."""
    last = row.layout.pp - 1
    (memory,) = memory_by_stage(row.config, row.layout, implementation="megatron", stages=(last,))
    state = memory.parameters + memory.gradients + memory.optimizer_state
    return state / (row.state_bytes or 1) - 1, memory.total / (row.peak_bytes or 1) - 1


def _memory_cells(row: PublishedRow) -> list[str]:
    cells = [row.name, _layout_cell(row)]
    measured = (row.state_bytes or 0, row.peak_bytes or 0)
    for size, error in zip(measured, memory_errors(row), strict=True):
        cells += [f"{size / 1e9:.2f}", f"{size * (1 + error) / 1e9:.2f}", _signed(error)]
    return cells


# --------------------------------------------------------------------------------------- sweeps


@frozen(kw_only=True)
class Sweep:
    """One model on one number of devices in many layouts, measured."""

    name: str
    layouts: int
    # Of the pairs whose measured times are more than 5% apart, those computed in the same order.
    ordered: float
    # Measured seconds of the layout with the shortest computed time, and of the fastest.
    chosen: float
    fastest: float

    @property
    def regret(self) -> float:
        """How much slower the chosen layout is than the fastest, as a share of the latter."""
        return self.chosen / self.fastest - 1


def sweeps() -> tuple[Sweep, ...]:
    """Those of vTrain."""
    groups: dict[str, list[RowError]] = {}
    for measured in row_errors():
        if measured.row.source == "vtrain":
            model = measured.row.name.partition("-")[2]
            groups.setdefault(model, []).append(measured)
    return tuple(_sweep(model, group) for model, group in groups.items())


def _sweep(name: str, group: Sequence[RowError]) -> Sweep:
    times = [(each.row.seconds * (1 + each.error), each.row.seconds) for each in group]
    in_order = 0
    pairs = 0
    for i, (computed, measured) in enumerate(times):
        for other_computed, other_measured in times[:i]:
            if abs(measured - other_measured) <= _CLOSE * min(measured, other_measured):
                continue
            pairs += 1
            in_order += (computed < other_computed) == (measured < other_measured)
    return Sweep(
        name=name,
        layouts=len(times),
        ordered=in_order / pairs,
        chosen=min(times)[1],
        fastest=min(measured for _, measured in times),
    )


def _sweep_cells(sweep: Sweep) -> list[str]:
    return [
        sweep.name,
        str(sweep.layouts),
        f"{sweep.ordered:.0%}",
        f"{sweep.chosen:.3f} s",
        f"{sweep.fastest:.3f} s",
        f"{sweep.regret:.1%}",
    ]


# ---------------------------------------------------------------------------------------- tables


def _signed(share: float) -> str:
    """Zero has a plus."""
    return f"{round(share, 3) + 0.0:+.1%}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned."""
    widths = [max(len(cells[i]) for cells in [head, *rows]) for i in range(len(head))]
    lines = [_line(head, widths), _line(["-" * width for width in widths], widths)]
    lines += [_line(cells, widths) for cells in rows]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    return f"| {' | '.join(padded)} |"


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")

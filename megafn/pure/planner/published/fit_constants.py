"""The shares of a machine's peaks, fitted to published rows; and each row with itself left out.

A fit minimises the squares of log(computed / measured) by Gauss-Newton steps on the logarithms of
the shares. It finds the constants that stand in `MACHINES`; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import attrs

from megafn.pure.planner.machine import Machine
from megafn.pure.planner.published.rows import PublishedRow
from megafn.pure.planner.time.step_time import price

# Source of the rows that were fitted, and which shares were; the others are A100's.
FITTED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "table-1": ("matmul_efficiency", "memory_efficiency", "link_efficiency"),
        "h100-table": ("matmul_efficiency",),
        "ci-tiny": ("launch_seconds",),
    }
)

_STEPS = 8
# Of a logarithm, for derivatives.
_DELTA = 1e-4
# No step changes a share by more than this factor's logarithm.
_LARGEST_STEP = 0.3
# A fit ends where no share changes by more.
_SMALLEST_STEP = 1e-5


def error(row: PublishedRow, shares: Mapping[str, float] | None = None) -> float:
    """Computed over measured seconds, less 1. shares: fields of Machine to replace."""
    machine = _with_shares(row.machine, shares) if shares else row.machine
    computed = price(row.config, row.layout, machine, row.implementation).total
    return computed / row.seconds - 1


def _with_shares(machine: Machine, shares: Mapping[str, float]) -> Machine:
    return attrs.evolve(
        machine,
        matmul_efficiency=shares.get("matmul_efficiency", machine.matmul_efficiency),
        memory_efficiency=shares.get("memory_efficiency", machine.memory_efficiency),
        link_efficiency=shares.get("link_efficiency", machine.link_efficiency),
        launch_seconds=shares.get("launch_seconds", machine.launch_seconds),
    )


def fit(rows: Sequence[PublishedRow], names: Sequence[str]) -> dict[str, float]:
    """The shares `names` that fit the rows best, starting from those of the rows' machine."""
    shares = {name: getattr(rows[0].machine, name) for name in names}
    for _ in range(_STEPS):
        residuals = _residuals(rows, shares)
        slopes = []
        for name in names:
            moved = shares | {name: shares[name] * math.exp(-_DELTA)}
            changed = _residuals(rows, moved)
            slopes.append(
                [
                    (before - after) / _DELTA
                    for before, after in zip(residuals, changed, strict=True)
                ]
            )
        steps = _least_squares(slopes, residuals)
        for name, step in zip(names, steps, strict=True):
            bounded = max(-_LARGEST_STEP, min(_LARGEST_STEP, step))
            shares[name] = min(1.0, shares[name] * math.exp(bounded))
        if max(map(abs, steps)) < _SMALLEST_STEP:
            break
    return shares


def left_out_errors(rows: Sequence[PublishedRow], names: Sequence[str]) -> list[float]:
    """Of each row, with shares fitted on the others."""
    errors = []
    for i, row in enumerate(rows):
        others = [*rows[:i], *rows[i + 1 :]]
        errors.append(error(row, fit(others, names)))
    return errors


def _residuals(rows: Sequence[PublishedRow], shares: Mapping[str, float]) -> list[float]:
    return [math.log1p(error(row, shares)) for row in rows]


def _least_squares(slopes: list[list[float]], residuals: list[float]) -> list[float]:
    """The step for each share after which linearised residuals are smallest."""
    matrix = [[_dot(one, other) for other in slopes] for one in slopes]
    right = [-_dot(one, residuals) for one in slopes]
    size = len(matrix)
    for i in range(size):
        # a share that no row depends on stays
        pivot = matrix[i][i] or 1.0
        for below in range(i + 1, size):
            factor = matrix[below][i] / pivot
            matrix[below] = [
                value - factor * above
                for value, above in zip(matrix[below], matrix[i], strict=True)
            ]
            right[below] -= factor * right[i]
    steps = [0.0] * size
    for i in reversed(range(size)):
        known = sum(matrix[i][j] * steps[j] for j in range(i + 1, size))
        steps[i] = (right[i] - known) / (matrix[i][i] or 1.0)
    return steps


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))

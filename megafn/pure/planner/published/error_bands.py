"""How far a computed time can be off: errors of the published rows that are most like a plan."""

from __future__ import annotations

import math
from functools import cache

import attrs
from attrs import frozen

from megafn.pure.config.records import TrainConfig
from megafn.pure.planner.machine import Machine
from megafn.pure.planner.published.fit_constants import FITTED, error, left_out_errors
from megafn.pure.planner.published.rows import SOURCES, PublishedRow, published_rows
from megafn.pure.planner.records import Band, Layout

# Rows that a band is taken from.
_NEAREST = 8


@frozen(kw_only=True)
class RowError:
    """A published row, and computed over measured seconds, less 1."""

    row: PublishedRow
    error: float
    # With constants that were fitted without this row; None if no constant was fitted to it.
    left_out: float | None

    @property
    def honest(self) -> float:
        """That of a row which nothing was fitted to."""
        return self.error if self.left_out is None else self.left_out


@cache
def row_errors() -> tuple[RowError, ...]:
    """Of every published row, in the order of the file."""
    rows = published_rows()
    left_out: dict[str, float] = {}
    for source, shares in FITTED.items():
        fitted = [row for row in rows if row.source == source]
        errors = left_out_errors(fitted, shares)
        left_out |= {row.name: value for row, value in zip(fitted, errors, strict=True)}
    return tuple(
        RowError(row=row, error=error(row), left_out=left_out.get(row.name)) for row in rows
    )


def band_of(config: TrainConfig, layout: Layout, machine: Machine, implementation: str) -> Band:
    """The errors of the published rows nearest to a plan, and whether they say anything about it.

    Near is what has the same device, hidden size, length, number of devices, recomputation, tp, pp
    and cp, or factors of two close to them. What the rows do not cover is named in `not_trusted`.

    >>> from megafn.pure.planner.machine import MACHINES
    >>> row = published_rows()[3]
    >>> band = band_of(row.config, row.layout, MACHINES["a100"], "megatron")
    >>> band.low < 0 < band.high, band.source, band.not_trusted
    (True, "table 1 of arXiv 2104.04473, vTrain's sweeps", None)
    """
    plan = _position(config, layout, machine)
    nearest = sorted(_positions(), key=lambda pair: plan.distance(pair[0]))[:_NEAREST]
    errors = [measured.honest for _, measured in nearest]
    sources = list(dict.fromkeys(measured.row.source for _, measured in nearest))
    reasons = _reasons(config, layout, machine, implementation)
    return Band(
        low=min(errors),
        high=max(errors),
        source=", ".join(SOURCES[source].title for source in sources),
        num_results=len(nearest),
        not_trusted="; ".join(reasons) if reasons else None,
    )


# ------------------------------------------------------------------------------------- nearness


@frozen(kw_only=True)
class _Position:
    """Where a run lies: logarithms to the base of 2, each with its weight."""

    device: tuple[float, float]
    hidden: float
    length: float
    devices: float
    tp: float
    pp: float
    cp: float
    # In fp8: 0.5, else 0.
    fp8: float
    recompute: str | None

    def distance(self, other: _Position) -> float:
        return (
            abs(self.device[0] - other.device[0])
            + abs(self.device[1] - other.device[1])
            + abs(self.hidden - other.hidden)
            + abs(self.length - other.length)
            + abs(self.devices - other.devices)
            + abs(self.tp - other.tp)
            + abs(self.pp - other.pp)
            + abs(self.cp - other.cp)
            + abs(self.fp8 - other.fp8)
            + 0.5 * (self.recompute != other.recompute)
        )


def _position(config: TrainConfig, layout: Layout, machine: Machine) -> _Position:
    """Of a run in bf16."""
    model = config.model
    return _Position(
        device=(4 * math.log2(machine.peak_flops), 4 * math.log2(machine.memory_bandwidth)),
        hidden=math.log2(model.hidden_size),
        length=0.5 * math.log2(model.seq_length),
        devices=0.25 * math.log2(layout.world_size),
        tp=0.25 * math.log2(layout.tp),
        pp=0.25 * math.log2(layout.pp),
        cp=0.5 * math.log2(layout.cp),
        fp8=0.0,
        recompute=layout.recompute.granularity,
    )


def _position_of_row(row: PublishedRow) -> _Position:
    position = _position(row.config, row.layout, row.machine)
    if row.implementation.product_speed == 1:
        return position
    return attrs.evolve(position, fp8=0.5)


@cache
def _positions() -> tuple[tuple[_Position, RowError], ...]:
    return tuple((_position_of_row(measured.row), measured) for measured in row_errors())


# -------------------------------------------------------------------------------------- trusted


@frozen(kw_only=True)
class _Covered:
    """The longest sequence and the most devices of any row."""

    length: int
    devices: int


@cache
def _covered() -> _Covered:
    rows = published_rows()
    return _Covered(
        length=max(row.config.model.seq_length for row in rows),
        devices=max(row.layout.world_size for row in rows),
    )


# Below it some rows take up to twice as long as computed.
_SMALLEST_HIDDEN = 4096


def _reasons(
    config: TrainConfig, layout: Layout, machine: Machine, implementation: str
) -> list[str]:
    """Why no published row speaks for the time of a plan."""
    model = config.model
    covered = _covered()
    reasons = []
    if implementation == "megafn":
        reasons.append("megafn's own time has not been measured yet")
    if machine.fitted_on is None:
        reasons.append(f"no constant is fitted on results of {machine.name}")
    missing = _missing(config)
    if missing:
        reasons.append(f"no published result is like it: none is {' or '.join(missing)}")
    if model.hidden_size < _SMALLEST_HIDDEN:
        reasons.append(
            f"hidden size below {_SMALLEST_HIDDEN}, where some runs took twice the computed time"
        )
    if layout.cp > 1:
        reasons.append("published results with cp are in fp8 only")
    if model.seq_length > covered.length:
        reasons.append(f"no published result has sequences longer than {covered.length:,} tokens")
    if model.sliding_window is not None:
        reasons.append("no published result has a sliding window")
    if layout.world_size > covered.devices:
        reasons.append(f"no published result has more than {covered.devices:,} devices")
    return reasons


def _missing(config: TrainConfig) -> list[str]:
    """What a config is that no row is, near or far."""
    family = getattr(config.model.family, "name", config.model.family)
    missing = []
    if family != "gpt":
        missing.append(f"of the family {family}")
    if config.precision.dtype == "fp32":
        missing.append("in fp32")
    return missing

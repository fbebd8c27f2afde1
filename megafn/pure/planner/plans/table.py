"""Plans and rankings as tables of text, narrower than 100 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import attrs
from attrs import frozen

from megafn.pure.config.problems import Problem
from megafn.pure.config.records import RecomputeConfig
from megafn.pure.planner.machine import Machine
from megafn.pure.planner.records import Band, Layout, Memory, StepTime

_WIDTH = 96

# Of a step: waiting for the host that is less is not mentioned.
_LEAST_SHARE = 0.001

# A pipeline with more stages is printed in part.
_MOST_STAGES = 8

BYTES_IN = {"GB": 1e9, "MB": 1e6}

_IMPLEMENTATIONS = {
    "megafn": "as megafn runs it",
    "megatron": "as Megatron-LM runs it, with overlap and fused kernels",
}


# Fields of StepTime.
_TIME_WORDS = {
    "layers": "layers",
    "recomputation": "recomputation",
    "head": "output and loss",
    "tp": "tp messages",
    "cp": "cp messages",
    "pp": "pp messages",
    "dp": "dp messages",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
}


@frozen(kw_only=True)
class RankingRow:
    """What a ranking shows of a plan."""

    # In `Ranking.plans`.
    index: int
    layout: Layout
    # Bytes of the fullest stage.
    memory: float
    seconds: float
    tokens_per_second: float
    mfu: float
    band: Band


# --------------------------------------------------------------------------------------- plans


def plan_text(
    *,
    machine: Machine,
    world_size: int,
    layout: Layout,
    implementation: str,
    memory: Sequence[Memory],
    time: StepTime,
    host_seconds: float,
    num_parameters: int,
    step_flops: float,
    iterations: int,
    run_seconds: float,
    device_hours: float,
    tokens_per_second: float,
    mfu: float,
    band: Band,
    problems: Sequence[Problem],
    assumptions: Sequence[str],
) -> str:
    """A plan: memory by stage, seconds by kind and assumptions; if it does not fit, why, no times.

    host_seconds: of `time`, waiting for the host. iterations: steps of the run.
    """
    head = [
        *_title(machine, world_size, implementation, fits=not problems),
        *_wrapped(layout_in_words(layout)),
        f"{in_parameters(num_parameters)} parameters, {in_flop(step_flops)} a step",
    ]
    if problems:
        sections = [
            head,
            _listed("does not fit", map(str, problems)),
            _memory_lines(memory, machine),
        ]
    else:
        speed = [
            f"{tokens_per_second:,.0f} tokens/s per device",
            _run_in_words(iterations, run_seconds, device_hours),
            _mfu_in_words(mfu, band),
        ]
        if host_seconds >= _LEAST_SHARE * time.total:
            speed.append(
                f"host-bound: {host_seconds / time.total:.1%} of the step waits for the host to "
                "launch kernels; larger micro-batches wait less"
            )
        if band.not_trusted is not None:
            speed.append(f"not trusted: {band.not_trusted}")
        sections = [
            head,
            _memory_lines(memory, machine),
            _time_lines(time),
            [line for sentence in speed for line in _wrapped(sentence)],
        ]
    if assumptions:
        sections.append(_listed("assumed", assumptions))
    return "\n\n".join("\n".join(lines) for lines in sections)


def _title(
    machine: Machine, world_size: int, implementation: str, *, fits: bool = True
) -> list[str]:
    verdict = "" if fits else ": does not fit"
    devices = devices_in_words(world_size, machine)
    return _wrapped(f"{devices}, {_IMPLEMENTATIONS[implementation]}{verdict}")


def _mfu_in_words(mfu: float, band: Band) -> str:
    low, high = mfu_band(mfu, band)
    return (
        f"MFU {mfu:.1%} as computed; shifted by this planner's errors on the {band.num_results} "
        f"published results most like this plan, {low:.1%} to {high:.1%} ({band.source})"
    )


def _run_in_words(iterations: int, run_seconds: float, device_hours: float) -> str:
    steps = f"{iterations:,} step{'' if iterations == 1 else 's'}"
    paid = in_seconds(device_hours) if device_hours >= 0.01 else "less than 0.01"
    return f"{steps} at this speed: {duration(run_seconds)}, {paid} device-hours"


def duration(seconds: float) -> str:
    """Seconds in the unit in which they are read.

    >>> duration(9), duration(1480), duration(360_000)
    ('9.00 seconds', '24.7 minutes', '100 hours')
    """
    if seconds < 120:
        return f"{in_seconds(seconds)} seconds"
    if seconds < 7200:
        return f"{in_seconds(seconds / 60)} minutes"
    return f"{in_seconds(seconds / 3600)} hours"


def in_parameters(number: int) -> str:
    """A number of parameters, with three digits.

    >>> in_parameters(8_030_261_248), in_parameters(124_439), in_parameters(512)
    ('8.03 billion', '124 thousand', '512')
    """
    return _with_prefix(
        number, {1e12: " trillion", 1e9: " billion", 1e6: " million", 1e3: " thousand"}
    )


def in_flop(number: float) -> str:
    """FLOP with three digits.

    >>> in_flop(4.053e18), in_flop(2e6)
    ('4.05 EFLOP', '2.00 MFLOP')
    """
    return _with_prefix(
        number,
        {
            1e21: " ZFLOP",
            1e18: " EFLOP",
            1e15: " PFLOP",
            1e12: " TFLOP",
            1e9: " GFLOP",
            1e6: " MFLOP",
        },
    )


def _with_prefix(number: float, units: Mapping[float, str]) -> str:
    """The number in the largest of these units, the largest first, of which it has one."""
    for size, unit in units.items():
        # 999.6 million is 1.00 billion
        if number >= 0.9995 * size:
            return f"{in_seconds(number / size)}{unit}"
    return f"{number:,.0f}"


def devices_in_words(world_size: int, machine: Machine) -> str:
    return f"{world_size:,} x {machine.name} of {gigabytes(machine.memory_bytes)} GB"


def layout_in_words(layout: Layout) -> str:
    """All that a layout chooses, in a line.

    >>> layout_in_words(Layout(tp=2, dp=4, sequence_parallel=True, num_micro_batches=8))
    'tp 2 x pp 1 x cp 1 x dp 4, 8 micro-batches of 1, sequence parallel'
    """
    words = [
        f"tp {layout.tp} x pp {layout.pp} x cp {layout.cp} x dp {layout.dp}",
        _micro_batches(layout),
    ]
    if layout.vpp > 1:
        words.append(f"{layout.vpp} chunks per stage")
    outer = outer_stages_in_words(layout)
    if outer:
        words.append(outer)
    if layout.sequence_parallel:
        words.append("sequence parallel")
    if layout.use_distributed_optimizer:
        words.append("distributed optimizer")
    recompute = recompute_in_words(layout.recompute)
    if recompute != "-":
        words.append(f"{recompute} recomputation")
    return ", ".join(words)


def _micro_batches(layout: Layout) -> str:
    count = layout.num_micro_batches
    return f"{count} micro-batch{'' if count == 1 else 'es'} of {layout.micro_batch_size}"


def outer_stages_in_words(layout: Layout) -> str:
    """The layers of the first and the last stage, if they are given."""
    first = layout.num_layers_in_first_pipeline_stage
    last = layout.num_layers_in_last_pipeline_stage
    if first and last:
        return f"{first} and {last} layers in the first and last stage"
    if first or last:
        return f"{first or last} layers in the {'first' if first else 'last'} stage"
    return ""


def recompute_in_words(recompute: RecomputeConfig) -> str:
    """ "-", "selective", "full" or, with other layers than usual, "block 3".

    >>> recompute_in_words(RecomputeConfig(granularity="full", num_layers=2))
    'full by 2'
    """
    if recompute.granularity is None:
        return "-"
    if recompute.granularity == "full" and recompute.method == "block":
        return f"block {recompute.num_layers}"
    if recompute.granularity == "full" and recompute.num_layers > 1:
        return f"full by {recompute.num_layers}"
    return recompute.granularity


def _memory_lines(memory: Sequence[Memory], machine: Machine) -> list[str]:
    kinds = [attribute.name for attribute in attrs.fields(Memory)]
    fullest = max(part.total for part in memory)
    unit = memory_unit(fullest)
    header = [unit, *(kind.replace("_", " ") for kind in kinds), "total"]
    rows = [header]
    shown = shown_stages(memory)
    for previous, stage in zip([-1, *shown], shown, strict=False):
        if stage > previous + 1:
            rows.append([f"({stage - previous - 1} more)", *[""] * (len(kinds) + 1)])
        part = memory[stage]
        numbers = [getattr(part, kind) for kind in kinds] + [part.total]
        rows.append([f"stage {stage}", *(in_unit(number, unit) for number in numbers)])
    left = machine.usable_bytes - fullest
    verdict = f"{gigabytes(left)} GB free" if left >= 0 else f"{gigabytes(-left)} GB too much"
    return [*aligned(rows), f"{usable_in_words(machine)}: {verdict} on the fullest stage"]


def shown_stages(memory: Sequence[Memory]) -> list[int]:
    """All stages, or of many the first three, the fullest and the last two."""
    stages = range(len(memory))
    if len(stages) <= _MOST_STAGES:
        return list(stages)
    fullest = max(stages, key=lambda stage: memory[stage].total)
    return sorted({*stages[:3], fullest, *stages[-2:]})


def _time_lines(time: StepTime) -> list[str]:
    rows = [["time", "seconds", "share"]]
    decimals = decimals_of_seconds(time.total)
    for words, seconds in seconds_in_words(time).items():
        rows.append([words, f"{seconds:,.{decimals}f}", f"{seconds / time.total:.1%}"])
    rows.append(["whole step", f"{time.total:,.{decimals}f}", ""])
    return aligned(rows)


# ------------------------------------------------------------------------------------- rankings


def ranking_text(
    *,
    machine: Machine,
    world_size: int,
    implementation: str,
    rows: Sequence[RankingRow],
    num_plans: int,
    reasons: Sequence[tuple[int, str]],
    advice: str | None,
) -> str:
    """A ranking: the best plans, how many there are, and why others are refused."""
    lines = _title(machine, world_size, implementation)
    if advice is not None:
        lines += _wrapped(advice)
    if rows:
        unit = memory_unit(max(row.memory for row in rows))
        header = [unit if cell == _MEMORY else cell for cell in _HEADER]
        cells = [_cells(row, unit) for row in rows]
        lines += ["", *aligned([header, *cells]), ""]
        lines += _notes(rows, num_plans, unit, machine)
    if reasons:
        refused = "; ".join(f"{count:,} {reason}" for count, reason in reasons)
        lines += _wrapped(f"Refused: {refused}.")
    return "\n".join(lines)


# The column whose heading is a unit.
_MEMORY = "memory"

# What a layout chooses, as `layout_cells` gives it.
LAYOUT_COLUMNS = ("tp", "pp", "vpp", "cp", "dp", "micro", "SP", "DO", "recompute")

_HEADER = [
    "plan",
    *LAYOUT_COLUMNS,
    _MEMORY,
    "s/step",
    "tokens/s",
    "MFU",
    "band",
]


def _cells(row: RankingRow, unit: str) -> list[str]:
    low, high = mfu_band(row.mfu, row.band)
    return [
        str(row.index),
        *layout_cells(row.layout),
        in_unit(row.memory, unit),
        in_seconds(row.seconds),
        f"{row.tokens_per_second:,.0f}",
        f"{row.mfu:.1%}",
        f"{low:.0%} to {high:.0%}{' ' if row.band.not_trusted is None else '*'}",
    ]


def layout_cells(layout: Layout) -> list[str]:
    """The cells of `LAYOUT_COLUMNS`."""
    sizes = (layout.tp, layout.pp, layout.vpp, layout.cp, layout.dp, layout.micro_batch_size)
    return [
        *map(str, sizes),
        "yes" if layout.sequence_parallel else "-",
        "yes" if layout.use_distributed_optimizer else "-",
        recompute_in_words(layout.recompute),
    ]


def _notes(rows: Sequence[RankingRow], num_plans: int, unit: str, machine: Machine) -> list[str]:
    notes = [
        "plan: index in the ranking; plans that differ from a better one only in SP, DO or "
        "recompute are not shown. micro: micro-batch size. SP: sequence parallel. DO: distributed "
        f"optimizer. {unit}: of the fullest stage, of {usable_in_words(machine)}. tokens/s: per "
        "device. MFU: counts attention without its mask. band: the computed MFU, shifted by this "
        "planner's errors on the published results most like the plan."
    ]
    reasons = [reason for row in rows for reason in (row.band.not_trusted or "").split("; ")]
    distinct = [reason for reason in dict.fromkeys(reasons) if reason]
    if distinct:
        notes.append(f"* not trusted: {'; '.join(distinct)}.")
    uneven = {
        f"{words} (pp {row.layout.pp}, vpp {row.layout.vpp})": None
        for row in rows
        if (words := outer_stages_in_words(row.layout))
    }
    if uneven:
        notes.append(f"Stages are not equal: {'; '.join(uneven)}.")
    notes.append(f"{num_plans:,} layouts fit.")
    return [line for note in notes for line in _wrapped(note)]


# ---------------------------------------------------------------------------------------- parts


def mfu_band(mfu: float, band: Band) -> tuple[float, float]:
    """The lowest and highest MFU to expect, if the plan is as wrong as the band says.

    >>> mfu_band(0.5, Band(low=-0.1, high=0.2, source="some rows", num_results=8))
    (0.45, 0.6)
    """
    return mfu * (1 + band.low), mfu * (1 + band.high)


def gigabytes(number: float) -> str:
    """Bytes in GB, with three digits or more.

    >>> gigabytes(1.234e9), gigabytes(80e9), gigabytes(1234.5e9)
    ('1.2', '80', '1,234')
    """
    billions = number / 1e9
    if abs(billions) >= 99.95:
        return f"{billions:,.0f}"
    return f"{billions:.1f}".removesuffix(".0")


def usable_in_words(machine: Machine) -> str:
    """What a training step may fill of a device.

    >>> from megafn.pure.planner.machine import MACHINES
    >>> usable_in_words(MACHINES["h100"])
    '78 GB usable (80 GB less 2 GB reserved)'
    """
    if machine.reserved_bytes == 0:
        return f"{gigabytes(machine.usable_bytes)} GB usable"
    return (
        f"{gigabytes(machine.usable_bytes)} GB usable ({gigabytes(machine.memory_bytes)} GB less "
        f"{gigabytes(machine.reserved_bytes)} GB reserved)"
    )


def seconds_in_words(time: StepTime) -> dict[str, float]:
    """What a step spends time on, in words, with the seconds; what takes none is left out.

    >>> seconds_in_words(StepTime(layers=2, dp=1))
    {'layers': 2, 'dp messages': 1}
    """
    seconds = {words: getattr(time, kind) for kind, words in _TIME_WORDS.items()}
    return {words: number for words, number in seconds.items() if number}


def decimals_of_seconds(total: float) -> int:
    """The decimals with which a total of seconds, and so its parts, have four digits.

    >>> decimals_of_seconds(20.0), decimals_of_seconds(0.05)
    (2, 5)
    """
    return max(0, 3 - math.floor(math.log10(total))) if total > 0 else 0


def memory_unit(largest: float) -> str:
    """The unit in which a table is written whose largest number of bytes is this.

    >>> memory_unit(70e9), memory_unit(7e6)
    ('GB', 'MB')
    """
    return "GB" if largest >= 1e8 else "MB"


def in_unit(number: float, unit: str) -> str:
    """Bytes in GB or MB, with one decimal.

    >>> in_unit(12.34e9, "GB"), in_unit(3.21e6, "MB")
    ('12.3', '3.2')
    """
    return f"{number / BYTES_IN[unit]:,.1f}"


def in_seconds(number: float) -> str:
    """Seconds with three digits or more.

    >>> in_seconds(0.012345), in_seconds(1.2345), in_seconds(1234.5)
    ('0.0123', '1.23', '1,234')
    """
    if number >= 99.95:
        return f"{number:,.0f}"
    return f"{number:#.3g}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right.

    >>> aligned([["stage 0", "1"], ["all", "100"]])
    ['stage 0    1', 'all      100']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def _listed(title: str, sentences: Iterable[str]) -> list[str]:
    lines = [title]
    for sentence in sentences:
        lines += _wrapped(sentence, indent="- ")
    return lines


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        break_on_hyphens=False,
        initial_indent=indent,
        subsequent_indent=" " * len(indent),
    )

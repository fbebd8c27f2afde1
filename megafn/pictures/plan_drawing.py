"""A plan as a picture in text: where memory and time go."""

from __future__ import annotations

import attrs

from megafn.pictures.memory_kinds import legend_of, stacked
from megafn.pure.planner.plans.records import Plan, check_plan
from megafn.pure.planner.plans.table import (
    decimals_of_seconds,
    gigabytes,
    in_unit,
    memory_unit,
    seconds_in_words,
    shown_stages,
    usable_in_words,
)
from megafn.pure.planner.records import StepTime

# Columns of the longest bar.
_WIDTH = 64


def draw_plan(plan: Plan) -> str:
    """Memory by stage against the device's line, and the time of a step, as bars of text.

    >>> from megafn.pure.config.records import ModelConfig, TrainConfig
    >>> from megafn.pure.planner.machine import MACHINES
    >>> from megafn.pure.planner.plans.plan import plan
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=1, global_batch_size=8, train_iters=9)
    >>> drawing = draw_plan(plan(config, MACHINES["h100"], world_size=8))
    >>> drawing.splitlines()[0]
    'MB by stage, of 78 GB usable (80 GB less 2 GB reserved)'
    """
    check_plan(plan)
    return "\n".join([*_memory_bars(plan), "", *_time_bars(plan.time)])


def _memory_bars(plan: Plan) -> list[str]:
    machine = plan.machine
    fullest = max(memory.total for memory in plan.memory)
    scale = _WIDTH / max(machine.usable_bytes, fullest)
    line = round(machine.usable_bytes * scale)
    unit = memory_unit(fullest)
    label = len(f"stage {len(plan.memory) - 1}")
    width = len(in_unit(fullest, unit))
    shown = shown_stages(plan.memory)
    bars = {stage: stacked(attrs.asdict(plan.memory[stage]), scale) for stage in shown}

    lines = [f"{unit} by stage, of {usable_in_words(machine)}"]
    for stage, bar in bars.items():
        number = in_unit(plan.memory[stage].total, unit).rjust(width)
        lines.append(f"{f'stage {stage}'.ljust(label)} {number} {_with_line(bar, line)}")
    hidden = len(plan.memory) - len(shown)
    if hidden:
        lines.append(f"{hidden} stages are not shown, none of them fuller")
    legend = legend_of("".join(bars.values()))
    lines.append(f"{legend}, | {gigabytes(machine.usable_bytes)} GB")
    return lines


def _with_line(bar: str, line: int) -> str:
    """The bar with a mark in front of column `line`."""
    padded = bar.ljust(line)
    return f"{padded[:line]}|{padded[line:]}"


def _time_bars(time: StepTime) -> list[str]:
    seconds_of = seconds_in_words(time)
    decimals = decimals_of_seconds(time.total)
    lines = [f"seconds of a step, {time.total:,.{decimals}f} in all"]
    if not seconds_of:
        return lines
    label = max(map(len, seconds_of))
    longest = max(seconds_of.values())
    width = len(f"{longest:,.{decimals}f}")
    for words, seconds in seconds_of.items():
        bar = "#" * round(seconds / longest * _WIDTH)
        number = f"{seconds:,.{decimals}f}".rjust(width)
        share = f"{seconds / time.total:.1%}".rjust(6)
        lines.append(f"{words.ljust(label)} {number} {share} {bar}".rstrip())
    return lines

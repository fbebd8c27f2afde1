"""A plan as a picture in text: where memory and time go."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from megafn.pure.planner.plans.records import Plan
from megafn.pure.planner.plans.table import (
    gigabytes,
    in_seconds,
    in_unit,
    memory_unit,
    shown_stages,
)
from megafn.pure.planner.records import Memory, StepTime

# Columns of the longest bar.
_WIDTH = 64

# The mark of each kind of memory.
_MARKS = {
    "parameters": "P",
    "gradients": "G",
    "optimizer_state": "O",
    "activations": "A",
    "other": "X",
}


def draw_plan(plan: Plan) -> str:
    """Memory by stage against the device's line, and the time of a step, as bars of text.

    >>> from megafn.pure.config.records import ModelConfig, TrainConfig
    >>> from megafn.pure.planner.machine import MACHINES
    >>> from megafn.pure.planner.plans.plan import plan
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=1, global_batch_size=8, train_iters=9)
    >>> drawing = draw_plan(plan(config, MACHINES["h100"], world_size=8))
    >>> drawing.splitlines()[0]
    'MB by stage; the device has 80 GB, of which 2 are in reserve'
    """
    return "\n".join([*_memory_bars(plan), "", *_time_bars(plan.time)])


def _memory_bars(plan: Plan) -> list[str]:
    machine = plan.machine
    limit = machine.memory_bytes - machine.reserved_bytes
    fullest = max(memory.total for memory in plan.memory)
    scale = _WIDTH / max(limit, fullest)
    line = round(limit * scale)
    unit = memory_unit(fullest)
    lines = [
        f"{unit} by stage; the device has {gigabytes(machine.memory_bytes)} GB, "
        f"of which {gigabytes(machine.reserved_bytes)} are in reserve"
    ]
    label = len(f"stage {len(plan.memory) - 1}")
    width = len(in_unit(fullest, unit))
    for stage in shown_stages(plan.memory):
        memory = plan.memory[stage]
        bar = _with_line(_stacked(_by_kind(memory), scale), line)
        number = in_unit(memory.total, unit).rjust(width)
        lines.append(f"{f'stage {stage}'.ljust(label)} {number} {bar}")
    hidden = len(plan.memory) - len(shown_stages(plan.memory))
    if hidden:
        lines.append(f"and {hidden} stages that are not shown, none of them fuller")
    drawn = set("".join(lines[1:]))
    kinds = [(mark, kind) for kind, mark in _MARKS.items() if mark in drawn]
    legend = [f"{mark} {kind.replace('_', ' ')}" for mark, kind in kinds]
    lines.append(", ".join([*legend, "| where the device is full"]))
    return lines


def _by_kind(memory: Memory) -> dict[str, float]:
    return attrs.asdict(memory)


def _stacked(parts: Mapping[str, float], scale: float) -> str:
    """Marks of each kind one after the other; ends are rounded, so that the sum is right."""
    bar = ""
    end = 0.0
    for kind, amount in parts.items():
        end += amount * scale
        bar += _MARKS[kind] * (round(end) - len(bar))
    return bar


def _with_line(bar: str, line: int) -> str:
    """The bar with a mark in front of column `line`."""
    padded = bar.ljust(line)
    return f"{padded[:line]}|{padded[line:]}"


def _time_bars(time: StepTime) -> list[str]:
    kinds = {kind: seconds for kind, seconds in attrs.asdict(time).items() if seconds}
    lines = [f"seconds of a step, {in_seconds(time.total)} in all"]
    if not kinds:
        return lines
    label = max(map(len, kinds))
    width = max(len(in_seconds(seconds)) for seconds in kinds.values())
    longest = max(kinds.values())
    for kind, seconds in kinds.items():
        bar = "#" * round(seconds / longest * _WIDTH)
        number = in_seconds(seconds).rjust(width)
        share = f"{seconds / time.total:.1%}".rjust(6)
        lines.append(f"{kind.ljust(label)} {number} {share} {bar}".rstrip())
    return lines

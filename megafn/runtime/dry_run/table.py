"""A dry run as a table of text, narrower than 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from megafn.pure.layout import Coordinates
from megafn.pure.planner.plans.table import aligned
from megafn.pure.planner.records import Memory
from megafn.runtime.dry_run.records import DryRunMemory, LargeTensor, Messages

# Tensors that are listed of those at the peak.
_MOST_TENSORS = 8


def dry_run_text(
    *,
    rank: int,
    world_size: int,
    place: Coordinates,
    num_parameters: int,
    memory: DryRunMemory,
    largest_tensors: Sequence[LargeTensor],
    flops: float,
    matmuls: int,
    messages: Mapping[str, Messages],
) -> str:
    """Bytes by kind after set-up and at the peak, the largest tensors, FLOP, and messages."""
    where = ", ".join(f"{axis} {number}" for axis, number in attrs.asdict(place).items())
    sections = [
        [f"one step of rank {rank:,} of {world_size:,} ({where}): {num_parameters:,} parameters"],
        _memory_lines(memory),
        _tensor_lines(largest_tensors),
        [f"{in_units(flops, 'FLOP', 1000)}, {matmuls:,} matrix products"],
        _message_lines(messages),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def in_units(number: float, unit: str = "B", base: int = 1000) -> str:
    """A number with a prefix and three digits.

    >>> in_units(999), in_units(12_345), in_units(5_645_463_552)
    ('999 B', '12.3 kB', '5.65 GB')
    """
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5 or prefix == "P":
            break
        number /= base
    digits = f"{number:.0f}" if prefix == "" or number >= 99.95 else f"{number:#.3g}"
    return f"{digits} {prefix}{unit}"


def _memory_lines(memory: DryRunMemory) -> list[str]:
    kinds = [attribute.name for attribute in attrs.fields(Memory)]
    rows = [["memory", *(kind.replace("_", " ") for kind in kinds), "total"]]
    for name, alive in (("after set-up", memory.setup), ("at the peak", memory.peak)):
        numbers = [getattr(alive, kind) for kind in kinds] + [alive.total]
        rows.append([name, *map(in_units, numbers)])
    lines = aligned(rows)
    if memory.cpu_only:
        without = in_units(memory.peak.total - memory.cpu_only)
        lines.append(
            f"of the activations {in_units(memory.cpu_only)} are kept on a CPU only; "
            f"without them the total is {without}"
        )
    return lines


def _tensor_lines(tensors: Sequence[LargeTensor]) -> list[str]:
    """Tensors that differ only in the module that made them share a line."""
    alike: dict[LargeTensor, list[str]] = {}
    for tensor in tensors:
        alike.setdefault(attrs.evolve(tensor, module=""), []).append(tensor.module)
    lines = []
    for tensor, modules in list(alike.items())[:_MOST_TENSORS]:
        shape = " x ".join(map(str, tensor.shape))
        kind = tensor.kind.replace("_", " ")
        times = f"{len(modules)} x " if len(modules) > 1 else ""
        origin = f", {modules[0]}" if modules[0] else ""
        more = " and others" if len(set(modules)) > 1 else ""
        size = f"{times}{in_units(tensor.bytes)}"
        lines.append(f"{size:>12}  {kind}, {tensor.dtype} [{shape}]{origin}{more}")
    if not lines:
        return []
    return [f"the {len(tensors)} largest tensors at the peak", *lines]


def _message_lines(messages: Mapping[str, Messages]) -> list[str]:
    rows = [["messages over", "number", "bytes"]]
    details = [""]
    for name, of_group in messages.items():
        if of_group.count == 0:
            continue
        rows.append([name, f"{of_group.count:,}", in_units(of_group.bytes)])
        details.append(_by_collective(of_group.by_collective))
    if len(rows) == 1:
        return ["no messages"]
    lines = aligned(rows)
    return [f"{line}  {detail}".rstrip() for line, detail in zip(lines, details, strict=True)]


def _by_collective(bytes_by_name: Mapping[str, int]) -> str:
    """The collectives, those with the most bytes first."""
    names = sorted(bytes_by_name, key=lambda name: -bytes_by_name[name])
    return ", ".join(f"{name} {in_units(bytes_by_name[name])}" for name in names)

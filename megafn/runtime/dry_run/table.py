"""A dry run as a table of text, narrower than 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

import attrs

from megafn.pure.layout import Coordinates
from megafn.pure.planner.plans.table import aligned
from megafn.pure.planner.records import Memory
from megafn.runtime.dry_run.records import DryRunMemory, LargeTensor, Messages

_WIDTH = 96

# By field of `Groups`: the ranks that exchange messages.
_GROUP_WORDS = {
    "tp": "tensor parallel",
    "pp": "neighbouring pipeline stages",
    "cp": "context parallel",
    "dp": "data parallel",
    "mp": "all ranks of one copy of the model, tp x pp",
    "dp_cp": "dp x cp, which sum gradients",
    "tp_cp": "tp x cp",
    "tp_dp_cp": "all ranks of one pipeline stage",
    "embd": "stages that share the word table",
    "pos_embd": "stages that share the table of positions",
    "half": "stages of T5's encoder, or of its decoder",
    "world": "all ranks",
}

# Tensors that are listed of those at the peak.
_MOST_TENSORS = 8


def dry_run_text(
    *,
    rank: int,
    world_size: int,
    place: Coordinates,
    sizes: Coordinates,
    micro_batches: tuple[int, int],
    num_parameters: int,
    memory: DryRunMemory,
    largest_tensors: Sequence[LargeTensor],
    flops: float,
    matmuls: int,
    messages: Mapping[str, Messages],
) -> str:
    """Bytes by kind after set-up and at the peak, the largest tensors, FLOP, and messages.

    sizes: of each axis. micro_batches: how many the rank has, and the samples of each.
    """
    number, samples = micro_batches
    sections = [
        [
            f"one step of rank {rank:,} of {world_size:,}: {_where(place, sizes)}",
            f"{number:,} {'micro-batch' if number == 1 else 'micro-batches'} of {samples:,}; "
            f"{num_parameters:,} parameters on this rank",
        ],
        _memory_lines(memory),
        _tensor_lines(largest_tensors),
        [f"{in_units(flops, 'FLOP')} and {matmuls:,} matrix products of this rank"],
        _message_lines(messages),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def in_units(number: float, unit: str = "B") -> str:
    """A number with a prefix and three digits.

    >>> in_units(999), in_units(12_345), in_units(5_645_463_552)
    ('999 B', '12.3 kB', '5.65 GB')
    """
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5 or prefix == "P":
            break
        number /= 1000
    digits = f"{number:.0f}" if prefix == "" or number >= 99.95 else f"{number:#.3g}"
    return f"{digits} {prefix}{unit}"


def _where(place: Coordinates, sizes: Coordinates) -> str:
    axes = ["tp", "cp", "dp", *(["ep"] if sizes.ep > 1 else [])]
    numbers = [f"{axis} {getattr(place, axis):,} of {getattr(sizes, axis):,}" for axis in axes]
    return ", ".join([f"stage {place.pp:,} of {sizes.pp:,} (pp)", *numbers])


def _memory_lines(memory: DryRunMemory) -> list[str]:
    kinds = [attribute.name for attribute in attrs.fields(Memory)]
    rows = [["memory", *(kind.replace("_", " ") for kind in kinds), "total"]]
    moments = {"after set-up": memory.setup, "at the peak, on a GPU": memory.peak_on_gpu}
    for name, alive in moments.items():
        numbers = [getattr(alive, kind) for kind in kinds] + [alive.total]
        rows.append([name, *map(in_units, numbers)])
    if memory.cpu_only:
        only = {"activations": memory.cpu_only, "total": memory.cpu_only}
        cells = [in_units(only[kind]) if kind in only else "" for kind in [*kinds, "total"]]
        rows.append(["kept on a CPU only", *cells])
    return aligned(rows)


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
        size = f"{times}{in_units(tensor.bytes)}"
        line = f"{size:>12}  {kind}, {tensor.dtype} [{shape}]"
        more = " and others" if len(set(modules)) > 1 else ""
        if modules[0]:
            room = _WIDTH - len(f"{line}, {more}")
            line += f", {_end_of(modules[0], room)}{more}"
        lines.append(line)
    if not lines:
        return []
    return [f"the {len(tensors)} largest tensors at the peak", *lines]


def _end_of(name: str, room: int) -> str:
    """A dotted name, without its first parts if it is too long.

    >>> _end_of("decoder.layers.0.mlp", room=20), _end_of("decoder.layers.0.mlp", room=10)
    ('decoder.layers.0.mlp', '...0.mlp')
    """
    if len(name) <= room:
        return name
    _, *parts = name.split(".")
    while len(parts) > 1 and len("...") + len(".".join(parts)) > room:
        parts = parts[1:]
    return "..." + ".".join(parts)


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
    lines = []
    for line, detail in zip(aligned(rows), details, strict=True):
        indent = " " * (len(line) + 2)
        wrapped = textwrap.wrap(detail, _WIDTH, initial_indent=indent, subsequent_indent=indent)
        lines += [line + "".join(wrapped[:1])[len(line) :], *wrapped[1:]]
    return [*lines, *_group_legend(name for name, *_ in rows[1:])]


def _group_legend(names: Iterable[str]) -> list[str]:
    words = "; ".join(f"{name}: {_GROUP_WORDS[name]}" for name in names if name in _GROUP_WORDS)
    return textwrap.wrap(words, _WIDTH)


def _by_collective(bytes_by_name: Mapping[str, int]) -> str:
    """The collectives, those with the most bytes first."""
    names = sorted(bytes_by_name, key=lambda name: -bytes_by_name[name])
    return ", ".join(f"{name} {in_units(bytes_by_name[name])}" for name in names)

"""The weights beneath adapters: found where the run had them from, and merged on the way out.

A checkpoint of a run with adapters may hold these only, and refer to the weights that the run
started from (see `checkpoint.adapters`). Opened here it is both in one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import attrs
import torch
from attrs import frozen

from megafn.pure.checkpoint.boxes import Box, Index
from megafn.pure.config.records import ModelConfig
from megafn.pure.families.built_in import BUILT_IN_SPECS, parameter_shapes
from megafn.pure.pretrained.pretrained import Pretrained
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.pretrained.formats import Place, find_weights
from megafn.runtime.pretrained.parameter_reader import ParameterReader
from megafn.runtime.pretrained.weight_source import WeightSource

# ---------------------------------------------------------------------------------------- opening


@contextlib.contextmanager
def open_weights(place: Place, model: ModelConfig | None) -> Iterator[WeightSource]:
    """The weights at a place, with those that it refers to. Raises as `OpenWeights` says."""
    with place.format.open(place.path, model) as source:
        if source.base is None:
            yield source
            return
        below = _find_base(source.base)
        with open_weights(below, source.model if model is None else model) as base:
            yield _one_source(AdaptersOnBase(own=source, base=base, record=source.base))


def base_problem(record: Pretrained, model: ModelConfig) -> str | None:
    """Why the weights that a record refers to cannot be used, or None if they are the same still.

    Raises CheckpointError and OSError if they cannot be read.
    """
    with open_weights(_find_base(record), model) as base:
        return _changed(record, base)


def _find_base(record: Pretrained) -> Place:
    try:
        return find_weights(record.source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; the adapters were trained on the weights at this path: put them back there"
        ) from None


def _changed(record: Pretrained, base: WeightSource) -> str | None:
    fingerprint = base.remember().fingerprint
    if fingerprint == record.fingerprint:
        return None
    return (
        f"{record.source} holds other weights (fingerprint {fingerprint}) than those that the "
        f"adapters were trained on ({record.fingerprint}); put those back there"
    )


@frozen(kw_only=True, eq=False)
class AdaptersOnBase:
    """A checkpoint of what was trained, and the weights that it refers to."""

    own: WeightSource
    base: WeightSource
    record: Pretrained  # of the base, when the run started from it


def _one_source(both: AdaptersOnBase) -> WeightSource:
    own = both.own
    replaced = _replaced_tensors(both)
    below = {name: held for name, held in both.base.tensors.items() if name not in replaced}
    return attrs.evolve(
        own,
        tensors={**below, **own.tensors},
        made_of=partial(_made_of, both),
        copy=partial(_copy, both),
        damage=partial(_damage, both),
        is_known_buffer=partial(_is_known_buffer, both),
        is_head=partial(_is_head, both),
        parameters=_whole_shapes(both),
    )


def _replaced_tensors(both: AdaptersOnBase) -> set[str]:
    """Tensors of the base that the checkpoint has itself, such as a head that was trained."""
    replaced: set[str] = set()
    for name, shape in both.own.parameters.items():
        # a head of another size replaces what has its name
        with contextlib.suppress(CheckpointError):
            replaced.update(both.base.made_of(name, shape))
    return replaced


def _whole_shapes(both: AdaptersOnBase) -> Mapping[str, Index]:
    model = both.own.model
    if model is None or model.family not in BUILT_IN_SPECS:
        return {**both.base.parameters, **both.own.parameters}
    return {**parameter_shapes(model), **both.own.parameters}


def _made_of(both: AdaptersOnBase, name: str, shape: Index) -> Sequence[str]:
    source = both.own if name in both.own.parameters else both.base
    return source.made_of(name, shape)


def _copy(both: AdaptersOnBase, name: str, shape: Index, box: Box, target: torch.Tensor) -> None:
    source = both.own if name in both.own.parameters else both.base
    source.copy(name, shape, box, target)


def _damage(both: AdaptersOnBase, rank: int, world_size: int) -> list[str]:
    problems = both.own.damage(rank, world_size) + both.base.damage(rank, world_size)
    if rank == 0:
        changed = _changed(both.record, both.base)
        if changed is not None:
            problems.append(changed)
    return problems


def _is_known_buffer(both: AdaptersOnBase, tensor: str) -> bool:
    return tensor not in both.own.tensors and both.base.is_known_buffer(tensor)


def _is_head(both: AdaptersOnBase, tensor: str) -> bool:
    source = both.own if tensor in both.own.tensors else both.base
    return source.is_head(tensor)


# ---------------------------------------------------------------------------------------- merging


def merged(reader: ParameterReader, scale: float | None) -> ParameterReader:
    """The parameters of a model without its adapters: each W is W + scale * B A.

    scale: alpha / rank; None if there are no adapters.
    """
    if scale is None:
        return reader
    adapters = (".lora_a.weight", ".lora_b.weight")
    return ParameterReader(
        shapes={
            name: shape for name, shape in reader.shapes.items() if not name.endswith(adapters)
        },
        read=partial(_read_merged, reader, scale),
    )


def _read_merged(
    reader: ParameterReader, scale: float, name: str, rank: int
) -> torch.Tensor | None:
    whole = reader.read(name, rank)
    layer = name.removesuffix(".weight")
    if f"{layer}.lora_a.weight" not in reader.shapes:
        return whole
    lora_a = reader.read(f"{layer}.lora_a.weight", rank)
    lora_b = reader.read(f"{layer}.lora_b.weight", rank)
    if whole is None or lora_a is None or lora_b is None:
        return None  # another rank reads
    return whole.addmm_(lora_b, lora_a, alpha=scale)

"""A checkpoint of megafn, of any layout, as weights to start from or to export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import frozen
from safetensors import SafetensorError

from megafn.pure.checkpoint.boxes import Box, Index
from megafn.pure.config.problems import Problem
from megafn.pure.config.records import ModelConfig, TrainConfig
from megafn.pure.config.serialization import from_dict
from megafn.pure.pretrained.compatibility import is_head, shape_problem
from megafn.pure.pretrained.pretrained import Pretrained, pretrained_from_dict
from megafn.runtime.checkpoint.adapters import adapters_scale, needs_base
from megafn.runtime.checkpoint.atomic_files import CHECKSUMS, CheckpointError
from megafn.runtime.checkpoint.disk_format import FORMAT, MANIFEST
from megafn.runtime.checkpoint.load import (
    BoxReader,
    checkpoint_at,
    copy_box,
    damaged_files,
    open_boxes,
    read_manifest,
)
from megafn.runtime.checkpoint.state_boxes import PARAMETER, kind_and_parameter, tensor_name
from megafn.runtime.data.corpus_identity import fingerprint_of
from megafn.runtime.pretrained.weight_source import StoredTensor, WeightFormat, WeightSource


@frozen(kw_only=True, eq=False)
class CheckpointWeights:
    """An open checkpoint."""

    path: Path
    config: TrainConfig
    manifest: Mapping[str, Any]
    shapes: Mapping[str, Index]  # of the parameters
    reader: BoxReader


@contextlib.contextmanager
def open_checkpoint(path: Path, model: ModelConfig | None = None) -> Iterator[WeightSource]:
    """The weights of a checkpoint. Raises as `OpenWeights` says."""
    manifest = read_manifest(path)
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path / MANIFEST} has format {manifest['format']}: this megafn reads format {FORMAT}"
        )
    shapes = {}
    tensors = {}
    for key, stored in manifest["tensors"].items():
        kind, name = kind_and_parameter(key)
        if kind == PARAMETER:
            shapes[name] = tuple(stored["shape"])
            tensors[name] = StoredTensor(shape=shapes[name], file=stored["pieces"][0][0])
    with open_boxes(path, manifest["tensors"]) as reader:
        weights = CheckpointWeights(
            path=path,
            config=from_dict(manifest["config"]),
            manifest=manifest,
            shapes=shapes,
            reader=reader,
        )
        yield WeightSource(
            path=path,
            remember=partial(_remember, weights),
            model=weights.config.model,
            tensors=tensors,
            made_of=partial(_made_of, weights),
            copy=partial(_copy, weights),
            damage=partial(damaged_files, path, manifest),
            is_head=is_head,
            parameters=shapes,
            base=pretrained_from_dict(manifest["pretrained"]) if needs_base(manifest) else None,
            adapters_scale=adapters_scale(manifest),
        )


def _remember(weights: CheckpointWeights) -> Pretrained:
    """The record of the checkpoint's own run, with the checkpoint as its source."""
    first = pretrained_from_dict(weights.manifest.get("pretrained"))
    record = Pretrained(
        source=str(weights.path.absolute()),
        fingerprint=fingerprint_of({CHECKSUMS: weights.path / CHECKSUMS}),
        dtype=weights.config.precision.dtype,
    )
    if first is None:
        return record
    return attrs.evolve(first, source=record.source, fingerprint=record.fingerprint)


def _made_of(weights: CheckpointWeights, name: str, shape: Index) -> Sequence[str]:
    if name not in weights.shapes:
        _check_untied(weights, name)
        return ()
    if weights.shapes[name] != shape:
        problem = shape_problem(name, shape, weights.shapes[name], str(weights.path))
        raise CheckpointError(problem)
    return (name,)


def _check_untied(weights: CheckpointWeights, name: str) -> None:
    if name == "output_layer.weight" and weights.config.model.tie_word_embeddings:
        problem = Problem(
            "model.tie_word_embeddings",
            False,
            f"the weights at {weights.path} share one table; set it to True",
        )
        raise CheckpointError(str(problem))


def _copy(
    weights: CheckpointWeights, name: str, shape: Index, box: Box, target: torch.Tensor
) -> None:
    try:
        copy_box(weights.reader, tensor_name(PARAMETER, name), shape, box, target)
    except SafetensorError as error:
        raise CheckpointError(f"{weights.path} could not be read: {error}") from None


def _find(path: Path) -> Path | None:
    found = checkpoint_at(path)
    return found if found is not None and found.exists() else None


FORMAT_OF_MEGAFN = WeightFormat(name="megafn checkpoint", find=_find, open=open_checkpoint)

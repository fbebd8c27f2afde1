"""What lies at a path, in words."""

from __future__ import annotations

from math import prod
from pathlib import Path

import attrs

from megafn.pure.config.records import ModelConfig
from megafn.pure.pretrained.natural_order import in_natural_order
from megafn.pure.pretrained.pretrained import Pretrained
from megafn.runtime.pretrained.formats import find_weights
from megafn.runtime.pretrained.weight_source import StoredTensor, WeightSource


def describe_weights(path: str | Path) -> str:
    """What a checkpoint or a Hugging Face directory holds: its model, and each tensor.

    Reads headers, not weights. Needs no process group. Raises CheckpointError if there are no
    weights at the path or they are damaged, ConfigError if the model is one that megafn cannot
    express.
    """
    place = find_weights(path)
    with place.format.open(place.path, None) as source:
        lines = [f"{place.path}: {place.format.name}"]
        lines.extend(_lines_of_record(source.remember()))
        if source.model is not None:
            lines.append(f"model: {_model_in_words(source.model)}")
        if source.base is not None:
            lines.append(
                f"adapters and what else was trained, on the weights of {source.base.source}"
            )
        lines.extend(_lines_of_tensors(source))
    return "\n".join(lines)


def _lines_of_record(record: Pretrained) -> list[str]:
    lines = []
    if record.architecture is not None:
        lines.append(f"architecture: {record.architecture}")
    lines.append(f"fingerprint: {record.fingerprint}")
    for key, value in (record.config or {}).items():
        if key.endswith("_token_id"):
            lines.append(f"{key}: {value}")
    return lines


def _model_in_words(model: ModelConfig) -> str:
    """The fields that are not their defaults."""
    shown = []
    for field in attrs.fields(ModelConfig):
        value = getattr(model, field.name)
        if value != field.default:
            shown.append(f"{field.name} = {value!r}")
    return ", ".join(shown)


def _lines_of_tensors(source: WeightSource) -> list[str]:
    tensors = source.tensors
    elements = sum(prod(tensor.shape) for tensor in tensors.values())
    files = {tensor.file for tensor in tensors.values()}
    width = max(map(len, tensors), default=0)
    lines = [f"weights: {len(tensors)} tensors of {elements:,} elements in {len(files)} files"]
    for name in in_natural_order(tensors):
        lines.append(f"  {name:<{width}}  {_tensor_in_words(tensors[name])}")
    return lines


def _tensor_in_words(tensor: StoredTensor) -> str:
    dtype = "" if tensor.dtype is None else f"  {str(tensor.dtype).removeprefix('torch.')}"
    return f"{list(tensor.shape)}{dtype}"

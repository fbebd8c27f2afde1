"""Checkpoints in megatron-core's format torch_dist, written in any layout.

A folder iter_0000007 of
    .metadata       a pickle of torch.distributed.checkpoint: of each tensor its chunks, which are
                    boxes of the whole tensor, and of each chunk its file and place in it
    __0_0.distcp .. the chunks, each as torch.save writes it
    common.pt       what is not a tensor, such as the arguments of the run
    metadata.json   the name of the format
Layers of a stack are one tensor, whose first dimension counts them.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from megafn.pure.checkpoint.boxes import Box, Index
from megafn.pure.config.records import ModelConfig
from megafn.pure.pretrained.megatron_tensors import is_of_optimizer
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.pretrained.inert_pickle import InertUnpickler, fields_of, is_inert
from megafn.runtime.pretrained.megatron_source import (
    Piece,
    PiecewiseTensor,
    arguments_of,
    check_version,
    checkpoint_folders,
    weight_source,
)
from megafn.runtime.pretrained.torch_archive import (
    FileTensor,
    OpenFiles,
    open_files,
    read_archive,
)
from megafn.runtime.pretrained.weight_source import WeightFormat, WeightSource

METADATA = ".metadata"
COMMON = "common.pt"
FORMAT_NAME = "metadata.json"

_ALL_LAYERS = re.compile(r"(.*\blayers)\.(?!\d+\.)(.+)")


@frozen(kw_only=True)
class Chunk:
    """A box of a stored tensor, and the bytes of a file that hold it."""

    box: Box
    file: Path
    start: int
    end: int


@frozen(kw_only=True)
class ChunkedTensor:
    """A tensor as the metadata describe it."""

    shape: Index
    dtype: torch.dtype | None
    chunks: Sequence[Chunk]


@contextlib.contextmanager
def open_torch_dist(path: Path, model: ModelConfig | None = None) -> Iterator[WeightSource]:
    """The weights of a checkpoint. Raises as `OpenWeights` says."""
    _check_format(path)
    stored = _read_metadata(path)
    with open_files() as files:
        common = _read_common(path, files)
        check_version(common, path / COMMON, default=3)
        tensors: dict[str, PiecewiseTensor] = {}
        for name, tensor in stored.items():
            tensors |= _one_for_each_layer(name, tensor, files)
        damage = partial(_damaged_files, files, stored)
        yield weight_source(path, files, tensors, arguments_of(common), model, damage)


def _check_format(path: Path) -> None:
    """Raises CheckpointError if metadata.json names another format; old ones may lack it."""
    file = path / FORMAT_NAME
    try:
        name = json.loads(file.read_bytes())["sharded_backend"]
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(f"{file} is damaged: it does not name the format") from None
    if name != "torch_dist":
        raise CheckpointError(
            f"{file}: sharded_backend = {name!r}: only torch_dist is read; load the checkpoint and "
            "save it as torch_dist with Megatron-LM"
        )


def _read_common(path: Path, files: OpenFiles) -> Mapping[str, Any]:
    """What is not a tensor; {} if there is no such file."""
    file = path / COMMON
    if not file.exists():
        return {}
    common = read_archive(files, file)
    return common if isinstance(common, dict) else {}


# --------------------------------------------------------------------------------------- metadata


def _read_metadata(path: Path) -> dict[str, ChunkedTensor]:
    """The tensors that are weights, or buffers, by their names."""
    file = path / METADATA
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; copy the whole checkpoint again") from None
    try:
        return _tensors_of_metadata(InertUnpickler(io.BytesIO(content), {}).load(), path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(
            f"{file} is damaged: it does not describe tensors ({error or type(error).__name__})"
        ) from None


def _tensors_of_metadata(metadata: Any, path: Path) -> dict[str, ChunkedTensor]:
    fields = fields_of(metadata)
    places = {}
    for index, info in fields["storage_data"].items():
        place = fields_of(index)
        if place.get("offset") is not None:
            places[place["fqn"], tuple(place["offset"])] = fields_of(info)
    tensors = {}
    for name, described in fields["state_dict_metadata"].items():
        if is_inert(described, "TensorStorageMetadata") and not is_of_optimizer(name):
            tensor = fields_of(described)
            tensors[name] = ChunkedTensor(
                shape=_index(tensor["size"]),
                dtype=_dtype(tensor["properties"]),
                chunks=[_chunk(name, chunk, places, path) for chunk in tensor["chunks"]],
            )
            _check_shapes(name, tensors[name], path / METADATA)
    return tensors


def _check_shapes(name: str, tensor: ChunkedTensor, file: Path) -> None:
    """Raises CheckpointError if a chunk is not a part of its tensor, or layers are not counted."""
    shape = tensor.shape
    if not shape and _ALL_LAYERS.fullmatch(name):
        raise CheckpointError(
            f"{file} is damaged: {name} is of all layers, but its shape [] does not count them"
        )
    for chunk in tensor.chunks:
        offset, size = chunk.box
        is_inside = len(offset) == len(size) == len(shape) and all(
            start + length <= whole
            for start, length, whole in zip(offset, size, shape, strict=True)
        )
        if not is_inside:
            raise CheckpointError(
                f"{file} is damaged: {name} has the shape {list(shape)}, and a part of the shape "
                f"{list(size)} at {list(offset)}"
            )


def _chunk(name: str, described: Any, places: Mapping[Any, Mapping[str, Any]], path: Path) -> Chunk:
    fields = fields_of(described)
    offset = _index(fields["offsets"])
    place = places[name, offset]
    file = place["relative_path"]
    if not isinstance(file, str) or Path(file).name != file:
        raise CheckpointError(f"{path / METADATA} is damaged: {file!r} is not a file name")
    if place.get("transform_descriptors"):
        raise CheckpointError(
            f"{path / METADATA}: {name} is stored compressed; save it without a transformation"
        )
    start, size = _index((place["offset"], place["length"]))
    box = (offset, _index(fields["sizes"]))
    return Chunk(box=box, file=path / file, start=start, end=start + size)


def _index(numbers: Any) -> Index:
    """A tuple of integers. Raises TypeError for anything else."""
    if any(type(number) is not int or number < 0 for number in numbers):
        raise TypeError(f"{numbers!r} are not sizes")
    return tuple(numbers)


def _dtype(properties: Any) -> torch.dtype | None:
    """The dtype of tensor properties; torch keeps them as a tuple that begins with it."""
    fields = fields_of(properties)
    state = fields.get("state")
    dtype = state[0] if isinstance(state, tuple) and state else fields.get("dtype")
    return dtype if isinstance(dtype, torch.dtype) else None


# ---------------------------------------------------------------------------------------- tensors


def _one_for_each_layer(
    name: str, tensor: ChunkedTensor, files: OpenFiles
) -> dict[str, PiecewiseTensor]:
    """A stored tensor, or if it is one of all layers, each layer's under a name with its number."""
    layers = _ALL_LAYERS.fullmatch(name)
    if layers is None:
        pieces = [_piece(chunk, 0, files) for chunk in tensor.chunks]
        return {name: _piecewise(tensor, tensor.shape, pieces, tensor.chunks)}
    chunks_of_layers: dict[int, list[Chunk]] = {layer: [] for layer in range(tensor.shape[0])}
    for chunk in tensor.chunks:
        (first, *_), (count, *_) = chunk.box
        for layer in range(first, first + count):
            chunks_of_layers[layer].append(chunk)
    tensors = {}
    for layer, chunks in chunks_of_layers.items():
        pieces = [_piece(chunk, 1, files, layer) for chunk in chunks]
        tensors[f"{layers[1]}.{layer}.{layers[2]}"] = _piecewise(
            tensor, tensor.shape[1:], pieces, chunks
        )
    return tensors


def _piecewise(
    tensor: ChunkedTensor, shape: Index, pieces: Sequence[Piece], chunks: Sequence[Chunk]
) -> PiecewiseTensor:
    file = chunks[0].file.name if chunks else METADATA
    return PiecewiseTensor(shape=shape, pieces=pieces, file=file, dtype=tensor.dtype)


def _piece(chunk: Chunk, dimensions_of_layers: int, files: OpenFiles, layer: int = 0) -> Piece:
    offset, size = chunk.box
    index = tuple(0 for _ in offset)
    if dimensions_of_layers:
        index = (layer - offset[0], *index[1:])
    box = (offset[dimensions_of_layers:], size[dimensions_of_layers:])
    return Piece(box=box, index=index, open=partial(_open_chunk, files, chunk))


def _open_chunk(files: OpenFiles, chunk: Chunk) -> FileTensor:
    """Where the elements of a chunk lie. Raises CheckpointError if it is not such a tensor."""
    tensor = read_archive(files, chunk.file, chunk.start, chunk.end)
    if not isinstance(tensor, FileTensor) or tensor.shape != chunk.box[1]:
        raise CheckpointError(
            f"{chunk.file} is damaged: at byte {chunk.start} is no tensor of shape "
            f"{list(chunk.box[1])}"
        )
    return tensor


def _damaged_files(
    files: OpenFiles, stored: Mapping[str, ChunkedTensor], rank: int, world_size: int
) -> list[str]:
    """What is wrong with the files that are this rank's to verify; one problem of each."""
    chunks_of_files: dict[Path, list[Chunk]] = {}
    for tensor in stored.values():
        for chunk in tensor.chunks:
            chunks_of_files.setdefault(chunk.file, []).append(chunk)
    problems = []
    for file in sorted(chunks_of_files)[rank::world_size]:
        try:
            for chunk in chunks_of_files[file]:
                _open_chunk(files, chunk)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


# ------------------------------------------------------------------------------------------- find


def _find(path: Path) -> Path | None:
    for folder in checkpoint_folders(path):
        has_metadata = (folder / METADATA).exists() or (folder / FORMAT_NAME).exists()
        if has_metadata or any(folder.glob("*.distcp")):
            return folder
    return None


TORCH_DIST = WeightFormat(
    name="checkpoint of megatron-core (torch_dist)", find=_find, open=open_torch_dist
)

"""A Hugging Face directory as weights to start from: config.json, and safetensors.

The weights are in model.safetensors, or in several files that model.safetensors.index.json lists.
If both are there the single file is read: transformers prefers it, and the index may be a leftover.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from safetensors import SafetensorError, safe_open

from megafn.pure.checkpoint.boxes import Box, Index, overlap, slices_of
from megafn.pure.config.problems import Problem
from megafn.pure.config.records import ModelConfig
from megafn.pure.pretrained.architecture import Architecture
from megafn.pure.pretrained.architectures import CONFIG, read_directory
from megafn.pure.pretrained.compatibility import is_head, shape_problem
from megafn.pure.pretrained.pretrained import Pretrained
from megafn.pure.pretrained.stored_slice import StoredSlice
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.data.corpus_identity import fingerprint_of
from megafn.runtime.pretrained.weight_source import (
    StoredTensor,
    WeightFormat,
    WeightSource,
    commonest_dtype,
)

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Bytes of a tensor that are compared at a time.
_BLOCK = 2**24

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@frozen(kw_only=True, eq=False)
class HuggingFaceWeights:
    """An open directory."""

    path: Path
    config: Mapping[str, Any]  # config.json
    architecture: Architecture
    model: ModelConfig  # that is read into
    files: Mapping[str, Any]  # open files by name
    tensors: Mapping[str, StoredTensor]
    places: Mapping[str, str]  # the architecture's name of each tensor -> the one in the files
    expected: Mapping[str, Index]  # shapes of the tensors of `model`, by the architecture's names


@contextlib.contextmanager
def open_hugging_face(path: Path, model: ModelConfig | None = None) -> Iterator[WeightSource]:
    """The weights of a directory. Raises as `OpenWeights` says."""
    config, architecture, described = read_directory(path)
    with contextlib.ExitStack() as closing:
        files, tensors = _open_files(path, closing)
        weights = HuggingFaceWeights(
            path=path,
            config=config,
            architecture=architecture,
            model=described if model is None else model,
            files=files,
            tensors=tensors,
            places=_places(architecture, tensors, described if model is None else model),
            expected=architecture.tensors(described if model is None else model),
        )
        yield WeightSource(
            path=path,
            remember=partial(_remember, weights),
            model=described,
            tensors=tensors,
            made_of=partial(_made_of, weights),
            copy=partial(_copy, weights),
            damage=partial(_differing_copies, weights),
            is_known_buffer=partial(_is_known_buffer, weights),
            is_head=partial(_is_head, architecture),
        )


# --------------------------------------------------------------------------------------- files


def _open_files(
    path: Path, closing: contextlib.ExitStack
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The open files by name, and what they hold; only their headers are read."""
    places = None if (path / SINGLE_FILE).exists() else _read_index(path)
    names = [SINGLE_FILE] if places is None else sorted(set(places.values()))
    files = {name: closing.enter_context(_open_file(path / name)) for name in names}
    held = {name: set(file.keys()) for name, file in files.items()}
    if places is None:
        places = dict.fromkeys(held[SINGLE_FILE], SINGLE_FILE)
    tensors = {}
    for tensor, name in places.items():
        if tensor not in held[name]:
            raise CheckpointError(
                f"{path / INDEX} is stale: it places {tensor} in {name}, which does not have it; "
                "restore the index that belongs to these files"
            )
        tensors[tensor] = _stored_tensor(path / name, files[name].get_slice(tensor), tensor)
    return files, tensors


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, as the index lists them."""
    file = path / INDEX
    try:
        places = json.loads(file.read_bytes())["weight_map"]
        names = set(places.values())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} holds neither {SINGLE_FILE} nor {INDEX}; save the model in the safetensors "
            "format, as transformers' save_pretrained does (a pickle may execute what it holds, "
            "and is not read)"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{file} is damaged: {name!r} is not a file name")
        if not (path / name).exists():
            raise CheckpointError(
                f"{path / name} is missing: {INDEX} lists it; fetch it again, or restore the index "
                "that belongs to the files"
            )
    return places


def _open_file(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}; fetch it again or restore it") from None
    except OSError as error:
        raise CheckpointError(f"{file} could not be read: {error}") from None


def _stored_tensor(file: Path, stored: Any, tensor: str) -> StoredTensor:
    # others than these are buffers, or of quantized weights
    dtype = _DTYPES.get(stored.get_dtype())
    return StoredTensor(shape=tuple(stored.get_shape()), file=file.name, dtype=dtype)


# ------------------------------------------------------------------------------------- parameters


def _slices(weights: HuggingFaceWeights, name: str, shape: Index) -> Sequence[StoredSlice]:
    return weights.architecture.slices(name, shape, weights.model)


def _places(
    architecture: Architecture, tensors: Mapping[str, StoredTensor], model: ModelConfig
) -> dict[str, str]:
    """The name in the files of each tensor that the architecture knows.

    Of a tensor and its copies, a file may hold one copy only.
    """
    places = {architecture.full_name(stored_name): stored_name for stored_name in tensors}
    for tensor, stored_name in list(places.items()):
        original = architecture.copy_of(tensor, model)
        if original is not None:
            places.setdefault(original, stored_name)
    for tensor, other in architecture.stand_ins.items():
        if other in places:
            places.setdefault(tensor, places[other])
    return places


def _made_of(weights: HuggingFaceWeights, name: str, shape: Index) -> Sequence[str]:
    stored_names = {}
    missing = []
    for tensor in dict.fromkeys(piece.tensor for piece in _slices(weights, name, shape)):
        stored_name = weights.places.get(tensor)
        if stored_name is None:
            missing.append(tensor)
        else:
            stored_names[tensor] = stored_name
    if missing and (stored_names or not is_head(name)):
        raise CheckpointError(
            f"{weights.path}: {', '.join(missing)} is missing, of which {name} is made; give "
            "weights of this model"
        )
    for tensor, stored_name in stored_names.items():
        _check_tensor(weights, name, shape, tensor, stored_name)
    return tuple(stored_names.values())  # none of a head that is new


def _check_tensor(
    weights: HuggingFaceWeights, name: str, shape: Index, tensor: str, stored_name: str
) -> None:
    """Raises CheckpointError if a stored tensor is not what the model needs."""
    stored = weights.tensors[stored_name]
    expected = weights.expected.get(tensor, shape)
    if stored.dtype is None:
        raise CheckpointError(
            f"{weights.path / stored.file}: {stored_name} is not stored in fp32, bf16 or fp16; "
            "give weights that are not quantized"
        )
    if stored.shape == expected:
        return
    if expected == shape:
        raise CheckpointError(shape_problem(name, shape, stored.shape, str(weights.path)))
    raise CheckpointError(
        f"{weights.path}: {stored_name} has shape {list(stored.shape)}, expected "
        f"{list(expected)} for {name}; set the sizes of the config to those of the weights"
    )


def _copy(
    weights: HuggingFaceWeights, name: str, shape: Index, box: Box, target: torch.Tensor
) -> None:
    """Copy what each slice of the parameter has in common with the box."""
    missing = prod(box[1])
    for piece in _slices(weights, name, shape):
        rows = ((piece.start, *(0 for _ in shape[1:])), (piece.rows, *shape[1:]))
        common = overlap(box, rows)
        if common is None:
            continue
        offset, size = common
        in_target = slices_of(common, box[0])
        first_row = offset[0] - piece.start + piece.at
        target[in_target] = _read(weights, piece, (first_row, *offset[1:]), size)
        missing -= prod(size)
    if missing:
        raise CheckpointError(f"{weights.path}: {missing} elements of {name} are missing")


def _read(
    weights: HuggingFaceWeights, piece: StoredSlice, offset: Index, size: Index
) -> torch.Tensor:
    """A box of a stored tensor, in the parameter's order of dimensions."""
    place = slices_of((offset, size))
    stored_name = weights.places[piece.tensor]
    stored = weights.tensors[stored_name]
    source = weights.files[stored.file].get_slice(stored_name)
    try:
        if piece.transposed:
            return source[place[::-1]].T
        return source[place]
    except SafetensorError as error:
        raise CheckpointError(f"{weights.path / stored.file} could not be read: {error}") from None


# ---------------------------------------------------------------------------- buffers and copies


def _is_known_buffer(weights: HuggingFaceWeights, stored_name: str) -> bool:
    tensor = weights.architecture.full_name(stored_name)
    return (
        weights.architecture.is_buffer(tensor)
        or weights.architecture.copy_of(tensor, weights.model) is not None
    )


def _is_head(architecture: Architecture, stored_name: str) -> bool:
    return architecture.is_head(architecture.full_name(stored_name))


def _differing_copies(weights: HuggingFaceWeights, rank: int, world_size: int) -> list[str]:
    """Tensors that a tied model has once and old files twice, if the second is another."""
    problems = []
    for name, stored_original in _copies(weights)[rank::world_size]:
        if not _same_content(weights, name, stored_original):
            problem = Problem(
                "model.tie_word_embeddings",
                True,
                f"{name} and {stored_original} differ in {weights.path}; set it to False",
            )
            problems.append(str(problem))
    return problems


def _copies(weights: HuggingFaceWeights) -> list[tuple[str, str]]:
    """Each stored tensor that repeats another, and that other."""
    copies = []
    for tensor, stored_name in sorted(weights.places.items()):
        original = weights.architecture.copy_of(tensor, weights.model)
        if original is not None and weights.places[original] != stored_name:
            copies.append((stored_name, weights.places[original]))
    return copies


def _same_content(weights: HuggingFaceWeights, one: str, other: str) -> bool:
    """Whether two stored tensors are equal, compared some rows at a time."""
    first = weights.tensors[one]
    second = weights.tensors[other]
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    one_slice = weights.files[first.file].get_slice(one)
    other_slice = weights.files[second.file].get_slice(other)
    rows = max(1, _BLOCK // (4 * max(1, prod(first.shape[1:]))))
    for start in range(0, first.shape[0], rows):
        if not torch.equal(one_slice[start : start + rows], other_slice[start : start + rows]):
            return False
    return True


# ------------------------------------------------------------------------------------ the record


def _remember(weights: HuggingFaceWeights) -> Pretrained:
    files = {name: weights.path / name for name in (CONFIG, *sorted(weights.files))}
    return Pretrained(
        source=str(weights.path.absolute()),
        fingerprint=fingerprint_of(files),
        architecture=weights.architecture.name,
        dtype=commonest_dtype(weights.tensors.values()),
        config=weights.config,
    )


def _find(path: Path) -> Path | None:
    names = (CONFIG, SINGLE_FILE, INDEX)
    return path if any((path / name).is_file() for name in names) else None


HUGGING_FACE = WeightFormat(name="Hugging Face directory", find=_find, open=open_hugging_face)

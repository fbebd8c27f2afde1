"""What both formats of Megatron-LM have in common: tensors in pieces, as a `WeightSource`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from megafn.pure.checkpoint.boxes import Box, Index, overlap, slices_of
from megafn.pure.config.records import ModelConfig
from megafn.pure.families.built_in import parameter_shapes
from megafn.pure.pretrained.compatibility import is_head, shape_problem
from megafn.pure.pretrained.megatron_model import fields_of_tensors, model_of_arguments
from megafn.pure.pretrained.megatron_tensors import (
    core_names,
    is_buffer,
    is_cut_over_vocabulary,
    is_second_name,
    is_stored_head,
    legacy_name,
)
from megafn.pure.pretrained.pretrained import Pretrained
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.data.corpus_identity import fingerprint_of
from megafn.runtime.pretrained.inert_pickle import fields_of
from megafn.runtime.pretrained.torch_archive import FileTensor, OpenFiles, copy_part
from megafn.runtime.pretrained.weight_source import (
    StoredTensor,
    WeightSource,
    commonest_dtype,
)

# The file in a folder of checkpoints that names the newest.
TRACKER = "latest_checkpointed_iteration.txt"

# Megatron-LM pads the vocabulary to a multiple of this times tp, unless an argument says otherwise.
_DIVISIBLE = 128


@frozen(kw_only=True)
class Piece:
    """A box of a stored tensor, and the tensor of a file in which it begins at an index.

    open: reads where that tensor lies. The index may have more dimensions than the box: the first
    ones choose a layer of several that are stored as one.
    """

    box: Box
    index: Index
    open: Callable[[], FileTensor]


@frozen(kw_only=True)
class PiecewiseTensor:
    """A tensor of a whole model, as the files hold it."""

    shape: Index
    pieces: Sequence[Piece]
    file: str  # that holds the first piece
    dtype: torch.dtype | None = None  # None: not known without opening the file


@frozen(kw_only=True, eq=False)
class MegatronWeights:
    """An open checkpoint of Megatron-LM; the fields are those of `weight_source`."""

    path: Path
    files: OpenFiles
    tensors: Mapping[str, PiecewiseTensor]
    arguments: Mapping[str, Any]
    family: str
    expected: frozenset[str]  # names of parameters that such a model has


# ------------------------------------------------------------------------------------------- find


def checkpoint_folders(path: Path) -> Iterable[Path]:
    """Where a checkpoint of Megatron-LM may lie at a path: there, or in the folder named newest."""
    yield path
    try:
        name = (path / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return
    if name == "release":
        yield path / name
    elif name.isdecimal():
        yield path / f"iter_{int(name):07d}"


# ---------------------------------------------------------------------------------------- describe


def arguments_of(common: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a run, of what Megatron-LM keeps beside its weights; {} if it has none."""
    return fields_of(common.get("args"))


def check_version(common: Mapping[str, Any], file: Path, default: float) -> None:
    """Raises CheckpointError for a checkpoint_version below 3."""
    version = common.get("checkpoint_version", default)
    if not isinstance(version, int | float) or version < 3:
        raise CheckpointError(
            f"{file}: checkpoint_version = {version!r}: must be 3 or more, because older versions "
            "order queries, keys and values in another way; load it and save it with Megatron-LM"
        )


def check_dense(arguments: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError for experts that are divided among ranks."""
    size = arguments.get("expert_model_parallel_size", 1)
    if size not in (None, 1):
        raise CheckpointError(
            f"{path}: expert_model_parallel_size = {size!r}: models of experts are not read; "
            "start from another checkpoint"
        )


def is_gated(arguments: Mapping[str, Any], model: ModelConfig | None) -> bool:
    """Whether the first layer of an MLP is two, gate and up."""
    swiglu = arguments.get("swiglu")
    if isinstance(swiglu, bool):
        return swiglu
    return model is not None and model.gated


def is_tied(arguments: Mapping[str, Any], model: ModelConfig | None) -> bool:
    """Whether the output layer has the table of the word embeddings."""
    untied = arguments.get("untie_embeddings_and_output_weights")
    if isinstance(untied, bool):
        return not untied
    return model is None or model.tie_word_embeddings


# ----------------------------------------------------------------------------------------- source


def weight_source(
    path: Path,
    files: OpenFiles,
    tensors: Mapping[str, PiecewiseTensor],
    arguments: Mapping[str, Any],
    model: ModelConfig | None,
    damage: Callable[[int, int], list[str]],
) -> WeightSource:
    """An open checkpoint as a source of weights.

    tensors: the weights by their names. arguments: those of its run, {} if it has none. model: that
    is read into.
    Raises CheckpointError if there are no weights, ConfigError for a model that megafn lacks.
    """
    if not tensors:
        raise CheckpointError(f"{path} holds no weights of a model; name another checkpoint")
    tensors = {
        name: tensor for name, tensor in tensors.items() if not is_second_name(name, tensors)
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    described = model_of_arguments(arguments, fields_of_tensors(shapes), model, str(path))
    weights = MegatronWeights(
        path=path,
        files=files,
        tensors=tensors,
        arguments=arguments,
        family=str(fields_of_tensors(shapes)["family"]),
        expected=frozenset(() if described is None else parameter_shapes(described)),
    )
    stored = {}
    for name, tensor in tensors.items():
        stored[name] = StoredTensor(shape=tensor.shape, file=tensor.file, dtype=tensor.dtype)
    return WeightSource(
        path=path,
        remember=partial(_remember, weights, stored),
        model=described,
        tensors=stored,
        made_of=partial(_made_of, weights),
        copy=partial(_copy, weights),
        damage=damage,
        is_known_buffer=is_buffer,
        is_head=is_stored_head,
    )


def _remember(weights: MegatronWeights, stored: Mapping[str, StoredTensor]) -> Pretrained:
    names = sorted({tensor.file for tensor in weights.tensors.values()})
    return Pretrained(
        source=str(weights.path.absolute()),
        fingerprint=fingerprint_of({name: weights.path / name for name in names}),
        dtype=commonest_dtype(stored.values()),
    )


def _stored_name(weights: MegatronWeights, name: str) -> str | None:
    """Which stored tensor a parameter of the whole model is, or None."""
    for candidate in (*core_names(name), legacy_name(name, weights.family)):
        if candidate in weights.tensors:
            return candidate
    return None


def _made_of(weights: MegatronWeights, name: str, shape: Index) -> Sequence[str]:
    stored = _stored_name(weights, name)
    if stored is None:
        if name in weights.expected and not is_head(name):
            raise CheckpointError(
                f"{weights.path}: {name} is missing; give weights of this model, or set the config "
                "to theirs"
            )
        return ()
    tensor = weights.tensors[stored]
    is_table = is_cut_over_vocabulary(stored) and len(tensor.shape) == len(shape)
    if is_table and tensor.shape[1:] == shape[1:]:
        padding = tensor.shape[0] - shape[0]
        fits = 0 <= padding <= _largest_padding(weights, tensor)
    else:
        fits = tensor.shape == shape
    if not fits:
        raise CheckpointError(shape_problem(name, shape, tensor.shape, str(weights.path)))
    return (stored,)


def _largest_padding(weights: MegatronWeights, tensor: PiecewiseTensor) -> int:
    """How many rows Megatron-LM may have added to the vocabulary."""
    divisible = weights.arguments.get("make_vocab_size_divisible_by")
    if not isinstance(divisible, int):
        divisible = _DIVISIBLE
    tp = len({piece.box[0][0] for piece in tensor.pieces})
    return max(divisible, 1) * tp - 1


def _copy(
    weights: MegatronWeights, name: str, shape: Index, box: Box, target: torch.Tensor
) -> None:
    (stored,) = _made_of(weights, name, shape)
    missing = prod(box[1])
    for piece in weights.tensors[stored].pieces:
        common = overlap(box, piece.box)
        if common is None:
            continue
        target[slices_of(common, box[0])] = _read(weights.files, piece, common)
        missing -= prod(common[1])
    if missing:
        raise CheckpointError(
            f"{weights.path} is damaged: {missing} elements of {stored} are missing"
        )


def _read(files: OpenFiles, piece: Piece, part: Box) -> torch.Tensor:
    """A part, a box of the stored tensor, of a piece."""
    tensor = piece.open()
    if not tensor.dtype.is_floating_point:
        raise CheckpointError(f"{tensor.path}: a weight is of {tensor.dtype}; expected floats")
    offset, size = part
    layer = piece.index[: len(piece.index) - len(offset)]
    first = piece.index[len(layer) :]
    inside = tuple(
        index + position - start
        for index, position, start in zip(first, offset, piece.box[0], strict=True)
    )
    in_file = ((*layer, *inside), (*(1 for _ in layer), *size))
    return copy_part(files, tensor, in_file).view(size)

"""Checkpoints in Megatron-LM's own format, a file for each model-parallel rank.

A folder iter_0000007 of mp_rank_XX/model_optim_rng.pt, or with a pipeline mp_rank_XX_YYY/..., by
tensor-parallel and pipeline-parallel rank. accelerate writes it too. Each file is torch.save's: the
arguments of the run, and the state dict of each model chunk of the rank, with the part that the
rank holds of each parameter. Layers count from 0 on every stage.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from attrs import frozen

from megafn.pure.checkpoint.boxes import in_whole
from megafn.pure.config.records import ModelConfig
from megafn.pure.pretrained.megatron_tensors import (
    LEGACY,
    cut_of,
    modern_legacy_name,
)
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.pretrained.megatron_source import (
    Piece,
    PiecewiseTensor,
    arguments_of,
    check_dense,
    check_version,
    checkpoint_folders,
    is_gated,
    is_tied,
    weight_source,
)
from megafn.runtime.pretrained.torch_archive import (
    FileTensor,
    OpenFiles,
    open_files,
    read_archive,
)
from megafn.runtime.pretrained.weight_source import WeightFormat, WeightSource

FILE = "model_optim_rng.pt"

_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(_\d{3,})?")
_MODEL = re.compile(r"model(\d*)")
_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..+)")

# The parameters of a model chunk, or of several, that one rank holds: by their names in the whole
# model.
Parameters = dict[str, FileTensor]


@contextlib.contextmanager
def open_mp_rank(path: Path, model: ModelConfig | None = None) -> Iterator[WeightSource]:
    """The weights of a checkpoint. Raises as `OpenWeights` says."""
    with open_files() as files:
        contents = _read_files(path, files)
        common = contents[0][0]
        arguments = arguments_of(common)
        check_dense(arguments, path)
        ranks = [_of_tensor_rank(stages, is_tied(arguments, model)) for stages in contents]
        gated = is_gated(arguments, model)
        tensors = {name: _joined(name, ranks, path, gated) for name in ranks[0]}
        yield weight_source(path, files, tensors, arguments, model, _no_damage)


# ------------------------------------------------------------------------------------------ files


def _read_files(path: Path, files: OpenFiles) -> list[list[Mapping[str, Any]]]:
    """What the files hold, [tensor-parallel rank][pipeline-parallel rank]."""
    first = _read_file(_folder_of(path, 0, 0), files)
    sizes = _sizes(path, first)
    contents = []
    for tp_rank in range(sizes.tp):
        stages = []
        for pp_rank in range(sizes.pp):
            is_first = (tp_rank, pp_rank) == (0, 0)
            content = first if is_first else _read_file(_folder_of(path, tp_rank, pp_rank), files)
            stages.append(content)
        contents.append(stages)
    return contents


def _folder_of(path: Path, tp_rank: int, pp_rank: int) -> Path:
    """The folder of a rank; without a pipeline it has one number."""
    short = path / f"mp_rank_{tp_rank:02d}"
    if pp_rank == 0 and short.exists():
        return short
    return path / f"mp_rank_{tp_rank:02d}_{pp_rank:03d}"


def _read_file(folder: Path, files: OpenFiles) -> Mapping[str, Any]:
    file = folder / FILE
    content = read_archive(files, file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is damaged: it is not a dict of Megatron-LM")
    check_version(content, file, default=0)
    return content


@frozen(kw_only=True)
class Sizes:
    """How many ranks wrote a checkpoint."""

    tp: int
    pp: int


def _sizes(path: Path, first: Mapping[str, Any]) -> Sizes:
    """As the arguments say; without them, as the names of the folders show."""
    matches = [match for entry in path.iterdir() if (match := _FOLDER.fullmatch(entry.name))]
    if any(match[3] for match in matches):
        raise CheckpointError(
            f"{path} has a file for each rank of expert parallelism: models of experts are not "
            "read; start from another checkpoint"
        )
    tp = max(int(match[1]) + 1 for match in matches)
    pp = max(int(match[2] or 0) + 1 for match in matches)
    arguments = arguments_of(first)
    return Sizes(
        tp=_size(arguments, "tensor_model_parallel_size", tp),
        pp=_size(arguments, "pipeline_model_parallel_size", pp),
    )


def _size(arguments: Mapping[str, Any], name: str, default: int) -> int:
    value = arguments.get(name)
    return max(value, default) if isinstance(value, int) else default


# ------------------------------------------------------------------------------------- parameters


def _of_tensor_rank(stages: list[Mapping[str, Any]], tied: bool) -> Parameters:
    """What one tensor-parallel rank of all stages holds.

    Chunk 0 of every stage comes before chunk 1 of the first.
    """
    chunks = []
    for stage, content in enumerate(stages):
        for key, value in content.items():
            match = _MODEL.fullmatch(key) if isinstance(key, str) else None
            if match:
                chunks.append((int(match[1] or 0), stage, value))
    parameters: Parameters = {}
    layers_before: dict[str, int] = {}
    for _, stage, chunk in sorted(chunks, key=lambda chunk: chunk[:2]):
        layers = dict(layers_before)
        for name, tensor in _flattened(chunk):
            if tied and stage > 0 and name == "output_layer.weight":
                continue  # a copy of the word embeddings
            match = _LAYER.fullmatch(name)
            if match:
                stack, number, rest = match.groups()
                layer = layers_before.get(stack, 0) + int(number)
                layers[stack] = max(layers.get(stack, 0), layer + 1)
                name = f"{stack}{layer}{rest}"
            parameters.setdefault(name, tensor)  # T5's decoder has a copy of the embeddings
        layers_before = layers
    return parameters


def _flattened(chunk: Any, prefix: str = "") -> Iterator[tuple[str, FileTensor]]:
    """The tensors of a state dict, which megatron.legacy nests."""
    if not isinstance(chunk, dict):
        return
    for key, value in chunk.items():
        name = f"{prefix}{key}"
        if isinstance(value, FileTensor):
            yield modern_legacy_name(name) if _is_legacy(name) else name, value
        else:
            yield from _flattened(value, f"{name}.")


def _is_legacy(name: str) -> bool:
    return name.startswith((LEGACY, "lm_head.")) and not name.startswith("lm_head.layer_norm.")


def _itself(tensor: FileTensor) -> FileTensor:
    return tensor


def _no_damage(rank: int, world_size: int) -> list[str]:
    """What is wrong with a file was found when it was opened."""
    return []


def _joined(name: str, ranks: list[Parameters], path: Path, gated: bool) -> PiecewiseTensor:
    """A whole tensor, of the parts that the tensor-parallel ranks hold."""
    cut = cut_of(name, gated)
    local = ranks[0][name].shape
    parts = ranks[:1] if cut.dim is None else ranks
    whole = list(local)
    if cut.dim is not None:
        if cut.dim >= len(local):
            raise CheckpointError(f"{path} is damaged: {name} has shape {list(local)}")
        whole[cut.dim] *= len(ranks)
    pieces: list[Piece] = []
    for tp_rank, part in enumerate(parts):
        tensor = part.get(name)
        if tensor is None or tensor.shape != local:
            found = "none" if tensor is None else list(tensor.shape)
            raise CheckpointError(
                f"{path}: tensor-parallel rank {tp_rank} has {name} of shape {found}, rank 0 of "
                f"shape {list(local)}; copy the whole checkpoint again"
            )
        blocks = in_whole(
            (tuple(0 for _ in local), local),
            local,
            tuple(whole),
            cut.dim,
            stride=cut.stride,
            tp=len(ranks),
            tp_rank=tp_rank,
        )
        for box, index in blocks:
            pieces.append(Piece(box=box, index=index, open=partial(_itself, tensor)))
    first = ranks[0][name]
    return PiecewiseTensor(
        shape=tuple(whole),
        pieces=pieces,
        file=str(first.path.relative_to(path)),
        dtype=first.dtype,
    )


# ------------------------------------------------------------------------------------------- find


def _find(path: Path) -> Path | None:
    for folder in checkpoint_folders(path):
        if any(_FOLDER.fullmatch(entry.name) for entry in folder.glob("mp_rank_*")):
            return folder
    return None


MP_RANK = WeightFormat(name="checkpoint of Megatron-LM (mp_rank_*)", find=_find, open=open_mp_rank)

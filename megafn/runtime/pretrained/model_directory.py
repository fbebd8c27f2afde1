"""Writing a Hugging Face directory: shards, index, config.json, tokenizer; whole or not at all.

Every rank makes the same plan: which stored tensor goes into which file, and which rank writes that
file. Then all go through the tensors in the same order; those that hold a part send it to the
writer, which holds one parameter and one tensor at a time.
"""

from __future__ import annotations

import glob
import json
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from megafn.pure.checkpoint.boxes import Index
from megafn.pure.config.family_record import family_name
from megafn.pure.config.problems import ConfigError, Problem, choice_problem, config_error
from megafn.pure.config.records import ModelConfig, TrainConfig
from megafn.pure.pretrained.architecture import Architecture
from megafn.pure.pretrained.architectures import (
    ARCHITECTURES,
    CONFIG,
    architecture_for,
    exported_config,
)
from megafn.pure.pretrained.pretrained import Pretrained
from megafn.pure.pretrained.stored_slice import StoredSlice
from megafn.runtime.checkpoint.atomic_files import (
    CheckpointError,
    TensorType,
    publish,
    sync_folder,
    write_file,
    write_tensor_stream,
)
from megafn.runtime.data.corpora import tokenizer_of
from megafn.runtime.model.layers import DTYPES
from megafn.runtime.pretrained.hugging_face import INDEX, SINGLE_FILE
from megafn.runtime.pretrained.parameter_reader import ParameterReader
from megafn.runtime.pretrained.ranks import Ranks

MAX_SHARD_BYTES = 5 * 10**9

_NAMES_IN_CONFIG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# What tokenizers of transformers are read from.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
)


@frozen(kw_only=True)
class Piece:
    """A slice of a parameter that goes into a stored tensor."""

    parameter: str
    slice: StoredSlice


@frozen(kw_only=True)
class Shard:
    """One file of weights: its tensors in order."""

    file: str
    types: Mapping[str, TensorType]


@frozen(kw_only=True)
class DirectoryPlan:
    """What is written; the same on every rank."""

    directory: Path
    config: Mapping[str, Any]  # of config.json
    shards: Sequence[Shard]
    pieces: Mapping[str, Sequence[Piece]]  # of each stored tensor
    tokenizer: Path | None


# -------------------------------------------------------------------------------------------- plan


def plan_directory(
    directory: str | Path,
    shapes: Mapping[str, Index],
    config: TrainConfig,
    pretrained: Pretrained | None,
    *,
    dtype: str | None,
    tokenizer: str | Path | None,
    max_shard_bytes: int,
) -> DirectoryPlan:
    """The plan for parameters of these whole shapes.

    Raises ConfigError naming the field that no architecture of transformers expresses.
    """
    dtype = _dtype(dtype, config, pretrained)
    if max_shard_bytes < 1:
        raise config_error([Problem("max_shard_bytes", max_shard_bytes, "must be at least 1")])
    model = config.model
    architecture = _architecture(model, pretrained)
    pieces = _pieces_of_tensors(architecture, shapes, model)
    stored_shapes = architecture.tensors(model)
    types = {
        tensor: TensorType(shape=stored_shapes[tensor], dtype=DTYPES[dtype]) for tensor in pieces
    }
    return DirectoryPlan(
        directory=Path(directory),
        config=_config_json(architecture, config, pretrained, dtype),
        shards=_shards(types, max_shard_bytes),
        pieces=pieces,
        tokenizer=None if tokenizer is None else Path(tokenizer),
    )


def _architecture(model: ModelConfig, pretrained: Pretrained | None) -> Architecture:
    name = None if pretrained is None else pretrained.architecture
    return architecture_for(model, None if name is None else ARCHITECTURES.get(name))


def _dtype(dtype: str | None, config: TrainConfig, pretrained: Pretrained | None) -> str:
    if dtype is not None:
        if dtype not in DTYPES:
            raise config_error([choice_problem("dtype", dtype, DTYPES)])
        return dtype
    return config.precision.dtype if pretrained is None else pretrained.dtype


def _pieces_of_tensors(
    architecture: Architecture, shapes: Mapping[str, Index], model: ModelConfig
) -> dict[str, list[Piece]]:
    """What each stored tensor is made of, in the order of the parameters.

    So the tensors that come from one parameter follow each other, and it is read once.
    """
    pieces: dict[str, list[Piece]] = {}
    for name, shape in shapes.items():
        slices = architecture.slices(name, shape, model)
        if not slices:
            raise CheckpointError(
                f"{name}: {architecture.name} of transformers has no such parameter; leave out "
                "what was added to the model, or keep the weights as a checkpoint"
            )
        for part in slices:
            pieces.setdefault(part.tensor, []).append(Piece(parameter=name, slice=part))
    missing = sorted(architecture.tensors(model).keys() - pieces.keys())
    if missing:
        raise CheckpointError(
            f"{architecture.name} of transformers has {', '.join(missing[:8])}, of which the "
            "weights hold nothing; give the whole model"
        )
    return pieces


def _config_json(
    architecture: Architecture, run: TrainConfig, pretrained: Pretrained | None, dtype: str
) -> dict[str, Any]:
    model = run.model
    source = None if pretrained is None else pretrained.config
    config = exported_config(architecture, model, source)
    if source is None:
        config["eos_token_id"] = _end_of_text(run)
    if len(config.get("id2label") or ()) != (model.num_labels or 0):
        # names of the labels of a head that was replaced
        config.pop("id2label", None)
        config.pop("label2id", None)
    # transformers 5 reads `dtype`, and those before `torch_dtype`
    for key in ("dtype", "torch_dtype"):
        config[key] = _NAMES_IN_CONFIG[dtype]
    return config


def _end_of_text(run: TrainConfig) -> int | None:
    """The id with which the texts end that a model was trained on from random weights.

    None if the tokenizer is not known, or cannot be read any more: the weights need none.
    """
    family = family_name(run.model.family)
    if run.data is None or family == "bert":
        return None
    try:
        tokenizer = tokenizer_of(run)
    except ConfigError as error:
        warnings.warn(f"config.json: it names no eos_token_id, because {error}", stacklevel=5)
        return None
    token = tokenizer.eos if family == "t5" else tokenizer.eod
    return token if token is not None and token < run.model.vocab_size else None


def _shards(types: Mapping[str, TensorType], max_bytes: int) -> list[Shard]:
    """The tensors in order, as many in a file as fit; a tensor larger than that has its own."""
    groups: list[dict[str, TensorType]] = [{}]
    size = 0
    for tensor, its_type in types.items():
        if groups[-1] and size + its_type.size > max_bytes:
            groups.append({})
            size = 0
        groups[-1][tensor] = its_type
        size += its_type.size
    if len(groups) == 1:
        return [Shard(file=SINGLE_FILE, types=groups[0])]
    return [
        Shard(file=f"model-{number:05d}-of-{len(groups):05d}.safetensors", types=group)
        for number, group in enumerate(groups, 1)
    ]


# ------------------------------------------------------------------------------------------- write


def write_directory(plan: DirectoryPlan, reader: ParameterReader, ranks: Ranks) -> Path:
    """Write what is planned; every rank calls it. Returns the directory.

    Raises CheckpointError, on every rank, if it exists already or cannot be written.
    """
    room = ranks.broadcast(_make_room(plan) if ranks.rank == 0 else None)
    if room.problem is not None:
        raise CheckpointError(room.problem)
    try:
        checksums, problem = _write_shards(plan, room.hidden, reader, ranks)
        if ranks.rank == 0 and problem is None:
            problem = _problem_of(partial(_publish, plan, room.hidden, checksums), plan.directory)
        problem = ranks.broadcast(problem)
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(room.hidden, ignore_errors=True)
        raise
    if problem is not None:
        if ranks.rank == 0:
            shutil.rmtree(room.hidden, ignore_errors=True)
        raise CheckpointError(problem)
    return plan.directory


@frozen(kw_only=True)
class Room:
    """The hidden folder that rank zero made, or why there is none."""

    hidden: Path | None = None
    problem: str | None = None


def _make_room(plan: DirectoryPlan) -> Room:
    directory = plan.directory
    try:
        if directory.exists():
            return Room(
                problem=f"{directory} exists already: name a new directory, or remove that one"
            )
        if plan.tokenizer is not None and not tokenizer_files(plan.tokenizer):
            return Room(
                problem=f"tokenizer = {str(plan.tokenizer)!r}: it holds no tokenizer; name a "
                "tokenizer.json, or a directory with one"
            )
        directory.parent.mkdir(parents=True, exist_ok=True)
        for leftover in directory.parent.glob(_hidden_name(glob.escape(directory.name), "?" * 8)):
            shutil.rmtree(leftover, ignore_errors=True)  # of an export that was killed
        hidden = directory.with_name(_hidden_name(directory.name, secrets.token_hex(4)))
        hidden.mkdir()
        sync_folder(directory.parent)
    except Exception as error:  # NUL in a path is a ValueError
        return Room(problem=_unwritten(directory, error))
    return Room(hidden=hidden)


def _problem_of(write: Callable[[], None], path: Path) -> str | None:
    """Why that cannot be written, or None. It is reported to all ranks, whatever its kind."""
    try:
        write()
    except Exception as error:
        return _unwritten(path, error)
    return None


def _unwritten(path: Path, error: Exception) -> str:
    reason = str(error) if isinstance(error, (OSError, ValueError)) else repr(error)
    return f"{path} could not be written: {reason}"


def _hidden_name(name: str, token: str) -> str:
    """The folder that becomes the directory of this name.

    token: eight characters, so that a pattern of them does not match the folder of a longer name.
    """
    return f".saving-{name}-{token}"


def tokenizer_files(path: Path) -> dict[str, Path]:
    """The tokenizer's files in a directory, or a tokenizer.json itself, by the name to write."""
    if path.is_file():
        return {"tokenizer.json": path}
    return {name: path / name for name in TOKENIZER_FILES if (path / name).is_file()}


def _write_shards(
    plan: DirectoryPlan, hidden: Path, reader: ParameterReader, ranks: Ranks
) -> tuple[dict[str, str], str | None]:
    """The sha256 of each file, and the first problem; every rank learns both."""
    checksums: dict[str, str] = {}
    problem = None
    for number, shard in enumerate(plan.shards):
        writer = number % ranks.world_size
        tensors = _stored_tensors(plan, shard, reader, writer)
        if ranks.rank == writer and problem is None:
            write = partial(_write_shard, shard, hidden, tensors, checksums)
            problem = _problem_of(write, plan.directory / shard.file)
        # the other ranks send their parts, and this one receives them also after a failure
        unread = _problem_of(partial(_go_through, tensors), plan.directory / shard.file)
        problem = problem or unread
    all_checksums: dict[str, str] = {}
    all_problems = []
    for checksums_of_rank, problem_of_rank in ranks.gather((checksums, problem)):
        all_checksums |= checksums_of_rank
        all_problems.append(problem_of_rank)
    return all_checksums, next((found for found in all_problems if found is not None), None)


def _write_shard(
    shard: Shard, hidden: Path, tensors: Iterator[torch.Tensor], checksums: dict[str, str]
) -> None:
    checksums[shard.file] = write_tensor_stream(
        hidden / shard.file, shard.types, tensors, {"format": "pt"}
    )


def _go_through(tensors: Iterator[torch.Tensor]) -> None:
    for _ in tensors:
        pass


def _stored_tensors(
    plan: DirectoryPlan, shard: Shard, reader: ParameterReader, writer: int
) -> Iterator[torch.Tensor]:
    """The tensors of a file in order, on the rank that writes it; on other ranks nothing.

    Every rank goes through it to the end. What fails on the writer is raised at the end: until then
    it receives what the others send.
    """
    name = None
    whole = None
    failure: Exception | None = None
    for tensor, its_type in shard.types.items():
        target = None
        for piece in plan.pieces[tensor]:
            if piece.parameter != name:
                name = piece.parameter
                whole = None  # one parameter at a time
                whole = reader.read(name, writer)
            if whole is None or failure is not None:
                continue
            try:
                if target is None:
                    target = torch.empty(its_type.shape, dtype=its_type.dtype)
                _place(target, piece.slice, whole)
            except Exception as error:  # there is no memory for it
                failure = error
        if target is not None and failure is None:
            yield target
    if failure is not None:
        raise failure


def _place(target: torch.Tensor, part: StoredSlice, whole: torch.Tensor) -> None:
    rows = whole[part.start : part.start + part.rows]
    if part.transposed:
        target[:, part.at : part.at + part.rows] = rows.T
    else:
        target[part.at : part.at + part.rows] = rows


# ----------------------------------------------------------------------------------------- publish


def _publish(plan: DirectoryPlan, hidden: Path, checksums: dict[str, str]) -> None:
    """Write the small files and give the directory its name."""
    if len(plan.shards) > 1:
        checksums[INDEX] = write_file(hidden / INDEX, _json(_index(plan)))
    checksums[CONFIG] = write_file(hidden / CONFIG, _json(plan.config))
    if plan.tokenizer is not None:
        for name, file in tokenizer_files(plan.tokenizer).items():
            checksums[name] = write_file(hidden / name, file.read_bytes())
    publish(hidden, plan.directory, checksums)


def _index(plan: DirectoryPlan) -> dict[str, Any]:
    size = sum(its_type.size for shard in plan.shards for its_type in shard.types.values())
    places = {tensor: shard.file for shard in plan.shards for tensor in shard.types}
    return {"metadata": {"total_size": size}, "weight_map": places}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()

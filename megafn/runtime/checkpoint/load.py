"""Reading a checkpoint: verify its files, compare its config, fill the state from its boxes.

The files are verified once, each by one rank, before anything is read into the state.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import frozen
from safetensors import SafetensorError, safe_open

from megafn.pure.checkpoint.boxes import Box, Index, overlap, slices_of
from megafn.pure.checkpoint.compatibility import data_problems, resume_problems
from megafn.pure.config.problems import config_error
from megafn.pure.config.records import TrainConfig
from megafn.pure.config.serialization import from_dict
from megafn.pure.pretrained.pretrained import pretrained_from_dict
from megafn.runtime.checkpoint.adapters import (
    ReadBase,
    check_adapters,
    lora_of_manifest,
    needs_base,
)
from megafn.runtime.checkpoint.atomic_files import CheckpointError, find_damage, read_checksums
from megafn.runtime.checkpoint.disk_format import FOLDER, FORMAT, MANIFEST, latest, tensor_key
from megafn.runtime.checkpoint.state_boxes import (
    PARAMETER,
    fill_state,
    frozen_names,
    kind_and_parameter,
    set_loss_scale,
    tensor_name,
)
from megafn.runtime.model.state import State, donate
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.object_collectives import (
    call_on_rank_zero,
    gather_from_all_ranks,
)


def load_checkpoint(
    state: State,
    directory: str | Path,
    read_base: ReadBase,
    *,
    data: Mapping[str, Any] | None = None,
) -> State:
    """`load`, by a caller that can read weights of other formats."""
    state.pg.check_open()
    path = call_on_rank_zero(partial(checkpoint_at, Path(directory)), state.pg)
    if path is None:
        raise CheckpointError(
            f"{directory} holds no complete checkpoint: name a folder that `save` wrote, or the "
            "one above it"
        )
    manifest = verified_manifest(path, state.pg)
    check_data(manifest, lambda: data, state)
    return load_verified(state, path, manifest, read_base)


def load_verified(
    state: State, path: Path, manifest: Mapping[str, Any], read_base: ReadBase
) -> State:
    """`load` of a checkpoint whose files were verified, see `verified_manifest`."""
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path / MANIFEST} has format {manifest['format']}: this megafn reads format {FORMAT}"
        )
    _check_config(manifest, state.config)
    check_adapters(manifest, state)
    if needs_base(manifest):
        state = read_base(state, manifest)
    state = donate(state)
    _fill(state, path, manifest)
    return attrs.evolve(
        state,
        iteration=manifest["iteration"],
        consumed_samples=manifest["consumed_samples"],
        skipped_samples=manifest["skipped_samples"],
        grad_norms=tuple(manifest["grad_norms"]),
        pretrained=pretrained_from_dict(manifest.get("pretrained")),  # older ones say nothing
    )


def checkpoint_at(directory: Path) -> Path | None:
    """The checkpoint that a directory is, or the newest in it, or None if it holds none."""
    if FOLDER.fullmatch(directory.name) or (directory / MANIFEST).exists():
        return directory
    return latest(directory)


def checkpoint_config(directory: str | Path) -> TrainConfig | None:
    """The config of the run that wrote a checkpoint, with its adapters as prepare_model.

    directory: a checkpoint, or a folder of them, of which the newest is read; None if it holds
    none. Needs no process group. Other functions that stood in the config are not in checkpoints.
    Raises CheckpointError if the manifest is damaged, OSError if it cannot be read.
    """
    path = checkpoint_at(Path(directory))
    if path is None or not path.exists():
        return None
    manifest = read_manifest(path)
    return attrs.evolve(from_dict(manifest["config"]), prepare_model=lora_of_manifest(manifest))


# ---------------------------------------------------------------------------------------- verify


def verified_manifest(path: Path, pg: ProcessGroups) -> dict[str, Any]:
    """The manifest, after every file was compared with its checksum; ranks share the work.

    Raises CheckpointError, on every rank, with every file that is missing or altered, and OSError,
    on every rank, if a file cannot be read, which says nothing of its content.
    """
    manifest: dict[str, Any] = {}
    problems: list[str] = []
    unreadable = None
    try:
        manifest, problems = _verify_own_share(path, pg)
    except OSError as error:
        unreadable = f"{error.filename} could not be read: {error.strerror}"
    results = gather_from_all_ranks((problems, unreadable), pg)
    for rank, (_, unreadable) in enumerate(results):
        if unreadable is not None:
            raise OSError(
                f"rank {rank}: {unreadable}; the checkpoint may be whole, and nothing was renamed: "
                "correct the permissions or the disk, and start again"
            )
    all_problems = set()
    for problems_of_rank, _ in results:
        all_problems.update(problems_of_rank)
    if all_problems:
        raise CheckpointError("; ".join(sorted(all_problems)))
    return manifest


def _verify_own_share(path: Path, pg: ProcessGroups) -> tuple[dict[str, Any], list[str]]:
    """The manifest, empty if damaged, and the problems of the files that this rank looks at."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return {}, [str(error)]
    return manifest, damaged_files(path, manifest, pg.rank, pg.world_size)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError if damaged, OSError as `find_damage`."""
    problem = find_damage(path / MANIFEST, read_checksums(path).get(MANIFEST))
    if problem is not None:
        raise CheckpointError(problem)
    return json.loads((path / MANIFEST).read_bytes())


def damaged_files(path: Path, manifest: Mapping[str, Any], rank: int, world_size: int) -> list[str]:
    """What is wrong with the files of tensors that are this rank's to verify.

    Raises OSError as `find_damage`.
    """
    checksums = read_checksums(path)
    names = sorted(manifest["files"])[rank::world_size]
    problems = [find_damage(path / name, checksums.get(name)) for name in names]
    return [problem for problem in problems if problem is not None]


# --------------------------------------------------------------------------------------- compare


def check_data(
    manifest: Mapping[str, Any], describe: Callable[[], Mapping[str, Any] | None], state: State
) -> None:
    """Raises ConfigError, on every rank, if a run's data is not what a manifest says of it.

    describe: gives tokenizer and corpora of the run, see `describe_data`; None: not known. Rank
    zero calls it, if the manifest says anything.
    """
    saved = manifest.get("data")
    if saved:
        call_on_rank_zero(partial(_compare_data, saved, describe, state.config), state.pg)


def _compare_data(
    saved: Mapping[str, Any],
    describe: Callable[[], Mapping[str, Any] | None],
    config: TrainConfig,
) -> None:
    now = describe()
    problems = data_problems(saved, now, config) if now is not None else ()
    if problems:
        raise config_error(problems)


def _check_config(manifest: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises ConfigError naming each field that makes this another run."""
    stored = manifest["config"]
    saved = _as_if_saved_today(from_dict(stored), stored, config)
    problems = resume_problems(saved, config, manifest["iteration"])
    if problems:
        raise config_error(problems)


def _as_if_saved_today(saved: Any, stored: Mapping[str, Any], config: Any) -> Any:
    """A saved config, with the values of `config` in fields that an older megafn did not know.

    So those are not compared. `stored` lacks them, and also those that were None, which are.
    """
    changes = {}
    for field in attrs.fields(type(saved)):
        name = field.name
        before = getattr(saved, name)
        now = getattr(config, name)
        if name not in stored:
            if field.default is not None:
                changes[name] = now
        elif attrs.has(type(before)) and attrs.has(type(now)):
            changes[name] = _as_if_saved_today(before, stored[name], now)
    return attrs.evolve(saved, **changes)


# ------------------------------------------------------------------------------------------ fill


@frozen(kw_only=True, eq=False)
class BoxReader:
    """The tensors of a checkpoint and its files, opened when they are first needed."""

    path: Path
    tensors: Mapping[str, Any]  # see `make_manifest`
    files: dict[str, Any]
    closing: contextlib.ExitStack


def _left_to_base(state: State, manifest: Mapping[str, Any]) -> frozenset[str]:
    """Frozen parameters that the checkpoint does not hold, as they are those of its base.

    In a state that is not for training its adapters are frozen too.
    """
    stored = manifest["tensors"]
    return frozenset(
        name for name in frozen_names(state) if tensor_name(PARAMETER, name) not in stored
    )


def _fill(state: State, path: Path, manifest: Mapping[str, Any]) -> None:
    """Copy the checkpoint into the state. Raises CheckpointError, on every rank, if one fails."""
    problem = None
    try:
        unchanged = _left_to_base(state, manifest) if needs_base(manifest) else frozenset()
        with open_boxes(path, manifest["tensors"]) as reader:
            fill_state(
                state,
                partial(copy_box, reader),
                _kinds_by_name(manifest),
                manifest["optimizer_step"],
                unchanged=unchanged,
            )
    except (CheckpointError, SafetensorError, OSError) as error:
        # a custom model with other parameters, or a disk that fails now
        problem = f"{path} could not be read: {error}"
    for problem_of_rank in gather_from_all_ranks(problem, state.pg):
        if problem_of_rank is not None:
            raise CheckpointError(problem_of_rank)
    if manifest["grad_scaler"] is not None:
        set_loss_scale(state, manifest["grad_scaler"])


def _kinds_by_name(manifest: Mapping[str, Any]) -> Mapping[str, list[str]]:
    """What the optimizer keeps of each parameter: a chain of optimizers keeps different slots."""
    kinds = defaultdict(list)
    for tensor in sorted(manifest["tensors"]):
        kind, name = kind_and_parameter(tensor)
        if kind != PARAMETER:
            kinds[name].append(kind)
    return kinds


@contextlib.contextmanager
def open_boxes(path: Path, tensors: Mapping[str, Any]) -> Iterator[BoxReader]:
    """A reader of the tensors that a manifest lists, for the length of the `with`."""
    with contextlib.ExitStack() as closing:
        yield BoxReader(path=path, tensors=tensors, files={}, closing=closing)


def copy_box(reader: BoxReader, tensor: str, shape: Index, box: Box, target: torch.Tensor) -> None:
    """Copy a box of a whole tensor into `target`, from every stored box that overlaps it."""
    missing = prod(box[1])
    for file, *stored_box in _stored_boxes(reader, tensor, shape):
        offset, size = map(tuple, stored_box)
        common = overlap(box, (offset, size))
        if common is None:
            continue
        source = _open_file(reader, file).get_slice(tensor_key(tensor, offset))
        target[slices_of(common, box[0])] = source[slices_of(common, offset)]
        missing -= prod(common[1])
    if missing:
        raise CheckpointError(f"{missing} elements of {tensor} are missing")


def _stored_boxes(reader: BoxReader, tensor: str, shape: Index) -> list[Any]:
    """[file, offset, size] of each stored box of a tensor, which must have the model's shape."""
    stored = reader.tensors.get(tensor)
    if stored is None or stored["shape"] != list(shape):
        stored_shape = "none" if stored is None else stored["shape"]
        raise CheckpointError(
            f"the model has {tensor} of shape {list(shape)}, the checkpoint {stored_shape}"
        )
    return stored["pieces"]


def _open_file(reader: BoxReader, name: str) -> Any:
    if name not in reader.files:
        reader.files[name] = reader.closing.enter_context(safe_open(reader.path / name, "pt"))
    return reader.files[name]

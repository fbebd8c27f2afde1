"""`save`, `load`, `latest`: a run's state to disk and back, in any layout.

A checkpoint is a folder iteration-00000012 of
    rank-00000.safetensors ...  boxes of whole tensors (parameters in fp32 masters' precision, optimizer state), each written once
    manifest.json               config, versions, position, and for each whole tensor its shape and which file holds which box
    SHA256SUMS                  of all of them, for `sha256sum -c` too
It is written in a hidden folder beside, flushed, and renamed by rank zero after every rank has said that its file is on
disk: so it is there, whole, or not at all.

Why not megatron-core's dist_checkpointing, which does the parallel mathematics elsewhere in megafn:
- It maps modules to whole tensors by methods of each module. megafn's names and places (`weights.parts`) are there already, in
  one place, tested by the law, and the same for every family, for tables that several stages hold and for padded vocabularies.
- Its distributed optimizer keeps other keys than the plain one, so that neither reads the other's; it gathers every shard on one
  rank to be reshardable; and it has three defects on loading torch's Adam (a fresh one cannot load; one step tensor hung on all
  parameters; the loaded step overwritten by 0), to be repaired by replacing its inner methods. Boxes need no gathering.
- Its files hold pickles (.metadata, common.pt, byte items), which run what an attacker put there; torch's own reader of them
  does too. safetensors and JSON hold none, so there is nothing to guard.
- Its data and torch's carry no checksums, and its writer wants psutil, forks, and takes seconds for a tiny model.
What is used instead: safetensors to read, and 60 lines of boxes (`pure.checkpoint.boxes`), tested over every pair of layouts.

Random states are not saved: they are a function of (seed, consumed samples, place). Nor is the schedule: a function of consumed samples.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from math import prod
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import frozen
from safetensors import SafetensorError, safe_open

from megafn import __version__
from megafn.pure.checkpoint.boxes import overlap
from megafn.pure.checkpoint.compatibility import resume_problems
from megafn.pure.checkpoint.write_plan import plan_writes
from megafn.pure.config.problems import config_error
from megafn.pure.config.serialization import from_dict, to_dict, without_functions
from megafn.runtime.checkpoint.atomic_files import (
    CheckpointError,
    find_damage,
    publish,
    read_sums,
    sync_folder,
    write_file,
    write_tensors,
)
from megafn.runtime.checkpoint.state_boxes import adam_step, check_buffers, fill_state, state_boxes
from megafn.runtime.model.optimizer import chained
from megafn.runtime.model.state import State
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.object_collectives import (
    broadcast_from_rank_zero,
    gather_from_all_ranks,
)

MANIFEST, FORMAT, _NAME = "manifest.json", 1, re.compile(r"iteration-(\d+)")


def checkpoints(directory: str | Path) -> dict[int, Path]:
    """The checkpoints of a directory by their iterations, ascending. One that has its name was whole when it got it."""
    found = {
        int(match[1]): path
        for path in Path(directory).glob("iteration-*")
        if (match := _NAME.fullmatch(path.name))
    }
    return {iteration: found[iteration] for iteration in sorted(found)}


def latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint of a directory; None where there is none."""
    return next(reversed(checkpoints(directory).values()), None)


# ---------------------------------------------------------------------------------------------------------- saving


@frozen(kw_only=True, eq=False)
class Saving:
    """A save under way: this rank's file is being written, or is."""

    pg: ProcessGroups
    folder: Path  # the name that it will have
    aside: Path
    manifest: Mapping[str, Any]
    written: Future  # {file: (bytes, sha256)}, or why not


def save(state: State, directory: str | Path) -> Path:
    """Write a checkpoint of a state below `directory`, which all hosts share; returns its folder. Every rank calls it.

    Raises CheckpointError, on every rank, where it cannot be written or one of this iteration is there already; what was
    there before stays as it was.
    """
    return finish_save(begin_save(state, directory))


def begin_save(
    state: State,
    directory: str | Path,
    *,
    asynchronous: bool = False,
    last_sample: int | None = None,
) -> Saving:
    """The first half of `save`; every rank calls it. Asynchronous: the tensors are copied now and written by a thread."""
    pg, directory = state.pg, Path(directory)
    check_buffers(state)
    folder = directory / f"iteration-{state.iteration:08d}"
    mine, manifest = _plan(state, f"saving {folder}")
    manifest["last_sample"] = last_sample
    aside = broadcast_from_rank_zero(
        _make_room(folder) if pg.is_rank_zero else None, pg, during=f"saving {folder}"
    )
    if isinstance(aside, str):
        raise CheckpointError(aside)
    file = aside / _file(pg.rank)
    written: Future = Future()
    if not asynchronous:
        _write_into(written, file, mine)
    else:  # a daemon, not an executor's: the interpreter would wait for that one at its end, for ever where the disk hangs
        copies = {key: view.to("cpu", copy=True) for key, view in mine.items()}
        threading.Thread(
            target=_write_into, args=(written, file, copies), name="megafn-checkpoint", daemon=True
        ).start()
    return Saving(pg=pg, folder=folder, aside=aside, manifest=manifest, written=written)


def finish_save(saving: Saving) -> Path:
    """The second half of `save`: waits until every rank has written, then gives the checkpoint its name. Every rank calls it."""
    pg, during = saving.pg, f"saving {saving.folder}"
    try:
        mine = saving.written.result(pg.timeout_seconds)
    except TimeoutError:
        raise RuntimeError(
            f"{during}: rank {pg.rank} hangs: it has not written its file in timeout_seconds = {pg.timeout_seconds:g}"
        ) from None
    results = gather_from_all_ranks(mine, pg, during=during)
    problem = next((result for result in results if isinstance(result, str)), None)
    if pg.is_rank_zero and problem is None:
        files = {name: told_of for result in results for name, told_of in result.items()}
        manifest = {**saving.manifest, "files": {name: size for name, (size, _) in files.items()}}
        try:
            sums = {name: digest for name, (_, digest) in files.items()}
            sums[MANIFEST] = write_file(saving.aside / MANIFEST, json.dumps(manifest).encode())
            publish(saving.aside, saving.folder, sums)
        except OSError as error:
            problem = f"{saving.folder} could not be written: {error}"
    problem = broadcast_from_rank_zero(problem, pg, during=during)
    if problem is not None:
        if pg.is_rank_zero:
            shutil.rmtree(saving.aside, ignore_errors=True)
        raise CheckpointError(problem)
    return saving.folder


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _written(file: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, str]] | str:
    if not tensors:
        return {}
    try:
        digest = write_tensors(file, tensors)
        return {file.name: (file.stat().st_size, digest)}
    except OSError as error:
        return f"{file.parent.name}/{file.name} could not be written: {error}"


def _write_into(written: Future, file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    try:
        written.set_result(_written(file, tensors))
    except BaseException as error:
        written.set_exception(error)


def _make_room(folder: Path) -> Path | str:
    """A new hidden folder beside; its name is like no other's, so that two runs in one directory never write into one. Or what is wrong."""
    try:
        if folder.exists():
            return f"{folder} is there already; save to another directory (one for each run), or remove it"
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(
            f".saving-{folder.name}-*"
        ):  # of a run that ended while it saved
            shutil.rmtree(left, ignore_errors=True)
        aside = folder.with_name(f".saving-{folder.name}-{secrets.token_hex(4)}")
        aside.mkdir()
        sync_folder(folder.parent)
        return aside
    except OSError as error:
        return f"{folder} could not be written: {error}"


def _key(tensor: str, offset: tuple[int, ...]) -> str:
    return f"{tensor}@{','.join(map(str, offset))}"


def _grad_scalers(state: State) -> Iterator[Any]:
    return filter(None, (getattr(part, "grad_scaler", None) for part in chained(state.optimizer)))


def _plan(state: State, during: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What this rank writes, and the manifest."""
    pg, found = state.pg, {}
    for piece in state_boxes(state):
        found.setdefault(_key(piece.tensor, piece.box[0]), piece)
    listing = [
        (piece.tensor, piece.shape, piece.box, piece.view.numel() * piece.view.element_size())
        for piece in found.values()
    ]
    stages, steps, listings = zip(
        *gather_from_all_ranks((pg.place.pp, adam_step(state), listing), pg, during=during)
    )
    if len(set(steps) - {None}) > 1:
        raise RuntimeError(f"optimizer steps by rank = {steps}: one number was expected")

    shared = plan_writes(list(zip(stages, listings)))
    tensors = {
        name: {"shape": shape, "pieces": [[_file(writer), *box] for box, writer in written]}
        for name, (shape, written) in shared.items()
    }
    mine = {
        _key(name, box[0]): found[_key(name, box[0])].view
        for name, (_, written) in shared.items()
        for box, writer in written
        if writer == pg.rank
    }
    scaler = next(_grad_scalers(state), None)
    return mine, {
        "format": FORMAT,
        "versions": {
            "megafn": __version__,
            "megatron-core": importlib.metadata.version("megatron-core"),
            "torch": torch.__version__,
        },
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "skipped_samples": state.skipped_samples,
        "grad_norms": state.grad_norms,
        "optimizer_step": next((step for step in steps if step is not None), None),
        "grad_scaler": {key: float(value) for key, value in scaler.state_dict().items()}
        if scaler
        else None,
        "world_size": pg.world_size,
        "config": to_dict(without_functions(state.config)),
        "tensors": tensors,
    }


# --------------------------------------------------------------------------------------------------------- loading


def load(state: State, directory: str | Path) -> State:
    """The state of a checkpoint, in the layout of `state`, whose buffers are donated. Every rank calls it.

    directory: a checkpoint, or a folder of them, of which the newest complete one is read. It may have been written in any
    layout. Nothing in it is executed. Raises CheckpointError naming the file that is missing or altered, before the state is
    touched, and ConfigError naming the field where the config is of another model or other data.
    """
    return read_checkpoint(state, directory)[0]


def read_checkpoint(state: State, directory: str | Path) -> tuple[State, dict[str, Any]]:
    """What `load` returns, and the manifest."""
    pg, path = (
        state.pg,
        broadcast_from_rank_zero(
            _checkpoint_at(Path(directory)) if state.pg.is_rank_zero else None, state.pg
        ),
    )
    if path is None:
        raise CheckpointError(
            f"{directory} holds no complete checkpoint; name a folder that `save` wrote, or the one above it"
        )
    manifest = _read_manifest(path, pg)
    if problems := resume_problems(
        from_dict(manifest["config"]), state.config, manifest["iteration"]
    ):
        raise config_error(problems)
    kinds, problem = (
        sorted({name.partition("/")[0] for name in manifest["tensors"]} - {"parameter"}),
        None,
    )
    try:
        with contextlib.ExitStack() as stack:
            fill_state(state, _reader(path, manifest, stack), kinds, manifest["optimizer_step"])
    except (
        CheckpointError,
        SafetensorError,
        OSError,
    ) as error:  # a model of one's own, or a disk that fails now
        problem = f"{path} could not be read: {error}"
    if problem := next(filter(None, gather_from_all_ranks(problem, pg)), None):
        raise CheckpointError(problem)
    if scale := manifest["grad_scaler"]:
        for scaler in _grad_scalers(state):
            scaler.load_state_dict(
                {
                    "scale": torch.tensor([scale["scale"]], device=pg.device),
                    **{key: int(value) for key, value in scale.items() if key != "scale"},
                }
            )
    position = {
        name: manifest[name] for name in ("iteration", "consumed_samples", "skipped_samples")
    }
    return attrs.evolve(state, **position, grad_norms=tuple(manifest["grad_norms"])), manifest


def _checkpoint_at(directory: Path) -> Path | None:
    return (
        directory
        if _NAME.fullmatch(directory.name) or (directory / MANIFEST).exists()
        else latest(directory)
    )


def _read_manifest(path: Path, pg: ProcessGroups) -> dict[str, Any]:
    """What manifest.json says, after every file has been compared with its checksum; the work is shared out over the ranks.

    Raises CheckpointError, on every rank, with every file that is missing or altered.
    """
    try:
        sums = read_sums(path)
        problems = [find_damage(path / MANIFEST, sums.get(MANIFEST))]
        if not any(problems):
            manifest = json.loads((path / MANIFEST).read_bytes())
            names = sorted(manifest["files"])
            problems += [
                find_damage(path / name, sums.get(name)) for name in names[pg.rank :: pg.world_size]
            ]
    except CheckpointError as error:
        problems = [str(error)]
    found = sorted(
        {problem for one in gather_from_all_ranks(problems, pg) for problem in one if problem}
    )
    if found:
        raise CheckpointError("; ".join(found))
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path / MANIFEST} has format {manifest['format']}; this megafn reads format {FORMAT}"
        )
    return manifest


def _reader(path: Path, manifest: Mapping[str, Any], stack: contextlib.ExitStack):
    files: dict[str, Any] = {}

    def copy(tensor, shape, box, target):
        stored = manifest["tensors"].get(tensor)
        if stored is None or tuple(stored["shape"]) != tuple(shape):
            raise CheckpointError(
                f"the model has {tensor} of shape {list(shape)}, the checkpoint {'none' if stored is None else stored['shape']}"
            )
        missing = prod(box[1])
        for file, offset, size in stored["pieces"]:
            if (common := overlap(box, (tuple(offset), tuple(size)))) is None:
                continue
            if file not in files:
                files[file] = stack.enter_context(safe_open(path / file, "pt"))
            there = tuple(slice(at - o, at - o + n) for at, n, o in zip(*common, offset))
            here = tuple(slice(at - o, at - o + n) for at, n, o in zip(*common, box[0]))
            target[here] = files[file].get_slice(_key(tensor, offset))[there]
            missing -= prod(common[1])
        if missing:
            raise CheckpointError(f"{missing} elements of {tensor} are missing")

    return copy

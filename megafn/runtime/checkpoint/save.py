"""Writing a checkpoint: plan, write, publish.

The ranks talk four times. Rank zero gathers what each of them holds, plans who writes what, and
scatters to each what it is to write. Each writes its file, and rank zero gathers the results. It
publishes the checkpoint, and one broadcast says whether that worked. So only rank zero sees more
than its own replicas' part of the state, however many ranks there are; the plan rests on what they
report, and not on what a config would let expect.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import field, frozen

from megafn.pure.checkpoint.write_plan import Holding, Listing, boxes_by_rank, plan_writes
from megafn.runtime.checkpoint.adapters import refers_to_base
from megafn.runtime.checkpoint.atomic_files import (
    CheckpointError,
    publish,
    sync_folder,
    write_file,
    write_tensors,
)
from megafn.runtime.checkpoint.disk_format import (
    MANIFEST,
    file_name,
    folder_name,
    make_manifest,
    tensor_key,
)
from megafn.runtime.checkpoint.state_boxes import (
    StateBox,
    adam_step,
    check_buffers,
    state_boxes,
)
from megafn.runtime.model.state import State, check_usable
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.object_collectives import (
    broadcast_from_rank_zero,
    gather_on_rank_zero,
    picklable,
    scatter_from_rank_zero,
)


def save(state: State, directory: str | Path, *, data: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint of a state below `directory`, which all hosts share; returns its folder.

    Every rank calls it. data: what the run reads, see `describe_data`; rank zero's is stored, and
    compared when a run resumes from the checkpoint.
    Raises CheckpointError, on every rank, if it cannot be written or this iteration already has
    one; checkpoints that were there before are unchanged. ValueError for a state that is not for
    training, RuntimeError for one that was donated, or whose process groups are closed.
    """
    return finish_save(begin_save(state, directory, data=data))


# -------------------------------------------------------------------------------- the two halves


@frozen(kw_only=True, eq=False)
class WrittenFile:
    """What a rank reports of its file."""

    files: Mapping[str, tuple[int, str]] = {}  # name: (bytes, sha256); empty: nothing to write
    problem: str | None = None  # why it could not be written


@frozen(kw_only=True, eq=False)
class Saving:
    """A save in progress: this rank's file is being written, or is written."""

    pg: ProcessGroups
    folder: Path  # its final name
    hidden: Path  # where it is written
    manifest: Mapping[str, Any] | None  # rank zero only
    written: Future[WrittenFile]
    ended: threading.Event = field(factory=threading.Event)  # `finish_save` was called


def begin_save(
    state: State,
    directory: str | Path,
    *,
    asynchronous: bool = False,
    last_sample: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> Saving:
    """The first half of `save`: plan, and begin to write. Every rank calls it.

    If asynchronous, the tensors are copied now and written by a thread. last_sample, data: see
    `make_manifest`.
    """
    check_usable(state)
    if not state.for_training:
        raise ValueError(
            "state: setup(for_training=False) made it, and a run could not resume from its "
            "checkpoint; export it, or save one that setup made for training"
        )
    pg = state.pg
    folder = Path(directory) / folder_name(state.iteration)

    boxes: dict[str, StateBox] = {}
    try:
        check_buffers(state)
        boxes = _boxes_by_key(state)
        report = _report(boxes, state, folder)
    except Exception as error:
        report = Report(error=error)

    reports = gather_on_rank_zero(_sendable(report), pg, during=_in_words(folder))
    plan = Plan()
    if reports is not None:
        plan = _plan_of_all(reports, state, last_sample, data)
    task = scatter_from_rank_zero(plan.tasks, pg)
    # A rank's own error has its traceback.
    problem = report.error or plan.error or task.error
    if problem is not None:
        raise problem

    tensors = {key: boxes[key].view for key in task.keys}
    return Saving(
        pg=pg,
        folder=folder,
        hidden=task.hidden,
        manifest=plan.manifest,
        written=_start_writing(task.hidden / file_name(pg.rank), tensors, asynchronous),
    )


def finish_save(saving: Saving) -> Path:
    """The second half of `save`: wait until every rank has written, then publish the checkpoint.

    Every rank calls it.
    """
    saving.ended.set()
    pg = saving.pg
    during = _in_words(saving.folder)
    results = gather_on_rank_zero(_wait_for_own_file(saving), pg, during=during)
    problem = None if results is None else _publish(saving, results)
    problem = broadcast_from_rank_zero(problem, pg, during=during)
    if problem is not None:
        if pg.is_rank_zero:
            shutil.rmtree(saving.hidden, ignore_errors=True)
        raise CheckpointError(problem)
    return saving.folder


def _in_words(folder: Path) -> str:
    return f"saving {folder}"


# ------------------------------------------------------------------------------------------ plan


@frozen(kw_only=True, eq=False)
class Report:
    """What a rank contributes to the plan, or why it cannot."""

    listing: Listing = Listing(stage=0, holdings=())
    step: int | None = None  # see `adam_step`
    hidden: Path | None = None  # where the checkpoint is written; rank zero only
    error: Exception | None = None


@frozen(kw_only=True, eq=False)
class Task:
    """What a rank is to write: the boxes with these keys, into a file in this folder."""

    hidden: Path = Path()
    keys: Sequence[str] = ()
    error: Exception | None = None  # nothing is to be written, because of it


@frozen(kw_only=True, eq=False)
class Plan:
    """Who writes what, on rank zero; empty on the others."""

    tasks: Sequence[Task] | None = None
    manifest: Mapping[str, Any] | None = None
    error: Exception | None = None


def _report(boxes: Mapping[str, StateBox], state: State, folder: Path) -> Report:
    pg = state.pg
    return Report(
        listing=Listing(stage=pg.place.pp, holdings=_holdings(boxes)),
        step=adam_step(state),
        hidden=_make_hidden_folder(folder) if pg.is_rank_zero else None,
    )


def _sendable(report: Report) -> Report:
    if report.error is None:
        return report
    return attrs.evolve(report, error=picklable(report.error))


def _plan_of_all(
    reports: Sequence[Report],
    state: State,
    last_sample: int | None,
    data: Mapping[str, Any] | None,
) -> Plan:
    """The plan of what all ranks report; what is wrong with it is every rank's error."""
    try:
        _raise_first_error(reports)
        writes = plan_writes([report.listing for report in reports])
        manifest = make_manifest(state, writes, _common_step(reports), last_sample, data)
    except Exception as error:
        if reports[0].hidden is not None:
            shutil.rmtree(reports[0].hidden, ignore_errors=True)
        return Plan(tasks=[Task(error=picklable(error))] * len(reports), error=error)

    hidden = reports[0].hidden
    assert hidden is not None  # rank zero made it, or reported an error
    tasks = []
    for boxes in boxes_by_rank(writes, len(reports)):
        keys = [tensor_key(tensor, offset) for tensor, offset in boxes]
        tasks.append(Task(hidden=hidden, keys=keys))
    return Plan(tasks=tasks, manifest=manifest)


def _raise_first_error(reports: Sequence[Report]) -> None:
    for rank, report in enumerate(reports):
        if report.error is not None:
            report.error.add_note(f"raised on rank {rank}")
            raise report.error


def _boxes_by_key(state: State) -> dict[str, StateBox]:
    """What this rank holds, once: chunks of one stage may share a table."""
    boxes: dict[str, StateBox] = {}
    for box in state_boxes(state, trained_only=refers_to_base(state)):
        boxes.setdefault(tensor_key(box.tensor, box.box[0]), box)
    return boxes


def _holdings(boxes: Mapping[str, StateBox]) -> tuple[Holding, ...]:
    holdings = []
    for box in boxes.values():
        size = box.view.numel() * box.view.element_size()
        holdings.append((box.tensor, box.shape, box.box, size))
    return tuple(holdings)


def _make_hidden_folder(folder: Path) -> Path:
    """Make a new hidden folder beside a checkpoint's final one.

    Its name is random, so that two runs in one directory never write into the same folder.
    Raises CheckpointError.
    """
    try:
        if folder.exists():
            raise CheckpointError(
                f"{folder} exists already: save to another directory (one for each run), or remove "
                "it"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".saving-{folder.name}-*"):  # of a run killed in a save
            shutil.rmtree(leftover, ignore_errors=True)
        hidden = folder.with_name(f".saving-{folder.name}-{secrets.token_hex(4)}")
        hidden.mkdir()
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written: {error}") from error
    return hidden


def _common_step(reports: Sequence[Report]) -> int | None:
    steps = {report.step for report in reports} - {None}
    if len(steps) > 1:
        by_rank = [report.step for report in reports]
        raise RuntimeError(f"optimizer steps by rank = {by_rank}: expected one number")
    return steps.pop() if steps else None


# ----------------------------------------------------------------------------------------- write


def _start_writing(
    file: Path, tensors: Mapping[str, torch.Tensor], asynchronous: bool
) -> Future[WrittenFile]:
    written: Future[WrittenFile] = Future()
    if not asynchronous:
        _write_into(written, file, tensors)
        return written
    copies = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
    # a daemon and not an executor's thread: at its end the interpreter would wait for that one,
    # forever if the disk hangs
    thread = threading.Thread(
        target=_write_into, args=(written, file, copies), name="megafn-checkpoint", daemon=True
    )
    thread.start()
    return written


def _write_into(
    written: Future[WrittenFile], file: Path, tensors: Mapping[str, torch.Tensor]
) -> None:
    try:
        written.set_result(_write(file, tensors))
    except BaseException as error:
        written.set_exception(error)


def _write(file: Path, tensors: Mapping[str, torch.Tensor]) -> WrittenFile:
    if not tensors:
        return WrittenFile()
    try:
        digest = write_tensors(file, tensors)
        return WrittenFile(files={file.name: (file.stat().st_size, digest)})
    except OSError as error:
        return WrittenFile(problem=f"{file.parent.name}/{file.name} could not be written: {error}")


def _wait_for_own_file(saving: Saving) -> WrittenFile:
    seconds = saving.pg.timeout_seconds
    try:
        return saving.written.result(seconds)
    except TimeoutError:
        raise RuntimeError(
            f"{_in_words(saving.folder)}: rank {saving.pg.rank} hangs: it has not written its file "
            f"in timeout_seconds = {seconds:g}"
        ) from None


# --------------------------------------------------------------------------------------- publish


def _publish(saving: Saving, results: Sequence[WrittenFile]) -> str | None:
    """Write the manifest and give the checkpoint its name. Returns why that failed, or None.

    results: of every rank.
    """
    for result in results:
        if result.problem is not None:
            return result.problem
    assert saving.manifest is not None  # this is rank zero
    sizes = {}
    checksums = {}
    for result in results:
        for name, (size, digest) in result.files.items():
            sizes[name] = size
            checksums[name] = digest
    manifest = json.dumps({**saving.manifest, "files": sizes}).encode()
    try:
        checksums[MANIFEST] = write_file(saving.hidden / MANIFEST, manifest)
        publish(saving.hidden, saving.folder, checksums)
    except OSError as error:
        return f"{saving.folder} could not be written: {error}"
    return None

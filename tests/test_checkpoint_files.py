"""What a save does to the disk: whole or absent, flushed, old ones deleted; what it refuses."""

import contextlib
import errno
import os
import shutil
import threading
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

import megafn as mf
from checkpoint_runs import (
    DIST,
    assert_resumed,
    config_of,
    same,
    text_config,
    train,
    with_checkpoint,
    without_checkpoints,
)
from equivalence import local_parts, share, tiny, uneven
from megafn.runtime.checkpoint import atomic_files, save
from megafn.runtime.checkpoint.disk_format import checkpoints
from megafn.runtime.checkpoint.resume import _remove_leftovers
from megafn.runtime.model.weights import local_parameters
from pool import run_script

# ------------------------------------------------------------------------- whole or absent


class Crash(BaseException):
    """The process ends here: no handler of an Exception runs."""


def effects(monkeypatch, at=None, flushed=None):
    """Counts what `save` does to the disk; returns the names of the effects that happened.

    The `at`-th effect does not happen, nor does any after it. flushed(name, *args) is called after
    each.
    """
    done = []

    def wrap(owner, name):
        real = getattr(owner, name)

        def effect(*args, **kwargs):
            if len(done) == at:
                raise Crash
            done.append(name)
            result = real(*args, **kwargs)
            if flushed is not None:
                flushed(name, *args)
            return result

        monkeypatch.setattr(owner, name, effect)

    for owner, name in (
        (os, "fsync"),
        (os, "rename"),
        (os, "mkdir"),
        (atomic_files, "write_file"),
        (atomic_files, "write_tensors"),
        (save, "write_file"),
        (save, "write_tensors"),
    ):
        wrap(owner, name)
    return done


def test_a_crash_between_any_two_effects_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    config = config_of(steps=4)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        state = mf.setup(config, pg)
        for iteration in range(2):
            batch = share(uneven(config, iteration), config, pg)
            state, _ = mf.train_step(state, batch, mf.step_fn("gpt"))
            if iteration == 0:
                mf.save(state, tmp_path)
        values = {1: local_parts(mf.load(mf.setup(config, pg), tmp_path)), 2: local_parts(state)}
        survived = []
        finished = False
        while not finished:
            with monkeypatch.context() as patched:
                done = effects(patched, at=len(survived))
                try:
                    mf.save(state, tmp_path)
                    finished = True
                except Crash:
                    assert len(done) == len(survived)
            newest = mf.latest(tmp_path)
            loaded = mf.load(mf.setup(config, pg), tmp_path)
            assert same(local_parts(loaded), values[loaded.iteration])
            assert newest.name == f"iteration-{loaded.iteration:08d}"
            assert loaded.iteration == (2 if "rename" in done else 1)
            _remove_leftovers(tmp_path)
            assert mf.latest(tmp_path) == newest
            assert [path.name for path in tmp_path.glob(".*")] == []
            survived.append(loaded.iteration)
            if loaded.iteration == 2:
                shutil.rmtree(newest)
        assert len(survived) > 10 and set(survived) == {1, 2} and survived == sorted(survived)


def test_everything_is_flushed_before_the_checkpoint_has_its_name_and_the_name_after(
    tmp_path, monkeypatch
):
    flushed = [set()]
    renamed = []

    def note(name, *args):
        if name == "fsync":
            flushed[-1].add(os.fstat(args[0]).st_ino)
        if name == "rename":
            renamed.append(args[1])
            flushed.append(set())

    config = config_of(steps=2)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        effects(monkeypatch, flushed=note)
        path = mf.save(mf.setup(config, pg), tmp_path / "new")
    before, after = flushed
    assert renamed == [path]
    assert {file.stat().st_ino for file in (path, *path.iterdir())} <= before
    assert path.parent.stat().st_ino in after


def test_two_runs_in_one_directory_write_into_folders_of_their_own(tmp_path):
    """The second removes the first's half-written folder: the first fails, nothing is mixed."""
    config = tiny()
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        state = mf.setup(config, pg)
        first = save.begin_save(state, tmp_path)
        second = save.begin_save(state, tmp_path)
        with pytest.raises(mf.CheckpointError, match="could not be written"):
            save.finish_save(first)
        assert mf.load(state, save.finish_save(second)).iteration == 0
        assert os.listdir(tmp_path) == ["iteration-00000000"]


def test_what_is_kept(tmp_path):
    config = text_config(tmp_path, steps=9)
    train(with_checkpoint(config, interval=1, keep_last=2, keep_every=3))
    assert list(checkpoints(tmp_path)) == [3, 6, 8, 9]
    assert [path.name for path in tmp_path.glob(".*")] == []


# --------------------------------------------------------------------------------- failures


def train_with_full_disk(config, rank, iteration):
    """`train`, in which a rank's disk is full when it writes the checkpoint of an iteration."""
    real = save.write_tensors

    def full(path, tensors):
        if int(os.environ.get("RANK", "0")) == rank and f"{iteration:08d}" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, tensors)

    save.write_tensors = full
    try:
        return train(config)
    finally:
        save.write_tensors = real


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_reported_once_and_training_continues(asynchronous, pool, tmp_path):
    config = with_checkpoint(text_config(tmp_path), asynchronous=asynchronous)
    whole = pool(2, train, without_checkpoints(config))
    results = pool(2, train_with_full_disk, config, 1, 4)
    assert [one.curve for one in results] == [one.curve for one in whole]
    assert list(checkpoints(tmp_path)) == [2, 6, 7]
    assert not list(tmp_path.glob(".*"))
    (warning,) = results[0].warnings
    assert "No space left on device" in warning and "training continues" in warning
    assert results[1].warnings == []


SMALL_FILES_ONLY = """
import resource, sys, torch
sys.path.insert(0, {tests!r})
import megafn as mf
from equivalence import tiny
config = tiny()
with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
    state = mf.setup(config, pg)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        mf.save(state, {directory!r})
    except mf.CheckpointError as error:
        print("raised:", error)
print(mf.latest({directory!r}))
"""


def test_a_file_that_may_not_grow_is_an_error_of_save_itself(tmp_path):
    tests = str(Path(__file__).parent)
    code = SMALL_FILES_ONLY.format(tests=tests, directory=str(tmp_path))
    ran = run_script(["-W", "ignore", "-c", code])
    assert "raised: " in ran.stdout and "File too large" in ran.stdout, ran
    assert ran.stdout.endswith("None\n"), ran
    assert list(tmp_path.iterdir()) == []


def test_a_second_save_of_an_iteration_is_refused(tmp_path):
    config = config_of(steps=2)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        path = mf.save(mf.setup(config, pg), tmp_path)
        exists = f"{path} exists already: save to another directory"
        with pytest.raises(mf.CheckpointError, match=exists):
            mf.save(mf.setup(config, pg), tmp_path)
        nothing = "holds no complete checkpoint: name a folder that `save` wrote"
        with pytest.raises(mf.CheckpointError, match=nothing):
            mf.load(mf.setup(config, pg), tmp_path / "elsewhere")


def save_with_failure(directory, rank, name):
    """What `save` raises on this rank if a function fails on that one."""
    config = config_of(steps=2)
    with mf.init_groups(mf.build_groups(config.parallel, 2), timeout_seconds=60) as pg:
        state = mf.setup(config, pg)
        fails = mock.patch.object(save, name, side_effect=ValueError(f"{name} fails"))
        with fails if pg.rank == rank else contextlib.nullcontext():
            try:
                mf.save(state, directory)
            except ValueError as error:
                return str(error), getattr(error, "__notes__", [])


@pytest.mark.parametrize(
    "rank, name, notes",
    [(0, "plan_writes", [[], []]), (1, "check_buffers", [["raised on rank 1"], []])],
)
def test_what_fails_before_anything_is_written_is_raised_on_every_rank_and_leaves_nothing(
    rank, name, notes, pool, tmp_path
):
    """Where it is another rank's error, a note says whose."""
    raised = pool(2, save_with_failure, tmp_path, rank, name)
    assert raised == [(f"{name} fails", notes_of_rank) for notes_of_rank in notes]
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- what is saved


def with_buffer(config, pg, **stage):
    chunk = mf.build_chunk(config, pg, **stage)
    chunk.decoder.register_buffer("running_mean", torch.zeros(3))
    return chunk


def test_a_persistent_buffer_is_refused_before_the_first_step(tmp_path):
    problem = (
        "TransformerBlock has the buffer 'running_mean' at module.decoder; make it a parameter"
    )
    trained = partial(pytest.fail, "it trained first")
    with pytest.raises(mf.ConfigError, match=problem):
        train(text_config(tmp_path), model=with_buffer, at=1, act=trained)
    assert list(tmp_path.iterdir()) == []


def frozen_words(config, pg, **stage):
    chunk = mf.build_chunk(config, pg, **stage)
    for part in local_parameters(chunk, config.model, pg):
        part.parameter.requires_grad_("word_embeddings" not in part.name)
    return chunk


@pytest.mark.parametrize("layout", [{}, DIST])
def test_frozen_parameters_are_saved_and_stay_as_they_were(layout, tmp_path):
    config = text_config(tmp_path, tie_word_embeddings=False, **layout)
    whole = train(without_checkpoints(config), model=frozen_words)
    train(config, model=frozen_words, stop=5)
    assert_resumed([whole], [train(config, model=frozen_words)], after=4)


# ----------------------------------------------------------------------------- asynchronous


def train_with_slow_disk(config):
    """`train`, in which the writing thread waits until iteration 6."""
    real = save.write_tensors
    go = threading.Event()

    def held(path, tensors):
        assert threading.current_thread() is threading.main_thread() or go.wait(30)
        return real(path, tensors)

    save.write_tensors = held
    try:
        return train(config, at=6, act=go.set)
    finally:
        save.write_tensors = real


def test_asynchronous_saving_writes_what_the_state_was(pool, tmp_path):
    """Training is two steps ahead when the thread writes: without a copy, numbers would differ."""
    directory = tmp_path / "there"
    config = text_config(directory, tp=2)
    whole = pool(4, train, text_config(tp=2))
    results = pool(4, train_with_slow_disk, with_checkpoint(config, asynchronous=True, interval=4))
    assert [one.curve for one in results] == [one.curve[:7] for one in whole]
    shutil.rmtree(directory / "iteration-00000007")
    assert list(checkpoints(directory)) == [4]
    assert_resumed(whole, pool(4, train, config), after=4)

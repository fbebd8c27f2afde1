"""Launchers that die, and two runs in one checkpoint.directory."""

import contextlib
import errno
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import attrs
import pytest

import megafn as mf
from checkpoint_runs import text_config, train, with_checkpoint
from megafn.runtime.checkpoint import directory_lock
from megafn.runtime.checkpoint.disk_format import checkpoints
from pool import ROOT, free_port, run_script

# ---------------------------------------------------------------------------- the meeting place


@pytest.mark.parametrize("rank", [0, 1], ids=["it-waits-for-the-other", "nobody-listens"])
def test_a_process_whose_run_is_gone_says_where_it_waited(rank):
    port = str(free_port())
    environment = dict(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0"
    )
    started = time.monotonic()
    with mock.patch.dict(os.environ, environment), pytest.raises(RuntimeError) as error:
        with mf.init_groups(mf.build_groups(mf.ParallelConfig(), 2), timeout_seconds=2):
            pass
    assert time.monotonic() - started < 20
    message = str(error.value)
    assert message.startswith(
        f"MASTER_ADDR:MASTER_PORT = 127.0.0.1:{port}: rank {rank} of 2 did not meet the other "
        "processes there within timeout_seconds = 2; the launcher (torchrun) or a process of this "
        "run has died or was never started: start all of them again ("
    )
    assert len(message.splitlines()) == 1


# ------------------------------------------------------------------------- one run in a directory


def impatient(config):
    """The config of a run that waits 1 s for another one in its directory."""
    return attrs.evolve(config, timeout_seconds=2.0)


HOLDER = """
import multiprocessing, sys, time
sys.path.insert(0, {tests!r})
import megafn as mf
from checkpoint_runs import text_config

def watch(metrics):
    if metrics.iteration == 3:
        # as a DataLoader forks its workers; it outlives the run
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        print("child", child.pid, flush=True)
        time.sleep(60)

mf.train(text_config({directory!r}), on_metrics=[watch])
"""


@contextlib.contextmanager
def live_run(directory, script):
    """(process, id of a process it forked) of a run that has trained 3 iterations."""
    script.write_text(HOLDER.format(tests=str(Path(__file__).parent), directory=str(directory)))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True
    )
    child = None
    try:
        child = int(process.stdout.readline().split()[1])
        yield process, child
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        if child is not None:
            os.kill(child, signal.SIGKILL)


def test_a_live_run_keeps_others_out_of_its_directory_and_a_killed_one_does_not(tmp_path):
    directory = tmp_path / "there"
    config = text_config(directory)
    with live_run(directory, tmp_path / "holder.py") as (process, child):
        started = time.monotonic()
        with pytest.raises(mf.ConfigError) as refused:
            train(impatient(config))
        assert time.monotonic() - started < 15
        message = str(refused.value)
        assert re.fullmatch(
            rf"checkpoint\.directory = '{directory}': process {process.pid} on \S+ \(since "
            r"[-\d]+ [:\d]+\) trains in it, and did not end within 1 s; end that run or name "
            rf"another directory \(if its host is gone for good, remove {directory}/\.lock\)",
            message,
        )
        elsewhere = text_config(tmp_path / "elsewhere")
        assert train(impatient(elsewhere)).curve[-1][0] == config.train_iters

        process.kill()
        process.wait()
        assert (directory / ".lock").exists()
        os.kill(child, 0)  # it is alive
        resumed = train(impatient(config))
    assert [iteration for iteration, *_ in resumed.curve] == [3, 4, 5, 6, 7]
    assert not list(directory.glob(".*"))


@contextlib.contextmanager
def locked(directory):
    """The lock of a directory, as another run holds it; yields what releases it."""
    file = directory_lock._try_to_lock(directory / ".lock")
    directory_lock._write_holder(file)
    try:
        yield lambda: directory_lock._release(file)
    finally:
        directory_lock._release(file)


def refusal(config):
    with pytest.raises(mf.ConfigError) as refused:
        mf.train(config)
    return str(refused.value)


def test_every_rank_refuses_together(pool, tmp_path):
    with locked(tmp_path):
        messages = pool(2, refusal, impatient(text_config(tmp_path, pp=2)))
    assert len(set(messages)) == 1 and f"process {os.getpid()} on " in messages[0]


def test_a_run_waits_for_one_that_is_about_to_end(tmp_path, capsys):
    config = text_config(tmp_path)
    config = attrs.evolve(config, log=attrs.evolve(config.log, progress=True))
    with locked(tmp_path) as release:
        timer = threading.Timer(1, release)
        timer.start()
        assert len(train(config).curve) == config.train_iters
        timer.join()
    printed = capsys.readouterr().err
    assert f"{tmp_path}: process {os.getpid()} on " in printed
    assert "waiting for up to 120 s" in printed


def test_fit_keeps_others_out_too_and_an_exception_frees_the_directory(tmp_path):
    config = text_config(tmp_path)
    train(config, stop=1)
    assert not list(tmp_path.glob(".*"))
    groups = mf.build_groups(config.parallel, 1)
    with locked(tmp_path), mf.init_groups(groups, timeout_seconds=2) as pg:
        with pytest.raises(mf.ConfigError, match="trains in it"):
            mf.fit(mf.setup(config, pg), mf.step_fn("gpt"))


def test_a_file_system_without_locks_is_a_warning(tmp_path):
    unsupported = OSError(errno.ENOLCK, "No locks available")
    with mock.patch.object(directory_lock, "_try_to_lock", side_effect=unsupported):
        trained = train(text_config(tmp_path))
    assert len(trained.curve) == 7
    assert trained.warnings == [
        f"{tmp_path}/.lock cannot be locked (No locks available), so a second run in this "
        "checkpoint.directory would not be noticed: start one at a time"
    ]


# ------------------------------------------------------------------------------------- orphans

ORPHANED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import attrs
import megafn as mf
from checkpoint_runs import text_config, with_checkpoint

def watch(metrics):
    if metrics.iteration == 3 and os.environ["RANK"] == "1":
        os.kill(os.getppid(), signal.SIGKILL)

config = with_checkpoint(text_config({directory!r}, steps=5000, tp=2), interval=10_000)
config = attrs.evolve(config, log=mf.LogConfig(progress=True))
try:
    mf.train(config, on_metrics=[watch])
except SystemExit as leaving:
    print("left with", leaving.code, flush=True)
"""


def test_a_run_whose_torchrun_was_killed_saves_and_ends(tmp_path):
    directory = tmp_path / "there"
    script = tmp_path / "script.py"
    script.write_text(ORPHANED.format(tests=str(Path(__file__).parent), directory=str(directory)))
    # it also waits for the orphans, which write into the same pipes
    ran = run_script([script], nproc=2)
    assert ran.returncode == -signal.SIGKILL, ran.stderr[-3000:]
    assert ran.stdout.split("\n") == ["left with 1"] * 2 + [""], ran.stderr[-3000:]
    (newest,) = checkpoints(directory)
    assert 3 <= newest < 5000
    ended = (
        f"torchrun, which started this run, has died: iteration {newest} is saved in {directory}; "
        "the same command resumes from there\n"
    )
    assert ended in ran.stderr
    assert not list(directory.glob(".*"))


@pytest.mark.parametrize("environment, exit_code", [({}, None), ({"TORCHELASTIC_RUN_ID": "1"}, 1)])
def test_only_a_parent_that_is_torchrun_takes_the_run_with_it(environment, exit_code, tmp_path):
    """A shell may end before the run that it started: `nohup python -m megafn train ... &`."""
    config = with_checkpoint(text_config(tmp_path), interval=10_000)
    another_parent_each_time = itertools.count(2).__next__
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(os, "getppid", another_parent_each_time),
    ):
        trained = train(config)
    assert trained.exit_code == exit_code
    assert list(checkpoints(tmp_path)) == [len(trained.curve)] == [1 if exit_code else 7]

"""`train` resumes by itself: exactly, in every family, from both kinds of data; or it refuses."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch

import megafn as mf
from checkpoint_runs import (
    assert_resumed,
    loader,
    text_config,
    train,
    with_checkpoint,
    without_checkpoints,
)
from megafn.runtime.checkpoint.autosave import SIGNALS
from megafn.runtime.checkpoint.disk_format import checkpoints
from pool import run_script


def test_train_resumes_by_itself_bit_for_bit(pool, tmp_path):
    config = text_config(tmp_path, tp=2)
    whole = pool(4, train, without_checkpoints(config))
    pool(4, train, config, stop=5)
    assert list(checkpoints(tmp_path)) == [2, 4]
    assert_resumed(whole, pool(4, train, config), after=4)
    assert list(checkpoints(tmp_path)) == [2, 4, 6, 7]
    finished = pool(4, train, config)
    assert all(one.curve == [] for one in finished), "it is finished"
    assert_resumed(whole, finished, after=7)


def test_where_a_run_resumes_and_where_a_signal_ended_it_is_printed(tmp_path, capsys):
    config = text_config(tmp_path)
    config = attrs.evolve(config, log=attrs.evolve(config.log, progress=True))

    def leave(metrics):
        if metrics.iteration == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(SystemExit):
        mf.train(config, on_metrics=[leave])
    printed = capsys.readouterr().err
    ended = f"SIGUSR1: iteration 3 is saved in {tmp_path}; the same command resumes from there\n"
    assert ended in printed

    mf.train(config)
    printed = capsys.readouterr().err
    resumed = f"resuming from {tmp_path}/iteration-00000003: 4 of 7 iterations are left\n"
    assert resumed in printed
    assert "4/7, " in printed and "1/7, " not in printed

    mf.train(config)
    printed = capsys.readouterr().err
    finished = (
        f"{tmp_path}/iteration-00000007 is the end of this run of 7 iterations: "
        "nothing is left to do\n"
    )
    assert finished in printed

    warning = (
        "train_iters = 9: the checkpoint was written with 7. "
        "If iteration 5 ran with that, this is another step"
    )
    with pytest.warns(UserWarning, match=warning):
        mf.replay(attrs.evolve(config, train_iters=9), 5)
    printed = capsys.readouterr().err
    assert f"replaying iterations 5 to 5 from {tmp_path}/iteration-00000004" in printed


def test_another_dp_reads_the_same_samples(pool, tmp_path):
    config = text_config(tmp_path, hidden_dropout=0.0)
    ((whole, *_),) = pool(1, train, without_checkpoints(config))
    sharded = attrs.evolve(config.optimizer, use_distributed_optimizer=True)
    pool(4, train, attrs.evolve(config, optimizer=sharded), stop=5)
    rest = pool(2, train, attrs.evolve(config, micro_batch_size=1))[0].curve
    assert [iteration for iteration, *_ in rest] == [5, 6, 7]
    torch.testing.assert_close(torch.tensor(rest), torch.tensor(whole[4:]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("data", [None, loader], ids=["text", "batches"])
@pytest.mark.parametrize(
    "family",
    [
        dict(family="bert", bert_binary_head=True, num_tokentypes=2),
        dict(family="t5", decoder_seq_length=16),
    ],
    ids=["bert", "t5"],
)
def test_every_family_resumes_bit_for_bit_from_both_kinds_of_data(family, data, tmp_path):
    config = text_config(tmp_path, steps=5, **family)
    if data is not None:
        config = attrs.evolve(config, data=None)
    whole = train(without_checkpoints(config), data=data)
    assert train(config, stop=3, data=data).curve == whole.curve[:3]
    rest = train(config, data=data)
    assert_resumed([whole], [rest], after=2)
    assert rest.warnings == []


def from_there(config):
    return lambda consumed_samples: loader(config, consumed_samples // config.global_batch_size)


def test_custom_batches_continue_after_what_was_read(tmp_path):
    config = attrs.evolve(text_config(tmp_path), data=None)
    whole = train(without_checkpoints(config), data=loader)
    assert train(config, stop=5, data=loader).curve == whole.curve[:5]
    for data in (loader, from_there):
        rest = train(config, data=data)
        assert_resumed([whole], [rest], after=4)
        assert rest.warnings == []
        for iteration in (6, 7):
            shutil.rmtree(tmp_path / f"iteration-0000000{iteration}")
    warned = train(config, data=partial(loader, draw=50)).warnings
    assert len(warned) == 1
    assert "micro-batch 12 is not the one that was read before" in warned[0]


# ----------------------------------------------------------------------------- another config


@pytest.mark.parametrize(
    "change, problem",
    [
        (dict(seed=7), "seed = 7: the checkpoint was written with 1234"),
        (dict(global_batch_size=16), "global_batch_size = 16: the checkpoint was written with 8"),
        (dict(num_layers=2), "model.num_layers = 2: the checkpoint was written with 4"),
        (
            dict(name="sgd", eps=1e-8),
            "optimizer.name = 'sgd': the checkpoint was written with 'adam'",
        ),
        (
            dict(train_iters=3),
            "train_iters = 3: the checkpoint stands at iteration 4; give 4 or more",
        ),
        (
            dict(data=mf.DataConfig(train=mf.demo_text(), sampler="cyclic", split=(9, 1, 0))),
            "data.split = (9, 1, 0): the checkpoint was written with",
        ),
        (dict(data="other"), "but the checkpoint was written with"),
    ],
)
def test_a_config_of_another_run_is_refused(change, problem, tmp_path):
    train(text_config(tmp_path), stop=5)
    if change.get("data") == "other":
        change = dict(data=other_data(tmp_path))
    of_the_run = {key: value for key, value in change.items() if key in ("data", "train_iters")}
    of_a_section = {key: value for key, value in change.items() if key not in of_the_run}
    other = attrs.evolve(text_config(tmp_path, **of_a_section), **of_the_run)
    with pytest.raises(mf.ConfigError, match=".*") as refused:
        train(other)
    message = str(refused.value)
    assert problem in message and len(message.splitlines()) == 1


def other_data(tmp_path):
    documents = []
    for j in range(1, 30):
        documents.append("".join(chr(97 + (i * j + j // 7) % 26) for i in range(3000)))
    text = tmp_path / "text.txt"
    text.write_text("\f".join(documents))
    return mf.DataConfig(train=str(text), sampler="cyclic", cache=str(tmp_path / "cache"))


def test_what_may_change_is_accepted(tmp_path):
    config = text_config(tmp_path)
    train(config, stop=3)
    other = attrs.evolve(
        config,
        train_iters=9,
        micro_batch_size=4,
        schedule=attrs.evolve(config.schedule, lr=3e-3),
        log=mf.LogConfig(progress=False, interval=2),
        precision=mf.PrecisionConfig(dtype="bf16"),
        optimizer=attrs.evolve(config.optimizer, clip_grad=0.5, use_distributed_optimizer=True),
    )
    assert [iteration for iteration, *_ in train(other).curve] == [3, 4, 5, 6, 7, 8, 9]


def test_not_resuming_refuses_a_directory_that_holds_checkpoints(tmp_path):
    config = text_config(tmp_path, steps=2)
    anew = with_checkpoint(config, resume=False)
    train(anew)
    problem = (
        "checkpoint.directory = .*: it already holds checkpoints; name an empty one, "
        "or set checkpoint.resume"
    )
    with pytest.raises(mf.ConfigError, match=problem):
        train(anew)
    (tmp_path / "file").touch()
    below = mf.CheckpointConfig(directory=str(tmp_path / "file" / "below"))
    problem = "checkpoint.directory = .*file/below': Not a directory; name a folder"
    with pytest.raises(mf.ConfigError, match=problem):
        train(attrs.evolve(config, checkpoint=below))


def test_a_directory_that_is_a_checkpoint_or_lies_in_one_is_refused(tmp_path):
    config = text_config(tmp_path, steps=2)
    train(config)
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "best").symlink_to("iteration-00000002")
    for name in ("iteration-00000002", "iteration-00000009", "best", "iteration-00000002/more"):
        with pytest.raises(mf.ConfigError, match="checkpoint.directory = .* is a checkpoint; name"):
            train(with_checkpoint(config, directory=str(tmp_path / name)))
    (tmp_path / "best").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    another = with_checkpoint(config, directory=str(tmp_path / "iteration-3" / "runs"))
    assert train(another).exit_code is None, "a name like a checkpoint's is not one"


def test_resume_must_refuses_to_start_fresh(tmp_path, capsys):
    config = text_config(tmp_path / "runs", steps=2)
    config = attrs.evolve(config, log=mf.LogConfig())
    must = with_checkpoint(config, resume="must")
    with pytest.raises(mf.ConfigError, match='holds no checkpoint, and checkpoint.resume = "must"'):
        train(must)
    assert not (tmp_path / "runs").exists()
    train(config, stop=3)
    assert f"starting fresh: {tmp_path}/runs holds no checkpoint\n" in capsys.readouterr().err
    longer = attrs.evolve(must, train_iters=3)
    assert [iteration for iteration, *_ in train(longer).curve] == [3]
    assert "fresh" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------ signals


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number, asynchronous", [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_a_signal_to_any_rank_saves_and_ends_all_with_code_0(number, asynchronous, pool, tmp_path):
    config = with_checkpoint(text_config(tmp_path, pp=2), asynchronous=asynchronous, interval=4)
    whole = pool(4, train, text_config(pp=2))
    results = pool(4, train, config, at=5, act=partial(send, number), rank=3)
    assert [one.exit_code for one in results] == [0] * 4
    assert list(checkpoints(tmp_path)) == [4, 5]
    assert_resumed(whole, pool(4, train, config), after=5)


def breaking_loader(config):
    """Micro-batches of three iterations; then the storage is gone."""
    yield from loader(attrs.evolve(config, train_iters=3))
    raise OSError("the storage is gone")


def test_a_signal_saves_before_the_next_batch_is_read(tmp_path):
    config = text_config(tmp_path)
    stopped = train(config, at=3, act=partial(send, signal.SIGTERM), data=breaking_loader)
    assert stopped.exit_code == 0 and list(checkpoints(tmp_path)) == [2, 3]
    with pytest.raises(OSError, match="the storage is gone"):
        train(with_checkpoint(config, directory=str(tmp_path / "other")), data=breaking_loader)


def test_signal_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS]
    train(text_config(tmp_path, steps=2), stop=1)
    assert [signal.getsignal(number) for number in SIGNALS] == before


KILLED_ONCE = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import megafn as mf
from checkpoint_runs import text_config

def watch(metrics):
    if os.environ["RANK"] == "0":
        print("iteration", metrics.iteration, metrics.loss, flush=True)
    is_first_run = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if metrics.iteration == 5 and os.environ["RANK"] == "1" and is_first_run:
        os.kill(os.getpid(), signal.SIGKILL)

mf.train(text_config({directory!r}), on_metrics=[watch])
"""


def test_torchrun_restarts_and_the_run_resumes(tmp_path):
    script = tmp_path / "script.py"
    tests = str(Path(__file__).parent)
    script.write_text(KILLED_ONCE.format(tests=tests, directory=str(tmp_path / "there")))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = run_script([*torchrun, "--max-restarts", "1", script])
    lines = [line.split() for line in ran.stdout.splitlines() if line.startswith("iteration")]
    assert ran.returncode == 0, ran.stderr[-3000:]
    iterations = [int(iteration) for _, iteration, _ in lines]
    assert iterations in ([1, 2, 3, 4, 5, 5, 6, 7], [1, 2, 3, 4, 5, 6, 5, 6, 7])
    losses = {(iteration, loss) for _, iteration, loss in lines}
    assert len(losses) == 7

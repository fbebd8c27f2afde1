"""Checkpoints: written in one layout, they go on in any other as if nothing had happened; whole or absent; damage is named."""

import ast
import contextlib
import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections import Counter
from functools import cache, partial
from pathlib import Path
from unittest import mock

import attrs
import pytest
import torch

import megafn as mf
import test_bert
import test_t5
from equivalence import assert_equal, local_parts, share, stack, tiny, uneven
from megafn.runtime.checkpoint import atomic_files as durable
from megafn.runtime.checkpoint import autosave as saver
from megafn.runtime.checkpoint import checkpoint, resume
from megafn.runtime.checkpoint import state_boxes as pieces
from megafn.runtime.model.weights import local_parameters
from pool import PoolError, run_script

SP, DIST, UNTIED = (
    dict(sequence_parallel=True),
    dict(use_distributed_optimizer=True),
    dict(tie_word_embeddings=False),
)
T5 = test_t5.T5 | dict(num_query_groups=None)
BERT = dict(family="bert", num_tokentypes=2, bert_binary_head=True)
SAVED = 3  # the iteration of the checkpoint, of 6


def config_of(**changes):
    return tiny(**dict(steps=6, num_query_groups=2, warmup_iters=1) | changes)


def as_of_two(config, iteration):
    """`uneven` as micro-batches of two rows would have it."""
    data = {"gpt": uneven, "bert": test_bert.uneven, "t5": test_t5.pairs}[config.model.family]
    return data(attrs.evolve(config, micro_batch_size=2), iteration)


def probe(state):
    if state.config.model.family == "t5":  # its decoder wants an input of its own
        asked = attrs.evolve(state, config=attrs.evolve(state.config, return_logits="every_stage"))
        rows = [
            {key: row[key] for key in ("input_ids", "labels")}
            for row in test_t5.pairs(state.config, 0)[: state.config.micro_batch_size]
        ]
        (found,) = mf.evaluate(asked, [[stack(rows)]], mf.step_fn("t5")).logits
        return found[0]
    found = mf.logits(state, torch.arange(40).reshape(2, 20) % state.config.model.vocab_size)
    return (
        found[0] if isinstance(found, tuple) else found
    )  # BERT's second are those of the order of sentences


def run(config, directory=None, at=None, stop=None):
    """Trains to the end (or `stop`): from iteration 0, or from the checkpoint in `directory`; saves at iteration `at`.

    (curve, parameters at first, at last, the logits where it loaded or saved)
    """
    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size(), model=config.model), timeout_seconds=60
    ) as pg:
        state, logits = mf.setup(config, pg), None
        start, curve = local_parts(state), []
        if directory is not None and at is None:
            state = mf.load(state, directory)
            logits = probe(state)
        for iteration in range(state.iteration, stop or config.train_iters):
            state, metrics = mf.train_step(
                state,
                share(as_of_two(config, iteration), config, pg),
                mf.step_fn(config.model.family),
            )
            curve.append((metrics.loss, metrics.grad_norm))
            if state.iteration == at:
                mf.save(state, directory)
                logits = probe(state)
        return curve, start, local_parts(state), logits


@pytest.fixture(scope="session")
def saved(pool, tmp_path_factory):
    """(directory, what `run` gave) of a layout that saved; made once a session."""

    @cache
    def made(processes, config):
        directory = tmp_path_factory.mktemp("checkpoint")
        return directory, pool(processes, run, config, directory, SAVED)

    return made


ONE = (1, {})
PAIRS = {  # name: ((processes, layout) that saves, (processes, layout) that loads, what both ask of the model)
    "tp2-pp2-to-one": ((4, dict(tp=2, pp=2)), ONE),
    "one-to-tp2-pp2-sp": (ONE, (4, dict(tp=2, pp=2, **SP))),
    "tp2-sp-to-tp4-vocabulary-padded-otherwise": (
        (2, dict(tp=2, **SP)),
        (4, dict(tp=4)),
        dict(num_query_groups=4),
    ),
    "tp4-to-dp2-dist": ((4, dict(tp=4)), (2, DIST), dict(num_query_groups=4)),
    "dp4-dist-to-one": ((4, DIST), ONE),
    "dp2-dist-to-dp4-dist": ((2, DIST), (4, DIST)),
    "dp4-dist-to-tp2-cp2": ((4, DIST), (4, dict(tp=2, cp=2))),
    "pp2-dp2-dist-to-tp2-dp2-dist": ((4, dict(pp=2, **DIST)), (4, dict(tp=2, **DIST))),
    "pp2-vpp2-to-pp4": ((2, dict(pp=2, vpp=2)), (4, dict(pp=4))),
    "pp4-to-pp2-vpp2-dp2-dist": ((4, dict(pp=4)), (4, dict(pp=2, vpp=2, **DIST))),
    "cp2-dp2-dist-to-pp2-first3": (
        (4, dict(cp=2, **DIST)),
        (2, dict(pp=2, num_layers_in_first_pipeline_stage=3)),
    ),
    "tp2-pp2-dp2-sp-dist-to-cp2": ((8, dict(tp=2, pp=2, **SP, **DIST)), (2, dict(cp=2))),
    "cp2-to-tp2-pp2-dp2-sp-dist": (
        (2, dict(cp=2)),
        (8, dict(tp=2, pp=2, order="pp-dp-cp-ep-tp", **SP, **DIST)),
    ),
    "untied-tp2-pp2-to-dp2-dist": ((4, dict(tp=2, pp=2)), (2, DIST), UNTIED),
    "untied-gated-pp2-dp2-dist-to-tp2-sp": (
        (4, dict(pp=2, **DIST)),
        (2, dict(tp=2, **SP)),
        dict(activation="swiglu", normalization="RMSNorm", ffn_hidden_size=40, **UNTIED),
    ),
    "gated-tp2-dp2-dist-to-pp2": (
        (4, dict(tp=2, **DIST)),
        (2, dict(pp=2)),
        dict(activation="geglu", position_embedding="rope"),
    ),
    "bert-tp2-pp2-to-dp2-dist": ((4, dict(tp=2, pp=2)), (2, DIST), BERT),
    "bert-pp2-dp2-dist-to-tp2-sp": ((4, dict(pp=2, **DIST)), (2, dict(tp=2, **SP)), BERT),
    "t5-relative-pp4-to-tp2-dp2-dist": (
        (4, dict(pp=4)),
        (4, dict(tp=2, **DIST)),
        T5 | test_t5.RELATIVE,
    ),
    "t5-pp2-dp2-dist-to-one": ((4, dict(pp=2, **DIST)), ONE, T5),
    "t5-one-to-pp2-tp2-sp": (ONE, (4, dict(pp=2, tp=2, **SP)), T5 | UNTIED),
    "sgd-tp2-to-dp2": ((2, dict(tp=2)), (2, {}), dict(name="sgd", momentum=0.9, lr=0.5, eps=1e-8)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_checkpoint_goes_on_in_another_layout(name, pool, saved):
    (n, first), (m, second), *base = PAIRS[name]
    base = base[0] if base else {}
    _, reference = saved(1, config_of(**base))
    directory, before = saved(n, config_of(**base, **first))
    after = pool(m, run, config_of(**base, **second), directory)
    curve, start, end, _ = reference[0]
    assert_equal((curve[SAVED:], start, end), [result[:3] for result in after])
    torch.testing.assert_close(after[0][3], before[0][3], rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ exact resume


@pytest.mark.parametrize(
    "n, layout",
    [
        (1, {}),
        (1, BERT),
        (1, T5),
        (1, dict(dtype="bf16")),
        (2, dict(tp=2, **SP)),
        (2, DIST | dict(dtype="bf16")),
        (4, dict(pp=2, vpp=2, **DIST)),
        (4, dict(cp=2, tp=2)),
    ],
)
def test_the_same_layout_goes_on_bit_for_bit_dropout_included(n, layout, pool, tmp_path):
    config = config_of(hidden_dropout=0.1, attention_dropout=0.1, **layout)
    whole = pool(n, run, config, tmp_path, SAVED)
    for (curve, _, end, logits), (rest, _, other, again) in zip(
        whole, pool(n, run, config, tmp_path)
    ):
        assert rest == curve[SAVED:] and torch.equal(logits, again)
        assert all(torch.equal(a[1], b[1]) for a, b in zip(end, other, strict=True))


class Stopped(Exception):
    pass


def train(config, *, stop=None, at=None, act=None, rank=None, data=None, **arguments):
    """`train` of one rank: [(iteration, loss, grad norm)], parameters where it came to its end, exit code, and what it warned of.

    At iteration `stop` it is stopped hard; at iteration `at`, `act` is done on `rank` (None: on all).
    """
    seen, end, code = [], None, None
    if data is not None:
        arguments["batches"] = data(config)

    def watch(metrics):
        seen.append((metrics.iteration, metrics.loss, metrics.grad_norm))
        if metrics.iteration == at and rank in (None, int(os.environ.get("RANK", "0"))):
            act()
        if metrics.iteration == stop:
            raise Stopped

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            end = local_parts(mf.train(config, on_metrics=[watch], **arguments))
        except Stopped:
            pass
        except SystemExit as left:
            code = left.code
    return (
        seen,
        end,
        code,
        [str(one.message) for one in heard if issubclass(one.category, UserWarning)],
    )


def text_config(directory=None, **changes):
    """Dropout, real text; saves every other iteration."""
    config = tiny(
        **dict(
            steps=7,
            vocab_size=256,
            hidden_dropout=0.1,
            global_batch_size=8,
            warmup_iters=1,
            eval_iters=0,
        )
        | changes
    )
    return attrs.evolve(
        config,
        data=mf.DataConfig(train=mf.demo_text(), sampler="cyclic"),
        log=mf.LogConfig(progress=False),
        checkpoint=mf.CheckpointConfig(directory=str(directory), interval=2, keep_last=0)
        if directory
        else mf.CheckpointConfig(),
    )


def same(one, other):
    return all(torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))


def test_train_goes_on_by_itself_bit_for_bit(pool, tmp_path):
    config = text_config(tmp_path, tp=2)
    whole = pool(4, train, attrs.evolve(config, checkpoint=mf.CheckpointConfig()))
    pool(4, train, config, stop=5)
    assert list(checkpoint.checkpoints(tmp_path)) == [2, 4]
    for (seen, end, *_), (rest, other, *_) in zip(whole, pool(4, train, config)):
        assert rest == seen[4:] and same(end, other)
    assert list(checkpoint.checkpoints(tmp_path)) == [2, 4, 6, 7]
    assert all(
        seen == [] and same(one[1], end)
        for one, (seen, end, *_) in zip(whole, pool(4, train, config))
    ), "it is finished"


def test_what_a_run_goes_on_from_and_where_a_signal_ends_it_is_told(tmp_path, capsys):
    config = text_config(tmp_path)
    config = attrs.evolve(config, log=attrs.evolve(config.log, progress=True))

    def leave(metrics):
        if metrics.iteration == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(SystemExit):
        mf.train(config, on_metrics=[leave])
    assert (
        f"SIGUSR1: iteration 3 is saved in {tmp_path}; the same command goes on from there\n"
        in capsys.readouterr().err
    )
    mf.train(config)
    told = capsys.readouterr().err
    assert (
        f"going on from {tmp_path}/iteration-00000003: 4 of 7 iterations are left\n" in told
        and "3/7|" in told
        and "0/7|" not in told
    )
    mf.train(config)
    assert (
        f"{tmp_path}/iteration-00000007 is the end of this run of 7 iterations: nothing is left to do\n"
        in capsys.readouterr().err
    )
    with pytest.warns(
        UserWarning,
        match="train_iters = 9: the checkpoint was written with 7. If iteration 5 ran with that, this is another step",
    ):
        mf.replay(attrs.evolve(config, train_iters=9), 5)
    assert (
        f"replaying iterations 5 to 5 from {tmp_path}/iteration-00000004" in capsys.readouterr().err
    )


def test_two_runs_in_one_directory_write_into_folders_of_their_own(tmp_path):
    """The second one takes the first one's half-written folder away; the first is told, and nothing of both is mixed."""
    config = tiny()
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        state = mf.setup(config, pg)
        one, other = (checkpoint.begin_save(state, tmp_path) for _ in range(2))
        with pytest.raises(mf.CheckpointError, match="could not be written"):
            checkpoint.finish_save(one)
        assert mf.load(state, checkpoint.finish_save(other)).iteration == 0
        assert os.listdir(tmp_path) == ["iteration-00000000"]


def test_another_dp_reads_the_same_samples(pool, tmp_path):
    config = text_config(tmp_path, hidden_dropout=0.0)
    ((whole, *_),) = pool(1, train, attrs.evolve(config, checkpoint=mf.CheckpointConfig()))
    pool(
        4,
        train,
        attrs.evolve(
            config, optimizer=attrs.evolve(config.optimizer, use_distributed_optimizer=True)
        ),
        stop=5,
    )
    rest = pool(2, train, attrs.evolve(config, micro_batch_size=1))[0][0]
    assert [one[0] for one in rest] == [5, 6, 7]
    torch.testing.assert_close(torch.tensor(rest), torch.tensor(whole[4:]), rtol=0, atol=1e-4)


def loader(config, start=0, draw=0):
    """Micro-batches of one data-parallel rank, as a user's loader gives them: the same each time it is iterated."""
    for iteration in range(start, config.train_iters):
        rows = as_of_two(config, iteration + draw)
        yield from (
            stack(rows[i : i + config.micro_batch_size])
            for i in range(0, len(rows), config.micro_batch_size)
        )


@pytest.mark.parametrize("data", [None, loader], ids=["text", "batches"])
@pytest.mark.parametrize(
    "family",
    [
        dict(family="bert", bert_binary_head=True, num_tokentypes=2),
        dict(family="t5", decoder_seq_length=16),
    ],
    ids=["bert", "t5"],
)
def test_every_family_goes_on_bit_for_bit_from_both_kinds_of_data(family, data, tmp_path):
    config = text_config(tmp_path, steps=5, **family)
    config = config if data is None else attrs.evolve(config, data=None)
    whole, end, *_ = train(attrs.evolve(config, checkpoint=mf.CheckpointConfig()), data=data)
    assert train(config, stop=3, data=data)[0] == whole[:3]
    rest, other, _, heard = train(config, data=data)
    assert rest == whole[2:] and same(end, other) and heard == []


def from_there(config):
    return lambda consumed_samples: loader(config, consumed_samples // config.global_batch_size)


def test_batches_of_ones_own_go_on_behind_what_was_read(tmp_path):
    config = attrs.evolve(text_config(tmp_path), data=None)
    whole, end, *_ = train(attrs.evolve(config, checkpoint=mf.CheckpointConfig()), data=loader)
    assert train(config, stop=5, data=loader)[0] == whole[:5]
    for data in (loader, from_there):
        rest, other, _, heard = train(config, data=data)
        assert rest == whole[4:] and same(end, other) and heard == []
        for iteration in (6, 7):
            shutil.rmtree(tmp_path / f"iteration-0000000{iteration}")
    heard = train(config, data=partial(loader, draw=50))[3]
    assert len(heard) == 1 and "micro-batch 12 is not the one that was read before" in heard[0]


@pytest.mark.parametrize(
    "change, told",
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
        (dict(data="other"), "is not the one that was read before the checkpoint"),
    ],
)
def test_a_config_of_another_run_is_refused(change, told, tmp_path):
    train(text_config(tmp_path), stop=5)
    if change.get("data") == "other":
        text = tmp_path / "text.txt"
        text.write_text(
            "\f".join(
                "".join(chr(97 + (i * j + j // 7) % 26) for i in range(3000)) for j in range(1, 30)
            )
        )
        change = dict(
            data=mf.DataConfig(train=str(text), sampler="cyclic", cache=str(tmp_path / "cache"))
        )
    other = text_config(
        tmp_path,
        **{key: value for key, value in change.items() if key not in ("data", "train_iters")},
    )
    other = attrs.evolve(
        other, **{key: value for key, value in change.items() if key in ("data", "train_iters")}
    )
    with pytest.raises(mf.ConfigError, match=".*") as refused:
        train(other)
    assert told in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_what_may_change_is_taken(tmp_path):
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
    assert [iteration for iteration, *_ in train(other)[0]] == [3, 4, 5, 6, 7, 8, 9]


def test_not_resuming_refuses_a_directory_that_holds_checkpoints(tmp_path):
    config = text_config(tmp_path, steps=2)
    anew = attrs.evolve(config, checkpoint=attrs.evolve(config.checkpoint, resume=False))
    train(anew)
    with pytest.raises(
        mf.ConfigError,
        match="checkpoint.directory = .*: it holds checkpoints already; name an empty one, or set checkpoint.resume",
    ):
        train(anew)
    (tmp_path / "file").touch()
    with pytest.raises(
        mf.ConfigError, match="checkpoint.directory = .*file/below': Not a directory; name a folder"
    ):
        train(
            attrs.evolve(
                config, checkpoint=mf.CheckpointConfig(directory=str(tmp_path / "file" / "below"))
            )
        )


# ---------------------------------------------------------------------------------------------------- retention


def test_what_is_kept(tmp_path):
    config = text_config(tmp_path, steps=9)
    train(
        attrs.evolve(
            config,
            checkpoint=attrs.evolve(config.checkpoint, interval=1, keep_last=2, keep_every=3),
        )
    )
    assert list(checkpoint.checkpoints(tmp_path)) == [3, 6, 8, 9]
    assert [path.name for path in tmp_path.glob(".*")] == []


# ------------------------------------------------------------------------------------------- crashes and failures


class Crash(BaseException):
    """The process ends here: no handler of an Exception runs."""


def effects(monkeypatch, at=None, flushed=None):
    """Counts what `save` does to the disk; the `at`-th effect does not happen, nor does anything behind it. Returns the names done."""
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
        (durable, "write"),
        (durable, "write_tensors"),
        (checkpoint, "write"),
        (checkpoint, "write_tensors"),
    ):
        wrap(owner, name)
    return done


def test_a_crash_between_any_two_effects_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    config = config_of(steps=4)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        state, at, finished, survived = mf.setup(config, pg), 0, False, []
        for iteration in range(2):
            state, _ = mf.train_step(
                state, share(uneven(config, iteration), config, pg), mf.step_fn("gpt")
            )
            if iteration == 0:
                mf.save(state, tmp_path)
        values = {1: local_parts(mf.load(mf.setup(config, pg), tmp_path)), 2: local_parts(state)}
        while not finished:
            with monkeypatch.context() as patched:
                done = effects(patched, at)
                try:
                    mf.save(state, tmp_path)
                    finished = True
                except Crash:
                    assert len(done) == at
            newest = mf.latest(tmp_path)
            found = mf.load(mf.setup(config, pg), tmp_path)
            assert (
                same(local_parts(found), values[found.iteration])
                and newest.name == f"iteration-{found.iteration:08d}"
            )
            assert found.iteration == (2 if "rename" in done else 1)
            assert (
                resume._remove_leftovers(tmp_path)[-1] == newest
                and [path.name for path in tmp_path.glob(".*")] == []
            )
            survived.append(found.iteration)
            if found.iteration == 2:
                shutil.rmtree(newest)
            at += 1
        assert len(survived) > 10 and set(survived) == {1, 2} and survived == sorted(survived)


def test_everything_is_flushed_before_the_checkpoint_has_its_name_and_the_name_after(
    tmp_path, monkeypatch
):
    flushed, renamed = [set()], []

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
    assert (
        renamed == [path]
        and {file.stat().st_ino for file in (path, *path.iterdir())} <= before
        and path.parent.stat().st_ino in after
    )


def no_space(rank, iteration):
    """This rank's disk is full while it writes the checkpoint of that iteration."""
    real = durable.write_tensors

    def full(path, tensors):
        if int(os.environ.get("RANK", "0")) == rank and f"{iteration:08d}" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, tensors)

    checkpoint.write_tensors = full
    return real


def train_with_full_disk(config, rank, iteration):
    real = no_space(rank, iteration)
    try:
        return train(config)
    finally:
        checkpoint.write_tensors = real


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_told_once_and_training_goes_on(asynchronous, pool, tmp_path):
    config = text_config(tmp_path)
    config = attrs.evolve(
        config, checkpoint=attrs.evolve(config.checkpoint, asynchronous=asynchronous)
    )
    whole = pool(2, train, attrs.evolve(config, checkpoint=mf.CheckpointConfig()))
    results = pool(2, train_with_full_disk, config, 1, 4)
    assert [seen for seen, *_ in results] == [seen for seen, *_ in whole]
    assert list(checkpoint.checkpoints(tmp_path)) == [2, 6, 7] and not list(tmp_path.glob(".*"))
    heard = [heard for *_, heard in results]
    assert (
        len(heard[0]) == 1
        and "No space left on device" in heard[0][0]
        and "training goes on" in heard[0][0]
        and heard[1] == []
    )


def test_a_file_that_may_not_grow_is_an_error_of_save_itself(tmp_path):
    code = f"""
import resource, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
import megafn as mf
from equivalence import tiny
config = tiny()
with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
    state = mf.setup(config, pg)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        mf.save(state, {str(tmp_path)!r})
    except mf.CheckpointError as error:
        print("told:", error)
print(mf.latest({str(tmp_path)!r}))
"""
    ran = run_script(["-W", "ignore", "-c", code])
    assert (
        "told: " in ran.stdout
        and "File too large" in ran.stdout
        and ran.stdout.endswith("None\n")
        and list(tmp_path.iterdir()) == []
    ), ran


# ------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with checkpoints of iterations 2 and 4, to be copied; and the uninterrupted curve."""
    directory = tmp_path_factory.mktemp("two")
    whole = train(text_config())
    train(text_config(directory), stop=5)
    return directory, whole


def copy_of(two, tmp_path):
    shutil.copytree(two[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, mf.latest(tmp_path)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json", "SHA256SUMS"])
def test_one_flipped_bit_is_named_with_its_file(name, two, tmp_path):
    directory, newest = copy_of(two, tmp_path)
    file, draw = newest / name, random.Random(name)
    data = file.read_bytes()
    config = text_config(directory)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        state = mf.setup(config, pg)
        before = local_parts(state)
        for _ in range(30):
            at, bit = draw.randrange(len(data)), draw.randrange(8)
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            with pytest.raises(mf.CheckpointError, match="is damaged") as told:
                mf.load(state, directory)
            assert str(newest) in str(told.value) and (
                name == "SHA256SUMS" or name in str(told.value)
            )
        assert same(before, local_parts(state)), "the state was touched"
        file.write_bytes(data)
        assert mf.load(state, directory).iteration == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: os.truncate(file, file.stat().st_size - 1),
        lambda file: os.truncate(file, 0),
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes() + b" "),
    ],
    ids=["truncated", "empty", "missing", "longer"],
)
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json", "SHA256SUMS"])
def test_a_truncated_or_missing_file_is_named_and_the_checkpoint_before_is_used_if_allowed(
    name, spoil, two, tmp_path
):
    directory, newest = copy_of(two, tmp_path)
    spoil(newest / name)
    config = text_config(directory)
    with pytest.raises(
        mf.CheckpointError,
        match=f'{newest.name}/{name} is damaged.*set checkpoint.on_damage to "previous"',
    ):
        train(config)
    seen, end, _, heard = train(
        attrs.evolve(config, checkpoint=attrs.evolve(config.checkpoint, on_damage="previous"))
    )
    assert (
        seen == two[1][0][2:]
        and same(end, two[1][1])
        and len(heard) == 1
        and "the checkpoint before: iteration-00000002" in heard[0]
    )
    assert (directory / f"damaged-1-{newest.name}").exists() and list(
        checkpoint.checkpoints(directory)
    ) == [2, 4, 6, 7]


def test_where_no_checkpoint_is_whole_the_run_does_not_start_anew_in_silence(two, tmp_path):
    directory, _ = copy_of(two, tmp_path)
    for path in checkpoint.checkpoints(directory).values():
        (path / "manifest.json").unlink()
    config = text_config(directory)
    with (
        pytest.raises(mf.CheckpointError, match="no checkpoint in it is whole"),
        pytest.warns(UserWarning, match="is damaged"),
    ):
        mf.train(
            attrs.evolve(config, checkpoint=attrs.evolve(config.checkpoint, on_damage="previous"))
        )


class Bomb:
    def __reduce__(self):
        return exec, ("import builtins; builtins.exploded = True",)


@pytest.mark.parametrize(
    "name",
    [
        ".metadata",
        "common.pt",
        "__0_0.distcp",
        "rank-00000.safetensors",
        "manifest.json",
        "SHA256SUMS",
    ],
)
def test_nothing_in_a_checkpoint_is_executed(name, two, tmp_path):
    import builtins
    import hashlib

    directory, newest = copy_of(two, tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert builtins.__dict__.pop("exploded"), "the bomb works"
    for data in (pickle.dumps(Bomb()), None):
        if data is None:
            with open(newest / name, "wb") as file:
                torch.save(Bomb(), file)
        else:
            (newest / name).write_bytes(data)
        sums = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in newest.iterdir()
            if file.name != "SHA256SUMS"
        }
        if name != "SHA256SUMS":  # the attacker writes the checksums too
            (newest / "SHA256SUMS").write_text(
                "".join(f"{digest}  {file}\n" for file, digest in sums.items())
            )
        try:
            train(text_config(directory), stop=5)
        except ValueError:  # whatever it says
            pass
        assert not hasattr(builtins, "exploded")


def test_the_code_that_reads_checkpoints_knows_no_pickle():
    for module in (checkpoint, durable, pieces, resume, saver):
        tree = ast.walk(ast.parse(Path(module.__file__).read_text()))
        names = {
            node.id if isinstance(node, ast.Name) else ast.unparse(node)
            for node in tree
            if isinstance(node, (ast.Name, ast.Attribute))
        }
        assert not names & {"pickle", "eval", "exec", "torch.load"}


def test_the_checksums_are_those_of_sha256sum(two):
    for path in checkpoint.checkpoints(two[0]).values():
        ran = subprocess.run(
            ["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=path, capture_output=True, text=True
        )
        assert ran.returncode == 0 and ran.stdout.count(": OK") == len(list(path.iterdir())) - 1


# --------------------------------------------------------------------------------------------- what is in the files


def test_every_element_is_written_once_and_evenly_shared_out(saved):
    directory, _ = saved(4, config_of(pp=2))
    path = mf.latest(directory)
    manifest = json.loads((path / "manifest.json").read_text())
    sizes = [size for _, size in sorted(manifest["files"].items())]
    assert len(sizes) == 4 and max(sizes) < 1.5 * min(sizes)
    from safetensors.torch import load_file

    stored = {name: load_file(path / name) for name in manifest["files"]}
    assert sum(len(one) for one in stored.values()) == sum(
        len(tensor["pieces"]) for tensor in manifest["tensors"].values()
    )
    assert sum(t.numel() for one in stored.values() for t in one.values()) == sum(
        torch.Size(t["shape"]).numel() for t in manifest["tensors"].values()
    )
    assert manifest["tensors"]["parameter/embedding.word_embeddings.weight"]["shape"] == [97, 32]


def test_a_second_save_of_an_iteration_is_refused(tmp_path):
    config = config_of(steps=2)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        path = mf.save(mf.setup(config, pg), tmp_path)
        with pytest.raises(
            mf.CheckpointError, match=f"{path} is there already; save to another directory"
        ):
            mf.save(mf.setup(config, pg), tmp_path)
        with pytest.raises(
            mf.CheckpointError,
            match="holds no complete checkpoint; name a folder that `save` wrote",
        ):
            mf.load(mf.setup(config, pg), tmp_path / "elsewhere")


def with_buffer(config, pg, **stage):
    chunk = mf.build_chunk(config, pg, **stage)
    chunk.decoder.register_buffer("running_mean", torch.zeros(3))
    return chunk


def test_a_persistent_buffer_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(
        mf.ConfigError,
        match="TransformerBlock has the buffer 'running_mean' at module.decoder; make it a parameter",
    ):
        train(
            text_config(tmp_path),
            model=with_buffer,
            at=1,
            act=partial(pytest.fail, "it trained first"),
        )
    assert list(tmp_path.iterdir()) == []


def frozen_words(config, pg, **stage):
    chunk = mf.build_chunk(config, pg, **stage)
    for part in local_parameters(chunk, config.model, pg):
        part.parameter.requires_grad_("word_embeddings" not in part.name)
    return chunk


@pytest.mark.parametrize("layout", [{}, DIST])
def test_frozen_parameters_are_saved_and_stay_as_they_were(layout, tmp_path):
    config = text_config(tmp_path, tie_word_embeddings=False, **layout)
    whole = train(attrs.evolve(config, checkpoint=mf.CheckpointConfig()), model=frozen_words)
    train(config, model=frozen_words, stop=5)
    rest = train(config, model=frozen_words)
    assert rest[0] == whole[0][4:] and same(rest[1], whole[1])


# ---------------------------------------------------------------------------------------------------- asynchronous


def test_asynchronous_saving_writes_what_the_state_was(pool, tmp_path):
    """The thread is held back until training is two steps further: a copy that is none would hold other numbers."""
    config = text_config(tmp_path / "there", tp=2)
    whole = pool(4, train, text_config(tp=2))
    results = pool(
        4,
        slow_writer,
        attrs.evolve(
            config, checkpoint=attrs.evolve(config.checkpoint, asynchronous=True, interval=4)
        ),
    )
    assert [seen for seen, *_ in results] == [seen[:7] for seen, *_ in whole]
    shutil.rmtree(tmp_path / "there" / "iteration-00000007")
    assert list(checkpoint.checkpoints(tmp_path / "there")) == [4]
    for (seen, end, *_), (rest, other, *_) in zip(whole, pool(4, train, config)):
        assert rest == seen[4:] and same(end, other)


def slow_writer(config):
    real, go = durable.write_tensors, threading.Event()

    def held(path, tensors):
        assert threading.current_thread() is threading.main_thread() or go.wait(30)
        return real(path, tensors)

    checkpoint.write_tensors = held
    try:
        return train(config, at=6, act=go.set)
    finally:
        checkpoint.write_tensors = real


# --------------------------------------------------------------------------------------------------------- signals


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number, asynchronous", [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_a_signal_to_any_rank_saves_and_ends_all_with_code_0(number, asynchronous, pool, tmp_path):
    config = text_config(tmp_path, pp=2)
    config = attrs.evolve(
        config, checkpoint=attrs.evolve(config.checkpoint, asynchronous=asynchronous, interval=4)
    )
    whole = pool(4, train, text_config(pp=2))
    results = pool(4, train, config, at=5, act=partial(send, number), rank=3)
    assert [code for _, _, code, _ in results] == [0] * 4 and list(
        checkpoint.checkpoints(tmp_path)
    ) == [4, 5]
    for (seen, end, *_), (rest, other, *_) in zip(whole, pool(4, train, config)):
        assert rest == seen[5:] and same(end, other)


def test_handlers_are_as_they_were(tmp_path):
    before = [signal.getsignal(number) for number in saver.SIGNALS]
    train(text_config(tmp_path, steps=2), stop=1)
    assert [signal.getsignal(number) for number in saver.SIGNALS] == before


def test_torchrun_restarts_and_the_run_goes_on(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import megafn as mf
from test_checkpoint import text_config

def watch(metrics):
    if os.environ["RANK"] == "0":
        print("iteration", metrics.iteration, metrics.loss, flush=True)
    if metrics.iteration == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

mf.train(text_config({str(tmp_path / "there")!r}), on_metrics=[watch])
""")
    ran = run_script(
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "1",
            script,
        ]
    )
    seen = [line.split() for line in ran.stdout.splitlines() if line.startswith("iteration")]
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [int(one[1]) for one in seen] in (
        [1, 2, 3, 4, 5, 5, 6, 7],
        [1, 2, 3, 4, 5, 6, 5, 6, 7],
    ) and len({(one[1], one[2]) for one in seen}) == 7


# ----------------------------------------------------------------------------------------------------------- kills


def struck(config, rank, at, strike):
    """`train` in which rank `rank` calls `strike` at the `at`-th of what it does to the disk, or after `at` seconds where that is a fraction."""
    count = 0

    def wrapped(real):
        def effect(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                strike()
            return real(*args, **kwargs)

        return effect

    with contextlib.ExitStack() as stack:
        if int(os.environ["RANK"]) == rank:
            for owner, name in (
                (os, "fsync"),
                (os, "rename"),
                (durable, "write_tensors"),
                (checkpoint, "write_tensors"),
                (checkpoint, "write"),
            ):
                stack.enter_context(mock.patch.object(owner, name, wrapped(getattr(owner, name))))
            if isinstance(at, float):
                threading.Timer(at, strike).start()
        return train(config)


def kill(victims):
    for victim in sorted(victims, key=os.getpid().__eq__):  # itself last
        os.kill(victim, signal.SIGKILL)


KILLS = int(os.environ.get("MEGAFN_KILLS", "20"))


@pytest.mark.timeout(60 + KILLS * 30)
def test_killed_runs_end_on_the_uninterrupted_curve(pool, tmp_path):
    """SIGKILL, 20 times (MEGAFN_KILLS=100 for more), of a random rank or of all at once: in the midst of what a save does to the disk, or at any time."""
    config = text_config(
        tmp_path, steps=8 * KILLS
    )  # many on a fast machine get far before the kill
    config = attrs.evolve(
        config, checkpoint=attrs.evolve(config.checkpoint, interval=1, keep_last=2)
    )
    whole = pool(2, train, attrs.evolve(config, checkpoint=mf.CheckpointConfig()))
    draw, stood, drawn = random.Random(1), 0, Counter()
    for turn in range(KILLS):
        rank, number, at_any_time = draw.randrange(2), draw.choice((1, 2)), turn % 3 == 0
        made = attrs.evolve(
            config, checkpoint=attrs.evolve(config.checkpoint, asynchronous=draw.random() < 0.5)
        )
        pids = pool(2, os.getpid)
        with pytest.raises(PoolError) as killed:
            pool(
                2,
                struck,
                made,
                rank,
                draw.uniform(0.05, 0.5)
                if at_any_time
                else draw.randrange(1, 24 if rank == 0 else 6),
                partial(kill, pids if number == 2 else [pids[rank]]),
            )
        assert str(killed.value).count("exit code -9") == number, killed.value
        drawn[number, at_any_time] += 1
        stood, before = max(checkpoint.checkpoints(tmp_path), default=0), stood
        assert stood >= before
    assert len(drawn) == 4 and 5 < stood < config.train_iters - 2, (drawn, stood)
    for (seen, end, *_), (rest, other, *_) in zip(whole, pool(2, train, config)):
        assert rest == seen[stood:] and same(end, other)
    assert list(checkpoint.checkpoints(tmp_path)) == [
        config.train_iters - 1,
        config.train_iters,
    ] and not list(tmp_path.glob(".*"))


# ----------------------------------------------------------------------------------------------------------- hangs

SECONDS = 6  # timeout_seconds, from the first step on


@pytest.mark.parametrize(
    "rank, at, strike, asynchronous, standing",
    [
        (
            1,
            3,
            partial(send, signal.SIGSTOP),
            False,
            1,
        ),  # before it writes its file for the second checkpoint
        (0, 10, partial(time.sleep, 60), False, 1),  # rank zero, before its folder is flushed
        (0, 17, partial(send, signal.SIGSTOP), False, 1),  # before it gets its name
        (0, 18, partial(time.sleep, 60), False, 2),  # behind that
        (
            1,
            3,
            partial(time.sleep, 60),
            True,
            1,
        ),  # in the thread that writes: the rank itself goes on until the next save
    ],
)
def test_a_rank_that_hangs_in_a_save_is_named_and_the_run_goes_on_from_the_last_whole_one(
    rank, at, strike, asynchronous, standing, pool, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "pool.GRACE", 5.0 if asynchronous else 1.0
    )  # as torchrun, the pool ends the rank that hangs once another one has failed
    config = text_config(tmp_path)
    whole = pool(2, train, attrs.evolve(config, checkpoint=mf.CheckpointConfig()))
    config = attrs.evolve(
        config, checkpoint=attrs.evolve(config.checkpoint, interval=1, asynchronous=asynchronous)
    )
    started = time.monotonic()
    with pytest.raises(PoolError) as hung:
        pool(2, struck, attrs.evolve(config, timeout_seconds=SECONDS), rank, at, strike)
    assert time.monotonic() - started < SECONDS + 30, (
        "it is bounded by the 60 s that the rank sleeps"
    )
    said = str(hung.value)
    named = rf"(rank {rank} hangs: |a rank hangs (.|\n)*(Ranks {rank} failed to pass|from rank {rank}\b))"
    assert re.search(rf"RuntimeError: saving {tmp_path}/iteration-00000002: {named}", said), said
    assert ("no answer" in said) == (not asynchronous), (
        said
    )  # a rank whose thread hangs comes to an end by itself
    assert list(checkpoint.checkpoints(tmp_path)) == list(range(1, standing + 1))
    for (seen, end, *_), (rest, other, *_) in zip(whole, pool(2, train, config)):
        assert rest == seen[standing:] and same(end, other)
    assert not list(tmp_path.glob(".*"))

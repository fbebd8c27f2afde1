"""A run survives what comes after a step, and reports before the first one what is knowable."""

import contextlib
import errno
import io
import json
import os
import resource
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import attrs
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

import megafn as mf
from bert_rows import bert_rows
from equivalence import share, short, uneven
from indexed_data import indexed
from megafn.runtime.checkpoint import save
from megafn.runtime.data.corpora import corpora
from megafn.runtime.parallel.object_collectives import all_ranks_arrive
from megafn.runtime.text.indexing import largest_id
from megafn.runtime.text.tokenizer import byte_tokenizer, identity_of
from pool import ROOT
from t5_rows import pairs

BERT = dict(family="bert", num_tokentypes=2, bert_binary_head=True)
T5 = dict(family="t5", decoder_seq_length=16)


def config(folder=None, *, data=None, model=None, **changes):
    """A tiny model and six iterations of two samples; saved in `folder`."""
    sizes = dict(num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=16, vocab_size=256)
    defaults = dict(
        model=mf.ModelConfig(**sizes | (model or {})),
        data=data,
        checkpoint=mf.CheckpointConfig(directory=None if folder is None else str(folder)),
        log=mf.LogConfig(progress=False),
        micro_batch_size=2,
        global_batch_size=2,
        train_iters=6,
        eval_iters=0,
    )
    return mf.TrainConfig(**defaults | changes)


def rows(count):
    return [{"input_ids": (torch.arange(16) + i) % 256} for i in range(count)]


def loader(count, **settings):
    return DataLoader(rows(count), batch_size=2, **settings)


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(rows(self.count))


def texts(folder, **contents):
    """Text files by name; returns a function from changes to a DataConfig of them."""
    for name, text in contents.items():
        (folder / f"{name}.txt").write_text(text)
    sources = {name: str(folder / f"{name}.txt") for name in contents}
    return mf.DataConfig(**sources, cache=str(folder / "cache"))


WORDS = "Plain words, and then some more of them. " * 60


# ----------------------------------------------------------------------- saved before all else


class Broken(Exception):
    pass


def broken_after(count):
    for _ in range(count):
        yield rows(2)[0] | {"input_ids": torch.stack([row["input_ids"] for row in rows(2)])}
    raise Broken


class BreaksLater:
    """Micro-batches that can be iterated anew, of which the second pass raises."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return broken_after(2 if self.passes < 2 else 0)


def trained(folder, *, broken, **layout):
    """How `train` ends if an evaluation or a sink fails after the second iteration."""
    made = config(
        folder,
        parallel=mf.ParallelConfig(**layout),
        global_batch_size=4,
        eval_iters=1,
        eval_interval=1 if broken == "evaluation" else 6,
        train_iters=6,
    )
    made = attrs.evolve(made, checkpoint=attrs.evolve(made.checkpoint, interval=2))

    def sink(metrics):
        if broken == "sink" and metrics.iteration == 2:
            raise Broken

    try:
        mf.train(
            made,
            batches=loader(40),
            valid_batches=BreaksLater() if broken == "evaluation" else loader(40),
            on_metrics=[sink],
        )
    except Broken:
        return sorted(os.listdir(folder))


@pytest.mark.parametrize("broken", ["evaluation", "sink"])
@pytest.mark.parametrize("layout", [dict(), dict(pp=2), dict(tp=2)], ids=["dp2", "pp2", "tp2"])
def test_what_is_due_is_saved_before_an_evaluation_or_a_sink_that_fails(
    broken, layout, pool, tmp_path
):
    for names in pool(2, trained, tmp_path, broken=broken, **layout):
        assert names == ["iteration-00000002"]


def test_the_last_iteration_is_saved_before_its_evaluation(tmp_path):
    with pytest.raises(Broken):
        mf.train(
            config(tmp_path, eval_iters=3, train_iters=3),
            batches=loader(40),
            valid_batches=broken_after(2),
        )
    assert mf.latest(tmp_path).name == "iteration-00000003"


@contextlib.contextmanager
def slow_disk():
    """A save in the background takes longer than what comes after it."""

    def slowly(path, tensors):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.7)
        return write_tensors(path, tensors)

    write_tensors = save.write_tensors
    with mock.patch.object(save, "write_tensors", slowly):
        yield


class BreaksOn:
    """A loader whose second micro-batch raises, on one rank or on all of them."""

    def __init__(self, rank=None):
        self.rank = rank

    def __iter__(self):
        if self.rank in (None, int(os.environ["RANK"])):
            return broken_after(1)
        return iter(loader(40))


def ended_while_saving(folder, **layout):
    """What `train` raises, and what is saved then, by what fails while a save is in progress."""
    cases = dict(
        evaluation=dict(valid_batches=BreaksOn()),
        evaluation_of_one=dict(valid_batches=BreaksOn(rank=1)),
        batches=dict(batches=BreaksOn()),
        batches_of_one=dict(batches=BreaksOn(rank=0)),
        sink=dict(on_metrics=[partial(breaking_sink, None)]),
        sink_of_one=dict(on_metrics=[partial(breaking_sink, 1)]),
    )
    found = {}
    for name, arguments in cases.items():
        directory = folder / name
        made = config(
            directory,
            parallel=mf.ParallelConfig(**layout),
            eval_iters=2,
            eval_interval=1 if "valid_batches" in arguments else 6,
            global_batch_size=4 if layout == {} else 2,
            timeout_seconds=20,
        )
        saving = attrs.evolve(made.checkpoint, interval=1, asynchronous=True)
        made = attrs.evolve(made, checkpoint=saving)
        given = dict(batches=loader(40), valid_batches=loader(40)) | arguments
        try:
            with slow_disk(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # equal shares
                mf.train(made, **given)
        except Exception as error:
            found[name] = type(error).__name__, sorted(os.listdir(directory))
    return found


def breaking_sink(rank, metrics):
    if rank in (None, int(os.environ["RANK"])):
        raise Broken


@pytest.mark.parametrize("layout", [dict(), dict(pp=2)], ids=["dp2", "pp2"])
def test_a_save_in_progress_is_published_before_an_error_ends_the_run(layout, pool, tmp_path):
    """On every rank, also if the error is that of one rank."""
    for found in pool(2, ended_while_saving, tmp_path, **layout):
        assert len(found) == 6
        assert set(map(repr, found.values())) == {"('Broken', ['iteration-00000001'])"}


def meetings():
    with mf.init_groups(mf.build_groups(mf.ParallelConfig(), 2), timeout_seconds=20) as pg:
        alone = pg.is_rank_zero and all_ranks_arrive("of one", pg, seconds=0.2)
        return alone, all_ranks_arrive("of both", pg, seconds=20)


def test_a_rank_that_is_alone_with_its_error_does_not_wait_long(pool):
    assert pool(2, meetings) == [(False, True)] * 2


# -------------------------------------------------------------------------- batches that are given


def test_a_short_last_batch_is_left_out_of_an_evaluation_and_ends_a_run(tmp_path):
    seen = []
    made = config(tmp_path, eval_iters=4, eval_interval=2)
    with pytest.warns(UserWarning, match="batches ended at iteration 4 of 6"):
        state = mf.train(made, batches=loader(9), valid_batches=loader(7), on_metrics=[seen.append])
    assert state.iteration == 4 and mf.latest(tmp_path).name == "iteration-00000004"
    assert [m.valid.count for m in seen if m.valid] == [3 * 2 * 15] * 2


def test_a_wrong_number_of_rows_before_the_end_is_an_error():
    with pytest.raises(ValueError, match="a micro-batch of 1 rows, where micro_batch_size = 2"):
        mf.train(config(), batches=DataLoader(rows(9), batch_size=1))


@pytest.mark.parametrize(
    "valid, said",
    [
        ([], "valid_batches: 0 micro-batches, fewer than the 1 of one global batch"),
        (DataLoader(rows(0), batch_size=2), "valid_batches: 0 micro-batches"),
        (DataLoader(Stream(0), batch_size=2), "valid_batches: it gives no micro-batch at all"),
        (iter(loader(40)), "valid_batches: an iterator .* evaluates 3 times"),
    ],
    ids=["list", "loader", "stream", "iterator"],
)
def test_validation_batches_that_cannot_do_are_refused_before_the_first_step(valid, said):
    seen = []
    with pytest.raises(mf.ConfigError, match=said):
        mf.train(
            config(eval_iters=2, eval_interval=2),
            batches=loader(40),
            valid_batches=valid,
            on_metrics=[seen.append],
        )
    assert not seen


class StartsOver:
    """Its own iterator, which each `iter` takes back to the start."""

    def __iter__(self):
        self.batches = iter(loader(9))
        return self

    def __next__(self):
        return next(self.batches)


def test_an_iterator_serves_a_single_evaluation_and_what_starts_over_every_one():
    for valid, interval in (
        (iter(loader(40)), None),
        (DataLoader(Stream(9), batch_size=2), 2),
        (StartsOver(), 2),
    ):
        seen = []
        mf.train(
            config(eval_iters=2, eval_interval=interval),
            batches=loader(40),
            valid_batches=valid,
            on_metrics=[seen.append],
        )
        counts = [m.valid.count for m in seen if m.valid]
        assert counts == [2 * 2 * 15] * (1 if interval is None else 3)


# ------------------------------------------------------------------------ texts and their ids


@pytest.mark.parametrize("family", [{}, BERT, T5], ids=["gpt", "bert", "t5"])
def test_the_held_out_set_stays_what_it_was_at_the_start(family, tmp_path):
    losses = []

    def meddle(metrics):
        if metrics.valid:
            losses.append(metrics.valid.loss)
        if metrics.iteration == 2:
            (tmp_path / "train.txt").write_text("Another text. It says other things. " * 90)
        if metrics.iteration == 4:
            (tmp_path / "train.txt").unlink()

    mf.train(
        config(
            tmp_path / "runs",
            data=attrs.evolve(texts(tmp_path, train=WORDS), split=(0.5, 0.5, 0.0)),
            model=family,
            schedule=mf.ScheduleConfig(lr=0.0),
            eval_iters=2,
            eval_interval=2,
        ),
        on_metrics=[meddle],
    )
    assert len(losses) == 3 and len(set(losses)) == 1
    assert mf.latest(tmp_path / "runs").name == "iteration-00000006"


@pytest.mark.parametrize("split", ["train", "valid"])
def test_ids_outside_the_vocabulary_are_refused_before_the_first_step(split, tmp_path):
    contents = dict(train=WORDS, valid=WORDS) | {split: WORDS + "café " * 9}
    seen = []
    made = config(data=texts(tmp_path, **contents), model=dict(vocab_size=128), eval_iters=2)
    with pytest.raises(mf.ConfigError) as caught:
        mf.train(made, on_metrics=[seen.append])
    for part in (f"data.{split}", f"{split}.txt", "195", "model.vocab_size = 128"):
        assert part in str(caught.value)
    assert not seen
    # where nothing reads it, or nothing in it is too large, it trains
    if split == "valid":
        without = attrs.evolve(made.data, valid=None)
        assert mf.train(attrs.evolve(made, eval_iters=0, data=without)).iteration == 6


def test_only_the_documents_that_are_read_count(tmp_path):
    """Whether indexing wrote the largest id down, or the data are another tool's."""
    small = [[1, 2, 3] * 10] * 8
    prefix = indexed(tmp_path / "data", [*small, [200] * 30, *small[:1]])
    data = mf.DataConfig(train=prefix, split=(0.8, 0.2, 0.0))
    made = config(data=data, model=dict(vocab_size=128))
    assert largest_id(prefix) is None
    written_by = attrs.asdict(identity_of(byte_tokenizer()))
    # an older megafn's file, and today's
    for name, others in (("data.ids.json", {}), ("data.tokens.json", {"tokenizer": written_by})):
        assert_valid_is_refused(made)
        (tmp_path / name).write_text(json.dumps({"largest_id": 200} | others))
        assert_valid_is_refused(made)
        (tmp_path / name).write_text(json.dumps({"largest_id": 100} | others))
        assert corpora(made, "valid")  # believed: batches are checked as they are read
        (tmp_path / name).unlink()
    (tmp_path / "data.ids.json").write_text("damaged")
    assert_valid_is_refused(made)


def assert_valid_is_refused(made):
    assert corpora(made, "train")
    with pytest.raises(mf.ConfigError, match="token id 200 for valid"):
        corpora(made, "valid")


def test_indexing_writes_down_the_largest_id(tmp_path):
    texts(tmp_path, train=WORDS + "é")
    prefixes = mf.index_text(tmp_path / "train.txt", tmp_path / "out", split=(0.9, 0.1, 0.0))
    assert [largest_id(prefix) for prefix in prefixes.values()] == [ord("w"), 0xC3]


@pytest.mark.parametrize("family", [BERT, T5], ids=["bert", "t5"])
def test_special_tokens_outside_the_vocabulary_are_refused_before_the_first_step(family, tmp_path):
    seen = []
    data = texts(tmp_path, train=WORDS)
    made = config(data=data, model=family | dict(vocab_size=128))
    with pytest.raises(mf.ConfigError, match="model.vocab_size = 128: the (cls|bos)"):
        mf.train(made, on_metrics=[seen.append])
    assert not seen


# -------------------------------------------------------------------------------------- logs


def test_a_log_that_cannot_be_written_to_is_one_warning(tmp_path, recwarn):
    made = config(
        tmp_path / "runs",
        data=texts(tmp_path, train=WORDS),
        log=mf.LogConfig(
            progress=False, jsonl="/dev/full", tensorboard_dir=str(tmp_path / "tensorboard")
        ),
    )
    assert mf.train(made).iteration == 6 and mf.latest(tmp_path / "runs")
    (said,) = [str(w.message) for w in recwarn if "training continues" in str(w.message)]
    assert said.startswith("log.jsonl = '/dev/full': can't be written to (No space left on device)")
    assert os.listdir(tmp_path / "tensorboard")


def test_tensorboard_that_cannot_write_is_one_warning(tmp_path, recwarn):
    """Its thread fails; what it raises arrives with a later record, or at the end."""
    folder = tmp_path / "tensorboard"
    made = config(log=mf.LogConfig(progress=False, tensorboard_dir=str(folder)))

    def fill_the_disk(metrics):
        if metrics.iteration == 2:
            size = max(path.stat().st_size for path in folder.iterdir())
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        state = mf.train(made, batches=loader(40), on_metrics=[fill_the_disk])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert state.iteration == 6
    said = [str(w.message) for w in recwarn if "training continues" in str(w.message)]
    assert len(said) == 1 and "log.tensorboard_dir" in said[0] and str(folder) in said[0]


class Full(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")


def tqdm_lock_is_free():
    """Whether this thread could draw a bar: tqdm has one lock for all threads."""
    acquired = [lock.acquire(True, 5) for lock in tqdm.get_lock().locks]
    if all(acquired):
        tqdm.get_lock().release()
    return all(acquired)


@pytest.mark.parametrize("terminal", [True, False], ids=["bar", "lines"])
def test_progress_that_cannot_be_written_ends_no_run(terminal, tmp_path, monkeypatch):
    made = config(tmp_path, log=mf.LogConfig(progress=True))
    with pytest.warns(UserWarning) as caught:
        monkeypatch.setattr(sys, "stderr", Full(terminal))
        assert mf.train(made, batches=loader(40)).iteration == 6
    assert mf.latest(tmp_path).name == "iteration-00000006"
    assert sum("standard error" in str(warning.message) for warning in caught) == 1
    with ThreadPoolExecutor(1) as another_thread:
        assert another_thread.submit(tqdm_lock_is_free).result()


def test_a_log_that_cannot_be_opened_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    for log in (
        dict(jsonl=str(tmp_path / "file" / "log.jsonl")),
        dict(tensorboard_dir=str(tmp_path / "file")),
    ):
        seen = []
        made = config(log=mf.LogConfig(progress=False, **log))
        with pytest.raises(mf.ConfigError, match=f"log.{list(log)[0]} = .*can't be opened"):
            mf.train(made, batches=loader(40), on_metrics=[seen.append])
        assert not seen


# ------------------------------------------------------------------------------- custom loops


def data_of(config):
    return {"gpt": uneven, "bert": bert_rows, "t5": pairs}[config.model.family](config, 0)


def message(error, call):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def misused(config, folder):
    """What is said of a wrong number of micro-batches, of a donated state and of closed groups."""
    step = mf.step_fn(config.model.family)
    groups = mf.build_groups(config.parallel, mf.world_size(), model=config.model)
    with mf.init_groups(groups, timeout_seconds=60) as pg:
        old = mf.setup(config, pg)
        batch = share(data_of(config), config, pg)
        expected = mf.num_micro_batches(config, pg.dp_size)
        counts = [
            message(ValueError, partial(mf.train_step, old, wrong, step))
            for wrong in (batch[:-1], [*batch, batch[0]], [])
        ]
        state, metrics = mf.train_step(old, batch, step)  # what raised has changed nothing
        donated = uses(old, batch, step, folder / "donated")
        loaded = mf.load(old, mf.save(state, folder / "saved"))
        donated += uses(state, batch, step, folder / "donated")
        mf.evaluate(loaded, [batch], step)
        loaded, _ = mf.train_step(loaded, batch, step)
    closed = uses(loaded, batch, step, folder / "closed")
    return expected, counts, donated, closed, os.listdir(folder)


def uses(state, batch, step, folder):
    """What each function says of a state that must not be used."""
    calls = [
        lambda: mf.train_step(state, batch, step),
        lambda: mf.evaluate(state, [batch], step),
        lambda: mf.fit(state, step),
        lambda: mf.save(state, folder),
    ]
    if state.config.model.family != "t5":
        calls.append(lambda: mf.logits(state, torch.ones(1, 4, dtype=torch.long)))
    return [message(RuntimeError, call) for call in calls]


LAYOUTS = {
    "single": (1, dict()),
    "tp2-sp": (2, dict(tp=2, sequence_parallel=True)),
    "pp2-vpp2": (2, dict(pp=2, vpp=2)),
    "cp2": (2, dict(cp=2)),
    "dp2-dist": (2, dict(use_distributed_optimizer=True)),
    "bert": (2, dict(**BERT)),
    "t5-pp2": (2, dict(family="t5", pp=2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_wrong_counts_donated_states_and_closed_groups_are_said(name, pool, tmp_path):
    processes, layout = LAYOUTS[name]
    made = short(**layout)
    for expected, counts, donated, closed, names in pool(processes, misused, made, tmp_path):
        for count, text in zip((expected - 1, expected + 1, 0), counts, strict=True):
            assert text.startswith(f"batch: {count} micro-batches, expected {expected} on each")
        assert all("its tensors were donated" in text for text in donated)
        assert all("init_groups" in text and "load" in text for text in closed)
        assert names == ["saved"]


def test_the_state_that_train_returns_is_refused_in_one_sentence(tmp_path):
    state = mf.train(config(), batches=loader(40))
    for use in (
        lambda: mf.logits(state, torch.tensor([[1, 2]])),
        lambda: mf.generate(state, torch.tensor([[1, 2]])),
        lambda: mf.save(state, tmp_path),
        lambda: mf.load(state, tmp_path),
        lambda: mf.evaluate(state, [[rows(2)]], mf.step_fn("gpt")),
        lambda: mf.whole_parameters(state.chunks, state.config.model, state.pg),
    ):
        text = message(RuntimeError, use)
        assert "closed" in text and "init_groups" in text and "\n" not in text
    assert not os.listdir(tmp_path) and not dist.is_initialized()


# ---------------------------------------------------------------------------- after a run


def test_the_hook_of_uncaught_exceptions_is_put_back(monkeypatch):
    def hook(*_):
        pass

    monkeypatch.setattr(sys, "excepthook", hook)
    mf.train(config(), batches=loader(40))
    assert sys.excepthook is hook
    with pytest.raises(Broken):
        mf.train(config(), batches=broken_after(1))
    assert sys.excepthook is hook
    with mf.init_groups(mf.build_groups(mf.ParallelConfig(), 1)):
        sys.excepthook = print
    assert sys.excepthook is print


UNFINISHED = """
import sys
import megafn as mf
from test_run_survives import WORDS, config, texts
from pathlib import Path


class Holder:
    pass


def main(pg):
    holder = Holder()
    holder.itself, holder.unfinished = holder, mf.batches(made, pg)
    next(holder.unfinished)
    sys.modules["torch"].unfinished = mf.batches(made, pg)
    for _ in sys.modules["torch"].unfinished:
        raise SystemExit


made = config(data=texts(Path(sys.argv[1]), train=WORDS))
with mf.init_groups(mf.build_groups(made.parallel, 1)) as pg:
    main(pg)
"""


def test_batches_that_nobody_finished_print_nothing_at_exit(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", UNFINISHED, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")

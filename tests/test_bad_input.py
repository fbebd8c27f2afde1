"""Bad input is reported in one sentence that names field, value and remedy.

On every rank, within seconds; no rank hangs.
"""

import os
import re
import signal
import time
import warnings
from pathlib import Path

import attrs
import pytest
import torch
import torch.distributed as dist

import megafn as mf
from indexed_data import indexed
from megafn.__main__ import main
from pool import PoolError, run_script

REMEDY = re.compile(
    r"\b(give|choose|start|set|name|write|remove|convert|raise|shorten|pad|pass|correct|leave|change|"
    r"did you mean|must|expected|seed and shard|tokenise|keep|lower)\b"
)


def config(**changes):
    """GPT of two layers without data; `changes` go to whichever config has the field."""
    made = mf.TrainConfig(
        model=mf.ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=32),
        log=mf.LogConfig(progress=False),
        micro_batch_size=2,
        global_batch_size=4,
        train_iters=2,
        eval_iters=1,
        timeout_seconds=30,
    )
    for section in ("model", "parallel", "schedule"):
        part = getattr(made, section)
        mine = {
            key: changes.pop(key) for key in list(changes) if key in attrs.fields_dict(type(part))
        }
        made = attrs.evolve(made, **{section: attrs.evolve(part, **mine)})
    return attrs.evolve(made, **changes)


def logged(made, folder):
    """`made` with logs in `folder`: were a file opened, it would be seen."""
    return attrs.evolve(
        made,
        log=mf.LogConfig(
            progress=False, jsonl=f"{folder}/log/a.jsonl", tensorboard_dir=f"{folder}/log/b"
        ),
    )


def assert_clear(text, *parts):
    """One sentence, in one line, with these parts and a remedy."""
    assert "\n" not in text.strip() and len(text) < 400, text
    assert all(part in text for part in parts), (text, parts)
    assert REMEDY.search(text), text


# ---------------------------------------------------------------- configs: before anything exists


@pytest.mark.parametrize(
    "world_size, changes, parts",
    [
        (
            3,
            {"tp": 2},
            ["world_size = 3", "tp * pp * cp = 2 must divide it", "multiple of 2 processes"],
        ),
        (1, {"tp": 2}, ["world_size = 1", "tp * pp * cp = 2"]),
        (8, {"tp": 8}, ["model.num_attention_heads = 4", "tp = 8"]),
        (2, {"pp": 2, "num_layers": 3}, ["model.num_layers = 3", "pp = 2"]),
        (3, {}, ["global_batch_size = 4", "micro_batch_size * dp = 2 * 3", "multiple of 6"]),
        (1, {"hidden_size": 30}, ["model.hidden_size = 30", "num_attention_heads = 4"]),
        (1, {"family": "gtp"}, ["model.family = 'gtp'", 'did you mean "gpt"?']),
        (1, {"train_iters": None}, ["train_iters = None", "train_samples"]),
        (1, {"lr": -1.0}, ["schedule.lr = -1.0", "at least 0"]),
        (1, {"micro_batch_size": "2"}, ["micro_batch_size = '2'", "integer"]),
        (1, {}, ["data = None", "give train your own batches"]),
    ],
)
def test_a_config_that_cannot_run_is_refused_before_anything_exists(
    world_size, changes, parts, monkeypatch, tmp_path
):
    for name, value in {
        "WORLD_SIZE": world_size,
        "RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(mf.ConfigError) as caught:
        mf.train(logged(config(**changes), tmp_path))
    told = str(caught.value).splitlines()
    assert_clear(next(line for line in told if parts[0] in line), *parts)
    assert not dist.is_initialized() and not any(tmp_path.iterdir())


def test_all_problems_are_told_at_once_each_with_a_remedy():
    with pytest.raises(mf.ConfigError) as caught:
        mf.train(config(tp=3, pp=5, family="gtp", micro_batch_size=0))
    first, *lines = str(caught.value).splitlines()
    assert first == f"{len(lines)} problems:" and len(lines) >= 5
    for line in lines:
        assert_clear(line, " = ")


# ------------------------------------------------------------------------------------------- data


def bad_data(folder):
    """(changes of the DataConfig, parts of the sentence), each on files of its own in `folder`."""

    def text(name, content):
        (folder / name).write_bytes(content)
        return str(folder / name)

    good, long = text("good.txt", b"some words and more of them " * 40), [range(1, 200)] * 10
    cut = indexed(folder / "cut", long)
    os.truncate(f"{cut}.bin", os.path.getsize(f"{cut}.bin") // 2)
    index = indexed(folder / "index", long)
    os.truncate(f"{index}.idx", 60)
    alone = indexed(folder / "alone", long)
    os.remove(f"{alone}.bin")
    return {
        "missing": (
            {"train": str(folder / "nowhere.txt")},
            ["data.train", "nowhere.txt", "no such file"],
        ),
        "a folder": ({"train": str(folder)}, ["data.train", str(folder), "this is a folder"]),
        "missing in a blend": (
            {"train": ((0.5, good), (0.5, str(folder / "nowhere.txt")))},
            ["data.train", "nowhere.txt"],
        ),
        "truncated .bin": ({"train": cut}, [f"{cut}.bin is truncated", "write it again"]),
        "truncated .idx": ({"train": index}, [f"{index}.idx is truncated", "write it again"]),
        "no .bin": ({"train": alone}, [f"{alone}.bin is missing"]),
        "empty text": ({"train": text("empty.txt", b"")}, ["empty.txt", "holds no text"]),
        "white space": ({"train": text("white.txt", b" \n\f\n")}, ["white.txt", "holds no text"]),
        "NUL": (
            {"train": text("nul.txt", b"ab\0cd " * 100)},
            ["nul.txt", "character 2 is NUL", "remove"],
        ),
        "no UTF-8": (
            {"train": text("latin.txt", b"caf\xe9 " * 100)},
            ["latin.txt", "byte 3 is not UTF-8", "convert"],
        ),
        "short text": (
            {"train": text("short.txt", b"a few words")},
            ["short.txt", "less than one sequence", "model.seq_length + 1 = 33"],
        ),
        "tokenizer": (
            {"train": good, "tokenizer": str(folder / "no.json")},
            ["data.tokenizer", "no.json"],
        ),
        # held-out text: found missing before the run, not after it
        "empty split": (
            {"train": good, "split": (1.0, 0.0, 0.0)},
            ["data.split = (1.0, 0.0, 0.0)", "valid"],
        ),
        "short split": (
            {"train": good, "split": (999.0, 1.0, 0.0)},
            ["valid", "less than one sequence"],
        ),
        "missing valid": (
            {"train": good, "valid": str(folder / "nowhere.txt")},
            ["data.valid", "nowhere.txt", "no such file"],
        ),
    }


KINDS = (
    "missing",
    "a folder",
    "missing in a blend",
    "truncated .bin",
    "truncated .idx",
    "no .bin",
    "empty text",
    "white space",
    "NUL",
    "no UTF-8",
    "short text",
    "tokenizer",
    "empty split",
    "short split",
    "missing valid",
)


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_cannot_be_read_is_told_before_a_process_group_or_a_log_exists(
    kind, tmp_path, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("a process group is made before the data is known to be there")

    changes, parts = bad_data(tmp_path)[kind]
    monkeypatch.setattr("megafn.runtime.training.train.init_groups", never)
    made = config(data=mf.DataConfig(cache=str(tmp_path / "cache"), **changes))
    with pytest.raises((mf.ConfigError, ValueError)) as caught:
        mf.train(logged(made, tmp_path))
    assert_clear(str(caught.value), *parts)
    assert not dist.is_initialized() and not (tmp_path / "log").exists()


def refusals(mades):
    """What `train` raises for each of these on this rank: the error's type and its text.

    None if this rank trains.
    """
    said = []
    for made in mades:
        try:
            mf.train(made)
            said.append(None)
        except ValueError as error:
            said.append(str(error))
        assert not dist.is_initialized()
    return said


def test_every_rank_refuses_data_alike(pool, tmp_path):
    assert tuple(bad_data(tmp_path)) == KINDS
    ids = indexed(tmp_path / "ids", [range(300, 500)] * 10)
    cases = [
        *bad_data(tmp_path).values(),
        (
            {"train": ids, "split": (1.0, 1.0, 0.0)},
            ["data.train = ", "token id 499 for train", "model.vocab_size = 256", "raise it"],
        ),
    ]
    mades = [
        config(pp=2, data=mf.DataConfig(cache=str(tmp_path / "cache"), **changes))
        for changes, _ in cases
    ]
    ranks = pool(4, refusals, mades)
    for (_, parts), *said in zip(cases, *ranks, strict=True):
        for text in said:
            assert text is not None, parts
            assert_clear(text, *parts)


# --------------------------------------------------------------------------- batches of one's own

IDS = torch.arange(64).reshape(2, 32)
BATCHES = {
    "not a mapping": (IDS, ["batch = Tensor", "mapping"]),
    "None": (None, ["batch = NoneType", "mapping"]),
    "no keys": ({}, ["batch keys = []", "'input_ids'"]),
    "other keys": ({"inputs": IDS}, ["batch keys = ['inputs']", "'tokens' and 'labels'"]),
    "no labels": ({"tokens": IDS}, ["batch keys = ['tokens']", "'labels'"]),
    "labels None": (
        {"tokens": IDS, "labels": None},
        ["batch['labels']", "not a tensor", "integers of shape [2, 32]"],
    ),
    "float ids": (
        {"input_ids": IDS.float()},
        ["batch['input_ids'] = torch.float32", "integers [batch, sequence]"],
    ),
    "bool ids": ({"input_ids": IDS > 3}, ["batch['input_ids'] = torch.bool", "integers"]),
    "one dimension": (
        {"input_ids": IDS[0]},
        ["batch['input_ids']", "shape [32]", "[batch, sequence]"],
    ),
    "three dimensions": ({"input_ids": IDS[None]}, ["batch['input_ids']", "shape [1, 2, 32]"]),
    "ragged": ({"input_ids": [[1, 2], [3]]}, ["batch['input_ids']", "not a tensor"]),
    "words": ({"input_ids": ["some", "words"]}, ["batch['input_ids']", "not a tensor"]),
    "no rows": (
        {"input_ids": IDS[:0]},
        ["batch['input_ids']", "shape [0, 32]", "neither of them 0"],
    ),
    "no tokens": ({"input_ids": IDS[:, :0]}, ["batch['input_ids']", "shape [2, 0]"]),
    "text of one": ({"text": IDS[:, :1]}, ["batch['text']", "shape [2, 1]", "at least two tokens"]),
    "label shape": (
        {"tokens": IDS, "labels": IDS[:, 1:]},
        ["batch['labels']", "shape [2, 31]", "shape [2, 32]"],
    ),
    "label rows": (
        {"input_ids": IDS, "labels": IDS[:1]},
        ["batch['labels']", "shape [1, 32]", "shape [2, 32]"],
    ),
    "loss mask shape": (
        {"tokens": IDS, "labels": IDS, "loss_mask": torch.ones(32)},
        ["batch['loss_mask']", "shape [32]"],
    ),
    "loss weights": (
        {"tokens": IDS, "labels": IDS, "loss_mask": torch.full((2, 32), 0.5)},
        ["batch['loss_mask']", "0.5", "zeros and ones"],
    ),
    "loss mask NaN": (
        {"tokens": IDS, "labels": IDS, "loss_mask": torch.full((2, 32), torch.nan)},
        ["batch['loss_mask']", "nan"],
    ),
    "mask shape": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 31)},
        ["batch['attention_mask']", "shape [2, 31]"],
    ),
    "hidden as floats": (
        {"tokens": IDS, "labels": IDS, "attention_mask": torch.ones(2, 32)},
        ["batch['attention_mask']", "bools", "'input_ids'"],
    ),
    "hidden shape": (
        {"tokens": IDS, "labels": IDS, "attention_mask": torch.zeros(2, 1, 31, 31).bool()},
        ["batch['attention_mask']", "[2, 1, 31, 31]"],
    ),
    "position shape": (
        {"input_ids": IDS, "position_ids": IDS[:, 1:]},
        ["batch['position_ids']", "shape [2, 31]"],
    ),
    "position dtype": (
        {"input_ids": IDS, "position_ids": IDS.float()},
        ["batch['position_ids'] = torch.float32"],
    ),
    "position range": (
        {"input_ids": IDS, "position_ids": IDS},
        ["batch['position_ids'] from 0 to 63", "32 rows", "raise"],
    ),
    "too long": (
        {"input_ids": IDS.repeat(1, 2)},
        ["sequences of 64 tokens", "32 rows", "model.max_position_embeddings"],
    ),
    "odd length": (
        {"input_ids": IDS[:, :31]},
        ["sequences of 31 tokens", "tp = 2", "multiple of 2"],
    ),
    "id too high": (
        {"input_ids": IDS + 193},
        ["batch['tokens']", "token id 256", "model.vocab_size = 256"],
    ),
    "id below 0": (
        {"input_ids": IDS - 1},
        ["batch['tokens']", "token id -1", "model.vocab_size = 256"],
    ),
    "label too high": (
        {"tokens": IDS, "labels": IDS + 200},
        ["batch['labels']", "token id 263", "model.vocab_size = 256"],
    ),
    "label below 0": ({"tokens": IDS, "labels": IDS - 5}, ["batch['labels']", "token id -5"]),
    "nothing counts": (
        {"tokens": IDS, "labels": torch.full((2, 32), -100)},
        ["loss_mask", "0 tokens count", "at least one"],
    ),
}


def refused_batches(made):
    """The error that each of BATCHES raises, by name.

    All ranks see the same bad batch, and all must refuse it.
    """
    said = {}
    with mf.init_groups(mf.build_groups(made.parallel, mf.world_size()), timeout_seconds=20) as pg:
        for name, (raw, _) in BATCHES.items():
            try:
                mf.fit(mf.setup(made, pg), mf.step_fn("gpt"), batches=[raw] * 4)
            except ValueError as error:
                said[name] = str(error)
    return said


def test_every_rank_refuses_a_bad_batch_on_every_pipeline_stage(pool):
    made = config(tp=2, pp=2, sequence_parallel=True)
    for said in pool(4, refused_batches, made):
        assert said.keys() == BATCHES.keys()
        for name, (_, parts) in BATCHES.items():
            assert_clear(said[name], *parts)


def batch_for_one(bad_rank):
    rank = int(os.environ["RANK"])
    mf.train(
        config(timeout_seconds=4),
        batches=[{"input_ids": IDS + 400 if rank == bad_rank else IDS}] * 4,
    )


def test_a_bad_batch_of_one_rank_ends_the_others_within_the_timeout(pool):
    with pytest.raises(PoolError, match=r"token id 463 is outside the vocabulary") as caught:
        pool(2, batch_for_one, 1)
    assert "rank 0 of 2" in str(caught.value) and "no answer" not in str(caught.value)


def different_batches(made):
    rank = int(os.environ["RANK"])
    try:
        mf.train(made, batches=[{"input_ids": IDS + rank}] * 4)
    except ValueError as error:
        return str(error)


def test_ranks_of_one_model_with_different_batches_are_refused(pool):
    for said in pool(2, different_batches, config(tp=2)):
        assert_clear(said, "ranks 0 and 1 read different batches", "pg.dp_rank")


def fractional_loss(made):
    def loss(logits, batch, pg):
        return mf.Loss(sum=logits.sum(), count=1.5)

    try:
        mf.train(
            made, step=attrs.evolve(mf.step_fn("gpt"), loss=loss), batches=[{"input_ids": IDS}] * 4
        )
    except ValueError as error:
        return str(error)


def test_a_fractional_count_is_refused():
    assert_clear(
        fractional_loss(config()) + " (give a whole count)",
        "Loss.count = 1.5",
        "not a whole number",
    )


# ------------------------------------------------------------------------------------ the command


def toml(folder, text):
    (folder / "config.toml").write_text(text)
    return str(folder / "config.toml")


TOML = (
    "micro_batch_size = 2\nglobal_batch_size = 4\ntrain_iters = 2\n"
    "[model]\nnum_layers = 2\nhidden_size = 32\nnum_attention_heads = 4\nseq_length = 32\n"
)


@pytest.mark.parametrize(
    "text, parts",
    [
        (
            TOML + "hiden_dropout = 0.1\n",
            ["model.hiden_dropout = 0.1", 'did you mean "hidden_dropout"?'],
        ),
        (TOML + "[paralel]\ntp = 2\n", ["paralel", 'did you mean "parallel"?']),
        ("tp = 2\n" + TOML, ["tp = 2", 'did you mean "parallel.tp"?']),
        (
            TOML.replace("num_layers = 2", "num_layers = '2'"),
            ["model.num_layers = '2'", "give an integer"],
        ),
        (TOML.replace("num_layers = 2", ""), ["model.num_layers is missing"]),
        (TOML + "hidden_dropout = \n", ["not valid TOML", "correct it"]),
        (TOML, ["data = None", "name a text"]),
        (TOML + "[data]\ntrain = 'nowhere.txt'\n", ["data.train = 'nowhere.txt'", "no such file"]),
        (TOML + "[parallel]\ntp = 3\n", ["world_size = 1", "tp * pp * cp = 3"]),
    ],
)
def test_the_command_says_what_is_wrong_in_a_line_and_no_traceback(
    text, parts, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", toml(tmp_path, text)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and err.startswith("megafn: ")
    assert_clear(next(line for line in err.splitlines() if parts[0] in line), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["train", "nowhere.toml"], ["nowhere.toml", "cannot be read"]),
        (["check", "nowhere.toml", "--world-size", "1"], ["nowhere.toml", "cannot be read"]),
        (["data", "nowhere.txt", "prefix"], ["nowhere.txt", "can't be read"]),
        (
            ["data", "a.txt", "prefix", "--split", "1,two,3"],
            ["--split = '1,two,3'", "three numbers"],
        ),
        (["data", "a.txt", "prefix", "--split", "1,2"], ["split = (1.0, 2.0)", "three weights"]),
        (
            ["data", "a.txt", "prefix", "--split", "0,0,0"],
            ["split = (0.0, 0.0, 0.0)", "weights of 0 or more"],
        ),
        (["data", "a.txt", "prefix", "--tokenizer", "no.json"], ["no.json", "tokenizer"]),
    ],
)
def test_the_other_commands_too(arguments, parts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some words")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("megafn: ") and "Traceback" not in err
    assert_clear(err.strip(), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


# ------------------------------------------- whole runs under torchrun: each ends, and not with 0


def test_a_bad_config_ends_a_torchrun_in_seconds(tmp_path):
    started = time.monotonic()
    done = run_script(
        [
            "-m",
            "megafn",
            "train",
            toml(tmp_path, TOML + "[parallel]\ntp = 2\n[data]\ntrain = 'nowhere.txt'\n"),
        ],
        nproc=2,
        timeout=60,
    )
    assert done.returncode != 0 and time.monotonic() - started < 45
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("megafn: ")]
    assert "data.train = 'nowhere.txt'" in sentence and "megafn/runtime" not in done.stderr
    # where torchrun's own report ends
    assert "traceback : data.train = 'nowhere.txt'" in done.stderr.partition("Root Cause")[2]


FAULT = """
import os, signal, sys, time
import megafn as mf

config = mf.TrainConfig(
    model=mf.ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=32),
    parallel=mf.ParallelConfig(pp=2),
    data=mf.DataConfig(train=mf.demo_text()),
    log=mf.LogConfig(progress=False),
    micro_batch_size=2,
    global_batch_size=4,
    train_iters=100_000,
    timeout_seconds=float(sys.argv[2]),
)

def fault(metrics):
    if metrics.iteration == 3 and os.environ["RANK"] == "1":
        print("fault at", time.time(), flush=True)
        if sys.argv[1] == "raise":
            raise ArithmeticError("rank 1 says no")
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))

mf.train(config, on_metrics=[fault])
"""


@pytest.mark.parametrize(
    "kind, nproc, timeout_seconds, within",
    [
        ("SIGKILL", 4, 600, 15),
        ("raise", 2, 600, 15),
        # 8 s until the other rank gives up, 30 s that torchrun leaves the stopped one to end
        ("SIGSTOP", 2, 8, 60),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_the_run(kind, nproc, timeout_seconds, within, tmp_path):
    (tmp_path / "fault.py").write_text(FAULT)
    done = run_script([tmp_path / "fault.py", kind, timeout_seconds], nproc=nproc, timeout=150)
    ended = time.time()
    assert (
        done.returncode != 0
        and ended - float(re.search(r"fault at ([\d.]+)", done.stdout)[1]) < within
    )
    if kind == "raise":
        assert "ArithmeticError: rank 1 says no" in done.stderr
    if kind == "SIGKILL":
        assert f"Signal {int(signal.SIGKILL)}" in done.stderr


@pytest.mark.parametrize(
    "variables, warns",
    [
        ({"SLURM_NTASKS": "4"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_NTASKS": "4", "WORLD_SIZE": "1"}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({}, False),
    ],
)
def test_tasks_of_slurm_that_were_not_told_their_ranks_are_warned(variables, warns, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert mf.world_size() == 1
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == warns
    assert all("set RANK=$SLURM_PROCID" in message for message in messages)

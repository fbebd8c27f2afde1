"""The commands: each has help with examples, refuses bad input in one sentence, and ends with a
code that says how it went."""

import json
import os
import re
import shlex
import subprocess
import sys
from unittest import mock

import attrs
import pytest

import megafn as mf
from megafn.__main__ import COMMANDS, build_parser, main, parse
from megafn.commands import failures
from megafn.runtime.parallel.object_collectives import errors_on_all_ranks
from pool import ROOT

NAMES = sorted(COMMANDS)


def actions(name):
    """The arguments of a command, without --help."""
    command = parse([name, *required(name)])
    return [action for action in command.parser._actions if action.dest != "help"]


def required(name):
    """Values for what a command requires: numbers are 1000, everything else is "nowhere"."""
    subparsers = next(action for action in build_parser()._actions if action.dest == "command")
    values = []
    for action in subparsers.choices[name]._actions:
        if action.required:
            values += [*action.option_strings[-1:], "1000" if action.metavar == "N" else "nowhere"]
    return values


def refused(arguments, capsys):
    """The sentence of a command that is expected to refuse its input."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("megafn: ") and err.count("\n") == 1, err
    return err


# -------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", NAMES)
def test_help_names_every_argument_alike(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: megafn {name} [-h]") and err == ""
    for action in actions(name):
        takes_value = action.nargs != 0
        assert action.help, action
        assert not takes_value or re.fullmatch(r"[A-Z]+(_[A-Z]+)*", action.metavar), action
        if action.default is not None and takes_value and not isinstance(action.default, list):
            assert "(default: %(default)s" in action.help, action


def test_an_argument_of_several_commands_is_the_same_in_each():
    known = {}
    for name in NAMES:
        for action in actions(name):
            words = (action.metavar, action.type)
            assert known.setdefault(action.dest, words) == words or action.dest == "tokenizer"


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_the_help_can_be_parsed(name):
    examples = re.findall(r"^  (\S.*)$", COMMANDS[name].__doc__.partition("\nExample")[2], re.M)
    assert examples
    for example in examples:
        launcher, command, arguments = re.fullmatch(
            r"(python|torchrun --nproc-per-node \d) -m megafn (\S+)(.*)", example
        ).groups()
        assert command == name
        parse([name, *shlex.split(arguments)])


def test_without_arguments_the_commands_are_listed(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: megafn")
    assert all(re.search(rf"^    {name}\b", err, re.M) for name in NAMES)


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"megafn {mf.__version__}\n"


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_refused(name, capsys):
    sentence = refused([name, *required(name), "--nonsense=3"], capsys)
    assert sentence == f"megafn: unknown argument '--nonsense=3'; see megafn {name} --help\n"


@pytest.mark.parametrize("name", [name for name in NAMES if required(name)])
def test_a_missing_argument_is_refused(name, capsys):
    sentence = refused([name], capsys)
    assert "arguments are required: " in sentence and f"; see megafn {name} --help" in sentence


@pytest.mark.parametrize("name", [name for name in NAMES if required(name)])
def test_a_path_where_nothing_is_is_refused(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nowhere" in refused([name, *required(name)], capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["trian", "config.toml"], ["'trian'", 'did you mean "train"?']),
        (["dryrun", "config.toml"], ["'dryrun'", 'did you mean "dry-run"?']),
        (["dry_run", "config.toml"], ["'dry_run'", 'did you mean "dry-run"?']),
        (["nonsense"], ["'nonsense'", "dry-run", "see megafn --help"]),
        (["check", "config.toml", "--world-size", "two"], ["--world-size", "'two'"]),
        (["check", "config.toml", "--world", "2"], ["--world-size"]),  # no abbreviations
        (["demo", "--family", "gtp"], ["family = 'gtp'", "bert"]),
        (["demo", "--iterations", "0"], ["train_iters = 0", "at least 1"]),
        (["tokenizer", "nowhere", "bpe", "--vocab-size", "3"], ["vocab_size = 3", "257"]),
    ],
)
def test_a_bad_value_is_refused(arguments, parts, capsys):
    sentence = refused(arguments, capsys)
    assert all(part in sentence for part in parts), sentence


PLAN = ["plan", "config.toml", "--machine", "H100", "--world-size", "8"]


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = mf.ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    config = mf.TrainConfig(model=model, micro_batch_size=1, global_batch_size=8, train_iters=9)
    mf.dump_config(config, "config.toml")
    (tmp_path / "folder").mkdir()
    return tmp_path / "config.toml"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ["--output", "config.toml"],
            "config.toml exists already; name another file, or pass --overwrite to replace it",
        ),
        (
            ["--output", "no/where.toml"],
            "--output = 'no/where.toml': there is no folder no; make it first",
        ),
        (
            ["--output", "folder", "--overwrite"],
            "--output = 'folder': this is a folder; name a file in it",
        ),
        (
            ["--picture", "no/where.png"],
            "--picture = 'no/where.png': there is no folder no; make it first",
        ),
        (
            ["--picture", "a.jpg"],
            "--picture = 'a.jpg': pictures are PNG; name a file that ends in .png",
        ),
    ],
)
def test_files_of_a_plan_are_checked_before_it_is_made(config_file, arguments, sentence, capsys):
    before = config_file.read_bytes()
    with mock.patch.object(mf, "rank_plans", side_effect=AssertionError):
        assert refused([*PLAN, *arguments], capsys) == f"megafn: {sentence}\n"
    assert config_file.read_bytes() == before


def test_a_plan_replaces_a_config_if_told_to(config_file, capsys):
    assert main([*PLAN, "--output", "config.toml", "--overwrite"]) == 0
    config = mf.load_config(config_file)
    assert mf.apply_plan(config, mf.rank_plans(config, mf.MACHINES["h100"], 8).plans[0]) == config


def test_a_plan_that_does_not_fit_is_not_written(config_file, capsys):
    config = mf.load_config(config_file)
    huge = attrs.evolve(config.model, num_layers=1000, hidden_size=65536)
    mf.dump_config(attrs.evolve(config, model=huge), config_file)
    assert main([*PLAN, "--output", "best.toml", "--picture", "best.png"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "no layout fits, so nothing is written to best.toml and best.png"
    assert sorted(os.listdir()) == ["config.toml", "folder"]


def test_several_numbers_of_devices_are_compared(config_file, capsys):
    config = mf.load_config(config_file)
    model = attrs.evolve(config.model, num_layers=32, hidden_size=4096, num_attention_heads=32)
    config = attrs.evolve(config, model=model, global_batch_size=16)
    mf.dump_config(config, config_file)
    assert main([*PLAN, "--world-size", "8,1,16"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 100
    for size, line in zip((8, 16), lines, strict=False):
        best = mf.rank_plans(config, mf.MACHINES["h100"], size).plans[0]
        row = dict(zip(head.split(), line.split(), strict=True))
        assert (row["h100"], row["tp"], row["dp"]) == (
            str(size),
            str(best.layout.tp),
            str(best.layout.dp),
        )
        assert row["tokens/s"] == f"{best.tokens_per_second:,.0f}"
    assert lines[-1] == "no layout fits on 1; plan with one --world-size says why"


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--world-size", "8,x"], "--world-size: '8,x': give a whole number, or several"),
        (["--world-size", "8,0"], "world_size = 0"),
        (["--world-size", "8,16", "--output", "best.toml"], "give one --world-size"),
    ],
)
def test_numbers_of_devices_are_refused(config_file, arguments, part, capsys):
    assert part in refused([*PLAN, *arguments], capsys)


def test_a_machine_that_there_is_not_gets_a_hint(config_file, capsys):
    sentence = refused([*PLAN, "--machine", "H10O"], capsys)
    assert sentence == (
        "megafn: --machine = 'H10O': choose one of a100, h100, h200, b200, or give a TOML file; "
        'did you mean "h100"?\n'
    )


def test_what_the_system_refuses_names_the_file(capsys, tmp_path):
    error = PermissionError(13, "Permission denied", str(tmp_path))
    with mock.patch.object(COMMANDS["inspect"], "run", side_effect=error):
        assert refused(["inspect", "there"], capsys) == f"megafn: {tmp_path}: Permission denied\n"


def test_a_library_that_is_not_installed_is_named(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words")
    with mock.patch.dict(sys.modules, tokenizers=None):
        for arguments in (
            ["tokenizer", str(text), str(tmp_path / "new"), "--vocab-size", "300"],
            ["data", str(text), str(tmp_path / "new"), "--tokenizer", "tokenizer.json"],
        ):
            assert "tokenizers is not installed; install megafn[hf]" in refused(arguments, capsys)


# -------------------------------------------------------------------------------------- early ends


@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_leaves_no_traceback(name, capsys):
    with mock.patch.object(COMMANDS[name], "run", side_effect=KeyboardInterrupt):
        assert main([name, *required(name)]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(unbuffered, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    model = mf.ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=32)
    config = mf.TrainConfig(model=model, micro_batch_size=1, global_batch_size=2, train_iters=1)
    mf.dump_config(config, tmp_path / "config.toml")
    command = ["-m", "megafn", "check", str(tmp_path / "config.toml"), "--world-size", "2"]
    try:
        ended = subprocess.run(
            [sys.executable, *command], env=environment, stdout=writing, stderr=subprocess.PIPE
        )
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_a_broken_pipe_that_is_not_the_output_is_an_error(capfd):
    with mock.patch.object(COMMANDS["inspect"], "run", side_effect=BrokenPipeError(32, "Broken")):
        assert main(["inspect", "there"]) == 2
    assert capfd.readouterr().err == "megafn: Broken\n"


# ------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("rank, sentence", [("0", "megafn: bad\n"), ("3", "megafn: rank 3: bad\n")])
def test_another_rank_says_what_rank_zero_did_not_say(
    rank, sentence, monkeypatch, capsys, tmp_path
):
    slept = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(failures.time, "sleep", slept.append)
    failures.report(mf.ConfigError("bad"))
    assert capsys.readouterr().err == sentence
    assert slept == ([] if rank == "0" else [failures.SECONDS_FOR_RANK_ZERO])
    assert (tmp_path / "error.json").exists()


def test_a_rank_that_is_ended_while_it_waits_has_told_the_launcher(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(failures.time, "sleep", mock.Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        failures.report(mf.ConfigError("bad"))
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == "rank 3: bad"
    assert int(message["extraInfo"]["timestamp"]) > failures.time.time()


def fail_on_rank_one():
    with mf.init_groups(mf.build_groups(mf.ParallelConfig(), 2)) as pg:
        try:
            with errors_on_all_ranks(pg):
                if not pg.is_rank_zero:
                    raise mf.ConfigError("no such file here")
        except mf.ConfigError as error:
            return failures._sentence(error)


def test_rank_zero_says_on_which_rank_it_was(pool):
    assert pool(2, fail_on_rank_one) == [
        "no such file here (raised on rank 1)",
        "no such file here",
    ]

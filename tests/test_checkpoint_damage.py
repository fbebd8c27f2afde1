"""Damage is named, nothing in a checkpoint is executed, and earlier checkpoints are whole."""

import ast
import builtins
import hashlib
import os
import pickle
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import megafn as mf
from checkpoint_runs import same, text_config, train, with_checkpoint
from equivalence import local_parts
from megafn.runtime.checkpoint import load
from megafn.runtime.checkpoint.disk_format import checkpoints

FILES = ["rank-00000.safetensors", "manifest.json", "SHA256SUMS"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with checkpoints of iterations 2 and 4, to be copied; the uninterrupted run."""
    directory = tmp_path_factory.mktemp("two")
    whole = train(text_config())
    train(text_config(directory), stop=5)
    return directory, whole


def copy_of(two, tmp_path):
    shutil.copytree(two[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, mf.latest(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_named_with_its_file(name, two, tmp_path):
    directory, newest = copy_of(two, tmp_path)
    file = newest / name
    data = file.read_bytes()
    draw = random.Random(name)
    config = text_config(directory)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        state = mf.setup(config, pg)
        before = local_parts(state)
        for _ in range(30):
            place = draw.randrange(len(data))
            flipped = bytes([data[place] ^ 1 << draw.randrange(8)])
            file.write_bytes(data[:place] + flipped + data[place + 1 :])
            with pytest.raises(mf.CheckpointError, match="is damaged") as refused:
                mf.load(state, directory)
            message = str(refused.value)
            assert str(newest) in message
            assert name == "SHA256SUMS" or name in message
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
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_named_and_the_checkpoint_before_is_used_if_allowed(
    name, spoil, two, tmp_path
):
    directory, newest = copy_of(two, tmp_path)
    _, whole = two
    spoil(newest / name)
    config = text_config(directory)
    problem = f'{newest.name}/{name} is damaged.*set checkpoint.on_damage to "previous"'
    with pytest.raises(mf.CheckpointError, match=problem):
        train(config)
    rest = train(with_checkpoint(config, on_damage="previous"))
    assert rest.curve == whole.curve[2:]
    assert same(rest.parameters, whole.parameters)
    assert len(rest.warnings) == 1
    assert "the checkpoint before: iteration-00000002" in rest.warnings[0]
    assert (directory / f"damaged-1-{newest.name}").exists()
    assert list(checkpoints(directory)) == [2, 4, 6, 7]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_now_is_not_taken_for_damaged(name, two, tmp_path):
    directory, newest = copy_of(two, tmp_path)
    (newest / name).unlink()
    # reading the first page of a process gives an I/O error
    (newest / name).symlink_to("/proc/self/mem")
    config = with_checkpoint(text_config(directory), on_damage="previous")
    with pytest.raises(OSError, match=f"{name} could not be read: Input/output error; .* renamed"):
        mf.train(config)
    assert list(checkpoints(directory)) == [2, 4]


def test_a_checkpoint_of_another_model_or_version_is_not_renamed(two, tmp_path, monkeypatch):
    directory, _ = copy_of(two, tmp_path)
    config = with_checkpoint(text_config(directory), on_damage="previous")
    monkeypatch.setattr(load, "FORMAT", 2)
    with pytest.raises(mf.CheckpointError, match="has format 1: this megafn reads format 2"):
        mf.train(config)
    assert list(checkpoints(directory)) == [2, 4]


def test_a_run_does_not_start_anew_silently_if_no_checkpoint_is_whole(two, tmp_path):
    directory, _ = copy_of(two, tmp_path)
    for path in checkpoints(directory).values():
        (path / "manifest.json").unlink()
    config = with_checkpoint(text_config(directory), on_damage="previous")
    with (
        pytest.raises(mf.CheckpointError, match="no checkpoint in it is whole"),
        pytest.warns(UserWarning, match="is damaged"),
    ):
        mf.train(config)


# --------------------------------------------------------------------------------- no pickles


class Bomb:
    def __reduce__(self):
        return exec, ("import builtins; builtins.exploded = True",)


def write_pickle(file):
    file.write_bytes(pickle.dumps(Bomb()))


def write_torch_pickle(file):
    with open(file, "wb") as opened:
        torch.save(Bomb(), opened)


def write_checksums(folder):
    """The attacker writes them too."""
    lines = []
    for file in folder.iterdir():
        if file.name != "SHA256SUMS":
            lines.append(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", *FILES])
def test_nothing_in_a_checkpoint_is_executed(name, two, tmp_path):
    directory, newest = copy_of(two, tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert builtins.__dict__.pop("exploded"), "the bomb works"
    for write in (write_pickle, write_torch_pickle):
        write(newest / name)
        if name != "SHA256SUMS":
            write_checksums(newest)
        try:
            train(text_config(directory), stop=5)
        except ValueError:  # whatever it says
            pass
        assert not hasattr(builtins, "exploded")


def test_the_code_that_reads_checkpoints_knows_no_pickle():
    modules = list(Path(load.__file__).parent.glob("*.py"))
    assert len(modules) > 5
    for module in modules:
        names = set()
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute):
                names.add(ast.unparse(node))
        assert not names & {"pickle", "eval", "exec", "torch.load"}


def test_the_checksums_are_those_of_sha256sum(two):
    directory, _ = two
    command = ["sha256sum", "-c", "--strict", "SHA256SUMS"]
    for path in checkpoints(directory).values():
        ran = subprocess.run(command, cwd=path, capture_output=True, text=True)
        assert ran.returncode == 0
        assert ran.stdout.count(": OK") == len(list(path.iterdir())) - 1

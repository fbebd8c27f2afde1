"""The installed package is found from wherever a user's script lies."""

import subprocess
import sys

import pytest

SCRIPT = """
import megafn as mf

assert mf.train and mf.__version__
"""
CONFIG = """
micro_batch_size = 4
global_batch_size = 16
train_iters = 40

[model]
num_layers = 2
hidden_size = 64
num_attention_heads = 4
seq_length = 64
"""


@pytest.fixture
def above_a_clone(tmp_path):
    """A folder that holds a clone called megafn, whose root has no __init__.py; a script and a config beside it."""
    (tmp_path / "megafn" / "megafn").mkdir(parents=True)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "config.toml").write_text(CONFIG)
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [["script.py"], ["-m", "megafn", "check", "config.toml", "--world-size", "1"]],
    ids=["script", "command"],
)
def test_a_clone_in_the_same_folder_does_not_hide_the_package(above_a_clone, command):
    done = subprocess.run(
        [sys.executable, *command], cwd=above_a_clone, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr

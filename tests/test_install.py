"""The installed package is found from any folder, and editors know its public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megafn as mf

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
    """A folder with a script, a config and a clone called megafn, whose root has no __init__.py."""
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


def test_type_checkers_see_the_names_that_are_loaded_lazily():
    """The imports below `if TYPE_CHECKING` and the lazy map agree, name by name."""
    tree = ast.parse(Path(mf.__file__).read_text())
    (branch,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imported = {
        (name.asname, f"{node.module}.{name.name}") for node in branch.body for name in node.names
    }
    loaded = {(name, f"megafn.{module}.{name}") for name, module in mf._HOME.items()}
    assert imported == loaded
    assert len(branch.body) == len({node.module for node in branch.body})


def test_every_public_name_is_found_and_listed():
    assert set(mf.__all__) <= set(dir(mf))
    assert all(getattr(mf, name) is not None for name in mf.__all__)
    with pytest.raises(AttributeError, match="module 'megafn' has no attribute 'trian'"):
        _ = mf.trian


def test_the_package_says_that_it_is_typed():
    """Without the marker, type checkers ignore the annotations of an installed package."""
    assert (Path(mf.__file__).parent / "py.typed").exists()

"""The scripts that users start from run as they stand, each in real processes."""

import importlib.util
import re
import time

import pytest

from pool import ROOT, run_script

WANDB = importlib.util.find_spec("wandb") is not None
SCRIPTS = ROOT / "docs" / "scripts"
NPROC = {
    "pure": None,
    "quickstart": 4,
    "custom_loop": 4,
    "custom_loss": 2,
    "custom_step": 2,
    "custom_module": 2,
    "custom_attention": 2,
    "custom_family": 2,
    "custom_optimizer": 2,
    "custom_sink": 2,
    "two_layouts": 2,
    "from_accelerate": 2,
}
SAYS = {
    "pure": r"stage 3 \|.*\n.*\nbubble 27\.3%",
    "quickstart": r"40/40\|.*loss \d",
    "custom_loop": r"^  20  loss \d",
    # what the script's stand-in prints; the real one has its own words
    "custom_sink": "" if WANDB else r"^ +10  train/loss \d.*  valid/loss \d.*\nfinished",
    "custom_family": r"reset_attention_mask = True: has no effect with model.family = 'diffusion'",
}


def test_every_script_is_run():
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(NPROC)


@pytest.mark.parametrize("name", NPROC)
def test_a_script_runs_as_it_stands(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    # each takes less than 60 s on a quiet machine
    done = run_script([SCRIPTS / f"{name}.py"], nproc=NPROC[name], timeout=240)
    assert done.returncode == 0, (
        f"after {time.monotonic() - started:.0f} s\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    )
    assert re.search(SAYS.get(name, ""), done.stdout + done.stderr, re.M)
    assert not any(tmp_path.iterdir()), "the script left files in the working directory"
    command = f"python {name}.py"
    if NPROC[name] is not None:
        command = f"torchrun --nproc-per-node {NPROC[name]} {name}.py"
    assert command in (SCRIPTS / f"{name}.py").read_text().split('"""')[1]

"""The scripts that users start from run as they stand, each in real processes."""

import importlib.util
import re
import time

import pytest
import transformers

from hugging_face_models import write_corpus, write_directory
from pool import ROOT, run_script

WANDB = importlib.util.find_spec("wandb") is not None
SCRIPTS = ROOT / "docs" / "scripts"
NPROC = {
    "pure": None,
    "plan": None,
    "dry_run": None,
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
    "finetune": 4,
    "lora": 2,
    "generate": 2,
}
SAYS = {
    "pure": r"stage 3 \|.*\n.*\nbubble 27\.3%",
    "plan": r"^256 x h100 of 80 GB",
    "dry_run": r"^one step of rank 0 of 1,024: ",
    "quickstart": r"40/40, .*loss \d",
    "custom_loop": r"^  20  loss \d",
    # what the script's stand-in prints; the real one has its own words
    "custom_sink": "" if WANDB else r"^ +10  train/loss \d.*  valid/loss \d.*\nfinished",
    "generate": r"^['\"].*['\"] -\d+\.\d",
    "custom_family": r"reset_attention_mask = True: has no effect with model.family = 'diffusion'",
}


def test_every_script_is_run():
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(NPROC)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What the docstrings of scripts call SOURCE and CORPUS."""
    folder = tmp_path_factory.mktemp("given")
    write_corpus(folder / "corpus.txt")
    write_directory("llama", folder / "source", folder / "corpus.txt")
    return {"SOURCE": folder / "source", "CORPUS": folder / "corpus.txt"}


@pytest.mark.parametrize("name", NPROC)
def test_a_script_runs_as_it_stands(name, given, tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {**given, "TARGET": tmp_path_factory.mktemp(name) / "target"}
    docstring = (SCRIPTS / f"{name}.py").read_text().split('"""')[1]
    arguments = re.findall("|".join(paths), docstring)
    started = time.monotonic()
    # each takes less than 60 s on a quiet machine
    done = run_script(
        [SCRIPTS / f"{name}.py", *map(paths.get, arguments)], nproc=NPROC[name], timeout=240
    )
    assert done.returncode == 0, (
        f"after {time.monotonic() - started:.0f} s\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    )
    assert re.search(SAYS.get(name, ""), done.stdout + done.stderr, re.M)
    assert not any(tmp_path.iterdir()), "the script left files in the working directory"
    command = f"python {name}.py"
    if NPROC[name] is not None:
        command = f"torchrun --nproc-per-node {NPROC[name]} {name}.py"
    assert command in docstring
    if "TARGET" in arguments:
        transformers.AutoTokenizer.from_pretrained(paths["TARGET"])
        model = transformers.AutoModelForCausalLM.from_pretrained(paths["TARGET"])
        assert type(model) is transformers.LlamaForCausalLM

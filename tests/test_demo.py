"""The demo of each family runs as `make demo` runs it, in a few iterations.

Its table, samples, picture and logs are there.
"""

import contextlib
import io
import re

import pytest
import transformers

from megafn.demo.demo import demo
from megafn.demo.pretraining import DEMOS


def shown(family, folder, iterations=6):
    """What the demo prints on this rank."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        demo(folder=folder, iterations=iterations, family=family)
    return printed.getvalue()


@pytest.mark.parametrize("family", DEMOS)
def test_the_demo_ends_with_a_table_two_samples_and_a_picture(family, pool, tmp_path):
    printed, *others = pool(4, shown, family, str(tmp_path))
    assert others == [""] * 3 and "tensor parallel 2 x pipeline parallel 2, 4 processes" in printed
    first, last = map(
        float, re.search(r"held-out loss +([\d.]+) -> ([\d.]+) nats", printed).groups()
    )
    baseline = float(re.search(r"byte frequencies alone +([\d.]+) nats", printed)[1])
    assert last < first and 3 < baseline < 4 and printed.count("\n--- ") == 2
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and len(
        (tmp_path / "metrics.jsonl").read_text().splitlines()
    ) == 6
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_demo_of_finetuning_exports_loads_and_adapts(pool, tmp_path):
    printed, *others = pool(4, shown, "finetune", str(tmp_path), iterations=4)
    assert others == [""] * 3
    assert "tensor parallel 2 x pipeline parallel 2, 4 processes" in printed
    assert "tensor parallel 2 x data parallel 2, 4 processes" in printed
    numbers = r" +([\d.]+) -> ([\d.]+) -> ([\d.]+) nats"
    untrained, pretrained, _ = map(float, re.search(f"first half{numbers}", printed).groups())
    assert pretrained < untrained
    untrained, pretrained, adapted = map(
        float, re.search(f"second half{numbers}", printed).groups()
    )
    assert adapted < pretrained < untrained
    assert printed.count("\n--- ") == 2
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("pretrained", "adapted"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(model) is transformers.LlamaForCausalLM

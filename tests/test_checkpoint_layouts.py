"""A checkpoint of one layout resumes in any other as if the run had not been interrupted."""

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

import megafn as mf
from checkpoint_runs import BERT, DIST, SAVED, SP, T5, UNTIED, config_of, run
from equivalence import assert_equal
from t5_rows import RELATIVE


@pytest.fixture(scope="session")
def saved(pool, tmp_path_factory):
    """saved(processes, config) -> (directory, what `run` returned); run once a session."""

    @cache
    def save_once(processes, config):
        directory = tmp_path_factory.mktemp("checkpoint")
        return directory, pool(processes, run, config, directory, SAVED)

    return save_once


ONE = (1, {})
# name: ((processes, layout) that saves, (processes, layout) that loads, changes of both)
PAIRS = {
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
        T5 | RELATIVE,
    ),
    "t5-pp2-dp2-dist-to-one": ((4, dict(pp=2, **DIST)), ONE, T5),
    "t5-one-to-pp2-tp2-sp": (ONE, (4, dict(pp=2, tp=2, **SP)), T5 | UNTIED),
    "sgd-tp2-to-dp2": ((2, dict(tp=2)), (2, {}), dict(name="sgd", momentum=0.9, lr=0.5, eps=1e-8)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_checkpoint_resumes_in_another_layout(name, pool, saved):
    (n, first), (m, second), *base = PAIRS[name]
    base = base[0] if base else {}
    _, reference = saved(1, config_of(**base))
    directory, before = saved(n, config_of(**base, **first))
    after = pool(m, run, config_of(**base, **second), directory)
    curve, start, end, _ = reference[0]
    assert_equal((curve[SAVED:], start, end), [result[:3] for result in after])
    torch.testing.assert_close(after[0][3], before[0][3], rtol=0, atol=1e-4)


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
def test_the_same_layout_resumes_bit_for_bit_dropout_included(n, layout, pool, tmp_path):
    config = config_of(hidden_dropout=0.1, attention_dropout=0.1, **layout)
    whole = pool(n, run, config, tmp_path, SAVED)
    rest = pool(n, run, config, tmp_path)
    for (curve, _, end, logits), (other_curve, _, other_end, other_logits) in zip(
        whole, rest, strict=True
    ):
        assert other_curve == curve[SAVED:]
        assert torch.equal(logits, other_logits)
        assert all(torch.equal(a[1], b[1]) for a, b in zip(end, other_end, strict=True))


def test_every_element_is_written_once_and_the_work_is_shared_evenly(saved):
    directory, _ = saved(4, config_of(pp=2))
    path = mf.latest(directory)
    manifest = json.loads((path / "manifest.json").read_text())
    tensors = manifest["tensors"]

    sizes = list(manifest["files"].values())
    assert len(sizes) == 4 and max(sizes) < 1.5 * min(sizes)

    boxes = [box for name in manifest["files"] for box in load_file(path / name).values()]
    assert len(boxes) == sum(len(tensor["pieces"]) for tensor in tensors.values())
    elements = sum(torch.Size(tensor["shape"]).numel() for tensor in tensors.values())
    assert sum(box.numel() for box in boxes) == elements
    assert tensors["parameter/embedding.word_embeddings.weight"]["shape"] == [97, 32]

"""Any input works, or raises one clear sentence of megafn: no traceback from inside a library."""

import os
import tomllib
import traceback
from types import SimpleNamespace

import attrs
import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import indexed_data
import megafn as mf
from megafn.runtime.data.batches import batches
from pool import ROOT

MODEL = mf.ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=16, vocab_size=50
)
CONFIG = mf.TrainConfig(
    model=MODEL, micro_batch_size=2, global_batch_size=4, train_iters=2, eval_iters=1
)
PG = SimpleNamespace(
    dp_rank=0, dp_size=1, device=torch.device("cpu")
)  # all that reading a batch asks of process groups
FUZZ = settings(max_examples=200, suppress_health_check=list(HealthCheck))


def answer(function, *arguments):
    """What the function gives, or the sentence of its refusal."""
    try:
        return function(*arguments)
    except (ValueError, OSError) as error:
        deepest = traceback.extract_tb(error.__traceback__)[-1].filename
        assert deepest.startswith(str(ROOT / "megafn")), f"raised in {deepest}: {error!r}"
        assert 15 < len(str(error)) and all(len(line) < 500 for line in str(error).splitlines()), (
            error
        )
        return str(error)


# ---- Batches

shapes = st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 17]), max_size=4)
values = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=3),
    st.lists(st.lists(st.integers(-2, 60), max_size=4), max_size=3),
    st.builds(
        lambda shape, low, high, dtype: torch.randint(
            low, high, shape, generator=torch.Generator().manual_seed(low + 200)
        ).to(dtype),
        shapes | st.just([2, 16]),
        st.sampled_from([-100, -1, 0, 1]),
        st.sampled_from([2, 50, 51]),
        st.sampled_from(
            [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool, torch.complex64]
        ),
    ),
    st.builds(lambda shape: np.zeros(shape), shapes),
)
KEYS = (
    "tokens",
    "labels",
    "loss_mask",
    "attention_mask",
    "position_ids",
    "input_ids",
    "text",
    "types",
    "x",
)
whole = torch.zeros(2, 16, dtype=torch.long)


@FUZZ
@given(
    st.one_of(
        st.dictionaries(st.sampled_from(KEYS), values),
        st.dictionaries(st.sampled_from(KEYS), values).map(
            lambda raw: {"tokens": whole, "labels": whole} | raw
        ),
        st.dictionaries(st.sampled_from(KEYS), values).map(lambda raw: {"input_ids": whole} | raw),
        values,
    )
)
def test_any_batch_is_read_or_refused(raw):
    made = answer(mf.step_fn("gpt").batch, raw, CONFIG, PG)
    if not isinstance(made, str):
        tokens = made["tokens"]
        assert (
            tokens.dim() == 2
            and tokens.dtype == torch.long
            and made["labels"].shape == made["loss_mask"].shape == tokens.shape
        )
        assert (
            0 <= tokens.min()
            and tokens.max() < 50
            and set(made["loss_mask"].unique().tolist()) <= {0, 1}
        )


def of_family(family, **changes):
    return attrs.evolve(CONFIG, model=attrs.evolve(MODEL, family=family, **changes))


BERT_KEYS = (
    "text",
    "input_ids",
    "types",
    "token_type_ids",
    "labels",
    "loss_mask",
    "padding_mask",
    "attention_mask",
    "position_ids",
    "is_random",
    "next_sentence_label",
    "x",
)
BERTS = [
    of_family("bert"),
    of_family("bert", bert_binary_head=True, num_tokentypes=2),
    *(
        of_family("bert", num_labels=3, problem_type=kind)
        for kind in ("single_label_classification", "multi_label_classification", "regression")
    ),
]


@FUZZ
@given(
    st.sampled_from(BERTS),
    st.one_of(
        values,
        *(
            st.dictionaries(st.sampled_from(BERT_KEYS), values).map(
                lambda raw, like=like: like | raw
            )
            for like in (
                {},
                {"text": whole, "labels": whole, "loss_mask": whole},
                {"input_ids": whole, "labels": whole},
            )
        ),
    ),
)
def test_any_batch_of_a_bert_is_read_or_refused(config, raw):
    made = answer(mf.step_fn("bert").batch, raw, config, PG)
    if not isinstance(made, str):
        tokens, rows = made["tokens"], made["tokens"].size(0)
        assert (
            tokens.dim() == 2
            and tokens.dtype == torch.long
            and 0 <= tokens.min()
            and tokens.max() < 50
        )
        if config.model.num_labels is None:
            assert made["labels"].shape == made["loss_mask"].shape == tokens.shape
        else:  # without labels only logits are asked for
            assert "labels" not in made or made["labels"].size(0) == rows
        assert (
            "tokentype_ids" not in made or made["tokentype_ids"].max() < config.model.num_tokentypes
        )


T5_KEYS = (
    "text_enc",
    "text_dec",
    "enc_mask",
    "dec_mask",
    "input_ids",
    "decoder_input_ids",
    "attention_mask",
    "decoder_attention_mask",
    "labels",
    "loss_mask",
    "x",
)
PAIR = {"text_enc": whole, "text_dec": whole[:, :8], "labels": whole[:, :8]}


@FUZZ
@given(
    st.one_of(
        values,
        *(
            st.dictionaries(st.sampled_from(T5_KEYS), values).map(lambda raw, like=like: like | raw)
            for like in ({}, PAIR, {"input_ids": whole, "labels": whole[:, :8]})
        ),
    )
)
def test_any_batch_of_a_t5_is_read_or_refused(raw):
    made = answer(mf.step_fn("t5").batch, raw, of_family("t5", decoder_seq_length=8), PG)
    if not isinstance(made, str):
        read, written, labels = made["tokens"], made["decoder_tokens"], made["labels"]
        assert written.shape == labels.shape == made["loss_mask"].shape and read.size(
            0
        ) == written.size(0)
        assert all(
            0 <= ids.min() and ids.max() < 50 for ids in (read, written, labels.clamp(min=0))
        )


# ---- TOML


def renamed(tree, name, other):
    return {
        other if key == name else key: renamed(value, name, other)
        if isinstance(value, dict)
        else value
        for key, value in tree.items()
    }


def put(tree, name, value):
    return {
        key: value if key == name else put(inner, name, value) if isinstance(inner, dict) else inner
        for key, inner in tree.items()
    }


TREE = mf.to_dict(attrs.evolve(CONFIG, data=mf.DataConfig(train="a.txt")))
NAMES = sorted(
    {name for value in (TREE, *(v for v in TREE.values() if isinstance(v, dict))) for name in value}
)
plain = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.booleans(),
    st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)


@FUZZ
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), plain | st.text(min_size=1, max_size=6)), max_size=4
    ),
    st.booleans(),
    st.integers(1, 16),
)
def test_any_toml_is_a_config_or_refused_and_then_judged(changes, rename, world_size):
    tree = TREE
    for name, value in changes:
        tree = (
            renamed(tree, name, value)
            if rename and isinstance(value, str)
            else put(tree, name, value)
        )
    made = answer(mf.from_dict, tomllib.loads(tomli_w.dumps(tree)))
    if not isinstance(made, str):
        for problem in mf.validate(made, world_size):
            assert problem.field and problem.remedy and "\n" not in str(problem)


@FUZZ
@given(st.binary(max_size=60), st.integers(0, 400))
def test_a_file_of_other_bytes_is_refused_as_toml(tmp_path_factory, junk, at):
    path = tmp_path_factory.mktemp("toml", numbered=True) / "config.toml"
    good = tomli_w.dumps(TREE).encode()
    path.write_bytes(good[:at] + junk + good[at:])
    made = answer(mf.load_config, path)
    assert isinstance(made, mf.TrainConfig) or str(path) in made


# ---- Data files


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """The bytes of a sound indexed dataset: .bin, .idx."""
    prefix = tmp_path_factory.mktemp("indexed") / "a"
    indexed_data.indexed(prefix, [np.arange(length) % 50 for length in (3, 40, 1, 25, 60)])
    return prefix.with_suffix(".bin").read_bytes(), prefix.with_suffix(".idx").read_bytes()


def read_all(folder, source, **changes):
    config = attrs.evolve(
        CONFIG,
        data=mf.DataConfig(
            train=source, split=(1.0, 0.0, 0.0), prefetch=0, cache=str(folder / "cache"), **changes
        ),
        eval_iters=0,
    )
    return list(batches(config, PG))


@FUZZ
@given(
    st.sampled_from(["bin", "idx"]),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3),
    st.integers(0, 40),
    st.binary(max_size=9),
)
def test_any_indexed_data_is_read_or_refused(tmp_path_factory, indexed, which, flips, cut, more):
    folder = tmp_path_factory.mktemp("data", numbered=True)
    data, index = map(bytearray, indexed)
    changed = data if which == "bin" else index
    for at, value in flips:
        changed[at % len(changed)] = value
    changed[:] = changed[: len(changed) - cut] + more
    (folder / "a.bin").write_bytes(data)
    (folder / "a.idx").write_bytes(index)
    made = answer(read_all, folder, str(folder / "a"))
    if not isinstance(made, str):
        assert len(made) == 2 and all(
            0 <= micro["tokens"].min() and micro["tokens"].max() < 50
            for share in made
            for micro in share
        )


@FUZZ
@given(
    st.binary(max_size=80) | st.text(max_size=80).map(str.encode),
    st.sampled_from([".txt", ".jsonl"]),
)
def test_any_text_is_read_or_refused(tmp_path_factory, content, suffix):
    folder = tmp_path_factory.mktemp("text", numbered=True)
    path = folder / f"a{suffix}"
    path.write_bytes(content)
    made = answer(read_all, folder, str(path))
    assert isinstance(made, str) or len(made) == 2
    assert set(os.listdir(folder)) <= {"cache", path.name} and not list(
        (folder / "cache").glob(".*.*.*")
    )  # nothing half made


@FUZZ
@given(
    st.binary(max_size=200),
    st.sampled_from(["", "{", '{"version": "1.0"}', "[]", "null", '{"model": {"type": "BPE"}}']),
)
def test_any_tokenizer_file_is_read_or_refused(tmp_path_factory, junk, text):
    folder = tmp_path_factory.mktemp("tokenizer", numbered=True)
    (folder / "a.txt").write_text("some words " * 20)
    (folder / "tokenizer.json").write_bytes(text.encode() or junk)
    assert isinstance(
        answer(read_all, folder, str(folder / "a.txt")), str
    )  # bytes, and model.vocab_size = 50
    told = answer(
        lambda: read_all(folder, str(folder / "a.txt"), tokenizer=str(folder / "tokenizer.json"))
    )
    assert isinstance(told, str) and "tokenizer" in told

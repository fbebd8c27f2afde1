"""Masked tokens: sentences as sequences, megatron-core's samples of them without its cache and its
mistakes about padding."""

import subprocess
import sys
from functools import partial

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

import megafn as mf
from megafn.runtime.data.corpora import corpora
from megafn.runtime.data.datasets import build_dataset
from megafn.runtime.families.bert import bert_data
from megafn.runtime.families.t5 import t5_data
from megafn.runtime.text.documents import cut_sentences
from pool import ROOT

DOCUMENTS = [
    " ".join(f"Sentence {i} of {name} has {'word ' * (i % 5 + 1)}in it." for i in range(12)) + "\n"
    for name in ("one", "two", "three", "four")
]


def config(folder, **changes):
    """A tiny BERT on DOCUMENTS; `changes` go to the model or to the data."""
    text = folder / "corpus.txt"
    if not text.exists():
        text.write_text("\f".join(DOCUMENTS))
    model = dict(
        family="bert",
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        seq_length=64,
        num_tokentypes=2,
    )
    data = dict(train=str(text), split=(1.0, 0.0, 0.0), cache=str(folder / "cache"), prefetch=0)
    for key in list(changes):
        (model if key in attrs.fields_dict(mf.ModelConfig) else data)[key] = changes.pop(key)
    return mf.TrainConfig(
        model=mf.ModelConfig(**model),
        data=mf.DataConfig(**data),
        micro_batch_size=2,
        global_batch_size=4,
        train_iters=10,
        eval_iters=0,
    )


def t5(folder, **changes):
    """A tiny T5 on DOCUMENTS."""
    return config(
        folder,
        **dict(family="t5", num_tokentypes=0, seq_length=40, decoder_seq_length=16) | changes,
    )


# ---------------------------------------------------------------------------------------- sentences


@given(st.text(alphabet='aZ .!?)"\n', max_size=60))
def test_sentences_joined_are_the_text_and_none_is_empty(text):
    pieces = cut_sentences(text)
    assert "".join(pieces) == text and all(pieces)


def test_each_sentence_is_a_sequence_of_its_document(tmp_path):
    (tmp_path / "a.txt").write_text("One. Two!\f" + "x" * 1200 + ". Three?\fno end")
    command = [
        sys.executable,
        "-m",
        "megafn",
        "data",
        str(tmp_path / "a.txt"),
        str(tmp_path / "a"),
        "--split",
        "1,0,0",
        "--split-sentences",
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.stdout == f"{tmp_path}/a_train\n", ran.stderr
    read = IndexedDataset(str(tmp_path / "a_train"))
    texts = [bytes(read[i].astype(np.uint8)).decode() for i in range(len(read))]
    assert texts == [
        "One. ",
        "Two!",
        "x" * 512,
        "x" * 512,
        "x" * 176 + ". ",
        "Three?",
        "no end",
    ] and read.document_indices.tolist() == [0, 2, 6, 7]


# ------------------------------------------------------------------------------------------ samples


def restored(row):
    """(A, B) of a sample, the tokens that were masked put back, and what is padding."""
    tokenizer, real = mf.byte_tokenizer(), int(row["padding_mask"].sum())
    assert row["padding_mask"].tolist() == [1] * real + [0] * (64 - real)
    ids = torch.where(row["loss_mask"] == 1, row["labels"], row["text"])[:real].tolist()
    first = ids.index(tokenizer.sep)
    assert (
        ids[0] == tokenizer.cls
        and ids[-1] == tokenizer.sep
        and row["types"].tolist()
        == [0] * (first + 1) + [1] * (real - first - 1) + [0] * (64 - real)
    )
    return bytes(ids[1:first]).decode(), bytes(ids[first + 1 : -1]).decode()


@pytest.mark.parametrize("pairs", [False, True])
def test_a_sample_is_a_run_of_a_document_whose_order_is_told(pairs, tmp_path):
    made = config(tmp_path, bert_binary_head=pairs)
    rows = [build_dataset(made)[i] for i in range(40)]
    assert len(build_dataset(made)) >= 40 and {int(row["is_random"]) for row in rows} == (
        {0, 1} if pairs else {0}
    )
    for row in rows:
        a, b = restored(row)
        if row["is_random"]:
            a, b = b, a
        where = [text for text in DOCUMENTS if a in text and b in text[text.index(a) + len(a) :]]
        assert where and bool(b) == pairs
        share = int(row["loss_mask"].sum()) / int(row["padding_mask"].sum())
        assert 0.1 < share <= 0.2
    kept = sum(
        int(((row["text"] == row["labels"]) & (row["loss_mask"] == 1)).sum()) for row in rows
    )
    masked = sum(int((row["text"] == mf.byte_tokenizer().mask).sum()) for row in rows)
    count = sum(int(row["loss_mask"].sum()) for row in rows)
    assert 0.7 < masked / count < 0.9 and 0.04 < kept / count < 0.17  # 80% and 10%


def test_the_share_that_is_masked_is_the_configs(tmp_path):
    rows = [build_dataset(config(tmp_path, mask_prob=0.4))[i] for i in range(20)]
    share = sum(int(row["loss_mask"].sum()) for row in rows) / sum(
        int(row["padding_mask"].sum()) for row in rows
    )
    assert 0.35 < share < 0.42
    short = [
        int(build_dataset(config(tmp_path, short_seq_prob=one))[i]["padding_mask"].sum())
        for one in (0.0, 1.0)
        for i in range(20)
    ]
    assert min(short[:20]) > 55 and min(short[20:]) < 40


def beside_megatron(made, folder):
    """Whether the first samples are those of megatron-core's own dataset through its cache."""
    # megatron-core's dataset asks torch.distributed for the rank
    with mf.init_groups(mf.build_groups(made.parallel, 1)):
        ours = build_dataset(made)
        kind, settings = (t5_data if made.model.family == "t5" else bert_data)(
            made, mf.byte_tokenizer()
        )
        settings.path_to_cache = folder
        theirs = kind.__mro__[1](
            ours.dataset,
            ours.dataset_path,
            ours.indices,
            ours.num_samples,
            ours.index_split,
            settings,
        )
        assert (
            kind.__mro__[1].__module__.startswith("megatron")
            and type(theirs)._build_sample_index is not kind._build_sample_index
        )
        keys = (
            "text",
            "text_enc",
            "text_dec",
            "enc_mask",
            "dec_mask",
            "labels",
            "loss_mask",
            "is_random",
            "truncated",
        )
        same = [
            np.array_equal(ours[i][key], theirs[i][key])
            for i in range(20)
            for key in keys
            if key in theirs[i]
        ]
        return (
            len(ours) == len(theirs)
            and np.array_equal(ours.sample_index, theirs.sample_index)
            and all(same)
        )


@pytest.mark.parametrize(
    "made", [config, partial(config, bert_binary_head=True), t5], ids=["bert", "bert-pairs", "t5"]
)
def test_samples_are_those_of_megatron_core(made, tmp_path, pool):
    assert pool(1, beside_megatron, made(tmp_path), str(tmp_path / "theirs")) == [True]
    assert list((tmp_path / "theirs").iterdir()) and not list((tmp_path / "cache").rglob("*.npy"))


def spans(ids):
    """{sentinel: what stands behind it} of ids that begin with one."""
    found, sentinels = {}, mf.byte_tokenizer().additional_special_tokens_ids
    for token in ids:
        if token in sentinels:
            found[token], last = [], token
        else:
            found[last].append(token)
    return found


def test_spans_put_back_for_their_sentinels_are_a_run_of_a_document(tmp_path):
    tokenizer, rows, lengths = (
        mf.byte_tokenizer(),
        [build_dataset(t5(tmp_path))[i] for i in range(60)],
        set(),
    )
    for row in rows:
        read, write = (
            row[name][row[mask] == 1].tolist()
            for name, mask in (("text_enc", "enc_mask"), ("text_dec", "dec_mask"))
        )
        labels = row["labels"][row["loss_mask"] == 1].tolist()
        assert len(row["text_enc"]) == 40 and len(row["text_dec"]) == len(row["labels"]) == 16
        assert (
            write == [tokenizer.bos, *labels[:-1]]
            and labels[-1] == tokenizer.eos
            and torch.equal(row["loss_mask"], row["dec_mask"])
        )
        taken = spans(labels[:-1])
        assert (
            list(taken)
            == list(tokenizer.additional_special_tokens_ids[: len(taken)])
            == [token for token in read if token in taken]
        )
        whole = bytes(byte for token in read for byte in taken.get(token, [token])).decode()
        assert (
            any(whole in text for text in DOCUMENTS)
            and len(whole) <= 38
            and row["enc_mask"].tolist() == [1] * len(read) + [0] * (40 - len(read))
        )
        lengths |= {len(span) for span in taken.values()}
        assert 1 <= sum(map(len, taken.values())) <= 5
    assert {1, 2, 3} <= lengths


@pytest.mark.parametrize(
    "changes, told",
    [
        (
            dict(seq_length=60),
            r"'bytes' has 6 sentinels, and a sample may have 8 spans; "
            r"lower model.seq_length = 60 or data.mask_prob = 0.15, or choose",
        ),
        (
            dict(decoder_seq_length=10),
            r"model.decoder_seq_length = 10: up to 5 spans of a sample are written; "
            r"give 11 or more, or lower model.seq_length",
        ),
    ],
)
def test_spans_that_find_no_place_are_refused_before_the_run(changes, told, tmp_path):
    # the last that find one
    assert build_dataset(t5(tmp_path, decoder_seq_length=11))[0]
    assert build_dataset(t5(tmp_path, seq_length=48))[0]
    with pytest.raises(mf.ConfigError, match=told):
        build_dataset(t5(tmp_path, **changes))
    assert [problem.field for problem in mf.validate(t5(tmp_path, seq_length=7), 1)] == [
        "model.seq_length"
    ]


def test_a_tokenizer_without_bos_begins_with_padding_and_one_without_sentinels_is_refused(tmp_path):
    path, vocab = word_pieces(tmp_path, 0)
    with pytest.raises(
        mf.ConfigError, match="0.json' has no additional_special_tokens_ids, which data for t5 need"
    ):
        build_dataset(t5(tmp_path, tokenizer=path, vocab_size=len(vocab)))
    text = (
        (tmp_path / "0.json")
        .read_text()
        .replace("[CLS]", "<extra_id_0>")
        .replace("[MASK]", "<extra_id_1>")
    )
    (tmp_path / "0.json").write_text(text)
    row = build_dataset(t5(tmp_path, tokenizer=path, vocab_size=len(vocab), seq_length=16))[0]
    assert (
        row["text_dec"][0] == vocab["[PAD]"]
        and row["dec_mask"][0] == 1
        and row["text_dec"][1] == vocab["[CLS]"]
    )


def word_pieces(folder, pad):
    """A tokenizer.json of words and pieces whose [PAD] has this id."""
    tokenizers = pytest.importorskip("tokenizers")
    words = sorted(
        {word for text in DOCUMENTS for word in text.replace(".", " ").split()} - {"word"}
    )
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special.insert(pad, "[PAD]")
    vocab = {token: i for i, token in enumerate([*special, "wo", "##rd", ".", *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / f"{pad}.json"))
    return str(folder / f"{pad}.json"), vocab


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_padding_is_hidden_whatever_its_id_and_words_are_masked_whole(pad, tmp_path):
    path, vocab = word_pieces(tmp_path, pad)
    made = config(
        tmp_path, tokenizer=path, vocab_size=len(vocab), bert_binary_head=True, short_seq_prob=0.5
    )
    rows = [build_dataset(made)[i] for i in range(40)]
    assert any(int(row["padding_mask"].sum()) < 64 for row in rows)
    for row in rows:
        real = row["padding_mask"] == 1
        assert (
            set(row["padding_mask"].tolist()) <= {0, 1}
            and set(row["types"].tolist()) <= {0, 1}
            and not row["loss_mask"][~real].any()
        )
        whole = torch.where(row["loss_mask"] == 1, row["labels"], row["text"])
        assert int((whole == vocab["[SEP]"]).sum()) == 2 and int(real.nonzero().max()) == int(
            (whole == vocab["[SEP]"]).nonzero().max()
        )
        # a sample may begin within a word
        word = (whole[:-1] == vocab["wo"]) & (whole[1:] == vocab["##rd"])
        assert torch.equal(row["loss_mask"][1:][word], row["loss_mask"][:-1][word])


# ----------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_read_is_refused_at_once(tmp_path):
    with pytest.raises(
        mf.ConfigError,
        match=r"corpus.txt': no document for train has 2 sentences or more, "
        r"each of 512 tokens at most; give more text",
    ):
        (tmp_path / "corpus.txt").write_text("one sentence\fand one")
        corpora(config(tmp_path, bert_binary_head=True))
    mf.index_text(tmp_path / "corpus.txt", tmp_path / "plain", split=(1, 0, 0))
    assert corpora(config(tmp_path, train=str(tmp_path / "plain_train")))[0].end == 2
    with pytest.raises(
        mf.ConfigError, match=r"no document for train has 2 sentences or more.*--split-sentences\)$"
    ):
        corpora(config(tmp_path, train=str(tmp_path / "plain_train"), bert_binary_head=True))
    path, _ = word_pieces(tmp_path, 0)
    content = (tmp_path / "0.json").read_text().replace("[MASK]", "[GONE]")
    (tmp_path / "0.json").write_text(content)
    with pytest.raises(
        mf.ConfigError,
        match=r"0.json' has no mask, which data for bert need; add these special tokens",
    ):
        build_dataset(config(tmp_path, tokenizer=path))


def test_documents_that_are_left_out_are_counted_on_rank_zero(tmp_path, monkeypatch):
    kept = ["First one. And a second.", "A third one. A fourth."]
    (tmp_path / "corpus.txt").write_text("\f".join([*kept, "single", "lonely"]))
    pairs = config(tmp_path, bert_binary_head=True)
    with pytest.warns(
        UserWarning,
        match=r"data.train = .*corpus.txt': 2 of 4 documents for train are left out: "
        r"2 with fewer than 2 sentences$",
    ):
        corpora(pairs)
    monkeypatch.setenv("RANK", "1")
    corpora(pairs)
    monkeypatch.setenv("RANK", "0")
    corpora(config(tmp_path))  # without the order of sentences, one is enough

    # as other tools write it: sentences of any length
    builder = IndexedDatasetBuilder(str(tmp_path / "long.bin"), dtype=np.uint16)
    for lengths in ([5, 600], [5, 6], [7]):
        builder.add_document(np.ones(sum(lengths), np.uint16), lengths)
    builder.finalize(str(tmp_path / "long.idx"))
    with pytest.warns(
        UserWarning,
        match="2 of 3 documents for train are left out: 1 with fewer than 2 sentences, "
        "1 with a sentence of more than 512 tokens",
    ):
        corpora(attrs.evolve(pairs, data=attrs.evolve(pairs.data, train=str(tmp_path / "long"))))


# -------------------------------------------------------------------------------------------- a run


def losses(made):
    seen = []
    mf.train(made, on_metrics=[seen.append])
    return [(metrics.loss, metrics.grad_norm, metrics.count) for metrics in seen]


@pytest.mark.parametrize("made", [partial(config, bert_binary_head=True), t5], ids=["bert", "t5"])
def test_a_run_from_text_is_the_same_in_every_layout(made, tmp_path, pool):
    made = attrs.evolve(made(tmp_path), train_iters=6, log=mf.LogConfig(progress=False))
    alone = pool(1, losses, made)[0]
    for layout in (mf.ParallelConfig(tp=2), mf.ParallelConfig(pp=2), mf.ParallelConfig()):
        for other in pool(2, losses, attrs.evolve(made, parallel=layout)):
            assert [count for *_, count in other] == [count for *_, count in alone]
            for expected, found in zip(alone, other, strict=True):
                assert found[:2] == pytest.approx(expected[:2], rel=0, abs=1e-4)

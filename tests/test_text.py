"""Text: nothing of it is lost on the way into token ids, into splits and into files."""

import gzip
import io
import json
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megafn.__main__ import main
from megafn.pure.config.problems import ConfigError
from megafn.runtime.text import cache, indexing, train_tokenizer
from megafn.runtime.text.cache import indexed_text
from megafn.runtime.text.demo_text import demo_text
from megafn.runtime.text.documents import (
    SPLITS,
    _pages,
    cut_sentences,
    read_documents,
    split_documents,
)
from megafn.runtime.text.indexing import index_text
from megafn.runtime.text.tokenizer import byte_tokenizer, load_tokenizer

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
weights = st.lists(st.sampled_from([0, 1, 2, 50, 949, 0.5]), min_size=3, max_size=3).filter(any)


def pieces(prefix, tokenizer=None):
    """The documents of an indexed dataset as text, each without its eod; of bytes by default."""
    tokenizer = tokenizer or byte_tokenizer()
    dataset = IndexedDataset(prefix)
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    assert all(ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1] for ids in dataset[:])
    return [tokenizer.decode(ids[:-1]) for ids in dataset[:]]


# --------------------------------------------------------------------------------------- tokenizers


@given(texts)
def test_bytes_give_the_text_back_and_no_text_holds_a_special_id(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    special = {
        tokenizer.eod,
        tokenizer.pad,
        tokenizer.cls,
        tokenizer.sep,
        tokenizer.mask,
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.unk,
        *tokenizer.additional_special_tokens_ids,
    }
    assert len(special) == 14 and special == {0, 0xC0, 0xC1, *range(0xF5, 0x100)}
    assert not special & set(ids.tolist())
    with_specials = np.concatenate([[tokenizer.bos], ids, sorted(special)])
    assert tokenizer.decode(ids) == tokenizer.decode(with_specials) == text


def test_bytes_refuse_nul_and_surrogates_and_mend_broken_characters():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="character 2 is NUL.*remove"):
        tokenizer.encode("ab\0c")
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("\ud800")
    assert tokenizer.decode([0x61, 0xC3, 0x62]) == "a\N{REPLACEMENT CHARACTER}b"
    with pytest.raises(ValueError, match="bytes, 0 to 255"):
        tokenizer.decode([256])


@pytest.fixture
def hugging_face(tmp_path):
    """Writes a byte-level BPE tokenizer.json with these special tokens."""
    tokenizers = pytest.importorskip("tokenizers")

    def write(*special, name="tokenizer.json"):
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        level = tokenizers.pre_tokenizers.ByteLevel
        made.pre_tokenizer, made.decoder = (
            level(add_prefix_space=False),
            tokenizers.decoders.ByteLevel(),
        )
        made.train_from_iterator(
            ["hello world " * 10],
            tokenizers.trainers.BpeTrainer(
                vocab_size=280,
                special_tokens=list(special),
                initial_alphabet=level.alphabet(),
                show_progress=False,
            ),
        )
        made.enable_truncation(4)
        made.enable_padding(length=8)
        made.save(str(tmp_path / name))
        return str(tmp_path / name)

    return write


def test_a_hugging_face_tokenizer_keeps_the_whole_text_and_lets_no_text_end_a_document(
    hugging_face,
):
    tokenizer = load_tokenizer(hugging_face("[SEP]", "</s>", "<pad>"))
    assert (tokenizer.eod, tokenizer.sep, tokenizer.pad, tokenizer.eos, tokenizer.mask) == (
        1,
        0,
        2,
        1,
        None,
    )
    text = "hello world, hello </s> né\n" * 3
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eod]) == text and tokenizer.eod not in ids
    assert max(ids) < tokenizer.vocab_size and len(ids) < len(text.encode())
    assert json.dumps(dict(tokenizer.unique_identifiers)) != json.dumps(
        dict(load_tokenizer(hugging_face("<|endoftext|>", name="b.json")).unique_identifiers)
    )


def test_the_user_names_the_token_that_ends_documents_and_no_text_holds_it(hugging_face, tmp_path):
    path = hugging_face("</s>", "[SEP]", "<|bye|>")
    usual, named = load_tokenizer(path), load_tokenizer(path, eod_token="<|bye|>")
    assert (usual.eod, named.eod) == (0, 2)
    assert load_tokenizer(path, eod_token="</s>").unique_identifiers == usual.unique_identifiers
    assert named.unique_identifiers != usual.unique_identifiers
    assert named.decode(named.encode("a <|bye|> b")) == "a <|bye|> b"
    with pytest.raises(ConfigError, match="data.eod_token = 'nope': .* has no such token"):
        load_tokenizer(path, eod_token="nope")
    with pytest.raises(ConfigError, match="data.eod_token = 'x': .*ends documents with NUL"):
        load_tokenizer("bytes", eod_token="x")
    # an added token that the file does not call special
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (tmp_path / "ordinary.json").write_text(json.dumps(content))
    ordinary = load_tokenizer(str(tmp_path / "ordinary.json"), eod_token="<|bye|>")
    (tmp_path / "a.txt").write_text("one <|bye|> two\fthree")
    for tokenizer in (named, ordinary):
        made = index_text(
            tmp_path / "a.txt", tmp_path / "out", tokenizer=tokenizer, split=(1, 0, 0)
        )
        assert pieces(made["train"], tokenizer) == ["one <|bye|> two", "three"]
    # a word of the vocabulary
    with pytest.raises(ValueError, match="document 1: its text contains .*'e'; name another"):
        index_text(tmp_path / "a.txt", tmp_path / "out", tokenizer=path, eod_token="e")
    with pytest.raises(ValueError, match="pass it to load_tokenizer"):
        index_text(tmp_path / "a.txt", tmp_path / "out", tokenizer=named, eod_token="e")


def test_a_tokenizer_that_cannot_serve_is_refused(hugging_face, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no token that ends a document; name one in"):
        load_tokenizer(hugging_face("[PAD]"))
    (tmp_path / "bad.json").write_text("{}")
    for name in ("bad.json", "missing.json"):
        with pytest.raises(ConfigError, match="not a Hugging Face tokenizer.json"):
            load_tokenizer(str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"install megafn\[hf\]"):
        load_tokenizer("tokenizer.json")
    assert load_tokenizer("bytes").vocab_size == 256


# ------------------------------------------------------------------------- training a tokenizer

WORDS = "the tide turns and the light house lights the tide\n\nnaïve 東京、タワー"


def test_a_trained_tokenizer_encodes_any_text_and_transformers_loads_it(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    lines = [json.dumps({"body": f"{WORDS} {i} <|endoftext|>"}) for i in range(50)]
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    folder = tmp_path / "new" / "tokenizer"
    command = ["tokenizer", str(tmp_path / "corpus.jsonl.gz"), str(folder), "--json-key", "body"]
    bert = [f"--special-token={token}" for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")]
    assert main([*command, "--vocab-size", "300", *bert]) == 0
    assert capsys.readouterr().out == f"{folder / 'tokenizer.json'}: 300 tokens\n"
    assert sorted(os.listdir(folder)) == ["tokenizer.json", "tokenizer_config.json"]
    assert os.listdir(folder.parent) == ["tokenizer"]

    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    assert (tokenizer.eod, tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert len(tokenizer.encode(" the tide")) == 2
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id) == (0, 1, 4)
    for text in (WORDS, "Ωμέγα \0\x7f \t 🌊", "  two  spaces "):
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == theirs.decode(ids) == text
        assert theirs(text)["input_ids"] == ids

    assert main([*command, "--vocab-size", "300"]) == 2
    assert capsys.readouterr().err == (
        f"megafn: {folder} exists already; name a new directory, or remove this one\n"
    )


def test_a_tokenizer_does_not_depend_on_the_fragments_it_is_trained_on(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    (tmp_path / "corpus.txt").write_text(f"{WORDS} " * 40 + "\f" + f"{WORDS} " * 3)
    for name, size in ("whole", 2**15), ("cut", 16):
        monkeypatch.setattr(train_tokenizer, "_FRAGMENT", size)
        trained = train_tokenizer.train_tokenizer(
            tmp_path / "corpus.txt", tmp_path / name, vocab_size=1000
        )
        assert trained.name == str(tmp_path / name / "tokenizer.json")
        assert 257 < trained.vocab_size < 1000  # no pair is left that occurs twice
    contents = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("whole", "cut")]
    assert contents[0] == contents[1]


def test_a_tokenizer_that_cannot_be_trained_is_refused_in_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    (tmp_path / "good.txt").write_text(WORDS)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b\\ud800"}\n')

    def train(name="good.txt", **kwargs):
        fields = {"vocab_size": 300, **kwargs}
        train_tokenizer.train_tokenizer(tmp_path / name, tmp_path / "new", **fields)

    with pytest.raises(ConfigError, match=r"vocab_size = 257: must hold 256 bytes .* 258 or more"):
        train(vocab_size=257, special_tokens=["[PAD]"])
    with pytest.raises(ConfigError, match="special token = '': must not be empty"):
        train(eod_token="")
    with pytest.raises(ConfigError, match="missing.txt can't be read: No such file"):
        train("missing.txt")
    with pytest.raises(ValueError, match="bad.jsonl, document 2: .*surrogates not allowed"):
        train("bad.jsonl")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"tokenizers is not installed; install megafn\[hf\]"):
        train()
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "good.txt"]


# ---------------------------------------------------------------------------------------- documents


@given(
    st.lists(texts.filter(lambda t: t.strip() and "\f" not in t), min_size=1, max_size=5),
    st.integers(1, 9),
)
def test_documents_come_back_whatever_the_block_they_are_read_in(
    tmp_path_factory, documents, block
):
    path = tmp_path_factory.mktemp("documents") / "a.txt"
    path.write_bytes("\f".join(documents).encode())
    assert list(read_documents(path)) == documents
    with open(path, "rb") as file:
        head = file.read(block)
        assert b"\f".join(_pages(head, file, block)) == path.read_bytes()
    path = path.with_suffix(".jsonl")
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in documents) + "\n\n")
    assert list(read_documents(path)) == documents


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", None, "can't be read: No such file"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\f\n ", "holds no text"),
        ("a.txt", b"ab\fc\xff", "byte 4 is not UTF-8"),
        ("a.txt", "né".encode()[:-1], "byte 1 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', "line 2: the value of .* 'text' is not a str"),
        ("a.txt", b'{"text": "a"}\n{"text": 1}\n', "line 2: the value of .* 'text' is not a str"),
        ("a.txt", b'{"id": 1, "body": "a"}\n', "no key 'text', but 'id', 'body'; .*data.json_key"),
        ("a.json", b"{}\n", "no key 'text', but none at all"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}]', "JSON array; .*jq -c '..."),
        ("a.txt", b'[\n {"text": "a"}\n]', "JSON array; .* begin the file with a form feed"),
        ("a.json", b'["a", "b"]', "JSON array"),
        ("a.json", b'{\n  "text": "a"\n}', "first line does not hold whole; .*jq -c"),
        ("a.txt", b'{\n  "text": "a"\n}', "first line does not hold whole; .*form feed"),
        ("a.json", b"plain text", "line 1 is not JSON"),
        ("a.txt.gz", gzip.compress(b"text " * 99)[:-9], "gzip compression is damaged"),
        ("a.txt.gz", gzip.compress(b"ab\xff"), "byte 2 is not UTF-8"),
        ("a.txt", b"\x28\xb5\x2f\xfd\0", "compressed by zstd.*zstd -d"),
        ("a.txt", b"\xef\xbb\xbfa\xff", "byte 4 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n[1]\n', "line 3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"te', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "JSON array"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xc0"}', "byte 24 is not UTF-8"),
    ],
)
def test_a_bad_file_is_told_in_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        list(read_documents(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=message):
        index_text(path, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} <= {name}  # and leaves nothing


JSON_LINES = "\n".join(json.dumps({"id": i, "text": f"Café {i}", "n": "x"}) for i in range(3))


@pytest.mark.parametrize("name", ["a.json", "a.ndjson", "a.jsonlines", "a.JSONL", "a.txt", "a"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
def test_json_lines_are_read_whatever_the_files_name(tmp_path, name, compress, mark):
    path = tmp_path / name
    path.write_bytes(compress(mark + b"\n" + JSON_LINES.encode()))
    assert list(read_documents(path)) == ["Café 0", "Café 1", "Café 2"]
    made = index_text(path, tmp_path / "out", split=(1, 0, 0), json_key="n")
    assert pieces(made["train"]) == ["x"] * 3


@pytest.mark.parametrize(
    "text",
    [
        "\f" + JSON_LINES,
        '{"a": 1}\nis how an object looks.',
        "[1] A footnote",
        "{braces} are text",
        "{",
    ],
)
def test_text_that_only_looks_like_json_stays_text(tmp_path, text):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    assert list(read_documents(path)) == [text.removeprefix("\f")]


def test_a_text_is_read_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(JSON_LINES,))
    writer.start()
    assert len(list(read_documents(tmp_path / "pipe"))) == 3
    writer.join()


@pytest.mark.parametrize(
    "text",
    [
        "It rains. |We stay in! |Do you mind?",
        "今天天气很好。|我们去公园散步吧！|“好。”|他说。",
        "「はい。」|彼は行った！？|本当？",
        "यह अच्छा है। |तुम कैसे हो?| वह गया॥",
        "كيف حالك؟ |أنا بخير.| شكرا",
        "یہ اچھا ہے۔ |وہ گیا۔",
        "Բարեւ։ |Ինչպես ես։",
        "“It is.” |‘No.’ |He left… |Then?! |(Yes.) |So",
        "„Er kam.“ |Dann ging er. |»Gut.« |Sie",
        "« Il vient. » |Elle part. |« Oui ! » |Il",
        "Voir p. ex. élève, т. е. так. |Да",
        "A line.\n\n|lowercase\n\n|Other  words.  |End",
        "3.14 and e.g. this stay.",
    ],
)
def test_sentences_end_as_their_language_ends_them(text):
    expected = re.sub(r"\|(\s*)", r"\1|", text).split("|")
    assert cut_sentences(text.replace("|", "")) == expected


# ---------------------------------------------------------------------------------------- splitting


@given(st.lists(st.text("ab \n", max_size=80), max_size=12), weights, st.integers(0, 16))
def test_a_split_loses_no_character_and_gives_each_part_its_share(documents, weights, reach):
    split = list(split_documents(documents, weights, reach=reach))
    assert ["".join(parts) for parts in split] == documents
    seen, given_ = 0, [0, 0, 0]
    for parts in split:
        seen += sum(map(len, parts))
        given_ = [n + len(part) for n, part in zip(given_, parts, strict=True)]
        for i in (0, 1):  # at each of the two cuts
            assert (
                abs(sum(given_[: i + 1]) - seen * sum(weights[: i + 1]) / sum(weights)) <= reach + 1
            )
    assert all(n == 0 for n, weight in zip(given_, weights, strict=True) if weight == 0)


def test_cuts_stand_behind_white_space_where_there_is_some():
    documents = ["every word of this stays whole however it is cut " * 20] * 10
    for parts in split_documents(documents, (6, 3, 1)):
        assert all(part and part[-1] == " " for part in parts)
    # white space on both sides of the cut: a part without weight gets nothing all the same
    assert list(split_documents(["aaaaaaaa bb ccccccc"], (1, 0, 1))) == [
        ("aaaaaaaa ", "", "bb ccccccc")
    ]


@pytest.mark.parametrize("bad", [(0, 0, 0), (1, -1, 1), (float("nan"), 1, 1), (float("inf"), 1, 1)])
def test_weights_that_say_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="split = .*give weights"):
        list(split_documents(["a"], bad))


# ----------------------------------------------------------------------------------------- indexing


def test_the_demo_text_is_prose_with_held_out_text_of_20_kb(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(8) as pool:  # every rank calls it
        paths = set(pool.map(lambda _: demo_text(), range(16)))
    (path,) = paths
    assert [p.name for p in (tmp_path / "megafn").iterdir()] == [os.path.basename(path)]
    documents = list(read_documents(path))
    assert len(documents) >= 75 and 400_000 < os.path.getsize(path) < 600_000
    before = os.stat(path)
    assert demo_text() == path and os.stat(path).st_ino == before.st_ino  # written once
    with open(path, "r+b") as file:
        file.truncate(100)
    demo_text()
    assert os.path.getsize(path) == before.st_size

    made = index_text(path, tmp_path / "demo")
    assert list(made) == list(SPLITS)
    parts = [pieces(made[part]) for part in SPLITS]
    assert sum(len(piece.encode()) for piece in parts[1]) > 20_000
    assert len(parts[0]) == len(documents)  # every document is cut ...
    assert len(parts[1]) > len(documents) * 0.95
    lost = sum(map(len, documents)) - sum(len(piece) for part in parts for piece in part)
    assert lost == 0  # ... and no character lost
    assert all(
        document.startswith(piece) for document, piece in zip(documents, parts[0], strict=True)
    )


def test_an_indexed_text_holds_the_pieces_that_the_split_makes(tmp_path, hugging_face):
    documents = ["the first document, né " * 9, "a second one " * 7, "x"]
    (tmp_path / "a.txt").write_text("\f".join(documents))
    tokenizer = load_tokenizer(hugging_face("<|endoftext|>"))
    for number, one in enumerate(("bytes", tokenizer)):
        made = index_text(
            tmp_path / "a.txt", tmp_path / f"new/{number}", tokenizer=one, split=(5, 0, 2)
        )
        assert made == {part: str(tmp_path / f"new/{number}_{part}") for part in ("train", "test")}
        cut = list(split_documents(documents, (5, 0, 2)))
        for part, prefix in made.items():
            expected = [parts[SPLITS.index(part)] for parts in cut if parts[SPLITS.index(part)]]
            assert pieces(prefix, byte_tokenizer() if one == "bytes" else one) == expected
            assert IndexedDataset(prefix).index.dtype is np.uint16
    # a second call replaces all that the first one left, and what an older megafn did
    for suffix in ("train.ids.json", "train.tokenizer.json", "test.tokenizer.json"):
        (tmp_path / f"new/0_{suffix}").write_text("{}")
    index_text(tmp_path / "a.txt", tmp_path / "new/0", split=(1, 0, 0))
    assert sorted(p.name for p in (tmp_path / "new").glob("0*")) == [
        "0_train.bin",
        "0_train.idx",
        "0_train.tokens.json",
    ]
    assert pieces(str(tmp_path / "new/0_train")) == documents


words = st.text(st.sampled_from("abé字ß0٣_.,，。'\" \u00a0\n\t\u0301\u3000"), max_size=9)
running_text = st.lists(
    st.one_of(words, st.sampled_from(["hello", " world", " hello wor", "ld ", "don't", " 's"])),
    min_size=1,
    max_size=40,
).map("".join)
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def a_tokenizer(folder, kind):
    """A small tokenizer.json whose tokens span words wherever its pre-tokenizer lets them."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    level = pre_tokenizers.ByteLevel
    pre_tokenizer = {
        "gpt2": level(add_prefix_space=False),
        "gpt2, prefixed": level(add_prefix_space=True),
        "gpt4": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(GPT4), "isolated"),
                level(add_prefix_space=False, use_regex=False),
            ]
        ),
        "not split": level(add_prefix_space=False, use_regex=False),
        "stripped": level(add_prefix_space=False),
        "prepended": level(add_prefix_space=False),
        "metaspace": pre_tokenizers.Metaspace(),
    }[kind]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if kind == "stripped":
        tokenizer.normalizer = normalizers.Strip()
    if kind == "prepended":
        tokenizer.normalizer = normalizers.Prepend("_")
    tokenizer.train_from_iterator(
        ["hello world don't 0123 a.\n字。\n b, 字，字\n" * 20] * 3,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["</s>"],
            initial_alphabet=level.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    "kind",
    ["bytes", "gpt2", "gpt2, prefixed", "gpt4", "not split", "stripped", "prepended", "metaspace"],
)
def test_a_document_encoded_in_fragments_has_the_ids_of_the_whole(
    tmp_path_factory, monkeypatch, kind
):
    folder = tmp_path_factory.mktemp("fragments")
    tokenizer = byte_tokenizer() if kind == "bytes" else a_tokenizer(folder, kind)
    monkeypatch.setattr(indexing, "_FRAGMENT", 3)
    fragments_seen = []

    @given(running_text)
    def ids_are_the_same(text):
        fragments = list(indexing._cut_for_encoding(text, tokenizer))
        fragments_seen.append(len(fragments))
        assert "".join(fragments) == text
        ids = np.concatenate([tokenizer.encode(fragment) for fragment in fragments])
        assert ids.tolist() == tokenizer.encode(text).tolist()

    ids_are_the_same()
    if kind in ("bytes", "gpt2", "gpt4"):
        assert max(fragments_seen) > 3


@pytest.mark.parametrize("split_sentences", [False, True])
def test_an_index_does_not_depend_on_fragments_or_batches(
    tmp_path, monkeypatch, hugging_face, split_sentences
):
    documents = ["the first document, né. It " * 9, "a second one. " * 7, "x", "hello world " * 50]
    (tmp_path / "a.txt").write_text("\f".join(documents))
    contents = {}
    for tokenizer in ("bytes", hugging_face("<|endoftext|>")):
        for fragment, batch in ((2**15, 2**20), (8, 20), (8, 1)):
            monkeypatch.setattr(indexing, "_FRAGMENT", fragment)
            monkeypatch.setattr(indexing, "_BATCH", batch)
            made = index_text(
                tmp_path / "a.txt",
                tmp_path / "out",
                tokenizer=tokenizer,
                split=(5, 1, 2),
                split_sentences=split_sentences,
            )
            files = [f"{prefix}{suffix}" for prefix in made.values() for suffix in (".bin", ".idx")]
            content = [open(file, "rb").read() for file in files]
            assert contents.setdefault(tokenizer, content) == content


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_is_drawn_on_a_terminal_only(tmp_path, monkeypatch, terminal):
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    (tmp_path / "a.txt").write_text("some words " * 100)
    index_text(tmp_path / "a.txt", tmp_path / "out")
    assert ("indexing a.txt" in stderr.getvalue()) == terminal


def test_a_text_that_cannot_be_encoded_is_named_whatever_its_batch(tmp_path, hugging_face):
    lines = [json.dumps({"text": text}) for text in ("fine", "not \ud800 fine", "fine")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="a.jsonl, document 2, .*surrogates"):
        index_text(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=hugging_face("</s>"))


def test_a_text_that_cannot_be_encoded_is_refused_and_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("fine\fnot\0fine")
    (tmp_path / "out_train.idx").write_text("of an earlier call")
    with pytest.raises(
        ValueError, match="a.txt, document 2, counted from its character 0: .*character 3 is NUL"
    ):
        index_text(tmp_path / "a.txt", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "out_train.idx"]
    with pytest.raises(ValueError, match="three weights"):
        index_text(tmp_path / "a.txt", tmp_path / "out", split=(1, 1))
    (tmp_path / "a.txt").write_text("too long")
    monkeypatch.setattr(indexing, "_LONGEST", 8)
    with pytest.raises(ValueError, match="document 1: 8 tokens .* separate documents"):
        index_text(tmp_path / "a.txt", tmp_path / "out", split=(1, 0, 0))


def test_a_text_is_indexed_once_however_many_ask(tmp_path, monkeypatch):
    source, calls, index = tmp_path / "a.txt", [], index_text

    def counted(*args, **kwargs):
        calls.append(threading.get_ident())
        time.sleep(0.05)
        return index(*args, **kwargs)

    monkeypatch.setattr(cache, "index_text", counted)
    source.write_text("some words to learn " * 50)

    def ask(split=(8, 1, 1)):
        return indexed_text(
            str(source), tokenizer=byte_tokenizer(), split=split, cache=str(tmp_path / "cache")
        )

    with ThreadPoolExecutor(4) as pool:
        first, *rest = pool.map(lambda _: ask(), range(4))
    assert len(calls) == 1 and all(one == first for one in rest) and list(first) == list(SPLITS)
    assert ask((1, 0, 0)) != first and len(calls) == 2  # another split is another index
    source.write_text("other words " * 50)
    assert ask() != first and len(calls) == 3  # so is another text
    assert pieces(ask((1, 0, 0))["train"]) == [source.read_text()]
    left = [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")]
    assert len(left) == 4 and all(name.startswith("a-") for name in left)


def test_a_cache_of_another_user_is_read_without_its_lock(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    (tmp_path / "a.txt").write_text("some words to learn " * 50)
    (tmp_path / "b.txt").write_text("other words " * 50)

    def ask(name):
        return indexed_text(
            str(tmp_path / name), tokenizer=byte_tokenizer(), split=(1, 0, 0), cache=str(folder)
        )

    first = ask("a.txt")
    # root may open anything: what another user may not do is refused here
    really_open, refused = os.open, []

    def open_as_another_user(path, flags, *args, **kwargs):
        if str(path).startswith(str(folder)) and flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            refused.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_as_another_user)
    monkeypatch.setattr(
        cache.tempfile, "mkdtemp", lambda dir, **_: open_as_another_user(dir, os.O_RDWR)
    )
    assert ask("a.txt") == first and not refused
    with pytest.raises(ConfigError, match="can't be written to, and does not hold .*b.txt"):
        ask("b.txt")
    # the lock that another user left can be held
    (lock,) = folder.glob(".*.lock")
    with cache._lock(lock):
        assert refused[-1] == lock


def test_an_index_that_fails_is_not_found_later(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("\0")
    for _ in range(2):
        with pytest.raises(ValueError, match="NUL"):
            indexed_text(
                str(source),
                tokenizer=byte_tokenizer(),
                split=(1, 0, 0),
                cache=str(tmp_path / "cache"),
            )
    assert all(p.name.endswith(".lock") for p in (tmp_path / "cache").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="data.cache = .* can't be created"):
        indexed_text(
            str(source),
            tokenizer=byte_tokenizer(),
            split=(1, 0, 0),
            cache=str(tmp_path / "file/cache"),
        )

"""Which data a run reads, by content: over all ranks, on resuming, and by which tokenizer."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import attrs
import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset

import megafn as mf
from checkpoint_runs import text_config, train
from megafn.pure.checkpoint.compatibility import data_problems
from megafn.pure.sampling import epochs_in_words
from megafn.runtime.data.corpora import corpora
from megafn.runtime.data.datasets import read_samples
from megafn.runtime.text.tokenizer import byte_tokenizer, identity_of, load_tokenizer

FAMILIES = {
    "gpt": {},
    "bert": dict(family="bert", bert_binary_head=True, num_tokentypes=2),
    "t5": dict(family="t5", decoder_seq_length=16),
}


def write_text(path, documents, seed):
    draw = random.Random(seed)
    words = "alpha beta gamma delta epsilon zeta eta theta".split()

    def document():
        sentences = [" ".join(draw.choices(words, k=6)).capitalize() for _ in range(12)]
        return ". ".join(sentences) + "."

    path.write_text("\f".join(document() for _ in range(documents)))
    return str(path)


def with_data(config, **data):
    return attrs.evolve(config, data=mf.DataConfig(**data))


# ------------------------------------------------------------------------- hosts with other copies

LAYOUTS = [dict(tp=2, pp=2), dict(pp=2), dict(cp=2)]


def refusals(folder):
    """Each layout with a copy of the text on each rank, of which the last one is older."""
    rank = int(os.environ["RANK"])
    own = Path(folder) / f"host{rank}"
    own.mkdir()
    same = write_text(own / "same.txt", 30, seed=1)
    older = write_text(own / "older.txt", 30, seed=2 if rank == 3 else 1)
    messages = []
    for number, layout in enumerate(LAYOUTS):
        config = text_config(steps=2, **layout)
        if number == 0:
            data = dict(train=(same, older))
        else:
            config = attrs.evolve(config, eval_iters=1)
            data = dict(train=same, valid=older)
        try:
            mf.train(with_data(config, **data, cache=str(own / "cache")))
        except mf.ConfigError as error:
            messages.append(str(error))
    return messages


def test_ranks_with_other_copies_of_a_corpus_are_refused_on_every_axis(pool, tmp_path):
    for messages in pool(4, refusals, str(tmp_path)):
        assert len(messages) == len(LAYOUTS)
        for message, split in zip(messages, ("train", "valid", "valid"), strict=True):
            assert "older.txt" in message and "same.txt" not in message
            assert f"of {split} is" in message and "on ranks 3;" in message


# ---------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_would_read_another_text_or_order_is_refused(family, tmp_path):
    big = write_text(tmp_path / "big.txt", 60, seed=1)
    small = write_text(tmp_path / "small.txt", 4, seed=2)

    def run(steps, blend=((0.7, big), (0.3, small))):
        config = text_config(tmp_path / "runs", steps=steps, **FAMILIES[family])
        config = attrs.evolve(config, train_iters=steps)
        cache = str(tmp_path / "cache")
        return train(with_data(config, train=blend, split=(1, 0, 0), cache=cache))

    run(3)
    with pytest.raises(mf.ConfigError, match="small.txt': a run of this length reads it in anoth"):
        run(120)
    with pytest.raises(mf.ConfigError, match="big.txt': its weight in the blend is 0.6, the check"):
        run(4, ((0.6, big), (0.4, small)))
    with pytest.raises(mf.ConfigError, match="written with .*big.txt', .*small.txt'; give those"):
        run(4, big)
    write_text(tmp_path / "small.txt", 4, seed=3)
    with pytest.raises(mf.ConfigError, match="small.txt': it holds .* but the checkpoint was"):
        run(4)
    # the same text under another name, and the same blend in other numbers
    moved = write_text(tmp_path / "moved.txt", 4, seed=2)
    assert [iteration for iteration, *_ in run(4, ((7.0, big), (3.0, moved))).curve] == [4]


def test_replay_and_a_custom_loop_refuse_another_text_as_a_resumed_run_does(tmp_path):
    text = write_text(tmp_path / "a.txt", 40, seed=1)
    other = write_text(tmp_path / "b.txt", 40, seed=2)
    cache = str(tmp_path / "cache")
    config = text_config(tmp_path / "runs", steps=4)
    here = with_data(config, train=text, sampler="cyclic", cache=cache)
    elsewhere = with_data(config, train=other, sampler="cyclic", cache=cache)

    def loop(config, use):
        with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
            return use(mf.setup(config, pg))

    data = mf.describe_data(here)
    path = loop(here, lambda state: mf.save(state, tmp_path / "saved", data=data))
    assert json.loads((path / "manifest.json").read_bytes())["data"] == data
    loop(here, lambda state: mf.load(state, path, data=data))
    loop(elsewhere, lambda state: mf.load(state, path))
    train(here)
    problem = "data.train = .*b.txt': it holds .* but the checkpoint was written with .*a.txt' of"
    data = mf.describe_data(elsewhere)
    with pytest.raises(mf.ConfigError, match=problem):
        loop(elsewhere, lambda state: mf.load(state, path, data=data))
    assert mf.replay(here, 4).iteration == 4
    with pytest.raises(mf.ConfigError, match=problem):
        mf.replay(elsewhere, 4)


def without_data(path):
    """Take out what the manifest says of the data, as an older megafn wrote it."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_bytes())
    assert manifest.pop("data")["corpora"][0]["epochs"] == "1 epoch"
    file.write_text(json.dumps(manifest))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    sums = path / "SHA256SUMS"
    lines = [line for line in sums.read_text().splitlines() if not line.endswith(file.name)]
    sums.write_text("\n".join([*lines, f"{digest}  {file.name}", ""]))


def test_a_checkpoint_that_says_nothing_of_its_data_loads(tmp_path):
    config = text_config(tmp_path)
    train(config, stop=3)
    without_data(mf.latest(tmp_path))
    another = write_text(tmp_path / "a.txt", 60, seed=1)
    other = with_data(config, train=another, sampler="cyclic", cache=str(tmp_path / "cache"))
    with pytest.raises(mf.ConfigError, match="is not the one that was read before the checkpoint"):
        train(other)
    assert [iteration for iteration, *_ in train(config).curve] == [3, 4, 5, 6, 7]


def test_what_a_manifest_lacks_is_not_compared():
    corpus = dict(source="a", fingerprint="f", documents=3, tokens=9, weight=None, epochs="1 epoch")
    now = dict(tokenizer=dict(name="bytes", digest="d"), corpora=[corpus])
    assert data_problems({}, now, text_config()) == ()
    assert data_problems(dict(corpora=[dict(source="b")]), now, text_config()) == ()
    (problem,) = data_problems(dict(corpora=[dict(corpus, tokens=8)]), now, text_config())
    assert problem.field == "data.train" and "3 documents of 8 tokens" in problem.remedy


def test_equal_words_for_epochs_mean_an_equal_order(tmp_path):
    """All that the order of megatron-core's dataset depends on, besides corpus and seed."""
    text = write_text(tmp_path / "a.txt", 6, seed=1)
    config = with_data(text_config(), train=text, split=(1, 0, 0), cache=str(tmp_path / "cache"))
    (corpus,) = corpora(config)
    kind, read = read_samples(config, "train")
    assert kind is GPTDataset
    length = config.model.seq_length
    orders = {}
    for samples in range(1, 4 * corpus.tokens // length, 3):
        dataset = read(corpus, samples)
        order = np.concatenate([dataset.document_index, dataset.shuffle_index]).tobytes()
        words = epochs_in_words(samples, tokens=corpus.tokens, seq_length=length)
        orders.setdefault(words, set()).add(order)
    assert len(orders) > 5
    assert all(len(of_words) == 1 for of_words in orders.values())
    assert len(set.union(*orders.values())) == len(orders)


# --------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_data_indexed_with_another_tokenizer_is_refused(family, tmp_path):
    text = write_text(tmp_path / "a.txt", 40, seed=1)
    other = attrs.evolve(byte_tokenizer(), name="other.json", unique_identifiers={"of": "other"})
    config = text_config(steps=2, **FAMILIES[family])
    for number, tokenizer in enumerate((byte_tokenizer(), other)):
        prefix = str(tmp_path / f"indexed{number}")
        mf.index_text(text, prefix, tokenizer=tokenizer, split_sentences=family != "gpt")
    assert len(corpora(with_data(config, train=str(tmp_path / "indexed0_train")))) == 1
    of_other = str(tmp_path / "indexed1_train")
    problem = "data.train = .*indexed with the tokenizer 'other.json' .* data.tokenizer = 'bytes'"
    with pytest.raises(mf.ConfigError, match=problem):
        train(with_data(config, train=of_other))
    today = Path(f"{of_other}.tokens.json")
    older = Path(f"{of_other}.tokenizer.json")
    older.write_text(json.dumps(json.loads(today.read_bytes())["tokenizer"]))
    for identity in (today, older):
        with pytest.raises(mf.ConfigError, match=problem):
            corpora(with_data(config, train=of_other))
        identity.write_text("{}")
        with pytest.raises(mf.ConfigError, match=f"{identity.name} is damaged"):
            corpora(with_data(config, train=of_other))
        identity.unlink()
    assert len(corpora(with_data(config, train=of_other))) == 1, "as other tools write it"


@pytest.fixture
def hugging_face(tmp_path):
    """Writes a byte-level tokenizer.json that was trained on these words."""
    tokenizers = pytest.importorskip("tokenizers")

    def write(name, words):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        level = tokenizers.pre_tokenizers.ByteLevel
        tokenizer.pre_tokenizer = level(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=level.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([words * 20], trainer)
        tokenizer.save(str(tmp_path / name))
        return str(tmp_path / name)

    return write


def test_tokenizers_are_compared_by_what_they_define(hugging_face, tmp_path):
    first = hugging_face("a.json", "alpha beta gamma delta ")
    moved = shutil.copy(first, tmp_path / "moved.json")
    laid_out = tmp_path / "laid_out.json"
    laid_out.write_text(json.dumps(json.loads(Path(first).read_text()), indent=4))
    other = hugging_face("b.json", "epsilon zeta eta theta ")
    digest = identity_of(load_tokenizer(first)).digest
    assert identity_of(load_tokenizer(moved)).digest == digest
    assert identity_of(load_tokenizer(str(laid_out))).digest == digest
    assert identity_of(load_tokenizer(other)).digest != digest

    text = write_text(tmp_path / "a.txt", 40, seed=1)
    cache = str(tmp_path / "cache")

    def run(steps, tokenizer):
        config = text_config(tmp_path / "runs", steps=steps, vocab_size=300)
        return train(with_data(config, train=text, tokenizer=str(tokenizer), cache=cache))

    run(2, first)
    assert [iteration for iteration, *_ in run(3, moved).curve] == [3]
    assert [iteration for iteration, *_ in run(4, laid_out).curve] == [4]
    with pytest.raises(mf.ConfigError, match="b.json': it defines another tokenizer .*a.json|laid"):
        run(5, other)
    with pytest.raises(
        mf.ConfigError, match="data.tokenizer = 'bytes': the checkpoint was written"
    ):
        run(5, "bytes")

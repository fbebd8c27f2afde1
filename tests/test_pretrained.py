"""Hugging Face weights in and out: transformers' numbers in every layout, and clear refusals."""

import builtins
import contextlib
import gc
import json
import os
import pickle
import re
import resource
import shutil
from pathlib import Path
from unittest import mock

import attrs
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import megafn as mf
from equivalence import share, tiny, uneven
from hugging_face_models import (
    MODELS,
    logits_of,
    make_model,
    rows,
    step_of_sgd,
    train_config,
)
from megafn.__main__ import main
from megafn.runtime.pretrained import hugging_face, model_directory

TOLERANCE = 1e-5

LAYOUTS = {
    "single": (1, {}),
    "tp2-sp": (2, dict(tp=2, sequence_parallel=True)),
    "pp2-vpp2": (2, dict(pp=2, vpp=2)),
    "pp2": (2, dict(pp=2)),
    "cp2": (2, dict(cp=2)),
    "tp2-pp2-sp": (4, dict(tp=2, pp=2, sequence_parallel=True)),
    "tp2-cp2": (4, dict(tp=2, cp=2)),
}
EVERYWHERE = ("single", "tp2-pp2-sp")
# Those whose positions, windows or output layers a layout cuts in a way of its own.
ALSO = {
    "tp2-sp": ("qwen3", "phi3", "bert", "t5"),
    "pp2-vpp2": ("smollm3", "llama-tied"),
    "pp2": ("t5-1.1",),
    "cp2": ("llama31", "mistral"),
}


# ----------------------------------------------------------------------------------- in the workers


class CountedFile:
    """A safetensors file that counts the elements that are read from it."""

    elements = 0

    def __init__(self, *arguments):
        self.file = safe_open(*arguments)

    def __enter__(self):
        self.file = self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return CountedSlice(self.file.get_slice(name))


class CountedSlice:
    def __init__(self, stored):
        self.stored = stored
        self.get_shape = stored.get_shape
        self.get_dtype = stored.get_dtype

    def __getitem__(self, place):
        tensor = self.stored[place]
        CountedFile.elements += tensor.numel()
        return tensor


@contextlib.contextmanager
def counted_reads():
    CountedFile.elements = 0
    with mock.patch.object(hugging_face, "safe_open", CountedFile):
        yield


def import_step_export(folder, jobs):
    """For each (model, layout): read the model, take one step, write the result.

    Returns the logits before the step, how many elements this rank read and holds.
    """
    results = []
    for name, layout, changes in jobs:
        config = train_config(folder / name, changes)
        groups = mf.build_groups(config.parallel, mf.world_size(), model=config.model)
        with mf.init_groups(groups) as pg:
            step = mf.step_fn(config.model.family)
            with counted_reads():
                state = mf.from_pretrained(mf.setup(config, pg), folder / name)
            held = sum(p.numel() for chunk in state.chunks for p in chunk.parameters())
            batch = share(rows(config.model.family), config, pg)
            state, metrics = mf.train_step(state, batch, step)
            logits = torch.cat(
                [one[0] if isinstance(one, tuple) else one for one in metrics.logits]
            )
            mf.to_pretrained(state, folder / f"{name}-{layout}")
            results.append((logits, CountedFile.elements, held))
    return results


# ----------------------------------------------------------------------------- against transformers


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with a directory of each model; its logits, and its parameters after a step."""
    folder = tmp_path_factory.mktemp("models")
    expected = {}
    for name in MODELS:
        model = make_model(name)
        model.save_pretrained(folder / name)
        batch = rows(mf.pretrained_model(folder / name).family)
        logits = logits_of(model, batch).detach()
        stepped = step_of_sgd(model, batch).state_dict()
        expected[name] = (logits, stepped)
    return folder, expected


@pytest.mark.parametrize("n", [1, 2, 4])
def test_logits_and_gradients_are_transformers_in_every_layout(n, sources, pool):
    folder, expected = sources
    jobs = [
        (name, layout, changes)
        for layout, (processes, changes) in LAYOUTS.items()
        for name in MODELS
        if processes == n
        and (layout in EVERYWHERE or name in ("llama", "gpt2") or name in ALSO.get(layout, ()))
    ]
    ranks = pool(n, import_step_export, folder, jobs, timeout=240)
    for i, (name, layout, _) in enumerate(jobs):
        logits, stepped = expected[name]
        loaded = getattr(transformers, MODELS[name][0]).from_pretrained(folder / f"{name}-{layout}")
        after = loaded.state_dict()
        for key, value in stepped.items():
            assert torch.allclose(after[key], value, atol=TOLERANCE), (name, layout, key)
        assert torch.allclose(ranks[0][i][0], logits, atol=TOLERANCE), (name, layout)
        for _, elements, held in (rank[i] for rank in ranks):
            assert 0 < elements <= held, (name, layout, "a rank read more than it holds")


# ----------------------------------------------------------------------------------- bits and bytes

# Changes of a run that has one of these sources, and the dtype that its weights are written in.
ROUND_TRIPS = {
    "tp2": ("gpt2", dict(parallel=mf.ParallelConfig(tp=2)), torch.float32),
    "distributed": (
        "llama",
        dict(optimizer=mf.OptimizerConfig(use_distributed_optimizer=True)),
        torch.float32,
    ),
    "masters": (
        "llama",
        dict(
            precision=mf.PrecisionConfig(dtype="bf16"),
            optimizer=mf.OptimizerConfig(use_distributed_optimizer=True),
        ),
        torch.float32,
    ),
    "bf16": (
        "llama-bf16",
        dict(parallel=mf.ParallelConfig(pp=2), precision=mf.PrecisionConfig(dtype="bf16")),
        torch.bfloat16,
    ),
}


def round_trip(folder):
    """Each run reads its weights, writes them as several files, and saves a checkpoint."""
    for name, (source, changes, _) in ROUND_TRIPS.items():
        config = attrs.evolve(train_config(folder / source, {}), **changes)
        with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
            state = mf.from_pretrained(mf.setup(config, pg), folder / source)
            mf.to_pretrained(state, folder / f"again-{name}", max_shard_bytes=40_000)
            mf.save(state, folder / f"checkpoint-{name}")


def weights_in(directory):
    weights = {}
    for file in directory.glob("*.safetensors"):
        weights |= load_file(file)
    return weights


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_import_then_export_gives_the_same_bits_from_a_state_and_from_its_checkpoint(
    sources, pool, tmp_path
):
    folder, _ = sources
    make_model("llama").to(torch.bfloat16).save_pretrained(folder / "llama-bf16")
    pool(2, round_trip, folder)
    for name, (source, _, dtype) in ROUND_TRIPS.items():
        original = weights_in(folder / source)
        again = folder / f"again-{name}"
        assert same_weights(original, weights_in(again)), name
        assert {tensor.dtype for tensor in weights_in(again).values()} == {dtype}
        mf.export(folder / f"checkpoint-{name}", tmp_path / name, max_shard_bytes=40_000)
        for file in again.iterdir():
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), file
        sizes = [file.stat().st_size for file in again.glob("model-*.safetensors")]
        assert len(sizes) > 1 and max(sizes) < 50_000
        config = json.loads((again / "config.json").read_text())
        before = json.loads((folder / source / "config.json").read_text())
        assert config == before | {"torch_dtype": config["dtype"]}
        # the files with an index are read like the single one
        state_of_index = read(again)
        assert same_weights(state_of_index, read(folder / source)), name


def read(path, **changes):
    """The whole parameters of a model read in one process."""
    config = attrs.evolve(train_config(path, {}), **changes)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        state = mf.from_pretrained(mf.setup(config, pg), path)
        return mf.whole_parameters(state.chunks, config.model, pg)


def anonymous_memory():
    """Bytes of this process that are not of files."""
    (line,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


def test_export_holds_one_parameter_at_a_time(tmp_path):
    config = tiny(hidden_size=256, num_layers=16)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        mf.save(mf.setup(config, pg), tmp_path)
    gc.collect()
    before = anonymous_memory()
    growth = []

    def place(*arguments):
        growth.append(anonymous_memory() - before)
        place_in_tensor(*arguments)

    place_in_tensor = model_directory._place
    with mock.patch.object(model_directory, "_place", place):
        mf.export(tmp_path, tmp_path / "exported")
    size = (tmp_path / "exported/model.safetensors").stat().st_size
    assert size > 50_000_000
    assert max(growth) < size / 8, "one of 16 layers is a sixteenth of it"


def test_an_export_leaves_the_folders_of_other_exports_alone(tmp_path):
    config = tiny()
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        mf.save(mf.setup(config, pg), tmp_path / "run")
    killed = tmp_path / ".saving-model-0123abcd"
    running = tmp_path / ".saving-model-chat-0123abcd"
    killed.mkdir()
    running.mkdir()
    mf.export(tmp_path / "run", tmp_path / "model")
    assert not killed.exists() and running.exists()


# ------------------------------------------------------------------------------------- bad input


def model_without(tensor):
    def spoil(path):
        weights = load_file(path / "model.safetensors")
        del weights[tensor]
        save_file(weights, path / "model.safetensors")

    return spoil


def model_with(tensor, value):
    def spoil(path):
        weights = load_file(path / "model.safetensors")
        weights[tensor] = value
        save_file(weights, path / "model.safetensors")

    return spoil


def with_index(change):
    """Written as several files; change(path, the parsed index)."""

    def spoil(path):
        make_model("llama").save_pretrained(path, max_shard_size="40KB")
        (path / "model.safetensors").unlink()
        index = json.loads((path / "model.safetensors.index.json").read_text())
        change(path, index)
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def spoil_index(path, index):
    file = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.embed_tokens.weight"] = file


def leave_the_directory(path, index):
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"


def truncate(file):
    os.truncate(file, file.stat().st_size - 4)


def last_shard(path):
    return max(path.glob("model-*.safetensors"))


def save_as_pickle(path):
    (path / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, path / "pytorch_model.bin")


NORM = "model.layers.3.input_layernorm.weight"  # of the second pipeline stage

# What is done to a directory or to the config's model, and what every rank says.
REFUSALS = {
    "truncated": (
        lambda path: truncate(path / "model.safetensors"),
        {},
        r"model.safetensors is damaged: .*; fetch it again or restore it",
    ),
    "truncated-shard": (
        with_index(lambda path, _: truncate(last_shard(path))),
        {},
        r"model-0000.-of-0000.\.safetensors is damaged: .*; fetch it again",
    ),
    "missing-shard": (
        with_index(lambda path, _: last_shard(path).unlink()),
        {},
        r"model-0000.-of-0000.\.safetensors is missing: .*index.json lists it; fetch it again",
    ),
    "stale-index": (
        with_index(spoil_index),
        {},
        r"index.json is stale: it places model.embed_tokens.weight in model-.* restore the index",
    ),
    "outside": (
        with_index(leave_the_directory),
        {},
        r"index.json is damaged: '../model.safetensors' is not a file name",
    ),
    "pickle": (save_as_pickle, {}, r"holds neither model.safetensors nor .*; save the model in"),
    "no-config": (
        lambda path: (path / "config.json").unlink(),
        {},
        r"config.json.*(missing|No such file)",
    ),
    "bad-config": (
        lambda path: (path / "config.json").write_text("{"),
        {},
        r"config.json.*(damaged|not valid JSON)",
    ),
    "nothing": (shutil.rmtree, {}, r"nothing does not exist: give a megafn checkpoint, a "),
    "vocabulary": (
        lambda path: None,
        dict(vocab_size=101),
        r"model.vocab_size = 101: the weights at .* are of 97 token ids; set that",
    ),
    "activation": (
        lambda path: None,
        dict(activation="geglu", norm_epsilon=1e-3),
        r"2 problems:\n  model.activation = 'geglu': the weights at .* 'swiglu'.*\n.*norm_epsilon",
    ),
    "tied": (
        lambda path: None,
        dict(tie_word_embeddings=True),
        r"model.tie_word_embeddings = True: lm_head.weight and .* differ in .*; set it to False",
    ),
    "missing": (model_without(NORM), {}, rf"{NORM} is missing, of which decoder.layers.3.input_"),
    "shape": (
        model_with(NORM, torch.ones(33)),
        {},
        r"decoder.layers.3.input_layernorm.weight: the model has it in shape \[32\], .* \[33\]",
    ),
    "integers": (
        model_with(NORM, torch.ones(32, dtype=torch.int8)),
        {},
        rf"{NORM} is not stored in fp32, bf16 or fp16; give weights that are not quantized",
    ),
    "unread": (
        model_with("model.layers.0.experts.weight", torch.ones(3)),
        {},
        r"no place for 1 of the stored tensors \(model.layers.0.experts.weight\); give",
    ),
    "nan": (
        model_with(NORM, torch.full((32,), torch.nan)),
        {},
        rf"{NORM} holds NaN or infinity; give weights that are finite",
    ),
}


def refusals(config, folder):
    """What this rank hears of each directory."""
    messages = {}
    for name, (_, changes, _) in REFUSALS.items():
        bad = attrs.evolve(config, model=attrs.evolve(config.model, **changes))
        with mf.init_groups(mf.build_groups(bad.parallel, mf.world_size())) as pg:
            state = mf.setup(bad, pg)
            with pytest.raises((mf.CheckpointError, mf.ConfigError)) as refused:
                mf.from_pretrained(state, folder / name)
            if name != "nan":  # found while reading
                assert mf.logits(state, torch.zeros(1, 8, dtype=torch.long)) is not None
            messages[name] = str(refused.value)
    return messages


def test_bad_weights_are_one_clear_sentence_on_every_rank(sources, pool, tmp_path):
    folder, _ = sources
    for name, (spoil, _, _) in REFUSALS.items():
        shutil.copytree(folder / "llama", tmp_path / name)
        spoil(tmp_path / name)
    config = train_config(folder / "llama", dict(pp=2))
    first, second = pool(2, refusals, config, tmp_path)
    assert first == second
    for name, (_, _, expected) in REFUSALS.items():
        assert re.search(expected, first[name]), (name, first[name])


def test_a_single_file_is_preferred_to_an_index_beside_it(sources, tmp_path):
    folder, _ = sources
    shutil.copytree(folder / "llama", tmp_path / "model")
    with_index(spoil_index)(tmp_path / "model")
    shutil.copy(folder / "llama/model.safetensors", tmp_path / "model")
    assert same_weights(read(tmp_path / "model"), read(folder / "llama"))


class Bomb:
    def __reduce__(self):
        return exec, ("import builtins; builtins.exploded = True",)


def test_nothing_in_a_directory_is_executed(sources, tmp_path):
    folder, _ = sources
    pickle.loads(pickle.dumps(Bomb()))
    assert builtins.__dict__.pop("exploded"), "the bomb works"
    bomb = pickle.dumps(Bomb())
    for name in ("pytorch_model.bin", "model.safetensors", "config.json", "tokenizer.json"):
        path = tmp_path / name.replace(".", "-")
        shutil.copytree(folder / "llama", path)
        if name == "pytorch_model.bin":
            (path / "model.safetensors").unlink()
        (path / name).write_bytes(bomb)
        with contextlib.suppress(ValueError):
            mf.describe_weights(path)
        config = train_config(folder / "llama", {})
        with (
            contextlib.suppress(ValueError),
            mf.init_groups(mf.build_groups(config.parallel, 1)) as pg,
        ):
            mf.from_pretrained(mf.setup(config, pg), path)
        assert not hasattr(builtins, "exploded")


def failing_exports(config, source, target):
    """What this rank hears when the target exists, a tokenizer is missing, or its disk is full."""
    messages = []
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.from_pretrained(mf.setup(config, pg), source)
        arguments = [(source, {}), (target, dict(tokenizer=target)), (target, dict(dtype="fp8"))]
        for directory, options in arguments:
            with pytest.raises(ValueError) as refused:
                mf.to_pretrained(state, directory, **options)
            messages.append(str(refused.value))
        for owner, name, failing_rank in (
            (model_directory, "_place", 1),
            (model_directory, "_json", 0),
        ):
            with contextlib.ExitStack() as patches:
                if pg.rank == failing_rank:
                    failure = RuntimeError("no memory")
                    patches.enter_context(mock.patch.object(owner, name, side_effect=failure))
                with pytest.raises(mf.CheckpointError) as refused:
                    mf.to_pretrained(state, target, max_shard_bytes=20_000)
            messages.append(str(refused.value))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not pg.is_rank_zero:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(mf.CheckpointError) as refused:
                mf.to_pretrained(state, target, max_shard_bytes=20_000)
            messages.append(str(refused.value))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return messages


def test_an_export_that_fails_says_why_on_every_rank_and_leaves_nothing(sources, pool, tmp_path):
    folder, _ = sources
    config = train_config(folder / "llama", dict(tp=2))
    first, second = pool(2, failing_exports, config, folder / "llama", tmp_path / "target")
    assert first == second
    exists, tokenizer, dtype, unplaced, unpublished, full = first
    assert exists.endswith("llama exists already: name a new directory, or remove that one")
    assert "it holds no tokenizer; name a tokenizer.json" in tokenizer
    failed = r"could not be written: RuntimeError\('no memory'\)"
    assert re.search(rf"target/model-0000\d-of-\d+.safetensors {failed}", unplaced)
    assert re.search(rf"target {failed}", unpublished)
    assert dtype.startswith("dtype = 'fp8': choose one of fp32, bf16, fp16")
    assert re.search(r"target/model-00002-of-.* could not be written: .*File too large", full)
    assert not list(tmp_path.iterdir())


def test_what_no_architecture_expresses_is_refused_by_its_field(tmp_path):
    config = tiny(qk_layernorm=True)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        state = mf.setup(config, pg)
        with pytest.raises(mf.ConfigError, match="model.qk_layernorm = True: "):
            mf.to_pretrained(state, tmp_path / "target")
    assert not (tmp_path / "target").exists()


# ------------------------------------------------------------------- from a checkpoint of megafn


def pretrain(config, directory):
    """Logits of a run of one step, which is saved."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state, _ = mf.train_step(
            mf.setup(config, pg), share(uneven(config, 0), config, pg), mf.step_fn("gpt")
        )
        mf.save(state, directory)
        return mf.logits(state, torch.arange(16)[None])


def continue_elsewhere(config, directory):
    """The state and logits of another run that starts from that checkpoint."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.from_pretrained(mf.setup(config, pg), directory)
        logits = mf.logits(state, torch.arange(16)[None])
        state, _ = mf.train_step(state, share(uneven(config, 0), config, pg), mf.step_fn("gpt"))
        return logits, state.iteration, state.pretrained


def test_a_run_of_another_length_batch_and_seed_starts_from_a_checkpoint_of_any_layout(
    pool, tmp_path
):
    config = tiny(max_position_embeddings=32, pp=2, vpp=2, use_distributed_optimizer=True)
    logits, _ = pool(2, pretrain, config, tmp_path)
    other = tiny(max_position_embeddings=32, seq_length=16, tp=2, global_batch_size=4, seed=5)
    for logits_there, iteration, record in pool(2, continue_elsewhere, other, tmp_path):
        assert torch.allclose(logits_there, logits, atol=TOLERANCE)
        assert iteration == 1
        assert record.source == str(tmp_path / "iteration-00000001")
        assert record.architecture is None and record.dtype == "fp32"


def test_a_classifier_starts_from_a_pretrained_bert_and_lists_what_differs(tmp_path, capsys):
    bert = tiny(family="bert", num_tokentypes=2, bert_binary_head=True, num_layers=2)
    with mf.init_groups(mf.build_groups(bert.parallel, 1)) as pg:
        state = mf.setup(bert, pg)
        mf.save(state, tmp_path)
        mf.to_pretrained(state, tmp_path / "bert")
        table = mf.whole_parameters(state.chunks, bert.model, pg)["pooler.dense.weight"]
    model = attrs.evolve(bert.model, bert_binary_head=False, num_labels=3)
    classifier = attrs.evolve(bert, model=model, seed=7)
    for path in (tmp_path, tmp_path / "bert"):
        with mf.init_groups(mf.build_groups(classifier.parallel, 1)) as pg:
            fresh = mf.setup(classifier, pg)
            head = mf.whole_parameters(fresh.chunks, model, pg)["classification_head.weight"]
            state = mf.from_pretrained(fresh, path)
            whole = mf.whole_parameters(state.chunks, model, pg)
            assert torch.equal(whole["classification_head.weight"], head)
            assert torch.equal(whole["pooler.dense.weight"], table)
        printed = capsys.readouterr().err
        listed = "new, with their initial values: classification_head.bias, classification_head.we"
        assert listed in printed
        assert re.search("stored and left out: .*(binary_head|seq_relationship).bias", printed)


# ------------------------------------------------------------------------- the run and its commands


def finetuning(source, directory, corpus):
    config = train_config(source, {})
    return attrs.evolve(
        config,
        data=mf.DataConfig(train=str(corpus)),
        checkpoint=mf.CheckpointConfig(directory=str(directory), pretrained=str(source)),
        log=mf.LogConfig(),
        return_logits=None,
        train_iters=2,
        eval_iters=0,
    )


@pytest.fixture
def corpus(tmp_path):
    text = tmp_path / "corpus.txt"
    text.write_text("\f".join(f"Document {i} is short. " * 20 for i in range(20)))
    return text


def small_llama(path):
    """A Llama over bytes."""
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=256,
        bos_token_id=256,
    )
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(path)


def test_train_starts_from_pretrained_weights_once_and_export_remembers_where_from(
    corpus, tmp_path, monkeypatch, capsys
):
    source, runs, target = (tmp_path / name for name in ("source", "runs", "target"))
    small_llama(source)
    config = finetuning(source, runs, corpus)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        with pytest.raises(mf.ConfigError, match=r"checkpoint.pretrained = .*call mf.from_pretrai"):
            mf.setup(config, pg)

    state = mf.train(config)
    assert state.pretrained.architecture == "LlamaForCausalLM"
    assert "parameters are read from" in capsys.readouterr().err
    replayed = mf.replay(config, 1)
    assert replayed.iteration == 1

    shutil.rmtree(source)
    longer = attrs.evolve(config, train_iters=3)
    resumed = mf.train(longer)  # from its checkpoint: the source is not read again
    assert resumed.iteration == 3 and resumed.pretrained == state.pretrained
    elsewhere = attrs.evolve(
        config, checkpoint=attrs.evolve(config.checkpoint, directory=str(tmp_path / "elsewhere"))
    )
    with pytest.raises(mf.ConfigError, match="checkpoint.pretrained = .*source does not exist"):
        mf.train(elsewhere)
    with pytest.raises(mf.CheckpointError, match="source does not exist"):
        mf.replay(elsewhere, 1)

    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    arguments = ["--dtype", "bf16", "--tokenizer", str(tokenizer)]
    assert main(["export", str(runs), str(target), *arguments]) == 0
    exported = transformers.LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert exported.config.eos_token_id == 256
    assert (target / "tokenizer.json").read_text() == "{}"
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert main(["inspect", str(runs)]) == main(["inspect", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "megafn checkpoint" in printed and "Hugging Face directory" in printed
    assert re.search(r"model.embed_tokens.weight +\[257, 32\]  bfloat16", printed)
    assert main(["export", str(runs), str(target)]) == 2
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    errors = capsys.readouterr().err
    assert "exists already" in errors and "does not exist" in errors


def test_a_model_of_ones_own_is_exported_with_the_end_of_its_texts(corpus, tmp_path):
    trained = attrs.evolve(
        tiny(steps=3, vocab_size=256),
        data=mf.DataConfig(train=str(corpus)),
        checkpoint=mf.CheckpointConfig(directory=str(tmp_path / "runs")),
        log=mf.LogConfig(progress=False),
        eval_iters=0,
    )
    mf.train(trained)
    mf.export(tmp_path / "runs", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["eos_token_id"] == mf.byte_tokenizer().eod
    assert config["bos_token_id"] is config["pad_token_id"] is None

    moved = attrs.evolve(trained, data=attrs.evolve(trained.data, tokenizer="moved.json"))
    with pytest.warns(UserWarning, match="no eos_token_id, because data.tokenizer = 'moved.json'"):
        assert model_directory._end_of_text(moved) is None


def test_is_rank_zero_by_the_launchers_environment_or_the_process_group(monkeypatch):
    assert mf.is_rank_zero()
    monkeypatch.setenv("RANK", "1")
    assert not mf.is_rank_zero()
    monkeypatch.delenv("RANK")
    with mf.init_groups(mf.build_groups(mf.ParallelConfig(), 1)):
        assert mf.is_rank_zero()

"""Weights of transformers write in every layout what transformers' own generate writes."""

import os
import re

import attrs
import pytest
import torch

import megafn as mf
from megafn.__main__ import main

transformers = pytest.importorskip("transformers")

LENGTHS = (12, 5, 9)
NEW = 8
GREEDY = mf.GenerationConfig(max_new_tokens=NEW, temperature=0.0, logprobs=True)
DRAWN = mf.GenerationConfig(max_new_tokens=NEW, temperature=1.2, top_k=50, top_p=0.95, seed=2)
SP = dict(sequence_parallel=True)
LIKE_LLAMA = dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)
LIKE_T5 = dict(
    vocab_size=97,
    d_model=32,
    d_kv=12,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    decoder_start_token_id=0,
    pad_token_id=0,
    dropout_rate=0.0,
)
# name: (class, its config, fields of the config)
MODELS = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=32),
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LIKE_LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", LIKE_LLAMA | dict(sliding_window=6)),
    "t5": ("T5ForConditionalGeneration", "T5Config", LIKE_T5 | dict(feed_forward_proj="relu")),
    "t5-1.1": (
        "T5ForConditionalGeneration",
        "T5Config",
        LIKE_T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
}
GPT_LAYOUTS = {
    1: [{}],
    2: [dict(tp=2), dict(tp=2, **SP), dict(pp=2), dict(pp=2, vpp=2), dict(cp=2), {}],
    4: [dict(tp=2, pp=2), dict(tp=2, pp=2, **SP)],
}
T5_LAYOUTS = {
    1: [{}],
    2: [dict(tp=2), dict(tp=2, **SP), dict(pp=2), {}],
    4: [dict(tp=2, pp=2), dict(tp=2, pp=2, **SP), dict(pp=4)],
}


def prompts():
    """Of different lengths, and a tensor of equal ones."""
    draw = torch.Generator().manual_seed(0)
    uneven = [torch.randint(1, 97, (length,), generator=draw).tolist() for length in LENGTHS]
    return uneven, torch.randint(1, 97, (2, 7), generator=draw)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: (directory of a random model, what it writes after each prompt alone)}."""
    made = {}
    for name, (model_class, config_class, fields) in MODELS.items():
        ids = dict(bos_token_id=None, eos_token_id=None)
        config = getattr(transformers, config_class)(**fields, **ids)
        torch.manual_seed(1)
        model = getattr(transformers, model_class)(config).eval()
        if name == "t5-1.1":  # transformers 5 ties all the same
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.3)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        uneven, even = prompts()
        made[name] = (directory, [written_alone(model, ids) for ids in [*uneven, *even.tolist()]])
    return made


def written_alone(model, ids):
    whole = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    return tuple(whole[0, -NEW:].tolist())


def config_of(directory, layout):
    return mf.TrainConfig(
        model=attrs.evolve(mf.pretrained_model(directory), seq_length=32),
        parallel=mf.ParallelConfig(**layout),
        log=mf.LogConfig(progress=False),
        micro_batch_size=1,
        global_batch_size=mf.world_size(),
        train_iters=1,
    )


def written(cases):
    """(greedy tokens of all prompts, drawn ones) of each (directory, layout)."""
    results = []
    uneven, even = prompts()
    for directory, layout in cases:
        config = config_of(directory, layout)
        groups = mf.build_groups(config.parallel, mf.world_size(), model=config.model)
        with mf.init_groups(groups, timeout_seconds=60) as pg:
            state = mf.from_pretrained(mf.setup(config, pg), directory)
            greedy = (
                mf.generate(state, uneven, GREEDY).tokens + mf.generate(state, even, GREEDY).tokens
            )
            results.append((list(greedy), mf.generate(state, uneven, DRAWN).tokens))
    return results


@pytest.fixture(scope="module")
def drawn_by_one(models, pool):
    cases = [(directory, {}) for directory, _ in models.values()]
    results = pool(1, written, cases)[0]
    for (_, expected), (greedy, _) in zip(models.values(), results, strict=True):
        assert greedy == expected
    return {name: drawn for name, (_, drawn) in zip(models, results, strict=True)}


@pytest.mark.parametrize("processes", [2, 4])
def test_every_layout_writes_what_transformers_writes(processes, models, drawn_by_one, pool):
    cases = []
    for name in models:
        layouts = T5_LAYOUTS if name.startswith("t5") else GPT_LAYOUTS
        cases.extend((name, layout) for layout in layouts[processes])
    arguments = [(models[name][0], layout) for name, layout in cases]
    for of_rank in pool(processes, written, arguments, timeout=300):
        for (name, layout), (greedy, drawn) in zip(cases, of_rank, strict=True):
            assert greedy == models[name][1], (name, layout)
            assert drawn == drawn_by_one[name], (name, layout)


def refused(directory):
    """What a T5 says of bad prompts, and of modules of a user's."""
    messages = []
    config = config_of(directory, {})
    with mf.init_groups(mf.build_groups(config.parallel, 1, model=config.model)) as pg:
        for model in (None, with_own_norm):
            state = mf.setup(config, pg, model=model)
            for ids in ((), (97,), (1, 2)):
                try:
                    mf.generate(state, [ids], GREEDY)
                except ValueError as error:
                    messages.append(str(error))
    return messages


class Doubled(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden):
        return 2 * self.norm(hidden)


def with_own_norm(config, pg, **place):
    chunk = mf.build_chunk(config, pg, **place)
    for layer in chunk.decoder.layers:
        layer.input_layernorm = Doubled(layer.input_layernorm)
    return chunk


def test_what_a_t5_cannot_write_is_refused(models, pool):
    messages = pool(1, refused, models["t5"][0])[0]
    patterns = (
        r"prompts\[0\] is empty",
        "has the id 97",
        r"prompts\[0\] is empty",
        "has the id 97",
    )
    for message, pattern in zip(messages[:4], patterns, strict=True):
        assert re.search(pattern, message), message
    assert messages[4:] and "modules that may look at other positions" in messages[4]


def test_the_command_writes_what_generate_writes(models, tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    directory, _ = models["gpt2"]
    tokenizer = mf.byte_tokenizer()
    text = "\x05\x06\x07"
    arguments = ["generate", os.fspath(directory), text, "--tokenizer", "bytes"]
    assert main([*arguments, "--max-new-tokens", "6"]) == 0
    out = capsys.readouterr().out
    config = config_of(directory, {})
    with mf.init_groups(mf.build_groups(config.parallel, 1, model=config.model)) as pg:
        state = mf.from_pretrained(mf.setup(config, pg), directory)
        generation = attrs.evolve(GREEDY, max_new_tokens=6, stop_token_ids=(tokenizer.eod,))
        (tokens,) = mf.generate(state, [tokenizer.encode(text)], generation).tokens
    assert out.endswith(f"{tokenizer.decode(tokens)}\n")
    for bad, sentence in (
        ([os.fspath(directory), text], "has no tokenizer.json"),
        ([os.fspath(tmp_path / "none"), text], "there is no such directory"),
        ([os.fspath(directory), "", "--tokenizer", "bytes"], "is empty"),
    ):
        assert main(["generate", *bad]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1


def test_the_command_writes_with_the_adapters_of_a_run(models, tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    directory, _ = models["gpt2"]
    prepare = mf.lora(rank=2, alpha=4.0, modules=("linear_qkv", "linear_fc1"))
    config = attrs.evolve(config_of(directory, {}), prepare_model=prepare)
    with mf.init_groups(mf.build_groups(config.parallel, 1, model=config.model)) as pg:
        state = mf.from_pretrained(mf.setup(config, pg), directory)
        for name, parameter in state.chunks[0].named_parameters():
            if name.endswith("lora_b.weight"):
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        state.optimizer.reload_model_params()
        mf.save(state, tmp_path / "run")
    mf.export(tmp_path / "run", tmp_path / "merged")
    texts = []
    for path in (tmp_path / "run", tmp_path / "merged", directory):
        arguments = [os.fspath(path), "\x05\x06\x07", "--tokenizer", "bytes"]
        assert main(["generate", *arguments, "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out.splitlines()[-1])
    adapted, merged, base = texts
    assert adapted == merged != base

"""Tiny models of transformers, written as directories, and what they compute."""

from pathlib import Path

import attrs
import torch
import transformers
from torch.nn.functional import cross_entropy

import megafn as mf

VOCABULARY = 97
LENGTH = 16
LR = 0.5

_LLAMA = dict(
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
_GPT2 = dict(n_embd=32, n_layer=4, n_head=4, n_positions=32)
_T5 = dict(
    d_model=32,
    d_kv=10,
    d_ff=40,
    num_layers=4,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    dropout_rate=0.0,
    decoder_start_token_id=0,
)
_BERT = dict(
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=32,
)

# name: (class, config)
MODELS = {
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "llama": ("LlamaForCausalLM", _LLAMA | dict(tie_word_embeddings=False)),
    "llama-tied": ("LlamaForCausalLM", _LLAMA | dict(head_dim=12, tie_word_embeddings=True)),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3ForCausalLM", _LLAMA | dict(head_dim=8)),
    "phi3": ("Phi3ForCausalLM", _LLAMA | dict(pad_token_id=0)),
    "starcoder2": ("Starcoder2ForCausalLM", _LLAMA | dict(sliding_window=None)),
    "llama31": (
        "LlamaForCausalLM",
        _LLAMA
        | dict(
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=500.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            )
        ),
    ),
    "mistral": ("MistralForCausalLM", _LLAMA | dict(sliding_window=5)),
    "smollm3": ("SmolLM3ForCausalLM", _LLAMA | dict(pad_token_id=0)),
    "neox": (
        "GPTNeoXForCausalLM",
        _BERT | dict(rotary_pct=0.5, use_parallel_residual=True, tie_word_embeddings=False),
    ),
    "bert": ("MegatronBertForMaskedLM", _BERT),
    "t5": ("T5ForConditionalGeneration", _T5 | dict(feed_forward_proj="relu")),
    "t5-1.1": (
        "T5ForConditionalGeneration",
        _T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
}


def make_model(name):
    """A model of transformers with random values in all its parameters, biases and norms too."""
    class_name, options = MODELS[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(vocab_size=VOCABULARY, **options)
    for field in config.to_dict():
        if "drop" in field or field.endswith("pdrop"):
            setattr(config, field, 0.0)
    torch.manual_seed(1)
    model = model_class(config)
    if name == "t5-1.1":
        # transformers 5 ties a new one, and unties it if the file has two tables
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


def write_directory(name, folder, corpus):
    """A directory as published ones are: a model, and a tokenizer trained on a text beside it."""
    tokenizer = mf.train_tokenizer(corpus, folder, vocab_size=300)
    class_name, options = MODELS[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**options)
    config.vocab_size = tokenizer.vocab_size
    config.max_position_embeddings = 64  # GPT-2 calls it n_positions, and knows this name too
    config.initializer_range = 0.1  # with 0.02 the layers of a model so narrow add almost nothing
    config.bos_token_id = tokenizer.eod
    config.eos_token_id = tokenizer.eod
    torch.manual_seed(1)
    model_class(config).save_pretrained(folder)


def write_corpus(path):
    """The first 60 kB of the demo's text."""
    path.write_text(Path(mf.demo_text()).read_text(encoding="utf-8")[:60_000], encoding="utf-8")


def train_config(path, changes):
    """A run of one step of plain SGD, whose difference is the gradient times LR."""
    model = mf.pretrained_model(path)
    model = attrs.evolve(model, seq_length=LENGTH)
    if model.family == "t5":
        model = attrs.evolve(model, decoder_seq_length=LENGTH)
    return mf.TrainConfig(
        model=model,
        parallel=mf.ParallelConfig(**changes),
        optimizer=mf.OptimizerConfig(name="sgd", momentum=0.0, clip_grad=0.0),
        schedule=mf.ScheduleConfig(lr=LR, decay="constant", weight_decay=0.0),
        log=mf.LogConfig(progress=False),
        return_logits="every_stage",
        micro_batch_size=1,
        global_batch_size=4,
        train_iters=1,
    )


def rows(family):
    """One global batch as raw rows."""
    draw = torch.Generator().manual_seed(7)
    ids, labels = torch.randint(0, VOCABULARY, (2, 4, LENGTH), generator=draw)
    ones = torch.ones(LENGTH, dtype=torch.long)
    if family == "t5":
        return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    if family == "bert":
        names = {"text": ids, "labels": labels}
        extra = {"loss_mask": ones, "padding_mask": ones, "types": 0 * ones}
        return [{key: value[i] for key, value in names.items()} | extra for i in range(4)]
    return [
        {"tokens": a, "labels": b, "loss_mask": ones.float()}
        for a, b in zip(ids, labels, strict=True)
    ]


def logits_of(model, batch):
    """Logits [batch, sequence, vocabulary] that transformers computes."""
    stacked = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
    if "text" in stacked:
        return model(input_ids=stacked["text"]).logits
    if "tokens" in stacked:
        return model(input_ids=stacked["tokens"]).logits
    return model(input_ids=stacked["input_ids"], labels=stacked["labels"]).logits


def step_of_sgd(model, batch):
    """The model after one step, changed in place."""
    labels = torch.stack([row["labels"] for row in batch])
    loss = cross_entropy(logits_of(model, batch).flatten(0, 1), labels.flatten())
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(LR * parameter.grad)
    return model

"""A small model of each family learns English prose over tensor parallel 2 x pipeline parallel 2.

Prints a table and what the model makes of text before and after training, and draws the curves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import field, frozen

import megafn as mf
from megafn.demo.report import draw, entropy, labels_of, layout_name, median_speed, table

PROMPT = "The statement "

# (config, pg, split) -> raw micro-batches of a split, "train" or "valid".
MicroBatchesOf = Callable[[mf.TrainConfig, mf.ProcessGroups, str], Iterator[Any]]


@frozen(kw_only=True)
class Demo:
    """How the demo of one family differs. `sample` shows what a state makes of text, on every rank.

    `model` and `data` are fields of ModelConfig and DataConfig.
    """

    iterations: int
    sample: Callable[[mf.State], str]
    batches: MicroBatchesOf
    model: Mapping[str, Any] = field(factory=dict)
    data: Mapping[str, Any] = field(factory=dict)


# ---------------------------------------------------------------------------------- the data


def of_text(config: mf.TrainConfig, pg: mf.ProcessGroups, split: str) -> Iterator[Any]:
    """Micro-batches as the family's own data gives them."""
    for batch in mf.batches(config, pg, split=split):
        yield from batch


def halves(
    config: mf.TrainConfig, pg: mf.ProcessGroups, split: str
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches for a T5: text as a GPT reads it, cut in two; the decoder continues the first.

    Not T5's span corruption: bytes have six sentinels, so that a sample would have six bytes to
    predict, too few to learn from in minutes.
    """
    encoder_length = config.model.seq_length
    as_gpt = attrs.evolve(
        config.model,
        family="gpt",
        seq_length=mf.sample_tokens(config.model),
        decoder_seq_length=None,
        num_decoder_layers=None,
    )
    for micro_batch in of_text(attrs.evolve(config, model=as_gpt), pg, split):
        tokens = micro_batch["tokens"]
        yield {"input_ids": tokens[:, :encoder_length], "labels": tokens[:, encoder_length:]}


# --------------------------------------------------------------- what a model makes of text


def tokenizer_of(config: mf.TrainConfig) -> mf.Tokenizer:
    assert config.data is not None  # see demo_config
    return mf.load_tokenizer(config.data.tokenizer)


def continued(state: mf.State, text: str = PROMPT, count: int = 112) -> str:
    """How a GPT continues a text, as far as the sequences it learns from reach."""
    config = state.config
    tokenizer = tokenizer_of(config)
    prompt = tokenizer.encode(text).tolist()
    sampling = mf.GenerationConfig(max_new_tokens=count, temperature=0.7, seed=config.seed)
    generated = mf.generate(state, [prompt], sampling)
    return tokenizer.decode([*prompt, *generated.tokens[0]])


def filled_in(state: mf.State, count: int = 4) -> str:
    """Held-out rows as a BERT reads them (_ is a mask), what it fills in, and the true text."""
    tokenizer = tokenizer_of(state.config)
    batch = next(of_text(state.config, state.pg, "valid"))
    text = batch["text"]
    is_masked = batch["loss_mask"] == 1
    logits = mf.logits(state, text)
    assert isinstance(logits, torch.Tensor)  # a tuple only with the head for sentence order
    guesses = logits.argmax(-1).cpu()
    filled = guesses.where(is_masked, text)
    true = batch["labels"].where(is_masked, text)
    rows = zip(text[:count], filled, true, strict=False)
    return side_by_side(tokenizer, rows, mask=tokenizer.mask)


def written_on(state: mf.State, count: int = 4) -> str:
    """Held-out text as a T5's encoder reads it, the decoder's guess of each byte, and the truth.

    The decoder sees the true bytes before the one that it guesses.
    """
    tokenizer = tokenizer_of(state.config)
    batch = next(halves(state.config, state.pg, "valid"))
    with_logits = attrs.evolve(state.config, return_logits="every_stage")
    report = mf.evaluate(attrs.evolve(state, config=with_logits), [[batch]], mf.step_fn("t5"))
    assert report.logits is not None  # they are sent to every stage
    (logits,) = report.logits
    guesses = logits.argmax(-1).cpu()
    rows = zip(batch["input_ids"][:count], guesses, batch["labels"], strict=False)
    return side_by_side(tokenizer, rows)


def side_by_side(
    tokenizer: mf.Tokenizer,
    rows: Iterable[tuple[torch.Tensor, ...]],
    *,
    mask: int | None = None,
) -> str:
    """Rows of ids (read, written, true) as three lines of text each; `mask` is shown as _."""

    def text(ids: torch.Tensor) -> str:
        if mask is not None:
            ids = ids.where(ids != mask, ord("_"))
        return " ".join(tokenizer.decode(ids.numpy()).split())

    return "\n".join(
        f"reads  {text(read)}\nwrites {text(written)}\nof     {text(true)}"
        for read, written, true in rows
    )


DEMOS = {
    "gpt": Demo(iterations=240, sample=continued, batches=of_text, model={"seq_length": 128}),
    "bert": Demo(
        iterations=250,
        sample=filled_in,
        batches=of_text,
        model={"seq_length": 64, "init_method_std": 0.05},
        data={"mask_prob": 0.3},
    ),
    "t5": Demo(
        iterations=250,
        sample=written_on,
        batches=halves,
        model={"num_layers": 2, "num_decoder_layers": 2, "seq_length": 64, "init_method_std": 0.05},
    ),
}


def demo_config(
    folder: str, iterations: int, world_size: int, family: str = "gpt"
) -> mf.TrainConfig:
    """A model of 1.3 million parameters, on four processes as 2 x 2, on fewer tensor parallel."""
    parallel = mf.ParallelConfig(tp=world_size)
    if world_size % 4 == 0:
        parallel = mf.ParallelConfig(tp=2, pp=2)
    model = {
        "family": family,
        "num_layers": 4,
        "hidden_size": 160,
        "num_attention_heads": 4,
        "position_embedding": "rope",
        **DEMOS[family].model,
    }
    return mf.TrainConfig(
        model=mf.ModelConfig(**model),
        parallel=parallel,
        schedule=mf.ScheduleConfig(
            lr=3e-3, min_lr=3e-4, decay="cosine", warmup_fraction=0.05, weight_decay=0.1
        ),
        data=mf.DataConfig(train=mf.demo_text(), **DEMOS[family].data),
        log=mf.LogConfig(tensorboard_dir=f"{folder}/tensorboard", jsonl=f"{folder}/metrics.jsonl"),
        micro_batch_size=8,
        global_batch_size=32,
        train_iters=iterations,
        eval_interval=max(1, iterations // 6),
        eval_iters=5,
    )


# ----------------------------------------------------------------------------- what is shown


def announcement(config: mf.TrainConfig, family: str, folder: str, world_size: int) -> str:
    model = config.model
    layers = model.num_layers + (model.num_decoder_layers or 0)
    return (
        f"A {family.upper()} of {layers} layers x {model.hidden_size} learns English over "
        f"{layout_name(config, world_size)}: {config.iterations} iterations, some minutes.\n"
        f"Logs and the picture go to {folder}/."
    )


def summary(
    config: mf.TrainConfig,
    history: Sequence[mf.Metrics],
    *,
    untrained: mf.Report,
    trained: mf.Report,
    baseline: float,
    seconds: float,
    folder: str,
    world_size: int,
) -> str:
    """The run in a few lines.

    untrained, trained: the evaluations before the first step and after the last.
    """
    first = history[0]
    last = history[-1]
    speed = median_speed(history)
    tokens = config.iterations * config.global_batch_size * mf.sample_tokens(config.model)
    return table(
        {
            "layout": layout_name(config, world_size),
            "tokens trained on": f"{tokens:,} ({speed:,.0f} a second, median)",
            "training loss": f"{first.loss:.3f} -> {last.loss:.3f} nats per predicted byte",
            "held-out loss": (
                f"{untrained.loss:.3f} -> {trained.loss:.3f} nats per predicted byte "
                f"(perplexity {trained.perplexity:.2f})"
            ),
            "byte frequencies alone": (
                f"{baseline:.3f} nats per byte (unigram entropy of what is predicted)"
            ),
            "time": f"{seconds:.0f} s",
            "picture": f"{folder}/curves.png",
            "logs": f"{folder}/metrics.jsonl, tensorboard --logdir {folder}/tensorboard",
        }
    )


# --------------------------------------------------------------------------------- the demo


def pretraining_demo(family: str, folder: str, iterations: int | None, world_size: int) -> None:
    """Train, then print a table and two samples, and draw the curves."""
    started = time.perf_counter()
    chosen = DEMOS[family]
    iterations = chosen.iterations if iterations is None else iterations
    config = demo_config(folder, iterations, world_size, family)
    mf.check(config, world_size)
    step = mf.step_fn(family)
    history: list[mf.Metrics] = []

    groups = mf.build_groups(config.parallel, world_size, model=config.model)
    with mf.init_groups(groups) as pg:
        state = mf.setup(config, pg)
        if pg.is_rank_zero:
            print(announcement(config, family, folder, world_size), flush=True)
        sample_before = chosen.sample(state)
        held_out = tuple(chosen.batches(config, pg, "valid"))
        untrained = mf.evaluate(state, [held_out], step)
        state = mf.fit(
            state,
            step,
            batches=chosen.batches(config, pg, "train"),
            valid_batches=held_out,
            on_metrics=[history.append],
        )
        sample_after = chosen.sample(state)
        if not pg.is_rank_zero:
            return
        baseline = entropy(labels_of(held_out, config, pg))

    draw(history, baseline, Path(folder, "curves.png"))
    trained = history[-1].valid
    assert trained is not None  # fit evaluates after the last iteration
    results = summary(
        config,
        history,
        untrained=untrained,
        trained=trained,
        baseline=baseline,
        seconds=time.perf_counter() - started,
        folder=folder,
        world_size=world_size,
    )
    print(f"\n{results}")
    print(f"\n--- before training\n{sample_before}\n\n--- and after\n{sample_after}")

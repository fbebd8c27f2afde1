"""`make demo`: a small model learns English prose over tensor parallel 2 x pipeline parallel 2; shows what came of it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import field, frozen

import megafn as mf

PROMPT = "The statement "


def of_text(config: mf.TrainConfig, pg: mf.ProcessGroups, split: str) -> Iterator[Any]:
    """Micro-batches as the family's own data gives them."""
    return (micro for batch in mf.batches(config, pg, split=split) for micro in batch)


def halves(
    config: mf.TrainConfig, pg: mf.ProcessGroups, split: str
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches for a T5: runs of the text as a GPT reads them, cut in two; the encoder reads the first half, the decoder writes on.

    Not T5's span corruption: bytes have six sentinels, so that a sample would have six bytes to predict, too few to learn from in minutes.
    """
    read, model = config.model.seq_length, config.model
    runs = attrs.evolve(
        config,
        model=attrs.evolve(
            model,
            family="gpt",
            seq_length=mf.sample_tokens(model),
            decoder_seq_length=None,
            num_decoder_layers=None,
        ),
    )
    return (
        {"input_ids": micro["tokens"][:, :read], "labels": micro["tokens"][:, read:]}
        for micro in of_text(runs, pg, split)
    )


@frozen(kw_only=True)
class Demo:
    """What the demo of one family differs in; `sample` shows what a state makes of text and runs on every rank."""

    iterations: int
    sample: Callable[[mf.State], str]
    batches: Callable[[mf.TrainConfig, mf.ProcessGroups, str], Iterator[Any]] = (
        of_text  # micro-batches of a split
    )
    model: dict[str, Any] = field(factory=dict)
    data: dict[str, Any] = field(factory=dict)


def written(state: mf.State, count: int = 200) -> str:
    """What a GPT writes behind PROMPT."""
    tokenizer = mf.load_tokenizer(state.config.data.tokenizer)
    prompt = torch.tensor([tokenizer.encode(PROMPT).tolist()])
    return tokenizer.decode(
        mf.generate(state, prompt, count=count, temperature=0.7, seed=state.config.seed)[0].numpy()
    )


def beside(
    tokenizer: mf.Tokenizer, holes: Sequence[int], rows: Iterable[tuple[torch.Tensor, ...]]
) -> str:
    """Rows of ids that a model reads, what it writes and what stood there, as texts; _ stands for the ids in `holes`."""

    def shown(ids: torch.Tensor) -> str:
        return " ".join(
            tokenizer.decode(
                ids.where(~torch.isin(ids, torch.tensor(holes)), ord("_")).numpy()
            ).split()
        )

    return "\n".join(
        f"reads  {shown(read)}\nwrites {shown(guess)}\nof     {shown(true)}"
        for read, guess, true in rows
    )


def filled_in(state: mf.State, count: int = 4) -> str:
    """Held-out rows as a BERT reads them (_ is a mask), what it fills in, and what stood there."""
    tokenizer, batch = (
        mf.load_tokenizer(state.config.data.tokenizer),
        next(of_text(state.config, state.pg, "valid")),
    )
    text, wanted = batch["text"], batch["loss_mask"] == 1
    guesses = mf.logits(state, text).argmax(-1).cpu()

    return beside(
        tokenizer,
        (tokenizer.mask,),
        zip(text[:count], guesses.where(wanted, text), batch["labels"].where(wanted, text)),
    )


def written_on(state: mf.State, count: int = 4) -> str:
    """Held-out text as a T5's encoder reads it; how it writes on, each byte told what stood before it; what stood there."""
    tokenizer, batch = (
        mf.load_tokenizer(state.config.data.tokenizer),
        next(halves(state.config, state.pg, "valid")),
    )
    asked = attrs.evolve(state, config=attrs.evolve(state.config, return_logits="every_stage"))
    (logits,) = mf.evaluate(asked, [[batch]], mf.step_fn("t5")).logits
    return beside(
        tokenizer, (), zip(batch["input_ids"][:count], logits.argmax(-1).cpu(), batch["labels"])
    )


DEMOS = {
    "gpt": Demo(iterations=240, sample=written, model=dict(seq_length=128)),
    "bert": Demo(
        iterations=250,
        sample=filled_in,
        model=dict(seq_length=64, init_method_std=0.05),
        data=dict(mask_prob=0.3),
    ),
    "t5": Demo(
        iterations=250,
        sample=written_on,
        batches=halves,
        model=dict(num_layers=2, num_decoder_layers=2, seq_length=64, init_method_std=0.05),
    ),
}


def demo_config(
    folder: str, iterations: int, world_size: int, family: str = "gpt"
) -> mf.TrainConfig:
    """A model of 1.3 million parameters; four processes share it as 2 x 2, fewer (or one) as tensor parallel."""
    parallel = (
        mf.ParallelConfig(tp=2, pp=2) if world_size % 4 == 0 else mf.ParallelConfig(tp=world_size)
    )
    chosen = DEMOS[family]
    return mf.TrainConfig(
        model=mf.ModelConfig(
            **dict(
                family=family,
                num_layers=4,
                hidden_size=160,
                num_attention_heads=4,
                position_embedding="rope",
            )
            | chosen.model
        ),
        parallel=parallel,
        schedule=mf.ScheduleConfig(
            lr=3e-3, min_lr=3e-4, decay="cosine", warmup_fraction=0.05, weight_decay=0.1
        ),
        data=mf.DataConfig(train=mf.demo_text(), **chosen.data),
        log=mf.LogConfig(tensorboard_dir=f"{folder}/tensorboard", jsonl=f"{folder}/metrics.jsonl"),
        micro_batch_size=8,
        global_batch_size=32,
        train_iters=iterations,
        eval_interval=max(1, iterations // 6),
        eval_iters=5,
    )


def layout_name(config: mf.TrainConfig, world_size: int) -> str:
    return (
        f"tensor parallel {config.parallel.tp} x pipeline parallel {config.parallel.pp}, "
        f"{world_size} process{'es' if world_size > 1 else ''}"
    )


def entropy(symbols: Iterable[int]) -> float:
    """Entropy in nats of symbols drawn one by one: the loss of a model that knows their frequencies alone.

    >>> round(entropy(b"abab"), 4) == round(math.log(2), 4)
    True
    """
    counts = Counter(symbols)
    return -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())


def predicted(
    micro_batches: Iterable[Any], config: mf.TrainConfig, pg: mf.ProcessGroups
) -> list[int]:
    """What is to be predicted of micro-batches."""
    read = (mf.step_fn(config.model.family).batch(micro, config, pg) for micro in micro_batches)
    return [label for batch in read for label in batch["labels"][batch["loss_mask"] == 1].tolist()]


def draw(history: list[mf.Metrics], baseline: float, path: Path) -> None:
    """The curves as a PNG: loss and held-out loss, learning rate, gradient norm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    loss, lr, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    steps = [m.iteration for m in history]
    valid = [(m.iteration, m.valid.loss) for m in history if m.valid is not None]
    loss.plot(steps, [m.loss for m in history], linewidth=0.9, label="training loss")
    loss.plot(*zip(*valid), "o-", label="held-out loss")
    loss.axhline(
        baseline, color="grey", linestyle="--", linewidth=0.9, label="byte frequencies alone"
    )
    loss.set_ylabel("nats per predicted byte")
    loss.legend()
    lr.plot(steps, [m.lr for m in history], linewidth=0.9)
    lr.set_ylabel("learning rate")
    norm.plot(steps, [m.grad_norm for m in history], linewidth=0.9)
    norm.set_ylabel("gradient norm")
    norm.set_xlabel("iteration")
    figure.savefig(path, dpi=120)


def demo(*, folder: str | None = None, iterations: int | None = None, family: str = "gpt") -> None:
    """Train, and print a table, two samples and where the picture and the logs are. Run it under torchrun."""
    if family not in DEMOS:
        raise mf.ConfigError(f"family = {family!r}: choose one of {', '.join(DEMOS)}")
    chosen = DEMOS[family]
    folder, iterations, sample, read = (
        folder or f"runs/demo-{family}",
        chosen.iterations if iterations is None else iterations,
        chosen.sample,
        chosen.batches,
    )
    world = mf.world_size()
    config, history, started = (
        demo_config(folder, iterations, world, family),
        [],
        time.perf_counter(),
    )
    mf.check(config, world)
    step = mf.step_fn(family)
    with mf.init_groups(mf.build_groups(config.parallel, world, model=config.model)) as pg:
        state = mf.setup(config, pg)
        if pg.is_rank_zero:
            print(
                f"A {family.upper()} of {config.model.num_layers + (config.model.num_decoder_layers or 0)} layers x {config.model.hidden_size} learns English over {layout_name(config, world)}: "
                f"{iterations} iterations, some minutes.\nLogs and the picture go to {folder}/.",
                flush=True,
            )
        before = sample(state)
        held_out = tuple(read(config, pg, "valid"))
        first = mf.evaluate(state, [held_out], step)
        state = mf.fit(
            state,
            step,
            batches=read(config, pg, "train"),
            valid_batches=held_out,
            on_metrics=[history.append],
        )
        after = sample(state)
        if not pg.is_rank_zero:
            return
        baseline = entropy(predicted(held_out, config, pg))
    last, speed = history[-1], sorted(m.tokens_per_second for m in history)[len(history) // 2]
    draw(history, baseline, Path(folder, "curves.png"))
    tokens = config.global_batch_size * mf.sample_tokens(config.model) * config.train_iters
    rows = [
        ("layout", layout_name(config, world)),
        ("tokens trained on", f"{tokens:,} ({speed:,.0f} a second, median)"),
        ("training loss", f"{history[0].loss:.3f} -> {last.loss:.3f} nats per predicted byte"),
        (
            "held-out loss",
            f"{first.loss:.3f} -> {last.valid.loss:.3f} nats per predicted byte (perplexity {last.valid.perplexity:.2f})",
        ),
        (
            "byte frequencies alone",
            f"{baseline:.3f} nats per byte (unigram entropy of what is predicted)",
        ),
        ("time", f"{time.perf_counter() - started:.0f} s"),
        ("picture", f"{folder}/curves.png"),
        ("logs", f"{folder}/metrics.jsonl, tensorboard --logdir {folder}/tensorboard"),
    ]
    width = max(len(name) for name, _ in rows)
    print("", *(f"{name:<{width}}  {value}" for name, value in rows), sep="\n")
    print(f"\n--- before training\n{before}\n\n--- and after\n{after}")

"""A model learns one half of a text, and adapters fit it to the other half.

Between the two lies a Hugging Face directory: the first run exports its model, the second loads it
in another layout, freezes it and trains adapters, which are merged into what it exports.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

import megafn as mf
from megafn.demo.pretraining import continued, of_text
from megafn.demo.report import draw, entropy, labels_of, layout_name, median_speed, table

# The second half explains the methods of strings, the first hardly names them.
PROMPT = "str."

# Of the first run; the second has half as many.
ITERATIONS = 200

# The layers that get adapters.
ADAPTED = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@frozen(kw_only=True)
class Paths:
    """Where the demo keeps what."""

    folder: Path

    @property
    def halves(self) -> tuple[Path, Path]:
        return self.folder / "first-half.txt", self.folder / "second-half.txt"

    @property
    def pretrained(self) -> Path:
        return self.folder / "pretrained"

    @property
    def adapted(self) -> Path:
        return self.folder / "adapted"


@frozen(kw_only=True)
class HeldOut:
    """Held-out loss on each half of the text, in nats per byte."""

    first: float
    second: float


@frozen(kw_only=True)
class Pretraining:
    """What is shown of the first run."""

    config: mf.TrainConfig
    history: Sequence[mf.Metrics]
    untrained: HeldOut
    trained: HeldOut
    baseline: float  # entropy of the second half's bytes, in nats


@frozen(kw_only=True)
class Adaptation:
    """What is shown of the second run. parameters, adapters: how many numbers each has."""

    config: mf.TrainConfig
    history: Sequence[mf.Metrics]
    adapted: HeldOut
    text_before: str
    text_after: str
    parameters: int
    adapters: int


def finetuning_demo(folder: str, iterations: int | None, world_size: int) -> None:
    """Pretrain, export, load, adapt, export; then a table, two samples and the picture."""
    started = time.perf_counter()
    iterations = ITERATIONS if iterations is None else iterations
    paths = Paths(folder=Path(folder))
    config = pretraining_config(paths, iterations, world_size)
    mf.check(config, world_size)
    if mf.is_rank_zero():
        prepare_folder(paths)
        print(announcement(config, paths, world_size), flush=True)

    pretraining = pretrain(config, paths, world_size)
    adaptation = adapt(adaptation_config(paths, iterations, world_size), paths, world_size)

    if mf.is_rank_zero():
        draw_both(pretraining, adaptation, paths)
        seconds = time.perf_counter() - started
        print(f"\n{summary(pretraining, adaptation, paths, world_size, seconds)}")
        print(f"\n--- before adaptation\n{adaptation.text_before}")
        print(f"\n--- and after\n{adaptation.text_after}")


# -------------------------------------------------------------------------------- the two runs


def pretrain(config: mf.TrainConfig, paths: Paths, world_size: int) -> Pretraining:
    """Train on the first half, and export. Every rank calls it."""
    step = mf.step_fn(config.model.family)
    history: list[mf.Metrics] = []
    groups = mf.build_groups(config.parallel, world_size, model=config.model)
    with mf.init_groups(groups) as pg:
        state = mf.setup(config, pg)
        untrained = held_out_losses(state, paths)
        on_second = held_out(config, pg, paths.halves[1])
        state = mf.fit(state, step, valid_batches=on_second, on_metrics=[history.append])
        trained = held_out_losses(state, paths)
        mf.to_pretrained(state, paths.pretrained)
        return Pretraining(
            config=config,
            history=history,
            untrained=untrained,
            trained=trained,
            baseline=entropy(labels_of(on_second, config, pg)),
        )


def adapt(config: mf.TrainConfig, paths: Paths, world_size: int) -> Adaptation:
    """Load what was exported, train adapters on the second half, and export them merged."""
    step = mf.step_fn(config.model.family)
    history: list[mf.Metrics] = []
    groups = mf.build_groups(config.parallel, world_size, model=config.model)
    with mf.init_groups(groups) as pg:
        state = mf.from_pretrained(mf.setup(config, pg), paths.pretrained)
        text_before = continued(state, PROMPT)
        on_second = held_out(config, pg, paths.halves[1])
        state = mf.fit(state, step, valid_batches=on_second, on_metrics=[history.append])
        mf.to_pretrained(state, paths.adapted)
        sizes = {
            name: parameter.numel()
            for name, parameter in mf.whole_parameters(state.chunks, config.model, pg).items()
        }
        adapters = sum(size for name, size in sizes.items() if ".lora_" in name)
        return Adaptation(
            config=config,
            history=history,
            adapted=held_out_losses(state, paths),
            text_before=text_before,
            text_after=continued(state, PROMPT),
            parameters=sum(sizes.values()) - adapters,
            adapters=adapters,
        )


def held_out(config: mf.TrainConfig, pg: mf.ProcessGroups, text: Path) -> tuple[Any, ...]:
    """This rank's micro-batches of the held-out part of a text."""
    assert config.data is not None  # see run_config
    reading = attrs.evolve(config, data=attrs.evolve(config.data, train=str(text)))
    return tuple(of_text(reading, pg, "valid"))


def held_out_losses(state: mf.State, paths: Paths) -> HeldOut:
    step = mf.step_fn(state.config.model.family)
    first, second = (
        mf.evaluate(state, [held_out(state.config, state.pg, text)], step).loss
        for text in paths.halves
    )
    return HeldOut(first=first, second=second)


# ---------------------------------------------------------------------------------- their configs


def pretraining_config(paths: Paths, iterations: int, world_size: int) -> mf.TrainConfig:
    """A Llama of 1.3 million parameters, on four processes as 2 x 2, on fewer tensor parallel."""
    parallel = mf.ParallelConfig(tp=world_size)
    if world_size % 4 == 0:
        parallel = mf.ParallelConfig(tp=2, pp=2)
    return run_config(
        paths,
        "pretraining",
        paths.halves[0],
        iterations,
        model=mf.ModelConfig(
            num_layers=4,
            hidden_size=160,
            num_attention_heads=4,
            seq_length=128,
            position_embedding="rope",
            normalization="RMSNorm",
            activation="swiglu",
            ffn_hidden_size=432,
            add_bias_linear=False,
        ),
        parallel=parallel,
        schedule=mf.ScheduleConfig(
            lr=2e-3, min_lr=2e-4, decay="cosine", warmup_fraction=0.1, weight_decay=0.1
        ),
    )


def adaptation_config(paths: Paths, iterations: int, world_size: int) -> mf.TrainConfig:
    """The exported model, frozen, with adapters; tensor parallel x data parallel."""
    parallel = mf.ParallelConfig(tp=world_size)
    if world_size % 2 == 0:
        parallel = mf.ParallelConfig(tp=2)
    return run_config(
        paths,
        "adaptation",
        paths.halves[1],
        max(1, iterations // 2),
        model=mf.pretrained_model(paths.pretrained),
        parallel=parallel,
        prepare_model=mf.lora(rank=8, alpha=16.0, modules=ADAPTED),
        schedule=mf.ScheduleConfig(lr=1e-2, min_lr=1e-3, decay="cosine", warmup_fraction=0.05),
    )


def run_config(
    paths: Paths, name: str, text: Path, iterations: int, **fields: Any
) -> mf.TrainConfig:
    """What the two runs have in common."""
    log = mf.LogConfig(
        tensorboard_dir=str(paths.folder / "tensorboard" / name),
        jsonl=str(paths.folder / f"{name}.jsonl"),
    )
    return mf.TrainConfig(
        data=mf.DataConfig(train=str(text), split=(90.0, 10.0, 0.0)),
        log=log,
        micro_batch_size=8,
        global_batch_size=32,
        train_iters=iterations,
        eval_interval=max(1, iterations // 4),
        eval_iters=3,
        **fields,
    )


def prepare_folder(paths: Paths) -> None:
    """Remove what an earlier demo exported, and write the halves of the text."""
    for directory in (paths.pretrained, paths.adapted):
        shutil.rmtree(directory, ignore_errors=True)
    paths.folder.mkdir(parents=True, exist_ok=True)
    documents = Path(mf.demo_text()).read_text(encoding="utf-8").split("\f")
    middle = sum(map(len, documents)) / 2
    halves: tuple[list[str], list[str]] = ([], [])
    length = 0
    for document in documents:
        halves[length > middle].append(document)
        length += len(document)
    for path, half in zip(paths.halves, halves, strict=True):
        path.write_text("\f".join(half), encoding="utf-8")


# ----------------------------------------------------------------------------- what is shown


def announcement(config: mf.TrainConfig, paths: Paths, world_size: int) -> str:
    model = config.model
    return (
        f"A Llama of {model.num_layers} layers x {model.hidden_size} learns half of a text over "
        f"{layout_name(config, world_size)}, is exported, loaded and adapted to the other half: "
        f"{config.iterations} and {max(1, config.iterations // 2)} iterations, some minutes.\n"
        f"Models, logs and the picture go to {paths.folder}/."
    )


def draw_both(pretraining: Pretraining, adaptation: Adaptation, paths: Paths) -> None:
    """The curves of both runs, one after the other."""
    length = pretraining.config.iterations
    later = [
        attrs.evolve(metrics, iteration=length + metrics.iteration)
        for metrics in adaptation.history
    ]
    draw(
        [*pretraining.history, *later],
        pretraining.baseline,
        paths.folder / "curves.png",
        held_out_name="held-out loss of the second half",
        loaded_after=length,
    )


def summary(
    pretraining: Pretraining,
    adaptation: Adaptation,
    paths: Paths,
    world_size: int,
    seconds: float,
) -> str:
    """Both runs in a few lines."""

    def losses(of_half: str) -> str:
        stages = (pretraining.untrained, pretraining.trained, adaptation.adapted)
        return " -> ".join(f"{getattr(losses, of_half):.3f}" for losses in stages)

    share = adaptation.adapters / adaptation.parameters
    return table(
        {
            "pretrained over": layout_name(pretraining.config, world_size),
            "adapted over": layout_name(adaptation.config, world_size),
            "trained": (
                f"{adaptation.parameters:,} parameters, then {adaptation.adapters:,} of adapters "
                f"({share:.1%})"
            ),
            "speed": (
                f"{median_speed(pretraining.history):,.0f} tokens a second, then "
                f"{median_speed(adaptation.history):,.0f} (medians)"
            ),
            "held-out loss": "untrained -> pretrained -> adapted",
            "  first half": f"{losses('first')} nats per byte",
            "  second half": f"{losses('second')} nats per byte",
            "byte frequencies alone": f"{pretraining.baseline:.3f} nats per byte (second half)",
            "time": f"{seconds:.0f} s",
            "models": f"{paths.pretrained}, {paths.adapted} (transformers loads them)",
            "picture": f"{paths.folder}/curves.png",
            "logs": (f"{paths.folder}/*.jsonl, tensorboard --logdir {paths.folder}/tensorboard"),
        }
    )

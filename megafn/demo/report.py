"""What a demo shows of a run: its layout, a table, and the curves as a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import megafn as mf


def layout_name(config: mf.TrainConfig, world_size: int) -> str:
    """The axes of a layout in words.

    Data parallelism is what the other axes leave.
    """
    parallel = config.parallel
    axes = [f"tensor parallel {parallel.tp}"]
    if parallel.pp > 1:
        axes.append(f"pipeline parallel {parallel.pp}")
    replicas = world_size // (parallel.tp * parallel.pp)
    if replicas > 1:
        axes.append(f"data parallel {replicas}")
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    return f"{' x '.join(axes)}, {processes}"


def entropy(symbols: Iterable[int]) -> float:
    """Entropy in nats of symbols drawn one by one: the loss of a model that knows only how often
    each occurs.

    >>> round(entropy(b"abab"), 4) == round(math.log(2), 4)
    True
    """
    counts = Counter(symbols)
    shares = [count / counts.total() for count in counts.values()]
    return -sum(share * math.log(share) for share in shares)


def labels_of(
    micro_batches: Iterable[Any], config: mf.TrainConfig, pg: mf.ProcessGroups
) -> list[int]:
    """The ids that are to be predicted in micro-batches."""
    prepare = mf.step_fn(config.model.family).batch
    labels = []
    for micro_batch in micro_batches:
        batch = prepare(micro_batch, config, pg)
        labels += batch["labels"][batch["loss_mask"] == 1].tolist()
    return labels


def median_speed(history: Sequence[mf.Metrics]) -> float:
    """Tokens a second."""
    return sorted(metrics.tokens_per_second for metrics in history)[len(history) // 2]


def table(rows: Mapping[str, str]) -> str:
    """Names and values in two columns.

    >>> print(table({"loss": "1.5", "time": "60 s"}))
    loss  1.5
    time  60 s
    """
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def draw(
    history: Sequence[mf.Metrics],
    baseline: float,
    path: Path,
    *,
    held_out_name: str = "held-out loss",
    loaded_after: int | None = None,
) -> None:
    """The curves as a PNG: loss and held-out loss, learning rate, gradient norm.

    loaded_after: the iteration at which one run's model was loaded by another, marked by a line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    loss, lr, norm = panels
    steps = [metrics.iteration for metrics in history]
    held_out = {
        metrics.iteration: metrics.valid.loss for metrics in history if metrics.valid is not None
    }
    loss.plot(steps, [metrics.loss for metrics in history], linewidth=0.9, label="training loss")
    loss.plot(list(held_out), list(held_out.values()), "o-", label=held_out_name)
    loss.axhline(
        baseline, color="grey", linestyle="--", linewidth=0.9, label="byte frequencies alone"
    )
    loss.set_ylabel("nats per predicted byte")
    lr.plot(steps, [metrics.lr for metrics in history], linewidth=0.9)
    lr.set_ylabel("learning rate")
    norm.plot(steps, [metrics.grad_norm for metrics in history], linewidth=0.9)
    norm.set_ylabel("gradient norm")
    norm.set_xlabel("iteration")
    if loaded_after is not None:
        for panel in panels:
            panel.axvline(loaded_after, color="grey", linestyle=":", linewidth=0.9)
        loss.plot([], [], color="grey", linestyle=":", label="exported, loaded, frozen; adapters")
    loss.legend()
    figure.savefig(path, dpi=120)

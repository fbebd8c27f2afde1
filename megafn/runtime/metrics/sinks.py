"""Where metrics go: each sink is a function of a `Metrics` record. Rank zero alone has any."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

from megafn.pure.config.records import TrainConfig
from megafn.runtime.parallel.groups import ProcessGroups

Sink = Callable[[Any], None]
BAR = "{n_fmt}/{total_fmt}|{bar:12}|{elapsed}<{remaining}{postfix}"  # fits a terminal of 100 columns with the numbers in it


@contextlib.contextmanager
def progress(total: int, start: int = 0) -> Iterator[Sink]:
    """A bar with loss, learning rate, gradient norm and tokens per second, `start` of `total` iterations done; an evaluation gets a line of its own."""
    from tqdm import tqdm

    with tqdm(total=total, initial=start, unit="it", dynamic_ncols=True, bar_format=BAR) as bar:

        def sink(metrics):
            norm = "" if metrics.grad_norm is None else f"{metrics.grad_norm:.3f}"
            norm = f"skipped {norm}".strip() if metrics.skipped else norm
            line = f"loss {metrics.loss:.4f}, lr {metrics.lr:.2e}, grad norm {norm}, {metrics.tokens_per_second:,.0f} tokens/s"
            if more := metrics.details:
                tflops, mfu = more["tflops_per_device"], more["mfu"]
                line += f", {tflops:.3g} TFLOP/s" if tflops is not None else ""
                line += f", MFU {mfu:.0%}" if mfu is not None else ""
                line += f", {more['memory_gib']:.1f} GiB, {metrics.seconds:.3g} s"
            if metrics.valid is not None:
                bar.write(
                    f"iteration {metrics.iteration}: held-out loss {metrics.valid.loss:.4f}, perplexity {metrics.valid.perplexity:.2f}"
                )
            bar.set_postfix_str(line, refresh=False)
            bar.update(metrics.iteration - bar.n)

        yield sink


def print_on_rank_zero(text: str, config: TrainConfig, pg: ProcessGroups) -> None:
    """A line on standard error for who watches the bar: on rank zero, under `log.progress`."""
    from tqdm import tqdm

    if pg.is_rank_zero and config.log.progress:
        tqdm.write(text, file=sys.stderr)


def scalars(metrics: Any) -> dict[str, float]:
    """The numbers of a record by their TensorBoard names; what is None is left out."""
    plain = attrs.asdict(metrics, recurse=False)
    report, valid, details = plain.pop("report"), plain.pop("valid"), plain.pop("details")
    plain |= {key: value for key, value in details.items() if value is not None}
    plain.pop("logits")
    named = {
        f"train/{key}": value
        for key, value in plain.items()
        if key != "iteration" and value is not None
    }
    named |= {f"train/{key}": value for key, value in report.items()}
    if valid is not None:
        named |= {
            "valid/loss": valid.loss,
            "valid/perplexity": valid.perplexity,
            **{f"valid/{key}": value for key, value in valid.report.items()},
        }
    return named


@contextlib.contextmanager
def tensorboard(folder: str) -> Iterator[Sink]:
    """TensorBoard scalars by iteration."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:

        def sink(metrics):
            for name, value in scalars(metrics).items():
                writer.add_scalar(name, value, metrics.iteration)

        yield sink


@contextlib.contextmanager
def jsonl(path: str) -> Iterator[Sink]:
    """One JSON object a record, appended and flushed; what is no number in JSON (NaN, infinity) is null."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:

        def finite(value):
            if isinstance(value, dict):
                return {key: finite(item) for key, item in value.items()}
            return None if isinstance(value, float) and not math.isfinite(value) else value

        def sink(metrics):
            file.write(
                json.dumps(finite(attrs.asdict(metrics, filter=lambda a, _: a.name != "logits")))
                + "\n"
            )
            file.flush()

        yield sink


@contextlib.contextmanager
def open_sinks(
    config: TrainConfig, pg: ProcessGroups, start: int = 0
) -> Iterator[tuple[Sink, ...]]:
    """The sinks of a config for the length of a run from iteration `start` on: called every `log.interval` iterations, after the last, and with each evaluation."""
    log = config.log
    with contextlib.ExitStack() as stack:
        made = []
        if pg.is_rank_zero:
            if log.progress:
                made.append(stack.enter_context(progress(config.iterations, start)))
            if log.tensorboard_dir is not None:
                made.append(stack.enter_context(tensorboard(log.tensorboard_dir)))
            if log.jsonl is not None:
                made.append(stack.enter_context(jsonl(log.jsonl)))

        def now_and_then(sink):
            def wrapped(metrics):
                if (
                    metrics.iteration % log.interval == 0
                    or metrics.iteration == config.iterations
                    or metrics.valid is not None
                ):
                    sink(metrics)

            return wrapped

        yield tuple(map(now_and_then, made))

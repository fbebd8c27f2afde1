"""Where metrics go. A sink is a function of a `Metrics` record.

`progress`, `tensorboard` and `jsonl` are context managers that yield a sink, each usable alone;
`open_sinks` opens those that a config asks for, on rank zero only.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import attrs
from attrs import define

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig
from megafn.runtime.metrics.records import Metrics, Report
from megafn.runtime.parallel.groups import ProcessGroups

# Called with each record. `train` and `fit` take such functions as on_metrics=, on every rank.
Sink = Callable[[Metrics], Any]

# Fits a terminal of 100 columns with the numbers in it.
BAR = "{n_fmt}/{total_fmt}|{bar:12}|{elapsed}<{remaining}{postfix}"


# Between two lines of progress in a file; a bar in a terminal is drawn more often.
SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(total: int, start: int = 0) -> Iterator[Sink]:
    """Progress with the main numbers on standard error, `start` of `total` iterations done.

    A bar in a terminal. Elsewhere (a file, a pipe) a line for the first iteration, for the last,
    and in between at most one every `SECONDS_BETWEEN_LINES`. An evaluation is printed on a line of
    its own.
    """
    if sys.stderr.isatty():
        with _bar(total, start) as sink:
            yield sink
    else:
        yield _lines(total, start)


@contextlib.contextmanager
def _bar(total: int, start: int) -> Iterator[Sink]:
    from tqdm import tqdm

    stream = _LateErrors(sys.stderr)
    options = {"unit": "it", "dynamic_ncols": True, "bar_format": BAR}
    with tqdm(total=total, initial=start, file=stream, **options) as bar:

        def sink(metrics: Metrics) -> None:
            if metrics.valid is not None:
                bar.write(_evaluation(metrics, metrics.valid), file=stream)
            bar.set_postfix_str(_numbers(metrics), refresh=False)
            bar.update(metrics.iteration - bar.n)
            stream.raise_error()

        yield sink
    stream.raise_error()


def _lines(total: int, start: int) -> Sink:
    clock = _Clock(started=time.monotonic())

    def sink(metrics: Metrics) -> None:
        now = time.monotonic()
        iteration = metrics.iteration
        if metrics.valid is not None:
            print(_evaluation(metrics, metrics.valid), file=sys.stderr)
        if iteration == total or now >= clock.next_line:
            clock.next_line = now + SECONDS_BETWEEN_LINES
            elapsed = now - clock.started
            remaining = elapsed / max(1, iteration - start) * (total - iteration)
            times = f"{_hours(elapsed)}<{_hours(remaining)}"
            print(f"{iteration}/{total}, {times}, {_numbers(metrics)}", file=sys.stderr, flush=True)

    return sink


@define(eq=False)
class _Clock:
    """Seconds of `time.monotonic`: when a run began, and when its next line of progress is due."""

    started: float
    next_line: float = -math.inf


def _hours(seconds: float) -> str:
    """As tqdm writes it: 01:05, or 2:01:05."""
    from tqdm import tqdm

    return tqdm.format_interval(seconds)


@define(eq=False)
class _LateErrors:
    """A stream whose writes raise no OSError; `raise_error` raises the first one.

    A bar whose stream raises keeps tqdm's lock forever, for which every other thread then waits.
    """

    stream: TextIO
    error: OSError | None = None

    def write(self, text: str) -> None:
        self._attempt(lambda: self.stream.write(text))

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except OSError as error:
            self.error = self.error or error

    def raise_error(self) -> None:
        error = self.error
        self.error = None
        if error is not None:
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:
        # as tqdm compares streams to know whether its bar stands where it is about to write
        return other is self or other is self.stream

    def __hash__(self) -> int:
        return hash(self.stream)


def _evaluation(metrics: Metrics, valid: Report) -> str:
    return (
        f"iteration {metrics.iteration}: held-out loss {valid.loss:.4f}, "
        f"perplexity {valid.perplexity:.2f}"
    )


def _numbers(metrics: Metrics) -> str:
    """What stands beside the bar, and in each line."""
    norm = "" if metrics.grad_norm is None else f"{metrics.grad_norm:.3f}"
    if metrics.skipped:
        norm = f"skipped {norm}".strip()
    parts = [
        f"loss {metrics.loss:.4f}",
        f"lr {metrics.lr:.2e}",
        f"grad norm {norm}",
        f"{metrics.tokens_per_second:,.0f} tokens/s",
    ]
    details = metrics.details
    if details:
        if details["tflops_per_device"] is not None:
            parts.append(f"{details['tflops_per_device']:.3g} TFLOP/s")
        if details["mfu"] is not None:
            parts.append(f"MFU {details['mfu']:.0%}")
        parts.append(f"{details['memory_gib']:.1f} GiB")
        parts.append(f"{metrics.seconds:.3g} s")
    return ", ".join(parts)


def print_on_rank_zero(text: str, config: TrainConfig, pg: ProcessGroups) -> None:
    """Print a line on standard error, above the bar: on rank zero, if `log.progress` is set."""
    from tqdm import tqdm

    if pg.is_rank_zero and config.log.progress:
        with contextlib.suppress(OSError):  # a full disk or a closed pipe ends no run
            tqdm.write(text, file=sys.stderr)


def scalars(metrics: Metrics) -> dict[str, float]:
    """The numbers of a record by their TensorBoard names, without those that are None."""
    numbers = attrs.asdict(metrics, recurse=False)
    for name in ("iteration", "report", "valid", "details", "logits"):
        numbers.pop(name)
    numbers |= metrics.details
    numbers |= metrics.report
    named = {f"train/{name}": value for name, value in numbers.items() if value is not None}
    valid = metrics.valid
    if valid is not None:
        numbers = {"loss": valid.loss, "perplexity": valid.perplexity, **valid.report}
        named |= {f"valid/{name}": value for name, value in numbers.items()}
    return named


@contextlib.contextmanager
def tensorboard(folder: str) -> Iterator[Sink]:
    """TensorBoard scalars by iteration."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:

        def sink(metrics: Metrics) -> None:
            for name, value in scalars(metrics).items():
                writer.add_scalar(name, value, metrics.iteration)

        yield sink


@contextlib.contextmanager
def jsonl(path: str) -> Iterator[Sink]:
    """One JSON object per record, appended and flushed. NaN and infinity become null."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:

        def sink(metrics: Metrics) -> None:
            record = attrs.asdict(metrics, filter=lambda attribute, _: attribute.name != "logits")
            file.write(json.dumps(_finite(record)) + "\n")
            file.flush()

        yield sink


def _finite(value: Any) -> Any:
    """A value with None for each number in it that is NaN or infinite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def open_sinks(
    config: TrainConfig, pg: ProcessGroups, start: int = 0
) -> Iterator[tuple[Sink, ...]]:
    """The sinks of a config, for a run from iteration `start` on; () on ranks other than zero.

    They are called every `log.interval` iterations, after the last one, and with each evaluation.
    If one fails with an OSError (a full disk), that is a warning, and it is not called again.
    """
    log = config.log
    if not pg.is_rank_zero:
        yield ()
        return
    opened = []
    if log.progress:
        bar = progress(config.iterations, start)
        opened.append(_guarded(bar, "log.progress = True: standard error"))
    if log.tensorboard_dir is not None:
        where = f"log.tensorboard_dir = {log.tensorboard_dir!r}"
        opened.append(_guarded(_opened(tensorboard(log.tensorboard_dir), where), where))
    if log.jsonl is not None:
        where = f"log.jsonl = {log.jsonl!r}"
        opened.append(_guarded(_opened(jsonl(log.jsonl), where), where))
    with contextlib.ExitStack() as stack:
        sinks = [stack.enter_context(sink) for sink in opened]
        yield tuple(_at_intervals(sink, config) for sink in sinks)


@contextlib.contextmanager
def _opened(opening: contextlib.AbstractContextManager[Sink], where: str) -> Iterator[Sink]:
    """A sink of a file. Raises ConfigError, before the first step, if it can't be opened."""
    try:
        sink = opening.__enter__()
    except OSError as error:
        raise ConfigError(
            f"{where}: can't be opened ({error.strerror or error}); name another, or None"
        ) from error
    yield sink
    opening.__exit__(None, None, None)


@contextlib.contextmanager
def _guarded(opening: contextlib.AbstractContextManager[Sink], where: str) -> Iterator[Sink]:
    """A sink that is not called again after an OSError, which becomes a warning that says where."""
    guard = _Guard(where)
    with _failure_as_warning(guard):
        sink = opening.__enter__()

    def sink_while_it_works(metrics: Metrics) -> None:
        if not guard.has_failed:
            with _failure_as_warning(guard):
                sink(metrics)

    try:
        yield sink_while_it_works
    finally:
        # writes what is left in a buffer, which can fail too
        with _failure_as_warning(guard):
            opening.__exit__(None, None, None)


@define(eq=False)
class _Guard:
    """Whether a sink, which writes to `where`, has failed."""

    where: str
    has_failed: bool = False


@contextlib.contextmanager
def _failure_as_warning(guard: _Guard) -> Iterator[None]:
    """The first OSError becomes a warning, later ones nothing."""
    try:
        yield
    except OSError as error:
        if not guard.has_failed:
            guard.has_failed = True
            warnings.warn(
                f"{guard.where}: can't be written to ({error.strerror or error}); training "
                "continues without it",
                stacklevel=7,  # the caller of `train`
            )


def _at_intervals(sink: Sink, config: TrainConfig) -> Sink:
    """A sink that leaves out the records between two intervals."""

    def thinned(metrics: Metrics) -> None:
        on_interval = metrics.iteration % config.log.interval == 0
        if on_interval or metrics.iteration == config.iterations or metrics.valid is not None:
            sink(metrics)

    return thinned

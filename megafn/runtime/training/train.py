"""The recipe: `train`, and the functions that it is made of, each callable from a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig
from megafn.pure.layout import build_groups
from megafn.pure.validation.validate import check
from megafn.runtime.accelerate.train_steps import step_of
from megafn.runtime.checkpoint.resume import check_directory, resume
from megafn.runtime.data.corpora import corpora
from megafn.runtime.families.step import Step
from megafn.runtime.metrics.records import Metrics
from megafn.runtime.model.state import State
from megafn.runtime.parallel import cpu
from megafn.runtime.parallel.groups import init_groups, world_size
from megafn.runtime.training.fit import fit
from megafn.runtime.training.setup import setup


def train(
    config: TrainConfig,
    *,
    step: Step | None = None,
    model: Callable | None = None,
    batches: Iterable[Any] | Callable | None = None,
    valid_batches: Iterable[Any] | None = None,
    on_metrics: Sequence[Callable[[Metrics], Any]] = (),
) -> State:
    """Train a config from start to end, or from its newest checkpoint on; returns the last state. Run it under torchrun, or as one plain process.

    step: the family's three functions, or your own. model: a function that builds one model chunk, see `setup`.
    Where they are None, config.step_function and config.model_function come before the built-in ones.
    batches: raw micro-batches of this rank's data-parallel position, as a DataLoader gives them (instead of config.data). A run
    that goes on from a checkpoint drops as many as it had read; a function (consumed_samples) -> iterable starts there itself.
    valid_batches: likewise, iterated anew for each evaluation. on_metrics: called with the `Metrics` of every iteration,
    on every rank. Under config.checkpoint the run is saved; on SIGTERM or SIGUSR1 it is saved and SystemExit(0) raised.
    Raises ConfigError with every problem of the config before any process group or file exists.
    """
    world = world_size()
    check(config, world, cuda=cpu.device().type == "cuda")
    if config.data is None and batches is None:
        raise ConfigError(
            "data = None: name a text or an indexed dataset in config.data, or give train your own batches."
        )
    step = step if step is not None else step_of(config)
    if batches is None:
        for split in (
            ("train", "valid") if config.eval_iters and valid_batches is None else ("train",)
        ):
            corpora(
                config, split
            )  # missing, damaged or too short: told now, not when it is first read
    check_directory(config.checkpoint)
    with init_groups(
        build_groups(config.parallel, world, model=config.model),
        timeout_seconds=config.timeout_seconds,
    ) as pg:
        state, batches = resume(setup(config, pg, model=model), batches)
        return fit(state, step, batches=batches, valid_batches=valid_batches, on_metrics=on_metrics)

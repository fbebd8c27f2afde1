"""`replay`: one step of a run again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from megafn.pure.checkpoint.compatibility import schedule_changes
from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig
from megafn.pure.config.serialization import from_dict
from megafn.pure.layout import build_groups
from megafn.pure.validation.validate import check
from megafn.runtime.accelerate.train_steps import step_of
from megafn.runtime.checkpoint.disk_format import checkpoints
from megafn.runtime.checkpoint.load import read_checkpoint
from megafn.runtime.checkpoint.resume import remaining_batches
from megafn.runtime.families.step import Step
from megafn.runtime.metrics.records import Metrics
from megafn.runtime.metrics.sinks import print_on_rank_zero
from megafn.runtime.parallel import cpu
from megafn.runtime.parallel.groups import init_groups, world_size
from megafn.runtime.parallel.object_collectives import broadcast_from_rank_zero
from megafn.runtime.training.fit import global_batches
from megafn.runtime.training.setup import setup
from megafn.runtime.training.step import train_step


def replay(
    config: TrainConfig,
    iteration: int,
    *,
    step: Step | None = None,
    model: Callable | None = None,
    batches: Iterable[Any] | Callable | None = None,
) -> Metrics:
    """Run an iteration of a run again, and return its `Metrics`; nothing is written. The arguments are those of `train`.

    Goes on from the newest checkpoint before it, or from the start: samples, dropout and weights are those of the run, so in
    the same layout the numbers are too, bit for bit. Give a `step` that looks closer at what happens in it. Rank zero warns where
    the checkpoint's config had another schedule, optimizer, precision or length: the step was another if it ran under that one.
    Raises ConfigError for an iteration that the run does not have.
    """
    check(config, world_size(), cuda=cpu.device().type == "cuda")
    begun = config.consumed_samples[0] // config.global_batch_size
    if not begun < iteration <= config.iterations:
        raise ConfigError(
            f"iteration = {iteration}: the run has {begun + 1} to {config.iterations}; give one of them"
        )
    if config.data is None and batches is None:
        raise ConfigError(
            "data = None: name a text or an indexed dataset in config.data, or give replay the batches of the run."
        )
    step = step if step is not None else step_of(config)
    with init_groups(
        build_groups(config.parallel, world_size(), model=config.model),
        timeout_seconds=config.timeout_seconds,
    ) as pg:
        state, last_sample, directory = (
            setup(config, pg, model=model),
            None,
            config.checkpoint.directory,
        )
        path = broadcast_from_rank_zero(
            next(
                (path for at, path in reversed(checkpoints(directory).items()) if at < iteration),
                None,
            )
            if directory
            else None,
            pg,
        )
        if path is not None:
            state, manifest = read_checkpoint(state, path)
            last_sample = manifest["last_sample"]
            if pg.is_rank_zero and (
                others := schedule_changes(from_dict(manifest["config"]), config)
            ):
                warnings.warn(
                    f"replay: {'; '.join(map(str, others))}. If iteration {iteration} ran with that, this is another step",
                    stacklevel=2,
                )
        print_on_rank_zero(
            f"replaying iterations {state.iteration + 1} to {iteration} from {path or 'the start'}",
            config,
            pg,
        )
        given = remaining_batches(batches, state, begun, last_sample)
        for batch in global_batches(
            given,
            config,
            pg,
            consumed_samples=state.consumed_samples,
            count=iteration - state.iteration,
        ):
            state, metrics = train_step(state, batch, step)
        if state.iteration < iteration:
            raise ConfigError(
                f"batches ended at iteration {state.iteration}: give those of the run, up to iteration {iteration}"
            )
        return metrics

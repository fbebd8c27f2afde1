"""`replay`: run one step of a past run again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megafn.pure.checkpoint.compatibility import schedule_changes
from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig
from megafn.pure.config.serialization import from_dict
from megafn.pure.layout import build_groups
from megafn.pure.validation.validate import check
from megafn.runtime.accelerate.train_steps import step_of
from megafn.runtime.checkpoint.disk_format import checkpoints
from megafn.runtime.checkpoint.load import check_data, load_verified, verified_manifest
from megafn.runtime.checkpoint.resume import remaining_batches
from megafn.runtime.data.corpora import Corpus
from megafn.runtime.data.corpus_identity import describe_data
from megafn.runtime.families.step import Step
from megafn.runtime.metrics.records import Metrics
from megafn.runtime.metrics.sinks import print_on_rank_zero
from megafn.runtime.model.state import State
from megafn.runtime.parallel import cpu
from megafn.runtime.parallel.groups import ProcessGroups, init_groups, world_size
from megafn.runtime.parallel.object_collectives import call_on_rank_zero
from megafn.runtime.pretrained.load import read_base
from megafn.runtime.pretrained.start import from_pretrained
from megafn.runtime.training.arguments import Batches, ModelFunction, OptimizerFunction
from megafn.runtime.training.fit import global_batches, same_corpora
from megafn.runtime.training.setup import build_state
from megafn.runtime.training.step import train_step


def replay(
    config: TrainConfig,
    iteration: int,
    *,
    step: Step | None = None,
    model: ModelFunction | None = None,
    optimizer: OptimizerFunction | None = None,
    batches: Batches | None = None,
) -> Metrics:
    """Run an iteration of a run again, and return its `Metrics`; nothing is written.

    The arguments are those of `train`. Resumes from the newest checkpoint before the iteration, or
    from the start: samples, dropout and weights are those of the run, so in the same layout the
    numbers are too, bit for bit. Give a `step` that looks closer at what happens in it. Rank zero
    warns if the checkpoint's config had another schedule, optimizer, precision or length: the step
    was another one if it ran under that.
    Raises ConfigError for an iteration that the run does not have, and if config.data is not what
    the checkpoint was written with.
    """
    world = world_size()
    check(config, world, cuda=cpu.device().type == "cuda")
    start = config.consumed_samples[0] // config.global_batch_size
    _check_iteration(iteration, start, config)
    if config.data is None and batches is None:
        raise ConfigError(
            "data = None: name a text or an indexed dataset in config.data, or give replay the "
            "batches of the run."
        )
    step = step if step is not None else step_of(config)
    groups = build_groups(config.parallel, world, model=config.model)
    with init_groups(groups, timeout_seconds=config.timeout_seconds) as pg:
        state = build_state(config, pg, model=model, optimizer=optimizer)
        parts = same_corpora(config, ("train",), pg)["train"] if batches is None else None
        state, last_sample = _newest_before(state, iteration, parts)
        remaining = remaining_batches(batches, state, start, last_sample)
        for batch in global_batches(
            remaining,
            step,
            config,
            pg,
            consumed_samples=state.consumed_samples,
            count=iteration - state.iteration,
            corpora=parts,
        ):
            state, metrics = train_step(state, batch, step)
    if state.iteration < iteration:
        raise ConfigError(
            f"batches ended at iteration {state.iteration}: give those of the run, up to iteration "
            f"{iteration}"
        )
    return metrics


def _check_iteration(iteration: int, start: int, config: TrainConfig) -> None:
    if not start < iteration <= config.iterations:
        raise ConfigError(
            f"iteration = {iteration}: the run has {start + 1} to {config.iterations}; "
            "give one of them"
        )


def _newest_before(
    state: State, iteration: int, parts: Sequence[Corpus] | None
) -> tuple[State, int | None]:
    """The newest checkpoint before an iteration, and the fingerprint of the last sample read.

    The state as it is, and None, if there is no such checkpoint. parts: the corpora that are read,
    which are compared with the checkpoint's; None: others' batches are read.
    """
    config = state.config
    pg = state.pg
    path = call_on_rank_zero(partial(_path_before, config, iteration), pg)
    last_sample = None
    if path is not None:
        manifest = verified_manifest(path, pg)
        if parts is not None:
            check_data(manifest, partial(describe_data, config, parts), state)
        state = load_verified(state, path, manifest, read_base)
        last_sample = manifest["last_sample"]
        _warn_of_changes(from_dict(manifest["config"]), config, iteration, pg)
    elif config.checkpoint.pretrained is not None:
        state = from_pretrained(state, config.checkpoint.pretrained)
    print_on_rank_zero(
        f"replaying iterations {state.iteration + 1} to {iteration} from {path or 'the start'}",
        config,
        pg,
    )
    return state, last_sample


def _path_before(config: TrainConfig, iteration: int) -> Path | None:
    directory = config.checkpoint.directory
    if directory is None:
        return None
    paths = checkpoints(directory)
    earlier = [saved for saved in paths if saved < iteration]
    return paths[max(earlier)] if earlier else None


def _warn_of_changes(
    saved: TrainConfig, config: TrainConfig, iteration: int, pg: ProcessGroups
) -> None:
    changes = schedule_changes(saved, config)
    if changes and pg.is_rank_zero:
        warnings.warn(
            f"replay: {'; '.join(map(str, changes))}. If iteration {iteration} ran with that, this "
            "is another step",
            stacklevel=4,
        )

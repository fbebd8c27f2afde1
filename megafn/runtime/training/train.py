"""The recipe: `train`. Each function that it calls can be called from a custom loop as well."""

from __future__ import annotations

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig
from megafn.pure.layout import build_groups
from megafn.pure.validation.validate import check
from megafn.runtime.accelerate.train_steps import step_of
from megafn.runtime.checkpoint.directory_lock import lock_directory
from megafn.runtime.checkpoint.resume import check_directory, resume
from megafn.runtime.data.corpora import Corpus, corpora
from megafn.runtime.data.given_batches import check_valid_batches
from megafn.runtime.families.step import Step
from megafn.runtime.model.state import State
from megafn.runtime.parallel import cpu
from megafn.runtime.parallel.groups import init_groups, world_size
from megafn.runtime.pretrained.load import read_base
from megafn.runtime.pretrained.start import check_pretrained, start_from_pretrained
from megafn.runtime.training.arguments import (
    Batches,
    MicroBatches,
    ModelFunction,
    OptimizerFunction,
    Sinks,
)
from megafn.runtime.training.fit import count_evaluations, fit_in_locked_directory, splits_read
from megafn.runtime.training.setup import build_state


def train(
    config: TrainConfig,
    *,
    step: Step | None = None,
    model: ModelFunction | None = None,
    optimizer: OptimizerFunction | None = None,
    batches: Batches | None = None,
    valid_batches: MicroBatches | None = None,
    on_metrics: Sinks = (),
) -> State:
    """Train a config from start to end, or from its newest checkpoint on; returns the last state.

    That state's process groups are closed then; to use it, call `setup` and `fit` in your own.
    Run it under torchrun, or as one plain process.
    step: the functions of the training step; model: builds one model chunk; optimizer: builds the
    optimizer, see `setup`. If None, config.step_function and config.model_function come before the
    built-in ones.
    batches: raw micro-batches of this rank's data-parallel position, as a DataLoader gives them,
    instead of config.data. A run that resumes from a checkpoint drops as many as it had read; a
    function (consumed_samples) -> iterable starts there itself.
    valid_batches: likewise, iterated anew for each evaluation.
    on_metrics: called with the `Metrics` of every iteration, on every rank.
    config.checkpoint.pretrained: weights that a run starts from if it has no checkpoint yet.
    Under config.checkpoint the run is saved; on SIGTERM or SIGUSR1 it is saved and SystemExit(0)
    raised. Raises ConfigError with every problem of the config before any process group or file
    exists.
    """
    world = world_size()
    check(config, world, cuda=cpu.device().type == "cuda")
    step = step if step is not None else step_of(config)
    groups = build_groups(config.parallel, world, model=config.model)
    found = check_data(config, groups.dp_size, batches, valid_batches)
    check_pretrained(config.checkpoint)
    check_directory(config.checkpoint)
    with (
        init_groups(groups, timeout_seconds=config.timeout_seconds) as pg,
        lock_directory(config, pg),
    ):
        state = build_state(config, pg, model=model, optimizer=optimizer)
        state = start_from_pretrained(state)
        state, batches = resume(state, batches, read_base, found.get("train"))
        return fit_in_locked_directory(
            state,
            step,
            batches=batches,
            valid_batches=valid_batches,
            on_metrics=on_metrics,
            corpora=found,
        )


def check_data(
    config: TrainConfig, dp: int, batches: Batches | None, valid_batches: MicroBatches | None
) -> dict[str, tuple[Corpus, ...]]:
    """The corpora of each split that the run reads, by split.

    Raises ConfigError if there is no data, a corpus is missing, damaged, too short or of another
    vocabulary, or `valid_batches` are too few or cannot be iterated anew.
    """
    start = config.consumed_samples[0] // config.global_batch_size
    evaluations = count_evaluations(start, config)
    if valid_batches is not None:
        check_valid_batches(valid_batches, config, dp, evaluations)
    if batches is not None:
        return {}
    if config.data is None:
        raise ConfigError(
            "data = None: name a text or an indexed dataset in config.data, or give train your own "
            "batches."
        )
    return {split: corpora(config, split) for split in splits_read(config, start, valid_batches)}

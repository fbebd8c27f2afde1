"""The loop: steps, evaluations, metrics and checkpoints until the last iteration."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import attrs

from megafn.pure.config.records import TrainConfig, num_micro_batches
from megafn.runtime.checkpoint.autosave import open_autosave, save_if_due
from megafn.runtime.data.batches import batches as read_batches
from megafn.runtime.data.batches import group_batches
from megafn.runtime.data.corpora import corpora
from megafn.runtime.data.corpus_identity import check_same_corpora, describe_data, identify
from megafn.runtime.data.same_batches import check_same_batches
from megafn.runtime.families.step import Step
from megafn.runtime.metrics.records import Report
from megafn.runtime.metrics.sinks import open_sinks
from megafn.runtime.model.state import State
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.training.arguments import MicroBatches, Sinks
from megafn.runtime.training.step import evaluate, train_step


def fit(
    state: State,
    step: Step,
    *,
    batches: MicroBatches | None = None,
    valid_batches: MicroBatches | None = None,
    on_metrics: Sinks = (),
) -> State:
    """Train from where the state stands to the config's last iteration.

    The old state's buffers are donated. The arguments are those of `train`, inside process groups
    that the caller opened. Evaluates every `eval_interval` iterations and after the last, without
    returning logits. If `batches` ends early, the run ends there with a warning.
    Raises FloatingPointError after stop_after_skipped updates in a row that were left out.
    """
    config = state.config
    pg = state.pg
    evaluates = config.eval_iters > 0 and (valid_batches is not None or batches is None)

    data = _check_data(config, pg, evaluates and valid_batches is None) if batches is None else None
    with open_sinks(config, pg, state.iteration) as sinks, open_autosave(state, data) as autosave:
        for batch in global_batches(
            batches,
            config,
            pg,
            consumed_samples=state.consumed_samples,
            count=config.iterations - state.iteration,
        ):
            state, metrics = train_step(state, batch, step)
            if evaluates and _evaluation_is_due(state.iteration, config):
                metrics = attrs.evolve(metrics, valid=_validate(state, step, valid_batches))
            for sink in (*sinks, *on_metrics):
                sink(metrics)
            autosave = save_if_due(autosave, state, batch)
            _stop_if_skipped_too_often(state)
        save_if_due(autosave, state, ended=True)

    if state.iteration < config.iterations:
        warnings.warn(
            f"batches ended at iteration {state.iteration} of {config.iterations}: "
            "give more of them, or lower train_iters.",
            stacklevel=2,
        )
    return state


def _check_data(config: TrainConfig, pg: ProcessGroups, evaluates: bool) -> dict[str, Any] | None:
    """Compare the corpora of the config over all ranks. Returns what checkpoints say of them.

    None, if no checkpoint is written, or on a rank other than zero.
    """
    train = corpora(config)
    identities = {"train": identify(train)}
    if evaluates:
        identities["valid"] = identify(corpora(config, "valid"))
    check_same_corpora(identities, pg)
    if config.checkpoint.directory is None or not pg.is_rank_zero:
        return None
    return describe_data(config, train)


def global_batches(
    given: MicroBatches | None,
    config: TrainConfig,
    pg: ProcessGroups,
    *,
    count: int,
    split: str = "train",
    consumed_samples: int | None = None,
) -> Iterator[tuple[Any, ...]]:
    """This rank's share of at most `count` global batches: of those given, or of config.data."""
    if given is None:
        return read_batches(config, pg, split=split, consumed_samples=consumed_samples, count=count)
    grouped = group_batches(given, num_micro_batches(config, pg.dp_size))
    return check_same_batches(grouped, pg, count=count, for_training=split == "train")


def _evaluation_is_due(iteration: int, config: TrainConfig) -> bool:
    if iteration == config.iterations:
        return True
    return config.eval_interval is not None and iteration % config.eval_interval == 0


def _validate(state: State, step: Step, valid_batches: MicroBatches | None) -> Report:
    """An evaluation without logits: those of all eval_iters at once would fill the memory."""
    config = state.config
    without_logits = attrs.evolve(config, return_logits=None)
    held_out = global_batches(
        valid_batches, config, state.pg, split="valid", count=config.eval_iters
    )
    return evaluate(attrs.evolve(state, config=without_logits), held_out, step)


def _stop_if_skipped_too_often(state: State) -> None:
    limit = state.config.stop_after_skipped
    if limit == 0 or state.skipped_in_a_row < limit:
        return
    samples = state.config.global_batch_size
    count = state.skipped_in_a_row
    end = state.consumed_samples
    raise FloatingPointError(
        f"iterations {state.iteration - count + 1} to {state.iteration}: loss or gradient was NaN, "
        f"infinite or a spike {count} times in a row, so nothing was updated (stop_after_skipped). "
        f"They read the run's samples {end - count * samples} to {end - 1}, of which "
        f"{end - samples} to {end - 1} last; replay(config, {state.iteration}) runs that step "
        "again."
    )

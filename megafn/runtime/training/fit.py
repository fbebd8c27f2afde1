"""The loop: steps, evaluations, metrics and checkpoints until the last iteration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import attrs

from megafn.pure.config.records import TrainConfig, num_micro_batches
from megafn.runtime.checkpoint.autosave import open_autosave, save_if_due
from megafn.runtime.data.batches import batches as read_batches
from megafn.runtime.data.batches import group_batches
from megafn.runtime.data.same_batches import check_same_batches
from megafn.runtime.families.step import Step
from megafn.runtime.metrics.records import Metrics
from megafn.runtime.metrics.sinks import open_sinks
from megafn.runtime.model.state import State
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.training.step import evaluate, train_step


def global_batches(
    given: Iterable[Any] | None,
    config: TrainConfig,
    pg: ProcessGroups,
    *,
    count: int,
    split: str = "train",
    consumed_samples: int | None = None,
) -> Iterator[tuple[Any, ...]]:
    """At most `count` global batches, this rank's share of each: of micro-batches that are given, or else of the config's data."""
    if given is None:
        return read_batches(config, pg, split=split, consumed_samples=consumed_samples, count=count)
    return check_same_batches(
        group_batches(given, num_micro_batches(config, pg.dp_size)), pg, count=count
    )


def fit(
    state: State,
    step: Step,
    *,
    batches: Iterable[Any] | None = None,
    valid_batches: Iterable[Any] | None = None,
    on_metrics: Sequence[Callable[[Metrics], Any]] = (),
) -> State:
    """Train from where the state stands to the config's last iteration; the old state's buffers are donated.

    The arguments are those of `train`, in process groups of one's own. Evaluates every `eval_interval` iterations and
    after the last, without returning logits. Where `batches` ends early, the run ends there with a warning.
    """
    config, pg = state.config, state.pg
    without_logits = attrs.evolve(
        config, return_logits=None
    )  # those of all eval_iters at once would fill the memory

    def due(iteration):
        to_validate = config.eval_iters > 0 and (valid_batches is not None or batches is None)
        return to_validate and (
            iteration == config.iterations
            or config.eval_interval
            and iteration % config.eval_interval == 0
        )

    with open_sinks(config, pg, state.iteration) as sinks, open_autosave(state) as autosave:
        for batch in global_batches(
            batches,
            config,
            pg,
            consumed_samples=state.consumed_samples,
            count=config.iterations - state.iteration,
        ):
            state, metrics = train_step(state, batch, step)
            if due(state.iteration):
                held_out = global_batches(
                    valid_batches, config, pg, split="valid", count=config.eval_iters
                )
                metrics = attrs.evolve(
                    metrics,
                    valid=evaluate(attrs.evolve(state, config=without_logits), held_out, step),
                )
            for sink in (*sinks, *on_metrics):
                sink(metrics)
            autosave = save_if_due(autosave, state, batch)
            if state.skipped_in_a_row >= config.stop_after_skipped > 0:
                raise FloatingPointError(_skipped_too_often(state))
        save_if_due(autosave, state, ended=True)
    if state.iteration < config.iterations:
        warnings.warn(
            f"batches ended at iteration {state.iteration} of {config.iterations}: give more of them, or lower train_iters.",
            stacklevel=2,
        )
    return state


def _skipped_too_often(state: State) -> str:
    batch, count, end = (
        state.config.global_batch_size,
        state.skipped_in_a_row,
        state.consumed_samples,
    )
    return (
        f"iterations {state.iteration - count + 1} to {state.iteration}: loss or gradient was NaN, infinite or a spike {count} times in a row, so nothing was updated "
        f"(stop_after_skipped). They read the run's samples {end - count * batch} to {end - 1}, of which {end - batch} to {end - 1} last; "
        f"replay(config, {state.iteration}) runs that step again."
    )

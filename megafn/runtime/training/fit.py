"""The loop: steps, evaluations, metrics and checkpoints until the last iteration."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
from attrs import frozen

from megafn.pure.config.records import TrainConfig, num_micro_batches
from megafn.runtime.checkpoint.autosave import (
    open_autosave,
    save_before_error,
    save_if_due,
    save_on_signal,
)
from megafn.runtime.checkpoint.directory_lock import lock_directory
from megafn.runtime.data.batches import batches as read_batches
from megafn.runtime.data.batches import group_batches
from megafn.runtime.data.corpora import Corpus
from megafn.runtime.data.corpora import corpora as find_corpora
from megafn.runtime.data.corpus_identity import check_same_corpora, describe_data, identify
from megafn.runtime.data.datasets import build_dataset
from megafn.runtime.data.given_batches import check_valid_batches, passes_over, without_short_end
from megafn.runtime.data.same_batches import check_same_batches
from megafn.runtime.families.step import Step, tokens_of
from megafn.runtime.metrics.records import Metrics, Report
from megafn.runtime.metrics.sinks import Sink, open_sinks
from megafn.runtime.model.state import State, check_usable
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.megatron_context import megatron_context
from megafn.runtime.parallel.object_collectives import call_on_rank_zero, errors_on_all_ranks
from megafn.runtime.training.arguments import MicroBatches, Sinks
from megafn.runtime.training.step import evaluate, train_step


def fit(
    state: State,
    step: Step,
    *,
    batches: MicroBatches | None = None,
    valid_batches: MicroBatches | None = None,
    on_metrics: Sinks = (),
    corpora: Mapping[str, Sequence[Corpus]] | None = None,
) -> State:
    """Train from where the state stands to the config's last iteration.

    The old state's buffers are donated. The arguments are those of `train`, inside process groups
    that the caller opened. Evaluates every `eval_interval` iterations and after the last, without
    returning logits. A checkpoint that is due is saved before that, and before the metrics are
    passed on. If `batches` ends early, or with a micro-batch of too few rows, the run ends there
    with a warning; in `valid_batches` such a last micro-batch is left out.
    corpora: those of the splits of config.data, as `train` found them; None: found now. What is
    read stays the same to the end of the run, if the texts are replaced or removed too.
    Raises ConfigError, before the first step, for `valid_batches` that are empty, or are an
    iterator, which can be read only once, and needed more often; and if another run trains in
    checkpoint.directory.
    Raises FloatingPointError after stop_after_skipped updates in a row that were left out.
    """
    check_usable(state)
    with lock_directory(state.config, state.pg):
        return fit_in_locked_directory(
            state,
            step,
            batches=batches,
            valid_batches=valid_batches,
            on_metrics=on_metrics,
            corpora=corpora,
        )


def fit_in_locked_directory(
    state: State,
    step: Step,
    *,
    batches: MicroBatches | None = None,
    valid_batches: MicroBatches | None = None,
    on_metrics: Sinks = (),
    corpora: Mapping[str, Sequence[Corpus]] | None = None,
) -> State:
    """`fit`, by a caller that holds the lock of checkpoint.directory."""
    config = state.config
    pg = state.pg
    compared: Mapping[str, Sequence[Corpus]] = {}
    if batches is None:
        splits = splits_read(config, state.iteration, valid_batches)
        compared = same_corpora(config, splits, pg, corpora)
    description = _description(compared, config, pg)

    with contextlib.ExitStack() as stack:
        with errors_on_all_ranks(pg):
            data = _open_data(state, step, batches, valid_batches, compared)
            sinks = stack.enter_context(open_sinks(config, pg, state.iteration))
            autosave = stack.enter_context(open_autosave(state, description))
        try:
            for batch in data.training:
                state, metrics = train_step(state, batch, step)
                # before everything that can fail: what was trained is not lost
                ended = state.iteration == config.iterations
                autosave = save_if_due(autosave, state, batch, ended=ended)
                if data.held_out is not None and _evaluation_is_due(state.iteration, config):
                    metrics = attrs.evolve(metrics, valid=_validate(state, step, data.held_out()))
                error = _error_of_sinks((*sinks, *on_metrics), metrics)
                autosave = save_on_signal(autosave, state, failed=error is not None)
                if autosave.has_failed:
                    _raise_error_of_sinks(error, config, pg)
                _stop_if_skipped_too_often(state)
            if state.iteration < config.iterations:  # the batches ended early
                autosave = save_if_due(autosave, state, ended=True)
                save_on_signal(autosave, state)
        except Exception:
            save_before_error(autosave)
            raise

    if state.iteration < config.iterations:
        warnings.warn(
            f"batches ended at iteration {state.iteration} of {config.iterations}: "
            "give more of them, or lower train_iters.",
            stacklevel=2,
        )
    return state


GlobalBatches = Iterator[tuple[Any, ...]]


@frozen(kw_only=True, eq=False)
class Data:
    """This rank's share of what a run reads, opened before the first step."""

    training: GlobalBatches
    held_out: Callable[[], GlobalBatches] | None  # for each evaluation; None: there is none


def same_corpora(
    config: TrainConfig,
    splits: Sequence[str],
    pg: ProcessGroups,
    found: Mapping[str, Sequence[Corpus]] | None = None,
) -> dict[str, Sequence[Corpus]]:
    """The corpora of each of the splits, compared over all ranks.

    found: of some splits those that were found before; the others are found now.
    """
    found = found or {}
    corpora = {}
    with errors_on_all_ranks(pg):
        for split in splits:
            corpora[split] = found[split] if split in found else find_corpora(config, split)
        identities = {split: identify(parts) for split, parts in corpora.items()}
    check_same_corpora(identities, pg)
    return corpora


def _description(
    corpora: Mapping[str, Sequence[Corpus]], config: TrainConfig, pg: ProcessGroups
) -> Mapping[str, Any] | None:
    """What checkpoints say of the corpora; None if there are none of either."""
    if not corpora or config.checkpoint.directory is None:
        return None
    return call_on_rank_zero(partial(describe_data, config, corpora["train"]), pg)


def _open_data(
    state: State,
    step: Step,
    batches: MicroBatches | None,
    valid_batches: MicroBatches | None,
    corpora: Mapping[str, Sequence[Corpus]],
) -> Data:
    config = state.config
    pg = state.pg
    held_out = None
    evaluations = count_evaluations(state.iteration, config)
    if valid_batches is not None and evaluations > 0:
        check_valid_batches(valid_batches, config, pg.dp_size, evaluations)
        # the random numbers that an evaluation has
        with megatron_context(pg, config.seed, "evaluate"):
            passes = passes_over(valid_batches)
        held_out = partial(_next_pass, passes, step, config, pg)
    elif "valid" in corpora:
        dataset = build_dataset(config, "valid", corpora["valid"])
        if pg.is_rank_zero:
            _warn_of_repeated_samples(len(dataset), config)
        held_out = partial(
            read_batches,
            config,
            pg,
            split="valid",
            count=config.eval_iters,
            dataset=dataset,
        )
    training = global_batches(
        batches,
        step,
        config,
        pg,
        consumed_samples=state.consumed_samples,
        count=config.iterations - state.iteration,
        corpora=corpora.get("train"),
    )
    return Data(training=training, held_out=held_out)


def _warn_of_repeated_samples(samples: int, config: TrainConfig) -> None:
    """A warning if one evaluation reads some of the validation samples more than once."""
    batch_size = config.global_batch_size
    if samples >= config.eval_iters * batch_size:
        return
    whole = samples // batch_size
    remedy = f"set eval_iters to {whole} or" if whole > 0 else "lower global_batch_size or"
    warnings.warn(
        f"eval_iters = {config.eval_iters}: the validation split has {samples} samples, that is "
        f"{samples / batch_size:.3g} global batches of {batch_size}, so each evaluation repeats "
        f"them; {remedy} give it more text (data.valid, data.split)",
        stacklevel=5,  # the caller of `train` or `fit`
    )


def global_batches(
    given: MicroBatches | None,
    step: Step,
    config: TrainConfig,
    pg: ProcessGroups,
    *,
    count: int,
    consumed_samples: int | None = None,
    corpora: Sequence[Corpus] | None = None,
    for_training: bool = True,
) -> GlobalBatches:
    """This rank's share of at most `count` global batches: of those given, or of config.data."""
    if given is None:
        dataset = build_dataset(config, "train", corpora)
        return read_batches(
            config, pg, consumed_samples=consumed_samples, count=count, dataset=dataset
        )
    is_short = partial(_has_too_few_rows, step, config, pg)
    whole = without_short_end(given, config.micro_batch_size, is_short)
    grouped = group_batches(whole, num_micro_batches(config, pg.dp_size))
    return check_same_batches(grouped, pg, count=count, for_training=for_training)


def _has_too_few_rows(step: Step, config: TrainConfig, pg: ProcessGroups, raw: Any) -> bool:
    return tokens_of(step.batch(raw, config, pg)).size(0) < config.micro_batch_size


def _next_pass(
    passes: Iterator[MicroBatches], step: Step, config: TrainConfig, pg: ProcessGroups
) -> GlobalBatches:
    return global_batches(
        next(passes), step, config, pg, count=config.eval_iters, for_training=False
    )


def count_evaluations(iteration: int, config: TrainConfig) -> int:
    """How many evaluations a run of this config makes after an iteration."""
    last = config.iterations
    if config.eval_iters == 0 or iteration >= last:
        return 0
    interval = config.eval_interval
    if interval is None:
        return 1
    at_intervals = last // interval - iteration // interval
    return at_intervals + (last % interval > 0)


def splits_read(
    config: TrainConfig, iteration: int, valid_batches: MicroBatches | None
) -> tuple[str, ...]:
    """The splits of config.data that a run without `batches` reads after an iteration."""
    if valid_batches is None and count_evaluations(iteration, config) > 0:
        return ("train", "valid")
    return ("train",)


def _evaluation_is_due(iteration: int, config: TrainConfig) -> bool:
    if iteration == config.iterations:
        return True
    return config.eval_interval is not None and iteration % config.eval_interval == 0


def _error_of_sinks(sinks: Sequence[Sink], metrics: Metrics) -> Exception | None:
    """Call the sinks. Returns what one of them raises, after which the rest are not called."""
    try:
        for sink in sinks:
            sink(metrics)
    except Exception as error:
        return error
    return None


def _raise_error_of_sinks(error: Exception | None, config: TrainConfig, pg: ProcessGroups) -> None:
    """Raise the error of this rank's sinks, or that of another rank."""
    if config.checkpoint.directory is None and error is not None:
        raise error  # the other ranks do not know of it
    with errors_on_all_ranks(pg):
        if error is not None:
            raise error


def _validate(state: State, step: Step, held_out: GlobalBatches) -> Report:
    """An evaluation without logits: those of all eval_iters at once would fill the memory."""
    without_logits = attrs.evolve(state.config, return_logits=None)
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

"""One training step, and an evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from attrs import frozen

from megafn.pure.config.records import num_micro_batches
from megafn.pure.families.built_in import sample_tokens
from megafn.pure.schedule import LrWd
from megafn.pure.spikes import append_norm, spike_limit
from megafn.runtime.families.step import Step
from megafn.runtime.metrics.diagnostics import diagnostics, model_sums
from megafn.runtime.metrics.records import Logits, Metrics, Report
from megafn.runtime.model.eval_mode import eval_mode
from megafn.runtime.model.optimizer import (
    Update,
    guarded_update,
    norm_from_square,
    set_lr,
    squared_norm_share,
)
from megafn.runtime.model.state import State, check_usable, donate
from megafn.runtime.parallel.megatron_context import megatron_context
from megafn.runtime.training.forward_backward import (
    MicroBatchSums,
    Output,
    forward_backward,
)
from megafn.runtime.training.gradients import zero_gradients
from megafn.runtime.training.model_checks import (
    check_first_gradients,
    check_unproven,
    watch_gradients,
)
from megafn.runtime.training.totals import Totals, sum_over_ranks
from megafn.runtime.training.whole_logits import whole_logits


def train_step(state: State, batch: Iterable[Any], step: Step) -> tuple[State, Metrics]:
    """One update. The old state's buffers are donated: its tensors belong to the state returned.

    batch: this rank's share of one global batch, raw micro-batches, as many on every rank. The
    gradient is that of (sum of losses) / (sum of counts), both over the whole global batch, however
    it was cut. If loss or gradient is NaN or infinite on one rank, or the gradient's norm a spike
    (optimizer.spike_factor), no rank updates anything, and the schedule does not advance.
    Raises ValueError, before the update, if the batch has another number of micro-batches than
    `num_micro_batches`, if none of its tokens counts, if step.loss reports other names for some
    micro-batches, and if the state is not for training; RuntimeError for a state that was donated
    before, or whose groups are closed. In the first step, or the first one in which it has a
    gradient other than zero, raises ConfigError before the update if a parameter that counts as
    replicated over tp has other gradients on other ranks.

    Numbers move to the host once, before the update: loss, count, reports and gradient norm in one
    tensor, summed over all ranks in one collective; once more under log.everything or fp16.
    """
    check_usable(state)
    if not state.for_training:
        raise ValueError(
            "state: setup(for_training=False) made it; train one that setup made for it"
        )
    clock = Clock(started=time.perf_counter())
    scheduled = state.schedule(state.consumed_samples - state.skipped_samples)
    set_lr(state.optimizer, scheduled.lr, scheduled.weight_decay)
    outputs: list[Output] = []

    with megatron_context(state.pg, state.config.seed, "train", state.consumed_samples):
        micro_batches = _all_micro_batches(state, batch)
        for chunk in state.chunks:
            chunk.train()
        zero_gradients(state)
        first = state.report_names is None
        with watch_gradients(state, first=first) as received:
            sums = _forward_backward(state, micro_batches, step, outputs, forward_only=False)
        if first:
            state = attrs.evolve(state, unproven=check_first_gradients(state, received))
        elif state.unproven is not None:
            state = attrs.evolve(state, unproven=check_unproven(state, state.unproven))
        overflow = state.optimizer.prepare_grads()
        share = squared_norm_share(state.optimizer, state.pg)
        totals = sum_over_ranks(sums, state.report_names, state.pg, squared_norm=share)
        logits = _logits(state, outputs)
        clock = attrs.evolve(clock, optimizer_started=time.perf_counter())
        state = donate(state)
        update = _guarded_update(state, totals, overflow)
        after = _read_after_update(state, update)

    clock = attrs.evolve(clock, ended=time.perf_counter())
    state = _next_state(state, totals, update)
    return state, _metrics(state, totals, update, after, scheduled, clock, logits)


def evaluate(state: State, batches: Iterable[Iterable[Any]], step: Step) -> Report:
    """Mean loss over global batches, forward only; equal on every rank.

    `batches` must be as long on every rank. The model returns to the mode that it was in. Raises
    ValueError if there is no batch, RuntimeError for a state that was donated, or whose groups are
    closed.
    """
    check_usable(state)
    sums = []
    outputs: list[Output] = []
    count = 0
    with (
        megatron_context(state.pg, state.config.seed, "evaluate"),
        eval_mode(state.chunks),
        torch.no_grad(),
    ):
        for batch in batches:
            sums += _forward_backward(state, batch, step, outputs, forward_only=True)
            count += 1
    if count == 0:
        raise ValueError(
            "batches: nothing to evaluate on; give at least one global batch (eval_iters, or a "
            "longer validation text)."
        )
    totals = sum_over_ranks(sums, state.report_names, state.pg)
    loss = totals.loss / totals.count
    return Report(
        loss=loss,
        perplexity=math.nan if math.isnan(loss) else math.exp(min(20.0, loss)),
        count=totals.count,
        report=_means(totals),
        logits=_logits(state, outputs),
    )


# ------------------------------------------------------------------------- the parts of a step


@frozen(kw_only=True)
class Clock:
    """When a step started, when its update started, and when it ended, in seconds."""

    started: float
    optimizer_started: float = math.nan
    ended: float = math.nan


@frozen(kw_only=True)
class AfterUpdate:
    """Numbers that are known only after the update; None if they are not asked for."""

    loss_scale: float
    params_norm: float | None = None
    zeros_in_grad: int | None = None


def _all_micro_batches(state: State, batch: Iterable[Any]) -> tuple[Any, ...]:
    """The batch as a tuple. Raises ValueError if it is not this rank's share of a global batch."""
    config = state.config
    micro_batches = tuple(batch)
    expected = num_micro_batches(config, state.pg.dp_size)
    if len(micro_batches) != expected:
        raise ValueError(
            f"batch: {len(micro_batches)} micro-batches, expected {expected} on each rank: "
            f"global_batch_size = {config.global_batch_size} / (micro_batch_size = "
            f"{config.micro_batch_size} * dp = {state.pg.dp_size}); group_batches makes these."
        )
    return micro_batches


def _forward_backward(
    state: State,
    batch: Iterable[Any],
    step: Step,
    outputs: list[Output],
    *,
    forward_only: bool,
) -> list[MicroBatchSums]:
    """`forward_backward` with a state's chunks; outputs are kept if the config asks for logits."""
    return forward_backward(
        state.chunks,
        batch,
        step,
        state.config,
        state.pg,
        forward_only=forward_only,
        on_logits=None if state.config.return_logits is None else outputs.append,
    )


def _logits(state: State, outputs: list[Output]) -> Logits | None:
    stages = state.config.return_logits
    if stages is None:
        return None
    return whole_logits(outputs, state.config, state.pg, every_stage=stages == "every_stage")


def _guarded_update(state: State, totals: Totals, overflow: bool) -> Update:
    return guarded_update(
        state.optimizer,
        loss=totals.loss,
        grad_norm=norm_from_square(totals.squared_norm),
        overflow=overflow,
        limit=spike_limit(state.grad_norms, state.config.optimizer.spike_factor),
    )


def _read_after_update(state: State, update: Update) -> AfterUpdate:
    """Loss scale, parameter norm and zeros, in one move to the host if any of them is asked for."""
    fp16 = state.config.precision.dtype == "fp16"
    if not fp16 and not state.config.log.everything:
        return AfterUpdate(loss_scale=1.0)
    numbers = torch.ones(1, dtype=torch.float64, device=state.pg.device)
    if fp16:
        numbers.copy_(state.optimizer.get_loss_scale())
    if state.config.log.everything:
        numbers = torch.cat([numbers, model_sums(state.chunks, state.optimizer, state.pg)])
    loss_scale, *sums = numbers.tolist()
    if not sums:
        return AfterUpdate(loss_scale=loss_scale)
    squared_norm, zeros = sums
    return AfterUpdate(
        loss_scale=loss_scale,
        params_norm=math.sqrt(squared_norm),
        zeros_in_grad=round(zeros) if update.done else None,
    )


def _next_state(state: State, totals: Totals, update: Update) -> State:
    samples = state.config.global_batch_size
    skipped_in_a_row = state.skipped_in_a_row + int(update.left_out)
    return attrs.evolve(
        state,
        iteration=state.iteration + 1,
        consumed_samples=state.consumed_samples + samples,
        skipped_samples=state.skipped_samples + (0 if update.done else samples),
        skipped_in_a_row=0 if update.done else skipped_in_a_row,
        grad_norms=append_norm(state.grad_norms, update.grad_norm),
        report_names=totals.names,
    )


def _metrics(
    state: State,
    totals: Totals,
    update: Update,
    after: AfterUpdate,
    scheduled: LrWd,
    clock: Clock,
    logits: Logits | None,
) -> Metrics:
    """The metrics of the step that led to `state`."""
    config = state.config
    seconds = clock.ended - clock.started
    norm = update.grad_norm
    details: Mapping[str, float | None] = {}
    if config.log.everything:
        details = diagnostics(
            config,
            state.pg,
            params_norm=after.params_norm,
            zeros_in_grad=after.zeros_in_grad,
            seconds=seconds,
            optimizer_seconds=clock.ended - clock.optimizer_started,
            iteration=state.iteration,
        )
    return Metrics(
        iteration=state.iteration,
        consumed_samples=state.consumed_samples,
        loss=totals.loss / totals.count,
        lr=scheduled.lr,
        weight_decay=scheduled.weight_decay,
        grad_norm=norm if norm is not None and math.isfinite(norm) else None,
        count=totals.count,
        skipped=not update.done,
        loss_scale=after.loss_scale,
        seconds=seconds,
        tokens_per_second=config.global_batch_size * sample_tokens(config.model) / seconds,
        report=_means(totals),
        details=details,
        logits=logits,
    )


def _means(totals: Totals) -> dict[str, float]:
    return {name: value / totals.count for name, value in totals.report.items()}

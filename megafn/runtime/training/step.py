"""One training step, and an evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch

from megafn.pure.config.records import TrainConfig
from megafn.pure.families.built_in import sample_tokens
from megafn.pure.spikes import append_norm, spike_limit
from megafn.runtime.families.step import Step
from megafn.runtime.metrics.diagnostics import diagnostics, zeros_in_grad
from megafn.runtime.metrics.records import Metrics, Report
from megafn.runtime.model.optimizer import set_lr, update
from megafn.runtime.model.state import State
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.megatron_context import megatron_context
from megafn.runtime.training.forward_backward import forward_backward
from megafn.runtime.training.whole_logits import whole_logits


def _report(
    totals: Mapping[str, float], kept: list[Any], config: TrainConfig, pg: ProcessGroups
) -> Report:
    count = totals["count"]
    if count <= 0:
        raise ValueError(
            f"loss_mask: {count:.0f} tokens count in this whole global batch, so it has no mean loss; give at least one token a label."
        )
    loss = totals["loss"] / count
    logits = (
        whole_logits(kept, config, pg, every_stage=config.return_logits == "every_stage")
        if config.return_logits
        else None
    )
    return Report(
        loss=loss,
        perplexity=math.exp(min(20.0, loss)) if loss == loss else math.nan,
        count=int(count),
        logits=logits,
        report={
            key.removeprefix("report/"): value / count
            for key, value in totals.items()
            if key.startswith("report/")
        },
    )


def train_step(state: State, batch: Iterable[Any], step: Step) -> tuple[State, Metrics]:
    """One update; the old state's buffers are donated: its tensors now belong to the state returned.

    batch: this rank's share of one global batch, raw micro-batches, as many on every rank. The gradient is that of
    (sum of losses) / (sum of counts), both over the whole global batch, however it was cut. Where it or the loss is NaN or
    infinite on one rank, or its norm a spike (optimizer.spike_factor), no rank updates anything, and the schedule does not move.
    Raises ValueError, before the update, where no token of the global batch counts.
    """
    started = time.perf_counter()
    config, pg, optimizer = state.config, state.pg, state.optimizer
    at = state.schedule(state.consumed_samples - state.skipped_samples)
    set_lr(optimizer, at.lr, at.weight_decay)
    with megatron_context(pg, config.seed, "train", state.consumed_samples):
        for chunk in state.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        kept: list[Any] = []
        report = _report(
            forward_backward(
                state.chunks,
                batch,
                step,
                config,
                pg,
                forward_only=False,
                on_logits=kept.append if config.return_logits else None,
            ),
            kept,
            config,
            pg,
        )
        stepping = time.perf_counter()
        fp16 = config.precision.dtype == "fp16"  # its loss scale looks for overflows itself
        limit = spike_limit(state.grad_norms, config.optimizer.spike_factor)
        finite = math.isfinite(report.loss)
        updated, norm = update(optimizer, limit=limit) if fp16 or finite else (False, math.nan)
        zeros = zeros_in_grad(optimizer, pg) if config.log.everything and updated else None
    now, samples = time.perf_counter(), config.global_batch_size
    seconds, more = now - started, {}
    if config.log.everything:
        more = diagnostics(
            config,
            pg,
            state.chunks,
            zeros=zeros,
            seconds=seconds,
            optimizer_seconds=now - stepping,
            iteration=state.iteration + 1,
        )
    state = attrs.evolve(
        state,
        iteration=state.iteration + 1,
        consumed_samples=state.consumed_samples + samples,
        skipped_samples=state.skipped_samples + (0 if updated else samples),
        skipped_in_a_row=0
        if updated
        else state.skipped_in_a_row + (norm is not None or not finite),
        grad_norms=append_norm(state.grad_norms, norm),
    )
    return state, Metrics(
        iteration=state.iteration,
        consumed_samples=state.consumed_samples,
        loss=report.loss,
        lr=at.lr,
        weight_decay=at.weight_decay,
        grad_norm=norm if norm is not None and math.isfinite(norm) else None,
        count=report.count,
        skipped=not updated,
        loss_scale=float(optimizer.get_loss_scale()),
        seconds=seconds,
        tokens_per_second=samples * sample_tokens(config.model) / seconds,
        report=report.report,
        details=more,
        logits=report.logits,
    )


def evaluate(state: State, batches: Iterable[Iterable[Any]], step: Step) -> Report:
    """Mean loss over global batches, forward only; equal on every rank. `batches` must be as long on every rank.

    Raises ValueError where there is no batch.
    """
    totals: dict[str, float] = {}
    config, kept = state.config, []
    with megatron_context(state.pg, state.config.seed, "evaluate"), torch.no_grad():
        for chunk in state.chunks:
            chunk.eval()
        for batch in batches:
            for key, value in forward_backward(
                state.chunks,
                batch,
                step,
                config,
                state.pg,
                forward_only=True,
                on_logits=kept.append if config.return_logits else None,
            ).items():
                totals[key] = totals.get(key, 0.0) + value
        for chunk in state.chunks:
            chunk.train()
    if not totals:
        raise ValueError(
            "batches: nothing to evaluate on; give at least one global batch (eval_iters, or a longer validation text)."
        )
    return _report(totals, kept, config, state.pg)

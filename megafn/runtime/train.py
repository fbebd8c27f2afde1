"""The recipe: `train`, and the functions that it is made of, each callable from a loop of one's own."""
from __future__ import annotations

import math
import time
import warnings
from functools import partial
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import attrs
import torch
from attrs import field, frozen
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.utils import get_model_config

from megafn.pure.config import ConfigError, TrainConfig, num_micro_batches
from megafn.pure.layout import build_groups
from megafn.pure.schedule import make_schedule
from megafn.pure.spikes import remembered, spike_limit
from megafn.pure.validate import check
from megafn.runtime import cpu
from megafn.runtime.agreement import agreed
from megafn.runtime.corpora import corpora
from megafn.runtime.data import batches as read_batches
from megafn.runtime.data import group_batches
from megafn.runtime.details import details, zeros_in_grad
from megafn.runtime.families import build_stage
from megafn.runtime.gathering import whole_logits
from megafn.runtime.groups import ProcessGroups, init_groups, megatron, world_size
from megafn.runtime.layers import check_parallel_layers
from megafn.runtime.methods import step_of
from megafn.runtime.optimizer import build_optimizer, set_lr, update
from megafn.runtime.passes import run_step
from megafn.runtime.saver import check_directory, open_saver, resume
from megafn.runtime.shared_tables import finalize_grads
from megafn.runtime.sinks import open_sinks
from megafn.runtime.state import State
from megafn.runtime.steps import Step


@frozen(kw_only=True)
class Report:
    """Means over a set of tokens. Equal on every rank."""

    loss: float
    perplexity: float                     # exp(min(20, loss)), as accelerate's
    count: int                            # tokens that count
    report: Mapping[str, float]           # the step's other sums, each divided by count
    # under config.return_logits: [batch, sequence, vocabulary] of each of this data-parallel position's micro-batches, whole
    # (or what else the step's forward gives, see `whole_logits`); on the last pipeline stage or on every one, None elsewhere
    logits: tuple[Any, ...] | None = field(default=None, repr=False, eq=False)


@frozen(kw_only=True)
class Metrics:
    """One iteration. Equal on every rank, times apart."""

    iteration: int
    consumed_samples: int
    loss: float
    lr: float
    weight_decay: float
    grad_norm: float | None               # None where it was not finite
    count: int
    skipped: bool                         # loss or gradient was NaN, infinite or a spike, so nothing was updated, on any rank
    loss_scale: float
    seconds: float
    tokens_per_second: float
    report: Mapping[str, float]
    valid: Report | None = None           # where this iteration was followed by an evaluation
    details: Mapping[str, float | None] = field(factory=dict)   # under log.everything, see `details`
    logits: tuple[Any, ...] | None = field(default=None, repr=False, eq=False)   # under config.return_logits, see `Report`


def setup(config: TrainConfig, pg: ProcessGroups, *, model: Callable | None = None) -> State:
    """Model chunks, optimizer and schedule of this process, at iteration 0 (or behind config.consumed_samples).

    model(config, pg, *, pre_process, post_process, vp_stage) -> module builds one chunk; None: config.model_function,
    or `build_stage`. config.prepare_model, where given, is handed that as a function without arguments.
    Raises ConfigError where the config does not fit the layout, and where the groups are of another one.
    """
    check(config, pg.world_size, cuda=pg.device.type == "cuda")
    if pg.groups != build_groups(config.parallel, pg.world_size, model=config.model):
        raise ConfigError("pg: its groups are those of another layout or model; make them from "
                          "mf.build_groups(config.parallel, world_size, model=config.model).")
    vpp, build = config.parallel.vpp, model or config.model_function or build_stage
    with megatron(pg, config.seed, "setup"):
        chunks = []
        for i in range(vpp):
            provider = partial(build, config, pg, pre_process=pg.is_first_stage and i == 0,
                               post_process=pg.is_last_stage and i == vpp - 1, vp_stage=i if vpp > 1 else None)
            chunk = provider() if config.prepare_model is None else config.prepare_model(provider)
            if not isinstance(chunk, torch.nn.Module):
                raise ConfigError(f"model function or prepare_model: it returned a {type(chunk).__name__}; return the module of one model chunk")
            check_parallel_layers(chunk, pg)
            chunks.append(chunk)
        chunks = [DistributedDataParallel(
            get_model_config(chunk), DistributedDataParallelConfig(
                use_distributed_optimizer=config.optimizer.use_distributed_optimizer, grad_reduce_in_fp32=True),
            chunk, pg_collection=pg.collection) for chunk in chunks]
        optimizer = build_optimizer(config, chunks, pg)
        for chunk in chunks:
            mcore = get_model_config(chunk)
            mcore.finalize_model_grads_func = finalize_grads
            if config.precision.dtype == "fp16":      # elsewhere the scale is 1, and a model that knows its optimizer is never freed
                mcore.grad_scale_func = optimizer.scale_loss
    consumed = config.consumed_samples[0]
    return State(config=config, pg=pg, chunks=tuple(chunks), optimizer=optimizer, schedule=make_schedule(config),
                 iteration=consumed // config.global_batch_size, consumed_samples=consumed)


def _report(totals: Mapping[str, float], kept: list[Any], config: TrainConfig, pg: ProcessGroups) -> Report:
    count = totals["count"]
    if count <= 0:
        raise ValueError(f"loss_mask: {count:.0f} tokens count in this whole global batch, so it has no mean loss; give at least one token a label.")
    loss = totals["loss"] / count
    logits = whole_logits(kept, config, pg, every_stage=config.return_logits == "every_stage") if config.return_logits else None
    return Report(loss=loss, perplexity=math.exp(min(20.0, loss)) if loss == loss else math.nan, count=int(count), logits=logits,
                  report={key.removeprefix("report/"): value / count for key, value in totals.items() if key.startswith("report/")})


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
    with megatron(pg, config.seed, "train", state.consumed_samples):
        for chunk in state.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        kept: list[Any] = []
        report = _report(run_step(state.chunks, batch, step, config, pg, forward_only=False, on_logits=kept.append if config.return_logits else None),
                         kept, config, pg)
        stepping = time.perf_counter()
        fp16 = config.precision.dtype == "fp16"              # its loss scale looks for overflows itself
        limit = spike_limit(state.grad_norms, config.optimizer.spike_factor)
        finite = math.isfinite(report.loss)
        updated, norm = update(optimizer, limit=limit) if fp16 or finite else (False, math.nan)
        zeros = zeros_in_grad(optimizer, pg) if config.log.everything and updated else None
    now, samples = time.perf_counter(), config.global_batch_size
    seconds, more = now - started, {}
    if config.log.everything:
        more = details(config, pg, state.chunks, zeros=zeros, seconds=seconds, optimizer_seconds=now - stepping,
                       iteration=state.iteration + 1)
    state = attrs.evolve(state, iteration=state.iteration + 1, consumed_samples=state.consumed_samples + samples,
                         skipped_samples=state.skipped_samples + (0 if updated else samples),
                         skipped_in_a_row=0 if updated else state.skipped_in_a_row + (norm is not None or not finite),
                         grad_norms=remembered(state.grad_norms, norm))
    return state, Metrics(
        iteration=state.iteration, consumed_samples=state.consumed_samples, loss=report.loss, lr=at.lr, weight_decay=at.weight_decay,
        grad_norm=norm if norm is not None and math.isfinite(norm) else None, count=report.count, skipped=not updated,
        loss_scale=float(optimizer.get_loss_scale()), seconds=seconds,
        tokens_per_second=samples * config.model.sample_tokens / seconds, report=report.report, details=more, logits=report.logits)


def evaluate(state: State, batches: Iterable[Iterable[Any]], step: Step) -> Report:
    """Mean loss over global batches, forward only; equal on every rank. `batches` must be as long on every rank.

    Raises ValueError where there is no batch.
    """
    totals: dict[str, float] = {}
    config, kept = state.config, []
    with megatron(state.pg, state.config.seed, "evaluate"), torch.no_grad():
        for chunk in state.chunks:
            chunk.eval()
        for batch in batches:
            for key, value in run_step(state.chunks, batch, step, config, state.pg, forward_only=True,
                                       on_logits=kept.append if config.return_logits else None).items():
                totals[key] = totals.get(key, 0.0) + value
        for chunk in state.chunks:
            chunk.train()
    if not totals:
        raise ValueError("batches: nothing to evaluate on; give at least one global batch (eval_iters, or a longer validation text).")
    return _report(totals, kept, config, state.pg)


def global_batches(given: Iterable[Any] | None, config: TrainConfig, pg: ProcessGroups, *, count: int, split: str = "train",
                   consumed_samples: int | None = None) -> Iterator[tuple[Any, ...]]:
    """At most `count` global batches, this rank's share of each: of micro-batches that are given, or else of the config's data."""
    if given is None:
        return read_batches(config, pg, split=split, consumed_samples=consumed_samples, count=count)
    return agreed(group_batches(given, num_micro_batches(config, pg.dp_size)), pg, count=count)


def fit(state: State, step: Step, *, batches: Iterable[Any] | None = None, valid_batches: Iterable[Any] | None = None,
        on_metrics: Sequence[Callable[[Metrics], Any]] = ()) -> State:
    """Train from where the state stands to the config's last iteration; the old state's buffers are donated.

    The arguments are those of `train`, in process groups of one's own. Evaluates every `eval_interval` iterations and
    after the last, without returning logits. Where `batches` ends early, the run ends there with a warning.
    """
    config, pg = state.config, state.pg
    without_logits = attrs.evolve(config, return_logits=None)        # those of all eval_iters at once would fill the memory

    def due(iteration):
        to_validate = config.eval_iters > 0 and (valid_batches is not None or batches is None)
        return to_validate and (iteration == config.iterations or config.eval_interval and iteration % config.eval_interval == 0)

    with open_sinks(config, pg, state.iteration) as sinks, open_saver(state) as keep:
        for batch in global_batches(batches, config, pg, consumed_samples=state.consumed_samples, count=config.iterations - state.iteration):
            state, metrics = train_step(state, batch, step)
            if due(state.iteration):
                held_out = global_batches(valid_batches, config, pg, split="valid", count=config.eval_iters)
                metrics = attrs.evolve(metrics, valid=evaluate(attrs.evolve(state, config=without_logits), held_out, step))
            for sink in (*sinks, *on_metrics):
                sink(metrics)
            keep(state, batch)
            if state.skipped_in_a_row >= config.stop_after_skipped > 0:
                raise FloatingPointError(_not_finite(state))
        keep(state, ended=True)
    if state.iteration < config.iterations:
        warnings.warn(f"batches ended at iteration {state.iteration} of {config.iterations}: give more of them, or lower train_iters.", stacklevel=2)
    return state


def _not_finite(state: State) -> str:
    batch, count, end = state.config.global_batch_size, state.skipped_in_a_row, state.consumed_samples
    return (f"iterations {state.iteration - count + 1} to {state.iteration}: loss or gradient was NaN, infinite or a spike {count} times in a row, so nothing was updated "
            f"(stop_after_skipped). They read the run's samples {end - count * batch} to {end - 1}, of which {end - batch} to {end - 1} last; "
            f"replay(config, {state.iteration}) runs that step again.")


def train(config: TrainConfig, *, step: Step | None = None, model: Callable | None = None, batches: Iterable[Any] | Callable | None = None,
          valid_batches: Iterable[Any] | None = None, on_metrics: Sequence[Callable[[Metrics], Any]] = ()) -> State:
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
        raise ConfigError("data = None: name a text or an indexed dataset in config.data, or give train your own batches.")
    step = step if step is not None else step_of(config)
    if batches is None:
        for split in ("train", "valid") if config.eval_iters and valid_batches is None else ("train",):
            corpora(config, split)               # missing, damaged or too short: told now, not when it is first read
    check_directory(config)
    with init_groups(build_groups(config.parallel, world, model=config.model), timeout_seconds=config.timeout_seconds) as pg:
        state, batches = resume(setup(config, pg, model=model), batches)
        return fit(state, step, batches=batches, valid_batches=valid_batches, on_metrics=on_metrics)

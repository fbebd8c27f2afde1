"""Optimizers of megatron-core, built from a config; and the guarded update, on any of them.

An optimizer function takes (config, chunks, pg), the chunks wrapped in megatron-core's
DistributedDataParallel, and returns a megatron-core optimizer: `FP32Optimizer`, another
`MegatronOptimizer`, or a `ChainedOptimizer` of several. `setup` and `train` take such a function as
`optimizer=`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from attrs import frozen
from megatron.core.optimizer import (
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megafn.pure.config.records import TrainConfig
from megafn.runtime.model.layers import DTYPES
from megafn.runtime.model.weights import local_parameters
from megafn.runtime.parallel.groups import ProcessGroups

OptimizerFunction = Callable[
    [TrainConfig, Sequence[torch.nn.Module], ProcessGroups], MegatronOptimizer
]

FLOAT32_MAX = torch.finfo(torch.float32).max


# ------------------------------------------------------------------------------------- building


def adam(
    config: TrainConfig, chunks: Sequence[torch.nn.Module], pg: ProcessGroups
) -> MegatronOptimizer:
    """AdamW (arXiv 1711.05101). torch's runs fused: one pass over memory."""
    optimizer = _megatron_optimizer(config, chunks, pg)
    for inner in inner_optimizers(optimizer):
        if isinstance(inner, torch.optim.AdamW):
            inner.defaults["fused"] = True
            for group in inner.param_groups:
                group["fused"] = True
                group["foreach"] = False
    return optimizer


def sgd(
    config: TrainConfig, chunks: Sequence[torch.nn.Module], pg: ProcessGroups
) -> MegatronOptimizer:
    """Stochastic gradient descent with momentum."""
    return _megatron_optimizer(config, chunks, pg)


# The functions of the built-in optimizers; `megafn.pure.optimizers.OPTIMIZERS` has their rules.
OPTIMIZERS: Mapping[str, OptimizerFunction] = {"adam": adam, "sgd": sgd}


def build_optimizer(
    config: TrainConfig, chunks: Sequence[torch.nn.Module], pg: ProcessGroups
) -> MegatronOptimizer:
    """The built-in optimizer that config.optimizer.name names."""
    return OPTIMIZERS[config.optimizer.name](config, chunks, pg)


def mcore_optimizer_config(config: TrainConfig) -> McoreOptimizerConfig:
    """megatron-core's optimizer config."""
    optimizer = config.optimizer
    precision = config.precision
    dtype = DTYPES[precision.dtype]
    return McoreOptimizerConfig(
        optimizer=optimizer.name,
        lr=config.schedule.lr,
        min_lr=config.schedule.min_lr,
        weight_decay=config.schedule.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        sgd_momentum=optimizer.momentum,
        clip_grad=optimizer.clip_grad,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        initial_loss_scale=precision.initial_loss_scale,
        min_loss_scale=precision.min_loss_scale,
        loss_scale_window=precision.loss_scale_window,
        hysteresis=precision.hysteresis,
    )


def _megatron_optimizer(
    config: TrainConfig, chunks: Sequence[torch.nn.Module], pg: ProcessGroups
) -> MegatronOptimizer:
    """megatron-core's optimizer, with the config's conditions on names as parameter groups.

    Biases and other vectors are not decayed (as upstream), unless the config has a condition.
    Conditions see a parameter's name in the whole model, so every layout gets the same answer.
    """
    optimizer = config.optimizer
    mcore = mcore_optimizer_config(config)
    names = {
        part.parameter: part.name
        for chunk in chunks
        for part in local_parameters(chunk, config.model, pg)
    }

    def key(name: str, condition: Callable[[str, torch.nn.Parameter], bool]) -> ParamKey:
        def matches(parameter: torch.nn.Parameter, _: str) -> bool:
            return bool(condition(names[parameter], parameter))

        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=matches))

    overrides = get_standard_config_overrides(mcore)
    if optimizer.no_weight_decay_cond is not None:
        not_decayed = key("no_weight_decay_cond", optimizer.no_weight_decay_cond)
        overrides = {not_decayed: {"wd_mult": 0.0}}
    if optimizer.lr_scale_cond is not None:
        scaled = key("lr_scale_cond", optimizer.lr_scale_cond)
        overrides[scaled] = {"lr_mult": optimizer.lr_mult}
    return get_megatron_optimizer(
        mcore, list(chunks), overrides, use_gloo_process_groups=False, pg_collection=pg.collection
    )


def complete_groups(optimizer: MegatronOptimizer, pg: ProcessGroups) -> None:
    """Give each optimizer in a chain the process groups that megatron-core's own functions set.

    Without `grad_stats_parallel_group` and `tp_group`, megatron-core would look for globals.
    """
    for part in chained(optimizer):
        if not hasattr(part, "grad_stats_parallel_group"):
            part.grad_stats_parallel_group = pg.mp
        if not hasattr(part, "tp_group"):
            part.tp_group = pg.tp


def chained(optimizer: MegatronOptimizer) -> Sequence[MegatronOptimizer]:
    """The optimizers of a megatron-core chain, or the optimizer itself if it is not a chain."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def inner_optimizers(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside megatron-core's, which chains and wraps them."""
    for part in chained(optimizer):
        if part.optimizer is not None:
            yield part.optimizer


# ------------------------------------------------------------------------------------- updating


@frozen(kw_only=True)
class Update:
    """What became of one update.

    `grad_norm`: before clipping; NaN if the loss was not finite, None after an overflow of fp16's
    loss scale. `left_out`: not done for a NaN, an infinity or a spike; an overflow, from which the
    loss scale recovers by itself, is none of these.
    """

    done: bool
    grad_norm: float | None
    left_out: bool


def set_lr(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Give every parameter group its learning rate and weight decay for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


@torch.no_grad()
def squared_norm_share(optimizer: MegatronOptimizer, pg: ProcessGroups) -> torch.Tensor:
    """This rank's share of the squared gradient norm: the sum over all ranks is the whole model's.

    A float64 scalar on the device. As megatron-core's `get_grad_norm`, which reads the number back
    by itself: the same gradients, each counted once. Ranks of different gradient statistics groups
    hold the same gradients, so each gives its part of one group's sum. Squares are fp32, so a
    gradient too large for fp32 has an infinite norm. Read it after `prepare_grads`.
    """
    share = torch.zeros((), dtype=torch.float64, device=pg.device)
    for part in chained(optimizer):
        gradients = part.get_main_grads_for_grad_norm()
        if gradients:
            replicas = pg.world_size / part.get_grad_stats_parallel_group().size()
            squared = torch.nn.utils.get_total_norm(gradients).square()
            share += squared.double() / replicas
    return share


def norm_from_square(squared: float) -> float:
    """The norm of the whole model; infinity if its square is beyond fp32."""
    return math.inf if squared > FLOAT32_MAX else math.sqrt(squared)


def guarded_update(
    optimizer: MegatronOptimizer, *, loss: float, grad_norm: float, overflow: bool, limit: float
) -> Update:
    """Clip and update, unless loss or gradient norm is NaN or infinite, or the norm above `limit`.

    Loss and norm are the whole batch's and the whole model's, so every rank decides alike.
    overflow: fp16's loss scale saw an infinity (`prepare_grads` returned True), so nothing is
    updated and the scale has been lowered. As megatron-core's `ChainedOptimizer.step` otherwise.
    """
    if overflow:
        return Update(done=False, grad_norm=None, left_out=not math.isfinite(loss))
    if not (math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm <= limit):
        norm = grad_norm if math.isfinite(loss) else math.nan
        return Update(done=False, grad_norm=norm, left_out=True)
    for part in chained(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=part.config.clip_grad, total_norm=grad_norm
            )
    done = optimizer.step_with_ready_grads()
    return Update(done=done, grad_norm=grad_norm, left_out=not done)

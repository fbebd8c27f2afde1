"""megatron-core's optimizer from a config."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megafn.pure.config.records import TrainConfig
from megafn.runtime.model.layers import DTYPES
from megafn.runtime.model.weights import local_parameters
from megafn.runtime.parallel.groups import ProcessGroups


def build_optimizer(config: TrainConfig, chunks: list[torch.nn.Module], pg: ProcessGroups) -> Any:
    """megatron-core's optimizer for model chunks wrapped in its DistributedDataParallel.

    Biases and other vectors are not decayed (as upstream), or what the config's conditions say; those are asked with a
    parameter's name in the whole model, so that every layout gets one answer. torch's Adam runs fused: one pass over memory.
    """
    optimizer, precision, dtype = config.optimizer, config.precision, DTYPES[config.precision.dtype]
    mcore = McoreOptimizerConfig(
        optimizer=optimizer.name,
        lr=config.schedule.lr,
        min_lr=config.schedule.min_lr,
        weight_decay=config.schedule.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        sgd_momentum=optimizer.momentum,
        clip_grad=optimizer.clip_grad or math.inf,  # infinity clips nothing, and the norm is known
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        initial_loss_scale=precision.initial_loss_scale,
        min_loss_scale=precision.min_loss_scale,
        loss_scale_window=precision.loss_scale_window,
        hysteresis=precision.hysteresis,
    )
    names = {
        part.parameter: part.name
        for chunk in chunks
        for part in local_parameters(chunk, config.model, pg)
    }

    def key(name, condition):
        return ParamKey(
            with_name_predicate=ParamWithNamePredicate(
                name=name, fn=lambda parameter, _: bool(condition(names[parameter], parameter))
            )
        )

    overrides = get_standard_config_overrides(mcore)
    if optimizer.no_weight_decay_cond is not None:
        overrides = {key("no_weight_decay_cond", optimizer.no_weight_decay_cond): {"wd_mult": 0.0}}
    if optimizer.lr_scale_cond is not None:
        overrides[key("lr_scale_cond", optimizer.lr_scale_cond)] = {"lr_mult": optimizer.lr_mult}
    built = get_megatron_optimizer(
        mcore, chunks, overrides, use_gloo_process_groups=False, pg_collection=pg.collection
    )
    for inner in inner_optimizers(built):
        if isinstance(inner, torch.optim.AdamW):
            inner.defaults["fused"] = True
            for group in inner.param_groups:
                group["fused"], group["foreach"] = True, False
    return built


def chained(optimizer: Any) -> list[Any]:
    """megatron-core's optimizers in one of its chains, or the one that is none."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def inner_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside megatron-core's, which chains and wraps them."""
    for part in chained(optimizer):
        if part.optimizer is not None:
            yield part.optimizer


def update(optimizer: Any, *, limit: float = math.inf) -> tuple[bool, float | None]:
    """megatron-core's own `ChainedOptimizer.step`, but for this: where the gradients' norm is NaN, infinite or above `limit`, nothing is updated.

    (whether there was an update, the norm before clipping; None where fp16's loss scale saw an overflow). The norm is that of the
    whole model, so the answer is the same on every rank.
    """
    if optimizer.prepare_grads():
        return False, None
    norm = float(optimizer.get_grad_norm())
    if not (math.isfinite(norm) and norm <= limit):
        return False, norm
    for part in chained(optimizer):
        if parameters := part.get_parameters():
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=part.config.clip_grad, total_norm=norm
            )
    return optimizer.step_with_ready_grads(), norm


def set_lr(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Give every parameter group its learning rate and weight decay for the next update."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = (
            lr * group.get("lr_mult", 1.0),
            weight_decay * group.get("wd_mult", 1.0),
        )

"""megatron-core's optimizer from a config."""
from __future__ import annotations

import math
from typing import Any, Iterator

import torch
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from megafn.pure.config import TrainConfig
from megafn.runtime.groups import ProcessGroups
from megafn.runtime.layers import DTYPES


def build_optimizer(config: TrainConfig, chunks: list[torch.nn.Module], pg: ProcessGroups) -> Any:
    """megatron-core's optimizer for model chunks wrapped in its DistributedDataParallel.

    Biases and other vectors are not decayed (as upstream). torch's Adam runs fused: one pass over memory.
    """
    optimizer, precision, dtype = config.optimizer, config.precision, DTYPES[config.precision.dtype]
    built = get_megatron_optimizer(
        McoreOptimizerConfig(
            optimizer=optimizer.name, lr=config.schedule.lr, min_lr=config.schedule.min_lr, weight_decay=config.schedule.weight_decay,
            adam_beta1=optimizer.beta1, adam_beta2=optimizer.beta2, adam_eps=optimizer.eps, sgd_momentum=optimizer.momentum,
            clip_grad=optimizer.clip_grad or math.inf,       # infinity clips nothing, and the norm is known
            use_distributed_optimizer=optimizer.use_distributed_optimizer,
            params_dtype=dtype, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16,
            initial_loss_scale=precision.initial_loss_scale, min_loss_scale=precision.min_loss_scale,
            loss_scale_window=precision.loss_scale_window, hysteresis=precision.hysteresis),
        chunks, use_gloo_process_groups=False, pg_collection=pg.collection)
    for inner in inner_optimizers(built):
        if isinstance(inner, torch.optim.AdamW):
            inner.defaults["fused"] = True
            for group in inner.param_groups:
                group["fused"], group["foreach"] = True, False
    return built


def inner_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside megatron-core's, which chains and wraps them."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            yield part.optimizer


def set_lr(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Give every parameter group its learning rate and weight decay for the next update."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, weight_decay * group.get("wd_mult", 1.0)

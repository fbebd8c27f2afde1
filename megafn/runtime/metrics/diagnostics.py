"""Everything that can be logged of an iteration: what accelerate's `set_all_logging_options` stands for."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megafn.pure.config.records import TrainConfig
from megafn.pure.families.built_in import sample_tokens
from megafn.pure.flops import training_flops
from megafn.runtime.model.optimizer import chained
from megafn.runtime.parallel.groups import ProcessGroups

# TFLOP/s of dense bf16 and fp16 products, by the names that CUDA gives its devices (the vendor's data sheets)
_PEAKS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "B200": 2250.0,
}


def peak_tflops(config: TrainConfig, device: torch.device) -> float | None:
    """Of one device: what the config says, else the device's by its name; None where that is not known."""
    if (
        config.log.peak_tflops is not None
        or device.type != "cuda"
        or config.precision.dtype == "fp32"
    ):
        return config.log.peak_tflops
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)


@torch.no_grad()
def parameter_norm(chunks: tuple[torch.nn.Module, ...], pg: ProcessGroups) -> float:
    """L2 norm of the whole model's parameters, each counted once; the same on every rank, which all call it."""
    total = torch.zeros((), dtype=torch.float64, device=pg.device)
    for chunk in chunks:
        for parameter in chunk.parameters():
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
                parameter, tp_group=pg.tp
            ):
                total += parameter.float().square().sum(dtype=torch.float64)
    dist.all_reduce(total, group=pg.mp)
    return total.sqrt().item()


@torch.no_grad()
def zeros_in_grad(optimizer: Any, pg: ProcessGroups) -> int:
    """How many elements of the whole model's gradient are 0, rows that pad the vocabulary included; read after the step.

    megatron-core's own count asks a global for the tensor-parallel group; this one counts the gradients of its norm.
    """
    total = 0
    for part in chained(optimizer):
        zeros = sum(
            gradient.numel() - gradient.count_nonzero()
            for gradient in part.get_main_grads_for_grad_norm()
        )
        count = torch.as_tensor(zeros, dtype=torch.int64, device=pg.device)
        dist.all_reduce(count, group=part.get_grad_stats_parallel_group())
        total += int(count)
    return total


def diagnostics(
    config: TrainConfig,
    pg: ProcessGroups,
    chunks: tuple[torch.nn.Module, ...],
    *,
    zeros: int | None,
    seconds: float,
    optimizer_seconds: float,
    iteration: int,
) -> Mapping[str, float | None]:
    """What `Metrics.details` holds under `log.everything`; what is not known is None.

    batch_size, params_norm, zeros_in_grad (None where the update was skipped), tokens_per_second_per_device,
    tflops_per_device, mfu (that over the peak), memory_gib (peak of this process: the GPU's, or resident),
    forward_backward_seconds, optimizer_seconds, seconds_left.
    """
    flops, peak = (
        training_flops(config.model, config.global_batch_size),
        peak_tflops(config, pg.device),
    )
    tflops = flops / seconds / pg.world_size / 1e12 if flops else None
    if pg.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(pg.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    return {
        "batch_size": config.global_batch_size,
        "params_norm": parameter_norm(chunks, pg),
        "zeros_in_grad": zeros,
        "tokens_per_second_per_device": config.global_batch_size
        * sample_tokens(config.model)
        / seconds
        / pg.world_size,
        "tflops_per_device": tflops,
        "mfu": tflops / peak if tflops and peak else None,
        "memory_gib": memory / 2**30,
        "forward_backward_seconds": seconds - optimizer_seconds,
        "optimizer_seconds": optimizer_seconds,
        "seconds_left": seconds * (config.iterations - iteration),
    }

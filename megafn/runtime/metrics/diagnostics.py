"""What `Metrics.details` holds under log.everything (accelerate's `set_all_logging_options`)."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megafn.pure.config.records import TrainConfig
from megafn.pure.families.built_in import sample_tokens
from megafn.pure.flops import training_flops
from megafn.runtime.model.optimizer import chained
from megafn.runtime.parallel.groups import ProcessGroups

# TFLOP/s of dense bf16 and fp16 products, by part of the name that CUDA gives the device (vendor's
# data sheets). The first match counts.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "B200": 2250.0,
}


def peak_tflops(config: TrainConfig, device: torch.device) -> float | None:
    """Peak of one device: the config's, else the table's for its name, else None."""
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops
    if device.type != "cuda" or config.precision.dtype == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


@torch.no_grad()
def model_sums(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, pg: ProcessGroups
) -> torch.Tensor:
    """[squared norm of the parameters, zeros in the gradient] of the whole model, float64, on every
    rank; every rank calls it, after the update. Each parameter counts once.

    Zeros include those in rows that pad the vocabulary. megatron-core's own count asks a global for
    the tensor-parallel group; this one looks at the gradients of which the norm is taken.
    """
    shares = torch.stack([_squared_parameters(chunks, pg), _zeros(optimizer, pg)])
    dist.all_reduce(shares, group=pg.world)
    return shares


def _squared_parameters(chunks: Sequence[torch.nn.Module], pg: ProcessGroups) -> torch.Tensor:
    """This rank's share of the squared norm; data and context parallel ranks hold the same."""
    total = torch.zeros((), dtype=torch.float64, device=pg.device)
    for chunk in chunks:
        for parameter in chunk.parameters():
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
                parameter, tp_group=pg.tp
            ):
                total += parameter.float().square().sum(dtype=torch.float64)
    return total / pg.dp_cp.size()


def _zeros(optimizer: MegatronOptimizer, pg: ProcessGroups) -> torch.Tensor:
    """This rank's share of the zeros; ranks of other gradient statistics groups hold the same."""
    total = torch.zeros((), dtype=torch.float64, device=pg.device)
    for part in chained(optimizer):
        replicas = pg.world_size / part.get_grad_stats_parallel_group().size()
        for gradient in part.get_main_grads_for_grad_norm():
            total += (gradient.numel() - gradient.count_nonzero()) / replicas
    return total


def _peak_memory(device: torch.device) -> int:
    """Bytes: the GPU's peak, or this process's resident one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def diagnostics(
    config: TrainConfig,
    pg: ProcessGroups,
    *,
    params_norm: float | None,
    zeros_in_grad: int | None,
    seconds: float,
    optimizer_seconds: float,
    iteration: int,
) -> Mapping[str, float | None]:
    """What `Metrics.details` holds; None for what is not known.

    batch_size, params_norm, zeros_in_grad (None if the update was skipped),
    tokens_per_second_per_device, tflops_per_device, mfu (that over the peak), memory_gib (peak of
    this process: the GPU's, or resident), forward_backward_seconds, optimizer_seconds,
    seconds_left.
    """
    samples = config.global_batch_size
    tokens = samples * sample_tokens(config.model)
    flops = training_flops(config.model, samples)
    peak = peak_tflops(config, pg.device)
    tflops = flops / seconds / pg.world_size / 1e12 if flops else None
    return {
        "batch_size": samples,
        "params_norm": params_norm,
        "zeros_in_grad": zeros_in_grad,
        "tokens_per_second_per_device": tokens / seconds / pg.world_size,
        "tflops_per_device": tflops,
        "mfu": tflops / peak if tflops and peak else None,
        "memory_gib": _peak_memory(pg.device) / 2**30,
        "forward_backward_seconds": seconds - optimizer_seconds,
        "optimizer_seconds": optimizer_seconds,
        "seconds_left": seconds * (config.iterations - iteration),
    }

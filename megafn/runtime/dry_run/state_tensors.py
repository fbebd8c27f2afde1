"""The tensors of a `State` by what they hold, and the names of its modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megafn.runtime.dry_run.nested import tensors_in
from megafn.runtime.model.optimizer import inner_optimizers
from megafn.runtime.model.state import State


def state_tensors(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """(kind, tensor) of all parameters, gradients and tensors of the optimizer.

    The kind is a field of `Memory`. Views of one memory may come several times; what comes first
    says what the memory is. Parameters come before the fp32 weights of the optimizer, which in fp32
    are the parameters themselves.
    """
    parameters = [parameter for chunk in state.chunks for parameter in chunk.parameters()]
    for parameter in parameters:
        yield "parameters", parameter
    for buffer in _gradient_buffers(state.chunks):
        if buffer.param_data is not None:
            yield "parameters", buffer.param_data
        yield "gradients", buffer.grad_data
    weights = []
    for optimizer in inner_optimizers(state.optimizer):
        for group in optimizer.param_groups:
            weights += group["params"]
    for tensor in (*parameters, *weights):
        for gradient in (getattr(tensor, "main_grad", None), _gradient(tensor)):
            if gradient is not None:
                yield "gradients", gradient
    for weight in weights:
        yield "optimizer_state", weight
    for optimizer in inner_optimizers(state.optimizer):
        for tensor in tensors_in(optimizer.state):
            yield "optimizer_state", tensor


def module_names(chunks: Sequence[torch.nn.Module]) -> dict[torch.nn.Module, str]:
    """The dotted name of each module in its chunk, the number of the chunk first if several."""
    names = {}
    for number, chunk in enumerate(chunks):
        # Without megatron-core's DistributedDataParallel around it.
        inner = getattr(chunk, "module", chunk)
        prefix = f"chunks.{number}" if len(chunks) > 1 else ""
        for name, module in inner.named_modules():
            names[module] = ".".join(part for part in (prefix, name) if part)
    return names


def _gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    # The distributed optimizer's shards are views; torch warns that they may have none.
    with warnings.catch_warnings(action="ignore"):
        return tensor.grad


def _gradient_buffers(chunks: Sequence[torch.nn.Module]) -> Iterator[Any]:
    for chunk in chunks:
        yield from getattr(chunk, "buffers", ()) if isinstance(chunk.buffers, list) else ()
        yield from getattr(chunk, "expert_parallel_buffers", ())

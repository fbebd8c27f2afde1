"""Gradients before and after the backward pass: zeroed; then summed over ranks, and divided."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megafn.runtime.model import tied_embeddings
from megafn.runtime.model.state import State


def zero_gradients(state: State) -> None:
    """Zero the gradient buffers of the chunks and the gradients of the optimizer."""
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()


def finalize_grads(
    chunks: list[torch.nn.Module],
    num_tokens: torch.Tensor,
    *,
    pg_collection: ProcessGroupCollection,
    force_all_reduce: bool = False,
) -> None:
    """Sum gradients over the ranks that hold copies, and divide them by the global token count.

    megatron-core's schedule calls it after the last backward pass. Its own `finalize_model_grads`
    divides too, but reads the count back for each chunk (`if num_tokens > 0`), which waits for the
    device; here the count stays a tensor. num_tokens: this rank's, set on the last stage only.
    """
    tied_embeddings.finalize_grads(
        chunks, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce
    )
    pipeline = pg_collection.pp
    if pipeline.size() > 1:
        last_stage = dist.get_process_group_ranks(pipeline)[-1]
        dist.broadcast(num_tokens, src=last_stage, group=pipeline)
    dist.all_reduce(num_tokens, group=pg_collection.dp_cp)
    scale = 1.0 / num_tokens.clamp(min=1)  # no token at all: `train_step` raises before the update
    for chunk in chunks:
        chunk.scale_gradients(scale)

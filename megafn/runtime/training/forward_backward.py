"""Forward and backward passes of a global batch over the pipeline, by megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config

from megafn.pure.config.records import TrainConfig
from megafn.runtime.families.step import Batch, Step, cut_sequence, tokens_of
from megafn.runtime.model.losses import Loss
from megafn.runtime.parallel.groups import ProcessGroups


def _shape(batch: Batch) -> tuple[int, int]:
    """(batch, sequence) of what stages send each other: an encoder-decoder's two sequences lie one behind the other."""
    rows, sequence = tokens_of(batch).shape[:2]
    return rows, sequence + (batch["decoder_tokens"].size(1) if "decoder_tokens" in batch else 0)


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[Batch],
    forward: Callable,
    loss_func: Callable,
    pg: ProcessGroups,
    *,
    forward_only: bool,
    collect: bool = False,
) -> list[Any]:
    """megatron-core's schedule for this layout over micro-batches already cut; what loss_func gave, on the last stage.

    loss_func(micro_batch, output) is called on the last stage: -> (loss sum, token count, anything), or, with
    `collect`, anything.
    """
    shapes = {_shape(batch) for batch in micro_batches}
    for chunk in chunks:
        get_model_config(chunk).variable_seq_lengths = (
            len(shapes) > 1
        )  # then stages tell each other the shapes
    micro_batch_size, sequence = max(shapes)
    several, pipelined = len(chunks) > 1, pg.pp.size() > 1
    communicator = (
        {"p2p_communicator": P2PCommunicator(pp_group=pg.pp, config=get_model_config(chunks[0]))}
        if pipelined
        else {}
    )

    def forward_step(iterator, model):
        micro_batch = next(iterator)
        return forward(model, micro_batch), partial(loss_func, micro_batch)

    return get_forward_backward_func(
        pp_size=pg.pp.size(), vp_size=len(chunks) if several else None
    )(
        forward_step_func=forward_step,
        model=list(chunks) if several else chunks[0],
        data_iterator=[iter(micro_batches) for _ in chunks] if several else iter(micro_batches),
        num_microbatches=len(micro_batches),
        seq_length=sequence * pg.cp.size(),
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=collect,
        pg_collection=pg.collection,
        **communicator,
    )


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    batch: Iterable[Any],
    step: Step,
    config: TrainConfig,
    pg: ProcessGroups,
    *,
    forward_only: bool,
    on_logits: Callable[[Any], Any] | None = None,
) -> dict[str, float]:
    """One global batch: sums of loss, count and the step's report over micro-batches, data and context parallel, on every rank.

    batch: this rank's raw micro-batches. Unless forward_only, gradients are left in the chunks' buffers, divided by
    the global count. on_logits: called on the last stage with what it put out for each micro-batch, a tensor or a tuple
    of them. Raises ValueError where the batch is empty or a sum is not what it should be.
    """
    micro_batches: Sequence[Batch] = [step.batch(raw, config, pg) for raw in batch]
    if not micro_batches:
        raise ValueError("batch = (): a global batch holds at least one micro-batch for each rank.")
    for rows in (tokens_of(micro_batch).size(0) for micro_batch in micro_batches):
        if rows != config.micro_batch_size:  # consumed_samples counts on it
            raise ValueError(
                f"batch: a micro-batch of {rows} rows, where micro_batch_size = {config.micro_batch_size}; "
                "give as many rows in each (a DataLoader: batch_size and drop_last=True)."
            )
    if step.prepare_global_batch is not None:
        micro_batches = step.prepare_global_batch(micro_batches, pg)
    micro_batches = [cut_sequence(micro_batch, pg) for micro_batch in micro_batches]

    def loss_func(micro_batch, output):
        if on_logits is not None:
            on_logits(
                tuple(one.detach() for one in output)
                if isinstance(output, tuple)
                else output.detach()
            )
        loss = step.loss(output, micro_batch, pg)
        if not isinstance(loss, Loss):
            raise TypeError(
                f"step.loss returned {type(loss).__name__}: return megafn.Loss(sum=..., count=...)."
            )
        count = torch.as_tensor(loss.count, device=pg.device)
        sums = {
            "loss": loss.sum,
            "count": count,
            **{f"report/{key}": torch.as_tensor(value) for key, value in loss.report.items()},
        }
        return (
            loss.sum,
            count.to(torch.int),
            {key: value.detach().double() for key, value in sums.items()},
        )

    sums = run_schedule(
        chunks, micro_batches, step.forward, loss_func, pg, forward_only=forward_only
    )
    return _totals(sums, pg)


def _totals(sums: list[Mapping[str, torch.Tensor]], pg: ProcessGroups) -> dict[str, float]:
    keys, totals = (), []
    if pg.is_last_stage:
        keys = sorted(sums[0])
        total = torch.stack([torch.stack([one[key] for one in sums]).sum() for key in keys])
        dist.all_reduce(total, group=pg.dp_cp)
        totals = total.tolist()
    if pg.pp.size() > 1:  # earlier stages know neither names nor numbers
        message = [(keys, totals)]
        dist.broadcast_object_list(
            message, src=dist.get_process_group_ranks(pg.pp)[-1], group=pg.pp, device=pg.device
        )
        keys, totals = message[0]
    return dict(zip(keys, totals))

"""Forward and backward passes of a global batch over the pipeline, by megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from attrs import frozen
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config

from megafn.pure.config.records import TrainConfig
from megafn.runtime.families.step import Batch, Step, cut_sequence, tokens_of
from megafn.runtime.model.losses import Loss
from megafn.runtime.parallel.groups import ProcessGroups

# What a model's last chunk returns for one micro-batch: a tensor, or a tuple of tensors.
Output = torch.Tensor | tuple[torch.Tensor, ...]


@frozen(kw_only=True, eq=False)
class MicroBatchSums:
    """What the last stage knows of one micro-batch: `values` are the loss sum, the token count, and
    the step's reports in the order of `names`; float64 [2 + len(names)] on the device, detached."""

    names: tuple[str, ...]
    values: torch.Tensor


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[Batch],
    forward: Callable[[torch.nn.Module, Batch], Output],
    loss_func: Callable[..., Any],
    pg: ProcessGroups,
    *,
    forward_only: bool,
    collect: bool = False,
) -> list[Any]:
    """Run megatron-core's schedule for this layout over micro-batches that are already cut.

    Returns, on the last stage, the third value of loss_func for each micro-batch; elsewhere [].
    loss_func(micro_batch, output) -> (loss sum, token count, anything) is called on the last stage.
    With `collect`, loss_func(micro_batch, output, non_loss_data=True) -> anything.
    """
    _announce_shapes(chunks, micro_batches)
    rows, sequence = max(shape_between_stages(batch) for batch in micro_batches)
    interleaved = len(chunks) > 1
    schedule = get_forward_backward_func(
        pp_size=pg.pp.size(), vp_size=len(chunks) if interleaved else None
    )
    options = {}
    if pg.pp.size() > 1:
        options["p2p_communicator"] = P2PCommunicator(
            pp_group=pg.pp, config=get_model_config(chunks[0])
        )

    def forward_step(iterator, model):
        micro_batch = next(iterator)
        return forward(model, micro_batch), partial(loss_func, micro_batch)

    return schedule(
        forward_step_func=forward_step,
        model=list(chunks) if interleaved else chunks[0],
        data_iterator=(
            [iter(micro_batches) for _ in chunks] if interleaved else iter(micro_batches)
        ),
        num_microbatches=len(micro_batches),
        seq_length=sequence * pg.cp.size(),
        micro_batch_size=rows,
        forward_only=forward_only,
        collect_non_loss_data=collect,
        pg_collection=pg.collection,
        **options,
    )


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    batch: Iterable[Any],
    step: Step,
    config: TrainConfig,
    pg: ProcessGroups,
    *,
    forward_only: bool,
    on_logits: Callable[[Output], None] | None = None,
) -> list[MicroBatchSums]:
    """Run one global batch; the sums of each micro-batch on the last stage, [] on earlier ones.

    batch: this rank's raw micro-batches. Unless forward_only, gradients are left in the chunks'
    buffers, divided by the global token count. on_logits: called on the last stage with the output
    for each micro-batch. Raises ValueError if the batch is empty or a micro-batch has the wrong
    number of rows, TypeError if step.loss does not return a Loss.
    """
    micro_batches = _micro_batches(batch, step, config, pg)

    def loss_func(micro_batch, output):
        if on_logits is not None:
            on_logits(_detached(output))
        loss = step.loss(output, micro_batch, pg)
        if not isinstance(loss, Loss):
            raise TypeError(
                f"step.loss returned {type(loss).__name__}: return megafn.Loss(sum=..., count=...)."
            )
        count = torch.as_tensor(loss.count, device=pg.device)
        return loss.sum, count.to(torch.int), _sums(loss, count, pg)

    return run_schedule(
        chunks, micro_batches, step.forward, loss_func, pg, forward_only=forward_only
    )


def _micro_batches(
    batch: Iterable[Any], step: Step, config: TrainConfig, pg: ProcessGroups
) -> Sequence[Batch]:
    """A global batch's share made ready for the model: tensors on the device, cut over cp."""
    micro_batches: Sequence[Batch] = [step.batch(raw, config, pg) for raw in batch]
    if not micro_batches:
        raise ValueError("batch = (): a global batch holds at least one micro-batch for each rank.")
    for micro_batch in micro_batches:
        rows = tokens_of(micro_batch).size(0)
        if rows != config.micro_batch_size:  # consumed_samples counts on it
            raise ValueError(
                f"batch: a micro-batch of {rows} rows, where micro_batch_size = "
                f"{config.micro_batch_size}; give as many rows in each (a DataLoader: batch_size "
                "and drop_last=True)."
            )
    if step.prepare_global_batch is not None:
        micro_batches = step.prepare_global_batch(micro_batches, pg)
    return [cut_sequence(micro_batch, pg) for micro_batch in micro_batches]


def shape_between_stages(batch: Batch) -> tuple[int, int]:
    """[batch, sequence] of what stages send each other.

    An encoder-decoder's two sequences follow one another.
    """
    rows, sequence = tokens_of(batch).shape[:2]
    if "decoder_tokens" in batch:
        sequence += batch["decoder_tokens"].size(1)
    return rows, sequence


def _announce_shapes(chunks: Sequence[torch.nn.Module], micro_batches: Sequence[Batch]) -> None:
    """Have stages send each other the shapes first if micro-batches differ in shape."""
    shapes = {shape_between_stages(batch) for batch in micro_batches}
    for chunk in chunks:
        get_model_config(chunk).variable_seq_lengths = len(shapes) > 1


def _detached(output: Output) -> Output:
    if isinstance(output, tuple):
        return tuple(tensor.detach() for tensor in output)
    return output.detach()


def _sums(loss: Loss, count: torch.Tensor, pg: ProcessGroups) -> MicroBatchSums:
    """A copy of the loss's numbers: the schedule changes the loss in place afterwards."""
    names = tuple(sorted(loss.report))
    values = [loss.sum.detach(), count, *(loss.report[name] for name in names)]
    on_device = [value.to(device=pg.device, dtype=torch.float64) for value in values]
    return MicroBatchSums(names=names, values=torch.stack(on_device))

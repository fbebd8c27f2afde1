"""What is done with a micro-batch: batch, forward and loss, plain functions in a frozen record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen

from megafn.pure.config.records import TrainConfig
from megafn.runtime.model.losses import Loss
from megafn.runtime.parallel.context import cp_positions
from megafn.runtime.parallel.groups import ProcessGroups

Batch = Mapping[str, torch.Tensor]


@frozen(kw_only=True)
class Step:
    """The functions of a step; exchange one with `attrs.evolve`, or write batch, forward and loss.

    batch(raw, config, pg) -> dict of tensors: reads one micro-batch, as the user's data gives it,
        into tensors [batch, sequence] of whole sequences (context parallelism cuts them later). An
        encoder-decoder's second sequence is called "decoder_tokens": pipeline stages send both.
    forward(model, batch) -> logits [sequence / cp, batch, vocabulary / tp] on the last pipeline
        stage, or whatever the loss reads, a tuple too; what an earlier stage returns is sent to the
        next one by the schedule.
    loss(logits, batch, pg) -> Loss(sum, count, report): sums over this process's share of the
        micro-batch.
    prepare_global_batch(micro_batches, pg) -> micro-batches: optional, for a loss that needs sums
        over the whole global batch. Called once for each global batch, with all that this rank has
        of it, before anything else; puts tensors into the micro-batches.
    """

    batch: Callable[[Any, TrainConfig, ProcessGroups], Batch]
    forward: Callable[[torch.nn.Module, Batch], Any]
    loss: Callable[[Any, Batch, ProcessGroups], Loss]
    prepare_global_batch: Callable[[Sequence[Batch], ProcessGroups], Sequence[Batch]] | None = None


def tokens_of(batch: Batch) -> torch.Tensor:
    """The tensor [batch, sequence] that gives the micro-batch's shape.

    "tokens", or else the first one with two dimensions. Raises ValueError if there is none.
    """
    tokens = batch.get("tokens")
    if tokens is not None:
        return tokens
    for value in batch.values():
        if value.dim() == 2:
            return value
    raise ValueError(
        f"step.batch returned {sorted(batch)}: expected a tensor [batch, sequence] among them."
    )


def cut_sequence(batch: Batch, pg: ProcessGroups) -> Batch:
    """A micro-batch cut over context parallel: this rank's part of each [batch, sequence, ...].

    A mask [batch, 1, queries, keys] is cut by its queries. Raises ValueError unless 2 * cp divides
    the sequence.
    """
    cp = pg.cp.size()
    if cp == 1:
        return batch
    sequence = tokens_of(batch).size(1)
    positions = cp_positions(sequence, cp, pg.place.cp, pg.device)
    return {key: _cut(value, sequence, positions) for key, value in batch.items()}


def _cut(value: torch.Tensor, sequence: int, positions: torch.Tensor) -> torch.Tensor:
    axis = 2 if value.dim() == 4 else 1
    if value.dim() < 2 or value.size(axis) != sequence:
        return value
    return value.index_select(axis, positions)

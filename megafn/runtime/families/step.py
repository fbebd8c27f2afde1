"""What one family does with a micro-batch: batch, forward and loss, plain functions in a frozen record; and GPT's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import lcm
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
    """A family's functions; exchange one with `attrs.evolve`, or write batch, forward and loss.

    batch(raw, config, pg) -> dict of tensors: one micro-batch as the user's data gives it, made into
        tensors [batch, sequence] of the whole sequence (context parallelism cuts them afterwards).
        An encoder-decoder's second sequence is called "decoder_tokens": pipeline stages send each other both.
    forward(model, batch) -> logits [sequence / cp, batch, vocabulary / tp] on the last pipeline stage, or whatever the loss
        reads, a tuple too; what a stage before it returns is handed on by the schedule.
    loss(logits, batch, pg) -> Loss(sum, count, report): sums over this process's share of the micro-batch.
    prepare_global_batch(micro_batches, pg) -> micro-batches: optional, for a loss that must know sums over the whole global batch. Called
        once for each, with all that this rank has of it, before anything else; puts tensors into the micro-batches.
    """

    batch: Callable[[Any, TrainConfig, ProcessGroups], Batch]
    forward: Callable[[torch.nn.Module, Batch], Any]
    loss: Callable[[Any, Batch, ProcessGroups], Loss]
    prepare_global_batch: Callable[[Sequence[Batch], ProcessGroups], Sequence[Batch]] | None = None


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def as_tensor(raw: Mapping[str, Any], key: str, wanted: str) -> torch.Tensor:
    try:
        return torch.as_tensor(raw[key])
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, texts, None
        raise ValueError(f"batch[{key!r}] is no tensor ({error}): {wanted} are wanted.") from None


def integers(raw: Mapping[str, Any], key: str, shape: torch.Size | None = None) -> torch.Tensor:
    """raw[key] as int64 [batch, sequence]; of `shape`, where that is given."""
    wanted = f"integers {'[batch, sequence], neither of them 0,' if shape is None else f'of shape {list(shape)}, that of the tokens,'}"
    value = as_tensor(raw, key, wanted)
    if (
        value.dim() != 2
        or value.dtype not in _INTEGERS
        or not value.numel()
        or shape not in (None, value.shape)
    ):
        raise ValueError(
            f"batch[{key!r}] = {value.dtype} of shape {list(value.shape)}: {wanted} are wanted."
        )
    return value.long()


def zeros_and_ones(raw: Mapping[str, Any], key: str, shape: torch.Size) -> torch.Tensor:
    wanted = f"zeros and ones of shape {list(shape)}, that of the tokens,"
    value = as_tensor(raw, key, wanted)
    if value.shape != shape:
        raise ValueError(f"batch[{key!r}] of shape {list(value.shape)}: {wanted} are wanted.")
    if value.device.type == "cpu" and (bad := value[(value != 0) & (value != 1)]).numel():
        raise ValueError(
            f"batch[{key!r}] holds {bad[0].item()}: {wanted} are wanted; weights belong in a loss of your own."
        )
    return value


def check_ids(name: str, ids: torch.Tensor, vocab_size: int) -> None:
    """Raises ValueError where a token id lies outside the vocabulary. Ids on a GPU are not looked at: that would wait for it."""
    if ids.device.type == "cpu" and ids.numel():
        low, high = ids.aminmax()
        if low < 0 or high >= vocab_size:
            bad = int(low) if low < 0 else int(high)
            raise ValueError(
                f"{name}: token id {bad} is outside the vocabulary; model.vocab_size = {vocab_size}: raise it, or tokenise with the model's tokenizer."
            )


def causal_and_padding_mask(attention_mask: torch.Tensor) -> torch.Tensor | None:
    """From a Hugging Face mask [batch, sequence], 1 = real, to a mask [batch, 1, sequence, sequence], True = hidden.

    Causal and padding together; a padding position sees itself, so that no row is empty. None where nothing is padded.
    """
    real = attention_mask.bool()
    if real.all():
        return None
    sequence = real.size(1)
    seen = (
        real[:, None, None, :]
        & torch.ones(sequence, sequence, dtype=torch.bool, device=real.device).tril()
    )
    return ~(seen | torch.eye(sequence, dtype=torch.bool, device=real.device))


def check_length(length: int, position_ids: torch.Tensor | None, config: TrainConfig) -> None:
    """On every rank alike: were it seen on one pipeline stage alone, the others would wait for it."""
    model, parallel = config.model, config.parallel
    unit = lcm(
        2 * parallel.cp if parallel.cp > 1 else 1,
        parallel.tp * parallel.cp if parallel.sequence_parallel else 1,
    )
    if length % unit:
        raise ValueError(
            f"batch: sequences of {length} tokens, which cp = {parallel.cp} and tp = {parallel.tp} cut; pad them to a multiple of {unit}."
        )
    if model.position_embedding == "learned_absolute":
        if length > model.position_rows:
            raise ValueError(
                f"batch: sequences of {length} tokens, and the position table has {model.position_rows} rows; "
                "raise model.max_position_embeddings or shorten them."
            )
        if (
            position_ids is not None
            and position_ids.device.type == "cpu"
            and not 0 <= position_ids.min() <= position_ids.max() < model.position_rows
        ):
            raise ValueError(
                f"batch['position_ids'] from {position_ids.min()} to {position_ids.max()}: the position table has "
                f"{model.position_rows} rows; give 0 to {model.position_rows - 1}, or raise model.max_position_embeddings."
            )


def tokens_of(batch: Batch) -> torch.Tensor:
    """The tensor [batch, sequence] whose shape is the micro-batch's."""
    found = batch.get("tokens")
    if found is None:
        found = next((value for value in batch.values() if value.dim() == 2), None)
    if found is None:
        raise ValueError(
            f"step.batch returned {sorted(batch)}: a tensor [batch, sequence] is wanted among them."
        )
    return found


def cut_sequence(batch: Batch, pg: ProcessGroups) -> Batch:
    """A micro-batch cut over context parallel: of each tensor [batch, sequence, ...] this rank's part of the sequence.

    A mask [batch, 1, queries, keys] is cut by its queries. Raises ValueError where 2 cp does not divide the sequence.
    """
    if pg.cp.size() == 1:
        return batch
    sequence = tokens_of(batch).size(1)
    mine = cp_positions(sequence, pg.cp.size(), pg.place.cp, pg.device)

    def cut(value):
        axis = 2 if value.dim() == 4 else 1
        return (
            value.index_select(axis, mine)
            if value.dim() > 1 and value.size(axis) == sequence
            else value
        )

    return {key: cut(value) for key, value in batch.items()}

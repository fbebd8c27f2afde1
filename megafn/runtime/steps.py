"""What one family does with a micro-batch: batch, forward and loss, plain functions in a frozen record; and GPT's."""
from __future__ import annotations

from math import lcm
from typing import Any, Callable, Mapping, Sequence

import torch
from attrs import frozen

from megafn.pure.config import TrainConfig
from megafn.runtime.groups import ProcessGroups
from megafn.runtime.losses import Loss

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
    whole(micro_batches, pg) -> micro-batches: optional, for a loss that must know sums over the whole global batch. Called
        once for each, with all that this rank has of it, before anything else; puts tensors into the micro-batches.
    """

    batch: Callable[[Any, TrainConfig, ProcessGroups], Batch]
    forward: Callable[[torch.nn.Module, Batch], Any]
    loss: Callable[[Any, Batch, ProcessGroups], Loss]
    whole: Callable[[Sequence[Batch], ProcessGroups], Sequence[Batch]] | None = None


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _tensor(raw: Mapping[str, Any], key: str, wanted: str) -> torch.Tensor:
    try:
        return torch.as_tensor(raw[key])
    except (TypeError, ValueError, RuntimeError) as error:          # ragged lists, texts, None
        raise ValueError(f"batch[{key!r}] is no tensor ({error}): {wanted} are wanted.") from None


def _integers(raw: Mapping[str, Any], key: str, shape: torch.Size | None = None) -> torch.Tensor:
    """raw[key] as int64 [batch, sequence]; of `shape`, where that is given."""
    wanted = f"integers {'[batch, sequence], neither of them 0,' if shape is None else f'of shape {list(shape)}, that of the tokens,'}"
    value = _tensor(raw, key, wanted)
    if value.dim() != 2 or value.dtype not in _INTEGERS or not value.numel() or shape not in (None, value.shape):
        raise ValueError(f"batch[{key!r}] = {value.dtype} of shape {list(value.shape)}: {wanted} are wanted.")
    return value.long()


def _zeros_and_ones(raw: Mapping[str, Any], key: str, shape: torch.Size) -> torch.Tensor:
    wanted = f"zeros and ones of shape {list(shape)}, that of the tokens,"
    value = _tensor(raw, key, wanted)
    if value.shape != shape:
        raise ValueError(f"batch[{key!r}] of shape {list(value.shape)}: {wanted} are wanted.")
    if value.device.type == "cpu" and (bad := value[(value != 0) & (value != 1)]).numel():
        raise ValueError(f"batch[{key!r}] holds {bad[0].item()}: {wanted} are wanted; weights belong in a loss of your own.")
    return value


def check_ids(name: str, ids: torch.Tensor, vocab_size: int) -> None:
    """Raises ValueError where a token id lies outside the vocabulary. Ids on a GPU are not looked at: that would wait for it."""
    if ids.device.type == "cpu" and ids.numel():
        low, high = ids.aminmax()
        if low < 0 or high >= vocab_size:
            bad = int(low) if low < 0 else int(high)
            raise ValueError(f"{name}: token id {bad} is outside the vocabulary; model.vocab_size = {vocab_size}: raise it, or tokenise with the model's tokenizer.")


def hide(attention_mask: torch.Tensor) -> torch.Tensor | None:
    """From a Hugging Face mask [batch, sequence], 1 = real, to a mask [batch, 1, sequence, sequence], True = hidden.

    Causal and padding together; a padding position sees itself, so that no row is empty. None where nothing is padded.
    """
    real = attention_mask.bool()
    if real.all():
        return None
    sequence = real.size(1)
    seen = real[:, None, None, :] & torch.ones(sequence, sequence, dtype=torch.bool, device=real.device).tril()
    return ~(seen | torch.eye(sequence, dtype=torch.bool, device=real.device))


def _hidden(raw: Mapping[str, Any], shape: torch.Size) -> torch.Tensor:
    """raw["attention_mask"], bool [batch or 1, 1, sequence or 1, sequence], True = hidden."""
    (batch, sequence), wanted = shape, "bools [batch or 1, 1, sequence or 1, sequence], True = hidden,"
    mask = _tensor(raw, "attention_mask", wanted)
    fits = mask.dim() == 4 and mask.dtype == torch.bool and mask.size(0) in (1, batch) and mask.size(1) == 1
    if not (fits and mask.size(2) in (1, sequence) and mask.size(3) == sequence):
        raise ValueError(f"batch['attention_mask'] = {mask.dtype} of shape {list(mask.shape)}: {wanted} are wanted beside tokens of shape "
                         f"{list(shape)}; for a mask [batch, sequence] of 1 = real, name the tokens 'input_ids'.")
    return mask


def _check_length(length: int, position_ids: torch.Tensor | None, config: TrainConfig) -> None:
    """On every rank alike: were it seen on one pipeline stage alone, the others would wait for it."""
    model, parallel = config.model, config.parallel
    unit = lcm(2 * parallel.cp if parallel.cp > 1 else 1, parallel.tp * parallel.cp if parallel.sequence_parallel else 1)
    if length % unit:
        raise ValueError(f"batch: sequences of {length} tokens, which cp = {parallel.cp} and tp = {parallel.tp} cut; pad them to a multiple of {unit}.")
    if model.position_embedding == "learned_absolute":
        if length > model.position_rows:
            raise ValueError(f"batch: sequences of {length} tokens, and the position table has {model.position_rows} rows; "
                             "raise model.max_position_embeddings or shorten them.")
        if position_ids is not None and position_ids.device.type == "cpu" and not 0 <= position_ids.min() <= position_ids.max() < model.position_rows:
            raise ValueError(f"batch['position_ids'] from {position_ids.min()} to {position_ids.max()}: the position table has "
                             f"{model.position_rows} rows; give 0 to {model.position_rows - 1}, or raise model.max_position_embeddings.")


def gpt_batch(raw: Mapping[str, Any], config: TrainConfig, pg: ProcessGroups) -> Batch:
    """A micro-batch of next-token prediction from one of three kinds of raw batch.

    - tokens, labels, loss_mask, position_ids [b, s] (attention_mask bool [b, 1, s, s], True = hidden): as megatron-core's dataset gives them.
    - input_ids [b, s], with attention_mask [b, s] (1 = real), labels [b, s] (-100: no loss; not shifted) and position_ids
      where given: as a Hugging Face collator gives them. The last position has no label, nor has padding.
    - text [b, s + 1]: inputs are all but the last token, labels all but the first.
    Raises ValueError on other keys, shapes and dtypes, on ids outside the vocabulary and positions outside a learned table.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"batch = {type(raw).__name__}: a mapping with 'tokens' and 'labels', 'input_ids', or 'text' is wanted.")
    if "tokens" in raw and "labels" in raw:
        tokens = _integers(raw, "tokens")
        batch = {"tokens": tokens, "labels": _integers(raw, "labels", tokens.shape)}
        batch["loss_mask"] = (batch["labels"] != -100).long()
        if raw.get("loss_mask") is not None:
            batch["loss_mask"] = _zeros_and_ones(raw, "loss_mask", tokens.shape) * batch["loss_mask"]
        if raw.get("attention_mask") is not None:
            batch["attention_mask"] = _hidden(raw, tokens.shape)
    elif "text" in raw:
        text = _integers(raw, "text")
        if raw.get("attention_mask") is not None:
            raise ValueError("batch['attention_mask'] beside 'text': it goes with 'input_ids', or with 'tokens' and 'labels'; leave it out or rename the tokens.")
        if text.size(1) < 2:
            raise ValueError(f"batch['text'] of shape {list(text.shape)}: at least two tokens of each sequence are wanted, [batch, sequence + 1].")
        batch = {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}
        batch["loss_mask"] = torch.ones_like(batch["labels"])
    elif "input_ids" in raw:
        tokens = _integers(raw, "input_ids")
        real = _zeros_and_ones(raw, "attention_mask", tokens.shape) if raw.get("attention_mask") is not None else torch.ones_like(tokens)
        labels = _integers(raw, "labels", tokens.shape) if raw.get("labels") is not None else tokens.masked_fill(real == 0, -100)
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)     # the label of a position is the next token
        labels = labels.masked_fill(real == 0, -100)                                         # and padding predicts nothing
        batch = {"tokens": tokens, "labels": labels, "loss_mask": (labels != -100).long()}
        mask = hide(real)
        if mask is not None:
            batch["attention_mask"] = mask
    else:
        raise ValueError(f"batch keys = {sorted(map(str, raw))}: 'tokens' and 'labels', 'input_ids', or 'text' is wanted.")
    tokens, model = batch["tokens"], config.model
    if raw.get("position_ids") is not None:
        position_ids = _integers(raw, "position_ids", tokens.shape)
        if position_ids.device.type != "cpu" or (position_ids != torch.arange(tokens.size(1))).any():      # else they go without saying
            batch["position_ids"] = position_ids
    check_ids("batch['tokens']", tokens, model.vocab_size)
    check_ids("batch['labels']", batch["labels"].masked_fill(batch["labels"] == -100, 0), model.vocab_size)
    _check_length(tokens.size(1), batch.get("position_ids"), config)
    return {key: value.to(pg.device, non_blocking=True) for key, value in batch.items()}


def gpt_forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [sequence / cp, batch, vocabulary / tp] on the last stage."""
    return model(batch["tokens"], batch.get("position_ids"), batch.get("attention_mask"))

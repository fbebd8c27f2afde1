"""What one family does with a micro-batch: batch, forward and loss, three plain functions in a frozen record."""
from __future__ import annotations

from typing import Any, Callable, Mapping

import torch
from attrs import frozen

from megafn.pure.config import ConfigError, TrainConfig
from megafn.runtime.groups import ProcessGroups
from megafn.runtime.losses import Loss, token_loss

Batch = Mapping[str, torch.Tensor]


@frozen(kw_only=True)
class Step:
    """A family's three functions; exchange one with `attrs.evolve`, or write all three.

    batch(raw, config, pg) -> dict of tensors: one micro-batch as the user's data gives it, made into
        tensors [batch, sequence] of the whole sequence (context parallelism cuts them afterwards).
    forward(model, batch) -> logits [sequence / cp, batch, vocabulary / tp] on the last pipeline stage; what a stage
        before it returns is handed on by the schedule.
    loss(logits, batch, pg) -> Loss(sum, count, report): sums over this process's share of the micro-batch.
    """

    batch: Callable[[Any, TrainConfig, ProcessGroups], Batch]
    forward: Callable[[torch.nn.Module, Batch], torch.Tensor]
    loss: Callable[[torch.Tensor, Batch, ProcessGroups], Loss]


def _integers(raw: Mapping[str, Any], key: str) -> torch.Tensor:
    value = torch.as_tensor(raw[key])
    if value.dim() != 2 or value.is_floating_point():
        raise ValueError(f"batch[{key!r}] = {value.dtype} of shape {list(value.shape)}: integers [batch, sequence] are wanted.")
    return value.long()


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


def gpt_batch(raw: Mapping[str, Any], config: TrainConfig, pg: ProcessGroups) -> Batch:
    """A micro-batch of next-token prediction from one of three kinds of raw batch.

    - tokens, labels, loss_mask, position_ids [b, s] (attention_mask bool [b, 1, s, s], True = hidden): as megatron-core's dataset gives them.
    - input_ids [b, s], with attention_mask [b, s] (1 = real), labels [b, s] (-100: no loss; not shifted) and position_ids
      where given: as a Hugging Face collator gives them. The last position has no label.
    - text [b, s + 1]: inputs are all but the last token, labels all but the first.
    Raises ValueError on other keys, other shapes and ids outside the vocabulary.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"batch = {type(raw).__name__}: a mapping with 'tokens' and 'labels', 'input_ids', or 'text' is wanted.")
    if "tokens" in raw and "labels" in raw:
        batch = {"tokens": _integers(raw, "tokens"), "labels": _integers(raw, "labels")}
        mask = raw["loss_mask"] if "loss_mask" in raw else batch["labels"] != -100
        batch["loss_mask"] = torch.as_tensor(mask) * (batch["labels"] != -100)
        batch |= {key: raw[key] for key in ("position_ids", "attention_mask") if raw.get(key) is not None}
    elif "text" in raw:
        text = _integers(raw, "text")
        batch = {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}
        batch["loss_mask"] = torch.ones_like(batch["labels"])
    elif "input_ids" in raw:
        tokens = _integers(raw, "input_ids")
        real = torch.as_tensor(raw["attention_mask"]) if raw.get("attention_mask") is not None else torch.ones_like(tokens)
        if real.shape != tokens.shape:
            raise ValueError(f"batch['attention_mask'] of shape {list(real.shape)}: that of input_ids, {list(tokens.shape)}, is wanted.")
        labels = _integers(raw, "labels") if raw.get("labels") is not None else tokens.masked_fill(real == 0, -100)
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)     # the label of a position is the next token
        batch = {"tokens": tokens, "labels": labels, "loss_mask": (labels != -100).long()}
        if raw.get("position_ids") is not None:
            batch["position_ids"] = _integers(raw, "position_ids")
        mask = hide(real)
        if mask is not None:
            batch["attention_mask"] = mask
    else:
        raise ValueError(f"batch keys = {sorted(map(str, raw))}: 'tokens' and 'labels', 'input_ids', or 'text' is wanted.")
    check_ids("batch['tokens']", batch["tokens"], config.model.vocab_size)
    check_ids("batch['labels']", batch["labels"].clamp(min=0), config.model.vocab_size)
    return {key: value.to(pg.device, non_blocking=True) for key, value in batch.items()}


def gpt_forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [sequence / cp, batch, vocabulary / tp] on the last stage."""
    return model(batch["tokens"], batch.get("position_ids"), batch.get("attention_mask"))


_STEPS = {"gpt": Step(batch=gpt_batch, forward=gpt_forward, loss=token_loss)}


def step_fn(family: str) -> Step:
    """The built-in functions of a family. Raises ConfigError for a family that is not there.

    >>> step_fn("gpt").loss.__name__
    'token_loss'
    """
    if family not in _STEPS:
        raise ConfigError(f"model.family = {family!r}: choose one of {', '.join(map(repr, _STEPS))}, or pass a Step of your own.")
    return _STEPS[family]

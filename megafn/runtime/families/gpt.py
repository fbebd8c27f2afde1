"""GPT: next-token prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megafn.pure.config.records import TrainConfig
from megafn.runtime.families.step import (
    Batch,
    as_tensor,
    causal_and_padding_mask,
    check_ids,
    check_length,
    integers,
    zeros_and_ones,
)
from megafn.runtime.parallel.groups import ProcessGroups


def _hidden(raw: Mapping[str, Any], shape: torch.Size) -> torch.Tensor:
    """raw["attention_mask"], bool [batch or 1, 1, sequence or 1, sequence], True = hidden."""
    (batch, sequence), wanted = (
        shape,
        "bools [batch or 1, 1, sequence or 1, sequence], True = hidden,",
    )
    mask = as_tensor(raw, "attention_mask", wanted)
    fits = (
        mask.dim() == 4
        and mask.dtype == torch.bool
        and mask.size(0) in (1, batch)
        and mask.size(1) == 1
    )
    if not (fits and mask.size(2) in (1, sequence) and mask.size(3) == sequence):
        raise ValueError(
            f"batch['attention_mask'] = {mask.dtype} of shape {list(mask.shape)}: {wanted} are wanted beside tokens of shape "
            f"{list(shape)}; for a mask [batch, sequence] of 1 = real, name the tokens 'input_ids'."
        )
    return mask


def gpt_batch(raw: Mapping[str, Any], config: TrainConfig, pg: ProcessGroups) -> Batch:
    """A micro-batch of next-token prediction from one of three kinds of raw batch.

    - tokens, labels, loss_mask, position_ids [b, s] (attention_mask bool [b, 1, s, s], True = hidden): as megatron-core's dataset gives them.
    - input_ids [b, s], with attention_mask [b, s] (1 = real), labels [b, s] (-100: no loss; not shifted) and position_ids
      where given: as a Hugging Face collator gives them. The last position has no label, nor has padding.
    - text [b, s + 1]: inputs are all but the last token, labels all but the first.
    Raises ValueError on other keys, shapes and dtypes, on ids outside the vocabulary and positions outside a learned table.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"batch = {type(raw).__name__}: a mapping with 'tokens' and 'labels', 'input_ids', or 'text' is wanted."
        )
    if "tokens" in raw and "labels" in raw:
        tokens = integers(raw, "tokens")
        batch = {"tokens": tokens, "labels": integers(raw, "labels", tokens.shape)}
        batch["loss_mask"] = (batch["labels"] != -100).long()
        if raw.get("loss_mask") is not None:
            batch["loss_mask"] = zeros_and_ones(raw, "loss_mask", tokens.shape) * batch["loss_mask"]
        if raw.get("attention_mask") is not None:
            batch["attention_mask"] = _hidden(raw, tokens.shape)
    elif "text" in raw:
        text = integers(raw, "text")
        if raw.get("attention_mask") is not None:
            raise ValueError(
                "batch['attention_mask'] beside 'text': it goes with 'input_ids', or with 'tokens' and 'labels'; leave it out or rename the tokens."
            )
        if text.size(1) < 2:
            raise ValueError(
                f"batch['text'] of shape {list(text.shape)}: at least two tokens of each sequence are wanted, [batch, sequence + 1]."
            )
        batch = {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}
        batch["loss_mask"] = torch.ones_like(batch["labels"])
    elif "input_ids" in raw:
        tokens = integers(raw, "input_ids")
        real = (
            zeros_and_ones(raw, "attention_mask", tokens.shape)
            if raw.get("attention_mask") is not None
            else torch.ones_like(tokens)
        )
        labels = (
            integers(raw, "labels", tokens.shape)
            if raw.get("labels") is not None
            else tokens.masked_fill(real == 0, -100)
        )
        labels = torch.cat(
            [labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1
        )  # the label of a position is the next token
        labels = labels.masked_fill(real == 0, -100)  # and padding predicts nothing
        batch = {"tokens": tokens, "labels": labels, "loss_mask": (labels != -100).long()}
        mask = causal_and_padding_mask(real)
        if mask is not None:
            batch["attention_mask"] = mask
    else:
        raise ValueError(
            f"batch keys = {sorted(map(str, raw))}: 'tokens' and 'labels', 'input_ids', or 'text' is wanted."
        )
    tokens, model = batch["tokens"], config.model
    if raw.get("position_ids") is not None:
        position_ids = integers(raw, "position_ids", tokens.shape)
        if (
            position_ids.device.type != "cpu"
            or (position_ids != torch.arange(tokens.size(1))).any()
        ):  # else they go without saying
            batch["position_ids"] = position_ids
    check_ids("batch['tokens']", tokens, model.vocab_size)
    check_ids(
        "batch['labels']", batch["labels"].masked_fill(batch["labels"] == -100, 0), model.vocab_size
    )
    check_length(tokens.size(1), batch.get("position_ids"), config)
    return {key: value.to(pg.device, non_blocking=True) for key, value in batch.items()}


def gpt_forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [sequence / cp, batch, vocabulary / tp] on the last stage."""
    return model(batch["tokens"], batch.get("position_ids"), batch.get("attention_mask"))

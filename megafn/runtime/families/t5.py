"""T5's step: span corruption, or any other pair of sequences, from megatron-core's dataset and from Hugging Face batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megafn.pure.config.records import TrainConfig
from megafn.runtime.families.step import (
    Batch,
    causal_and_padding_mask,
    check_ids,
    check_length,
    integers,
    zeros_and_ones,
)
from megafn.runtime.model.losses import IGNORE
from megafn.runtime.parallel.groups import ProcessGroups


def t5_batch(raw: Mapping[str, Any], config: TrainConfig, pg: ProcessGroups) -> Batch:
    """A micro-batch of an encoder-decoder from one of two kinds of raw batch; s tokens to read, t to write, 1 = real in masks.

    - text_enc [b, s], text_dec, labels, loss_mask [b, t], enc_mask [b, s], dec_mask [b, t]: as megatron-core's dataset gives them.
    - input_ids [b, s], labels [b, t] (-100: no loss), and where given attention_mask [b, s], decoder_attention_mask [b, t] and
      decoder_input_ids [b, t]; without these the labels shifted right, behind config.model.decoder_start_token_id, which
      stands for -100 too: as a Hugging Face collator gives them. Padding of the decoder predicts nothing.
    Labels are not shifted: that of a position is what it predicts. Raises ValueError on other keys, shapes and dtypes, on
    ids outside the vocabulary, and on a row whose encoder tokens are all padding.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"batch = {type(raw).__name__}: a mapping with 'text_enc', 'text_dec' and 'labels', or with 'input_ids' and 'labels', is wanted."
        )
    model = config.model
    if "text_enc" in raw and "text_dec" in raw and raw.get("labels") is not None:
        names, (inputs, decoder_inputs) = (
            ("text_enc", "enc_mask", "dec_mask"),
            ("text_enc", "text_dec"),
        )
    elif "input_ids" in raw and raw.get("labels") is not None:
        names, (inputs, decoder_inputs) = (
            ("input_ids", "attention_mask", "decoder_attention_mask"),
            ("input_ids", "decoder_input_ids"),
        )
    else:
        raise ValueError(
            f"batch keys = {sorted(map(str, raw))}: 'text_enc', 'text_dec' and 'labels', or 'input_ids' and 'labels', are wanted."
        )
    tokens, labels = integers(raw, inputs), integers(raw, "labels")
    if labels.size(0) != tokens.size(0):
        raise ValueError(
            f"batch['labels'] of shape {list(labels.shape)}: {tokens.size(0)} rows, as batch[{inputs!r}] has, are wanted."
        )
    real, decoder_real = (
        zeros_and_ones(raw, name, like.shape).bool()
        if raw.get(name) is not None
        else torch.ones_like(like, dtype=torch.bool)
        for name, like in zip(names[1:], (tokens, labels))
    )
    if raw.get("loss_mask") is not None:
        labels = labels.masked_fill(zeros_and_ones(raw, "loss_mask", labels.shape) == 0, IGNORE)
    if raw.get(decoder_inputs) is not None:
        decoder_tokens = integers(raw, decoder_inputs, labels.shape)
    else:
        decoder_tokens = torch.cat([torch.full_like(labels[:, :1], IGNORE), labels[:, :-1]], dim=1)
        decoder_tokens = decoder_tokens.masked_fill(
            decoder_tokens == IGNORE, model.decoder_start_token_id
        )
    labels = labels.masked_fill(~decoder_real, IGNORE)
    check_ids(f"batch[{inputs!r}]", tokens, model.vocab_size)
    check_ids("batch['labels']", labels.masked_fill(labels == IGNORE, 0), model.vocab_size)
    check_ids(f"batch[{decoder_inputs!r}]", decoder_tokens, model.vocab_size)
    if real.device.type == "cpu" and not real.any(1).all():
        raise ValueError(
            f"batch[{names[1]!r}] hides every token of row {int((~real.any(1)).nonzero()[0])}: one real token at least is wanted."
        )
    for length in (tokens.size(1), labels.size(1)):
        check_length(length, None, config)
    batch = {
        "tokens": tokens,
        "decoder_tokens": decoder_tokens,
        "labels": labels,
        "loss_mask": (labels != IGNORE).long(),
    }
    if not real.all():
        batch["attention_mask"] = batch["cross_attention_mask"] = ~real[:, None, None]
    if (mask := causal_and_padding_mask(decoder_real)) is not None:
        batch["decoder_attention_mask"] = mask
    return {key: value.to(pg.device, non_blocking=True) for key, value in batch.items()}


def t5_forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [t, batch, vocabulary / tp] on the last stage."""
    return model(
        batch["tokens"],
        batch["decoder_tokens"],
        batch.get("attention_mask"),
        batch.get("decoder_attention_mask"),
        batch.get("cross_attention_mask"),
    )

"""Raw batches, checked: what batch functions read from a user's mapping, and masks for layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megafn.pure.config.records import TrainConfig
from megafn.pure.config.sequence_unit import sequence_unit
from megafn.runtime.model.losses import IGNORE
from megafn.runtime.parallel.groups import ProcessGroups

Raw = Mapping[str, Any]
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


# ------------------------------------------------------------------------------------- reading


def check_mapping(raw: object, keys: str) -> None:
    """Raises ValueError unless a raw batch is a mapping; `keys` says which ones it may have."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"batch = {type(raw).__name__}: expected a mapping with {keys}.")


def unknown_keys(raw: Raw, keys: str) -> ValueError:
    """The error for a mapping that is none of the kinds of raw batch."""
    return ValueError(f"batch keys = {sorted(map(str, raw))}: expected {keys}.")


def given(raw: Raw, key: str) -> bool:
    """Whether a raw batch has a value under a key; None is none."""
    return raw.get(key) is not None


def as_tensor(raw: Raw, key: str, expected: str) -> torch.Tensor:
    """raw[key] as a tensor. Raises ValueError that says what is expected."""
    try:
        return torch.as_tensor(raw[key])
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, texts, None
        raise ValueError(
            f"batch[{key!r}] is not a tensor ({error}): expected {expected}."
        ) from None


def integers(raw: Raw, key: str, shape: torch.Size | None = None) -> torch.Tensor:
    """raw[key] as int64 [batch, sequence]; of `shape`, if that is given."""
    if shape is None:
        expected = "integers [batch, sequence], neither of them 0"
    else:
        expected = f"integers of shape {list(shape)}, like the tokens"
    value = as_tensor(raw, key, expected)
    fits = value.dim() == 2 and value.numel() > 0 and value.dtype in _INTEGERS
    if not fits or shape not in (None, value.shape):
        raise ValueError(
            f"batch[{key!r}] = {value.dtype} of shape {list(value.shape)}: expected {expected}."
        )
    return value.long()


def zeros_and_ones(raw: Raw, key: str, shape: torch.Size) -> torch.Tensor:
    """raw[key], a mask of `shape`. Values on a GPU are not looked at: that would wait for it."""
    expected = f"zeros and ones of shape {list(shape)}, like the tokens"
    value = as_tensor(raw, key, expected)
    if value.shape != shape:
        raise ValueError(f"batch[{key!r}] of shape {list(value.shape)}: expected {expected}.")
    if value.device.type == "cpu":
        others = value[(value != 0) & (value != 1)]
        if others.numel():
            raise ValueError(
                f"batch[{key!r}] holds {others[0].item()}: expected {expected}; "
                "weights belong in a custom loss."
            )
    return value


def real_tokens(raw: Raw, key: str, tokens: torch.Tensor) -> torch.Tensor:
    """raw[key] (1 = real) as bools like the tokens; all True if there is no such key."""
    if not given(raw, key):
        return torch.ones_like(tokens, dtype=torch.bool)
    return zeros_and_ones(raw, key, tokens.shape).bool()


def on_device(batch: Mapping[str, torch.Tensor], pg: ProcessGroups) -> dict[str, torch.Tensor]:
    return {key: value.to(pg.device, non_blocking=True) for key, value in batch.items()}


# ------------------------------------------------------------------------------------ checking


def check_ids(name: str, ids: torch.Tensor, vocab_size: int) -> None:
    """Raises ValueError if a token id is outside the vocabulary.

    Ids on a GPU are not looked at: that would wait for it.
    """
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if 0 <= low and high < vocab_size:
        return
    outside = low if low < 0 else high
    raise ValueError(
        f"{name}: token id {outside} is outside the vocabulary; "
        f"model.vocab_size = {vocab_size}: raise it, or tokenise with the model's tokenizer."
    )


def check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    """As `check_ids`, for labels, of which -100 stands for no loss."""
    check_ids("batch['labels']", labels.masked_fill(labels == IGNORE, 0), vocab_size)


def check_length(length: int, position_ids: torch.Tensor | None, config: TrainConfig) -> None:
    """Raises ValueError if sequences of this length cannot be cut, or have too few positions.

    On every rank alike: if only one pipeline stage raised, the others would wait for it.
    """
    model = config.model
    parallel = config.parallel
    unit = sequence_unit(parallel.tp, parallel.cp, parallel.sequence_parallel)
    if length % unit:
        raise ValueError(
            f"batch: sequences of {length} tokens, which cp = {parallel.cp} and "
            f"tp = {parallel.tp} cut; pad them to a multiple of {unit}."
        )
    if model.position_embedding != "learned_absolute":
        return
    rows = model.position_rows
    if length > rows:
        raise ValueError(
            f"batch: sequences of {length} tokens, and the position table has {rows} rows; "
            "raise model.max_position_embeddings or shorten them."
        )
    if position_ids is not None and position_ids.device.type == "cpu":
        low, high = (int(bound) for bound in position_ids.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(
                f"batch['position_ids'] from {low} to {high}: the position table has {rows} rows; "
                f"give 0 to {rows - 1}, or raise model.max_position_embeddings."
            )


# --------------------------------------------------------------------------------------- masks


def causal_and_padding_mask(real: torch.Tensor) -> torch.Tensor | None:
    """From a mask [batch, sequence], 1 = real, to [batch, 1, sequence, sequence], True = hidden.

    Causal and padding together; a padding position sees itself, so that no row is empty. None if
    nothing is padded.
    """
    real = real.bool()
    if real.all():
        return None
    sequence = real.size(1)
    square = torch.ones(sequence, sequence, dtype=torch.bool, device=real.device)
    itself = torch.eye(sequence, dtype=torch.bool, device=real.device)
    visible = (real[:, None, None, :] & square.tril()) | itself
    return ~visible


def padding_mask(real: torch.Tensor) -> torch.Tensor | None:
    """From bools [batch, sequence], True = real, to a mask [batch, 1, 1, sequence], True = hidden.

    None if nothing is padded. A row that is all padding hides nothing: no mean over nothing.
    """
    if real.all():
        return None
    hidden = ~real & real.any(1, keepdim=True)
    return hidden[:, None, None]

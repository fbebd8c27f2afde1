"""Prompts of different lengths as one batch, and what each token may attend to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index

import torch
from attrs import frozen

from megafn.pure.config.records import ModelConfig
from megafn.pure.generation import GenerationConfig

# Token ids of each prompt: sequences of integers, or one tensor [batch, sequence].
Prompts = torch.Tensor | Iterable[Sequence[int]]


def as_ids(prompts: Prompts) -> tuple[tuple[int, ...], ...]:
    """The token ids of each prompt. Raises ValueError if they are not integers."""
    if isinstance(prompts, torch.Tensor) and prompts.dim() != 2:
        raise ValueError(
            f"prompts of shape {list(prompts.shape)}: expected a tensor [batch, sequence], or a "
            "list with the token ids of each prompt"
        )
    if isinstance(prompts, str) or not isinstance(prompts, torch.Tensor | Iterable):
        raise ValueError(
            f"prompts = {str(prompts)[:60]!r}: expected a list with the token ids of each prompt"
        )
    return tuple(_ids_of(prompt, row) for row, prompt in enumerate(prompts))


def _ids_of(prompt: Sequence[int] | torch.Tensor, row: int) -> tuple[int, ...]:
    try:
        return tuple(index(token) for token in prompt)
    except TypeError:
        shown = repr(prompt)
        raise ValueError(
            f"prompts[{row}] = {shown[:60]}: expected a sequence of token ids; encode text "
            "with load_tokenizer(...).encode"
        ) from None


def check_prompts(
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    model: ModelConfig,
    *,
    is_continued: bool = True,
) -> None:
    """Raises ValueError for no or an empty prompt, an unknown id, and one that is too long.

    is_continued: new tokens follow the prompt; else a decoder starts from its start token.
    """
    if not prompts:
        raise ValueError("prompts = []: give at least one prompt")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{row}] is empty: give at least one token")
        for token in prompt:
            if not 0 <= token < model.vocab_size:
                raise ValueError(
                    f"prompts[{row}] has the id {token}: must be from 0 to {model.vocab_size - 1} "
                    "(model.vocab_size); encode with the model's own tokenizer"
                )
        if model.position_embedding == "learned_absolute":
            if is_continued:
                _check_positions_of_both(row, len(prompt), config.max_new_tokens, model)
            else:
                _check_positions_of_each(row, len(prompt), config.max_new_tokens, model)


def _check_positions_of_both(row: int, length: int, new: int, model: ModelConfig) -> None:
    # the last new token is never an input
    if length + new - 1 > model.position_rows:
        raise ValueError(
            f"prompts[{row}] has {length} tokens, with {new} new ones {length + new}: the position "
            f"table has {model.position_rows} rows; shorten the prompt or lower max_new_tokens"
        )


def _check_positions_of_each(row: int, length: int, new: int, model: ModelConfig) -> None:
    rows = model.position_rows
    if length > rows:
        raise ValueError(
            f"prompts[{row}] has {length} tokens: the position table has {rows} rows; "
            "shorten the prompt"
        )
    # the decoder's first input is model.decoder_start_token_id
    if new > rows:
        raise ValueError(
            f"max_new_tokens = {new}: the position table has {rows} rows; lower it to {rows}"
        )


@frozen(kw_only=True, eq=False)
class PaddedBatch:
    """Prompts padded at their beginning, and the tokens that were added to them.

    rows: the numbers of the prompts. tokens: [batch, sequence]. padding: [batch], how many tokens
    of padding each row begins with; None if no row has any.
    """

    rows: tuple[int, ...]
    tokens: torch.Tensor
    padding: torch.Tensor | None

    def positions(self, start: int, end: int) -> torch.Tensor:
        """Positions [batch, end - start] of the columns from start to end - 1; padding has 0."""
        columns = torch.arange(start, end, device=self.tokens.device).expand(len(self.rows), -1)
        if self.padding is None:
            return columns
        return (columns - self.padding[:, None]).clamp(min=0)

    def hidden(self, start: int, end: int, queries: int, window: int | None) -> torch.Tensor | None:
        """Mask bool [batch or 1, 1, queries, end], True = hidden; None if causality hides enough.

        Of the columns from `start`, of which there are `queries`; those from `end` on are filling.
        """
        # torch's causal attention has its first query at the first key
        has_causality = queries == 1 or start == 0
        if self.padding is None and has_causality and (window is None or end <= window):
            return None
        device = self.tokens.device
        query = torch.arange(start, start + queries, device=device)[:, None]
        key = torch.arange(end, device=device)
        hidden = (key > query)[None]
        if window is not None:
            hidden = hidden | (key <= query - window)
        if self.padding is not None:
            hidden = hidden | (key < self.padding[:, None, None])
        # padding sees itself: attention to nothing is not a number
        hidden = hidden & (key != query)
        # filling sees something real, too
        hidden[:, end - start :] = False
        return hidden[:, None]


def padded_batch(
    rows: Sequence[int], prompts: Sequence[Sequence[int]], device: torch.device
) -> PaddedBatch:
    """The prompts with these numbers as one batch."""
    width = max(len(prompts[row]) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    padding = torch.tensor([width - len(prompts[row]) for row in rows])
    for place, row in enumerate(rows):
        tokens[place, width - len(prompts[row]) :] = torch.tensor(prompts[row])
    return PaddedBatch(
        rows=tuple(rows),
        tokens=tokens.to(device),
        padding=padding.to(device) if padding.any() else None,
    )

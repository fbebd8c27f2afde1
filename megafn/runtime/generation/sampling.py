"""The next token of each row, from logits: a function of the logits, the seed and the place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megafn.pure.generation import GenerationConfig, uniform


def next_tokens(
    logits: torch.Tensor, config: GenerationConfig, rows: Sequence[int], step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, log-probabilities) [batch] of the next tokens, from logits [batch, vocabulary].

    rows: the number of each row's prompt. Log-probabilities are the model's own, before
    temperature and filters. The id of a row whose logits have a NaN or infinity is -1.
    """
    logits = logits.float()
    ids = logits.argmax(-1) if config.temperature == 0 else _sample(logits, config, rows, step)
    chosen = logits.gather(-1, ids[:, None])[:, 0]
    total = logits.logsumexp(-1)
    return ids.masked_fill(~total.isfinite(), -1), chosen - total


def _sample(
    logits: torch.Tensor, config: GenerationConfig, rows: Sequence[int], step: int
) -> torch.Tensor:
    """One id for each row: the first whose cumulated probability exceeds the row's number.

    Cumulated in the order of the vocabulary, not in that of the probabilities: rounding, which
    differs between layouts, may exchange neighbours there.
    """
    # none of them overflows: the largest is 0, whatever the temperature
    logits = (logits - logits.amax(-1, keepdim=True)).double() / config.temperature
    if config.top_k is not None:
        logits = _keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = _keep_top_p(logits, config.top_p)
    cumulated = logits.softmax(-1).cumsum(-1)
    numbers = [uniform(config.seed, row, step) for row in rows]
    drawn = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None]
    ids = torch.searchsorted(cumulated, drawn * cumulated[:, -1:], right=True)
    return ids[:, 0].clamp(max=logits.size(-1) - 1)


def _keep_top_k(logits: torch.Tensor, count: int) -> torch.Tensor:
    smallest_kept = logits.topk(min(count, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, float("-inf"))


def _keep_top_p(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """Without the least likely tokens, whose probabilities sum up to at most 1 - mass."""
    ascending, order = logits.sort(-1)
    is_dropped = ascending.softmax(-1).cumsum(-1) <= 1 - mass
    is_dropped[:, -1] = False
    return logits.masked_fill(is_dropped.scatter(-1, order, is_dropped), float("-inf"))

"""What a training step and an evaluation report, as records of plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

# Logits as `whole_logits` returns them: [batch, sequence, vocabulary] of each of this data-parallel
# rank's micro-batches, or whatever else the step's forward returns.
Logits = tuple[Any, ...]


@frozen(kw_only=True)
class Report:
    """Means over the tokens of one evaluation. Equal on every rank.

    `perplexity`: exp(min(20, loss)), as in accelerate. `count`: tokens that the loss is a mean of.
    `report`: the step's other sums, each divided by count. `logits`: under config.return_logits, on
    the last pipeline stage or on every one; None elsewhere.
    """

    loss: float
    perplexity: float
    count: int
    report: Mapping[str, float]
    logits: Logits | None = field(default=None, repr=False, eq=False)


@frozen(kw_only=True)
class Metrics:
    """One iteration. Equal on every rank, except for times.

    `iteration` and `consumed_samples` are those after the step, `lr` and `weight_decay` those of
    it. `loss` and `report` are means over the `count` tokens of the global batch. `grad_norm` is
    before clipping; None if it was not finite. `skipped`: loss or gradient was NaN, infinite or a
    spike, so no rank updated anything. `seconds` is the step's, on this rank. `valid`: the
    evaluation after this iteration, if there was one. `details`: under log.everything, see
    `diagnostics`. `logits`: under config.return_logits, see `Report`.
    """

    iteration: int
    consumed_samples: int
    loss: float
    lr: float
    weight_decay: float
    grad_norm: float | None
    count: int
    skipped: bool
    loss_scale: float
    seconds: float
    tokens_per_second: float
    report: Mapping[str, float]
    valid: Report | None = None
    details: Mapping[str, float | None] = field(factory=dict)
    logits: Logits | None = field(default=None, repr=False, eq=False)

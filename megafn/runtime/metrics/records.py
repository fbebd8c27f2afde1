"""What a step and an evaluation report, as records of plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen


@frozen(kw_only=True)
class Report:
    """Means over a set of tokens. Equal on every rank."""

    loss: float
    perplexity: float  # exp(min(20, loss)), as accelerate's
    count: int  # tokens that count
    report: Mapping[str, float]  # the step's other sums, each divided by count
    # under config.return_logits: [batch, sequence, vocabulary] of each of this data-parallel position's micro-batches, whole
    # (or what else the step's forward gives, see `whole_logits`); on the last pipeline stage or on every one, None elsewhere
    logits: tuple[Any, ...] | None = field(default=None, repr=False, eq=False)


@frozen(kw_only=True)
class Metrics:
    """One iteration. Equal on every rank, times apart."""

    iteration: int
    consumed_samples: int
    loss: float
    lr: float
    weight_decay: float
    grad_norm: float | None  # None where it was not finite
    count: int
    skipped: (
        bool  # loss or gradient was NaN, infinite or a spike, so nothing was updated, on any rank
    )
    loss_scale: float
    seconds: float
    tokens_per_second: float
    report: Mapping[str, float]
    valid: Report | None = None  # where this iteration was followed by an evaluation
    details: Mapping[str, float | None] = field(factory=dict)  # under log.everything, see `details`
    logits: tuple[Any, ...] | None = field(
        default=None, repr=False, eq=False
    )  # under config.return_logits, see `Report`

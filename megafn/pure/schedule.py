"""Learning rate and weight decay as a closed form of the samples consumed so far.

Equal, float for float, to megatron-core's `OptimizerParamScheduler` as Megatron-LM builds it: every length is counted
in samples, iterations times the global batch size. Nothing is stepped, so resuming has nothing to restore.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import frozen

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig


@frozen
class LrWd:
    """What one optimizer step uses; the weight decay is not yet multiplied by the learning rate."""

    lr: float
    weight_decay: float


# What is left of lr - min_lr after a fraction of the decay. Each runs from 1 to 0.
_FALL: Mapping[str, Callable[[float], float]] = {
    "linear": lambda ratio: 1.0 - ratio,
    "cosine": lambda ratio: 0.5 * (math.cos(math.pi * ratio) + 1.0),
    "exponential": lambda ratio: 2.0 * math.pow(0.5, ratio) - 1.0,
    "minus_sqrt": lambda ratio: 1.0 - math.sqrt(ratio),
}

# What of end_weight_decay - start_weight_decay is reached after a fraction of the run. Each runs from 0 to 1.
_RISE: Mapping[str, Callable[[float], float]] = {
    "linear": lambda ratio: ratio,
    "cosine": lambda ratio: 0.5 * (math.cos(math.pi * (1 - ratio)) + 1.0),
}

# The fields that give a length; at most one of each.
_LENGTHS = {
    "decay": ("decay_iters", "decay_samples"),
    "warmup": ("warmup_iters", "warmup_samples", "warmup_fraction"),
    "wsd_decay": ("wsd_decay_iters", "wsd_decay_samples"),
}

DECAYS = ("constant", "linear", "cosine", "inverse-square-root", "wsd")
WSD_DECAY_STYLES = tuple(_FALL)
WEIGHT_DECAY_INCR_STYLES = ("constant", *_RISE)


def schedule_problems(config: TrainConfig) -> Iterator[tuple[str, Any, str]]:
    """Every reason for which `make_schedule` would refuse the config, each as (field, value, remedy).

    Refused beside what `OptimizerParamScheduler` asserts: negative lengths and rates, which it takes silently, and a
    WSD decay that reaches into the warm-up, where the learning rate would jump.
    """
    schedule = config.schedule
    for name, allowed in (
        ("decay", DECAYS),
        ("wsd_decay_style", WSD_DECAY_STYLES),
        ("weight_decay_incr_style", WEIGHT_DECAY_INCR_STYLES),
    ):
        if (value := getattr(schedule, name)) not in allowed:
            yield f"schedule.{name}", value, f"choose one of {', '.join(allowed)}"

    given = {
        length: {name: value for name in names if (value := getattr(schedule, name)) is not None}
        for length, names in _LENGTHS.items()
    }
    for length in given.values():
        for name, value in length.items():
            if not 0 <= value < math.inf:
                yield f"schedule.{name}", value, "a length is 0 or more"
        for name in tuple(length)[1:]:
            yield f"schedule.{name}", length[name], f"give only one of {' and '.join(length)}"
    if schedule.decay != "wsd":
        for name, value in given["wsd_decay"].items():
            yield f"schedule.{name}", value, 'leave it out, or set decay = "wsd"'

    if not 0 <= schedule.lr < math.inf:
        yield "schedule.lr", schedule.lr, "a learning rate is finite and 0 or more"
    for name in ("min_lr", "init_lr"):
        if not 0 <= (value := getattr(schedule, name)) <= schedule.lr:
            yield f"schedule.{name}", value, f"choose 0 to lr = {schedule.lr}"

    start, end = schedule.start_weight_decay, schedule.end_weight_decay
    if not 0 <= schedule.weight_decay < math.inf:
        yield "schedule.weight_decay", schedule.weight_decay, "weight decay is finite and 0 or more"
    if schedule.weight_decay_incr_style == "constant":
        for name, value in (("start_weight_decay", start), ("end_weight_decay", end)):
            if value is not None:
                yield (
                    f"schedule.{name}",
                    value,
                    'leave it out, or set weight_decay_incr_style to "linear" or "cosine"',
                )
    elif start is None or end is None:
        yield (
            "schedule.weight_decay_incr_style",
            schedule.weight_decay_incr_style,
            "give start_weight_decay and end_weight_decay, the two ends of the ramp",
        )
    elif not 0 <= start <= end < math.inf:
        yield (
            "schedule.start_weight_decay",
            start,
            f"choose 0 to end_weight_decay = {end}, which is finite",
        )

    lengths = _lengths(config)
    if (config.train_iters is None) == (config.train_samples is None):
        yield "train_iters", config.train_iters, "give exactly one of train_iters and train_samples"
    elif lengths.horizon <= 0:
        name = "train_iters" if config.train_iters is not None else "train_samples"
        yield name, getattr(config, name), "a run is longer than 0 samples"
    elif lengths.decay <= 0:
        for name, value in given["decay"].items():
            yield f"schedule.{name}", value, "the learning rate needs more than 0 samples to decay"
    elif not lengths.warmup < lengths.decay:
        for name, value in given["warmup"].items():
            yield (
                f"schedule.{name}",
                value,
                f"the warm-up ({lengths.warmup:g} samples) is part of the decay length "
                f"({lengths.decay:g}) and must be shorter than it: shorten the one or lengthen the other",
            )
    elif schedule.decay == "wsd" and lengths.warmup + lengths.wsd_decay > lengths.decay * (
        1 + 1e-12
    ):  # sums round
        for name, value in (given["wsd_decay"] or given["warmup"]).items():
            yield (
                f"schedule.{name}",
                value,
                f"the warm-up ({lengths.warmup:g} samples) and the WSD decay "
                f"({lengths.wsd_decay:g}) must fit into the decay length ({lengths.decay:g}): shorten one of them",
            )


def make_schedule(config: TrainConfig) -> Callable[[int], LrWd]:
    """A pure function of consumed samples; a step uses `schedule(samples consumed before it)`.

    With n consumed samples, and the lengths in samples of decay D (default: the run), warm-up W (default: 0) and
    WSD decay C (default: D / 10):

    - n <= W: from init_lr to lr, linearly
    - "constant": lr
    - n > D: min_lr
    - "inverse-square-root": max(min_lr, lr * sqrt(W / n)) with W at least 1 (without a warm-up it falls at once)
    - "linear", "cosine": from lr at W to min_lr at D
    - "wsd": lr until D - C, then to min_lr at D in the shape of wsd_decay_style (arXiv 2404.06395)

    Weight decay is `weight_decay`, or ramps from start_weight_decay to end_weight_decay over the whole run, as
    weight_decay_incr_style says. Follows megatron-core's `OptimizerParamScheduler` and Megatron-LM's
    `get_optimizer_param_scheduler`; W = 0 and C = 0 are allowed, as there.

    Raises ConfigError with all of `schedule_problems`; the schedule raises ValueError for a negative n.

    >>> from megafn.pure.config.records import ModelConfig, ScheduleConfig
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> schedule = make_schedule(TrainConfig(
    ...     model=model, micro_batch_size=2, global_batch_size=16, train_iters=100,
    ...     schedule=ScheduleConfig(lr=1e-3, min_lr=1e-5, decay="linear", warmup_iters=10, weight_decay=0.1)))
    >>> [schedule(16 * iteration).lr for iteration in (0, 5, 10, 100)]
    [0.0, 0.0005, 0.001, 1e-05]
    >>> schedule(80)
    LrWd(lr=0.0005, weight_decay=0.1)
    """
    if problems := tuple(schedule_problems(config)):
        raise ConfigError(
            "; ".join(f"{field} = {value!r}: {remedy}" for field, value, remedy in problems)
        )
    lr, weight_decay = _learning_rate(config), _weight_decay(config)

    def schedule(consumed_samples: int) -> LrWd:
        if not consumed_samples >= 0:
            raise ValueError(
                f"consumed_samples = {consumed_samples}: a run starts at 0 samples; give 0 or more"
            )
        return LrWd(lr=lr(consumed_samples), weight_decay=weight_decay(consumed_samples))

    return schedule


@frozen(kw_only=True)
class _Lengths:
    """In samples. A fraction of another length may fall between two samples, as upstream."""

    horizon: int  # the whole run: weight decay ramps over it
    decay: int  # contains the warm-up; beyond it the learning rate is min_lr, unless constant
    warmup: float
    wsd_decay: float  # the last part of `decay`, for "wsd"


def _lengths(config: TrainConfig) -> _Lengths:
    schedule = config.schedule

    def first(iters: int | None, samples: int | None, default: float) -> float:
        return (
            iters * config.global_batch_size
            if iters is not None
            else samples
            if samples is not None
            else default
        )

    horizon = first(config.train_iters, config.train_samples, 0)
    decay = first(schedule.decay_iters, schedule.decay_samples, horizon)
    return _Lengths(
        horizon=horizon,
        decay=decay,
        warmup=first(
            schedule.warmup_iters, schedule.warmup_samples, (schedule.warmup_fraction or 0) * decay
        ),
        wsd_decay=first(schedule.wsd_decay_iters, schedule.wsd_decay_samples, decay / 10),
    )


# Below, the order of the floating point operations is upstream's, so that the results are equal to the last bit.


def _learning_rate(config: TrainConfig) -> Callable[[int], float]:
    schedule, lengths = config.schedule, _lengths(config)
    lr, min_lr, init_lr, warmup = (
        float(schedule.lr),
        schedule.min_lr,
        schedule.init_lr,
        lengths.warmup,
    )

    def inverse_square_root(n: int) -> float:
        return max(min_lr, lr * max(warmup, 1) ** 0.5 / max(n, 1) ** 0.5)

    def fall(
        coefficient: Callable[[float], float], start: float, length: float
    ) -> Callable[[int], float]:
        return lambda n: (
            min_lr + (coefficient((n - start) / length) if n > start else 1.0) * (lr - min_lr)
        )

    if schedule.decay == "inverse-square-root":
        decay = inverse_square_root
    elif schedule.decay == "wsd":
        decay = fall(
            _FALL[schedule.wsd_decay_style], lengths.decay - lengths.wsd_decay, lengths.wsd_decay
        )
    elif schedule.decay != "constant":
        decay = fall(_FALL[schedule.decay], warmup, lengths.decay - warmup)

    def at(n: int) -> float:
        if warmup > 0 and n <= warmup:
            return init_lr + (lr - init_lr) * n / warmup
        if schedule.decay == "constant":
            return lr
        return min_lr if n > lengths.decay else decay(n)

    return at


def _weight_decay(config: TrainConfig) -> Callable[[int], float]:
    schedule, horizon = config.schedule, _lengths(config).horizon
    start, end = schedule.start_weight_decay, schedule.end_weight_decay
    if schedule.weight_decay_incr_style == "constant":
        return lambda n: schedule.weight_decay
    rise = _RISE[schedule.weight_decay_incr_style]
    return lambda n: end if n > horizon else start + rise(n / horizon) * (end - start)

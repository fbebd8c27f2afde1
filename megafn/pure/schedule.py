"""Learning rate and weight decay as a closed form of the samples consumed so far.

Equal, float for float, to megatron-core's `OptimizerParamScheduler` as Megatron-LM builds it: every
length is counted in samples, iterations times the global batch size. Nothing is stepped, so
resuming has nothing to restore.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from attrs import frozen

from megafn.pure.config.problems import Problem, choice_problem, config_error
from megafn.pure.config.records import ScheduleConfig, TrainConfig


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

# How much of end_weight_decay - start_weight_decay is reached after a fraction of the run. Each
# runs from 0 to 1.
_RISE: Mapping[str, Callable[[float], float]] = {
    "linear": lambda ratio: ratio,
    "cosine": lambda ratio: 0.5 * (math.cos(math.pi * (1 - ratio)) + 1.0),
}

DECAYS = ("constant", "linear", "cosine", "inverse-square-root", "wsd")
WSD_DECAY_STYLES = tuple(_FALL)
WEIGHT_DECAY_INCR_STYLES = ("constant", *_RISE)

_CHOICES = {
    "decay": DECAYS,
    "wsd_decay_style": WSD_DECAY_STYLES,
    "weight_decay_incr_style": WEIGHT_DECAY_INCR_STYLES,
}

# The fields that give a length; at most one of each.
_LENGTH_FIELDS = {
    "decay": ("decay_iters", "decay_samples"),
    "warmup": ("warmup_iters", "warmup_samples", "warmup_fraction"),
    "wsd_decay": ("wsd_decay_iters", "wsd_decay_samples"),
}


def make_schedule(config: TrainConfig) -> Callable[[int], LrWd]:
    """A pure function of consumed samples; a step uses `schedule(samples consumed before it)`.

    With n consumed samples, and the lengths in samples of decay D (default: the run), warm-up W
    (default: 0) and WSD decay C (default: D / 10):

    - n <= W: from init_lr to lr, linearly
    - "constant": lr
    - n > D: min_lr
    - "inverse-square-root": max(min_lr, lr * sqrt(W / n)) with W at least 1 (without a warm-up it
      falls at once)
    - "linear", "cosine": from lr at W to min_lr at D
    - "wsd": lr until D - C, then to min_lr at D in the shape of wsd_decay_style (arXiv 2404.06395)

    Weight decay is `weight_decay`, or ramps from start_weight_decay to end_weight_decay over the
    whole run, in the shape of weight_decay_incr_style. Follows megatron-core's
    `OptimizerParamScheduler` and Megatron-LM's `get_optimizer_param_scheduler`; W = 0 and C = 0 are
    allowed, as there.

    Raises ConfigError with all of `schedule_problems`; the schedule raises ValueError for a
    negative n.

    >>> from megafn.pure.config.records import ModelConfig
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> schedule = make_schedule(TrainConfig(
    ...     model=model, micro_batch_size=2, global_batch_size=16, train_iters=100,
    ...     schedule=ScheduleConfig(
    ...         lr=1e-3, min_lr=1e-5, decay="linear", warmup_iters=10, weight_decay=0.1)))
    >>> [schedule(16 * iteration).lr for iteration in (0, 5, 10, 100)]
    [0.0, 0.0005, 0.001, 1e-05]
    >>> schedule(80)
    LrWd(lr=0.0005, weight_decay=0.1)
    """
    problems = tuple(schedule_problems(config))
    if problems:
        raise config_error(problems)
    lr = _learning_rate(config)
    weight_decay = _weight_decay(config)

    def schedule(consumed_samples: int) -> LrWd:
        if not consumed_samples >= 0:
            raise ValueError(f"consumed_samples = {consumed_samples}: must be 0 or more")
        return LrWd(lr=lr(consumed_samples), weight_decay=weight_decay(consumed_samples))

    return schedule


def schedule_problems(config: TrainConfig) -> Iterator[Problem]:
    """Every reason for which `make_schedule` refuses the config.

    Refused besides what `OptimizerParamScheduler` asserts: negative lengths and rates, which it
    accepts silently, and a WSD decay that reaches into the warm-up, where the learning rate would
    jump.
    """
    yield from _choice_problems(config.schedule)
    yield from _length_problems(config.schedule)
    yield from _rate_problems(config.schedule)
    yield from _weight_decay_problems(config.schedule)
    yield from _fit_problems(config)


def _choice_problems(schedule: ScheduleConfig) -> Iterator[Problem]:
    for name, choices in _CHOICES.items():
        value = getattr(schedule, name)
        if value not in choices:
            yield choice_problem(f"schedule.{name}", value, choices)


def _length_problems(schedule: ScheduleConfig) -> Iterator[Problem]:
    """What is wrong with the fields of a length, one by one."""
    for length in _LENGTH_FIELDS:
        given = _given(schedule, length)
        for name, value in given.items():
            if not 0 <= value < math.inf:
                yield Problem(f"schedule.{name}", value, "must be finite and 0 or more")
        for name in tuple(given)[1:]:
            yield Problem(
                f"schedule.{name}", given[name], f"give only one of {' and '.join(given)}"
            )
    if schedule.decay != "wsd":
        for name, value in _given(schedule, "wsd_decay").items():
            yield Problem(f"schedule.{name}", value, 'leave it out, or set decay = "wsd"')


def _rate_problems(schedule: ScheduleConfig) -> Iterator[Problem]:
    if not 0 <= schedule.lr < math.inf:
        yield Problem("schedule.lr", schedule.lr, "must be finite and 0 or more")
    for name in ("min_lr", "init_lr"):
        value = getattr(schedule, name)
        if not 0 <= value <= schedule.lr:
            yield Problem(f"schedule.{name}", value, f"choose 0 to lr = {schedule.lr}")


def _weight_decay_problems(schedule: ScheduleConfig) -> Iterator[Problem]:
    if not 0 <= schedule.weight_decay < math.inf:
        remedy = "must be finite and 0 or more"
        yield Problem("schedule.weight_decay", schedule.weight_decay, remedy)

    style = schedule.weight_decay_incr_style
    start = schedule.start_weight_decay
    end = schedule.end_weight_decay
    if style == "constant":
        remedy = 'leave it out, or set weight_decay_incr_style to "linear" or "cosine"'
        if start is not None:
            yield Problem("schedule.start_weight_decay", start, remedy)
        if end is not None:
            yield Problem("schedule.end_weight_decay", end, remedy)
    elif start is None or end is None:
        remedy = "give start_weight_decay and end_weight_decay, the two ends of the ramp"
        yield Problem("schedule.weight_decay_incr_style", style, remedy)
    elif not 0 <= start <= end < math.inf:
        remedy = f"choose 0 to end_weight_decay = {end}, which must be finite"
        yield Problem("schedule.start_weight_decay", start, remedy)


def _fit_problems(config: TrainConfig) -> Iterator[Problem]:
    """What is wrong between the length of the run, decay, warm-up and WSD decay; the first only."""
    if (config.train_iters is None) == (config.train_samples is None):
        remedy = "give exactly one of train_iters and train_samples"
        yield Problem("train_iters", config.train_iters, remedy)
        return

    schedule = config.schedule
    lengths = _lengths(config)
    if lengths.horizon <= 0:
        name = "train_iters" if config.train_iters is not None else "train_samples"
        yield Problem(name, getattr(config, name), "a run must be longer than 0 samples")
    elif lengths.decay <= 0:
        for name, value in _given(schedule, "decay").items():
            remedy = "the learning rate needs more than 0 samples to decay"
            yield Problem(f"schedule.{name}", value, remedy)
    elif not lengths.warmup < lengths.decay:
        for name, value in _given(schedule, "warmup").items():
            remedy = (
                f"the warm-up ({lengths.warmup:g} samples) is part of the decay length "
                f"({lengths.decay:g}) and must be shorter; shorten the one or lengthen the other"
            )
            yield Problem(f"schedule.{name}", value, remedy)
    elif schedule.decay == "wsd" and not _wsd_fits(lengths):
        given = _given(schedule, "wsd_decay") or _given(schedule, "warmup")
        for name, value in given.items():
            remedy = (
                f"the warm-up ({lengths.warmup:g} samples) and the WSD decay "
                f"({lengths.wsd_decay:g}) must fit into the decay length ({lengths.decay:g}); "
                "shorten one of them"
            )
            yield Problem(f"schedule.{name}", value, remedy)


def _given(schedule: ScheduleConfig, length: str) -> dict[str, float]:
    """The fields of a length that are set, with their values."""
    values = {name: getattr(schedule, name) for name in _LENGTH_FIELDS[length]}
    return {name: value for name, value in values.items() if value is not None}


@frozen(kw_only=True)
class _Lengths:
    """In samples. A fraction of another length may fall between two samples, as upstream."""

    # The whole run: weight decay ramps over it.
    horizon: float
    # Contains the warm-up; after it the learning rate is min_lr, unless constant.
    decay: float
    warmup: float
    # The last part of `decay`, for "wsd".
    wsd_decay: float


def _lengths(config: TrainConfig) -> _Lengths:
    schedule = config.schedule
    batch = config.global_batch_size
    horizon = _in_samples(config.train_iters, config.train_samples, batch, 0)
    decay = _in_samples(schedule.decay_iters, schedule.decay_samples, batch, horizon)
    warmup = (schedule.warmup_fraction or 0) * decay
    return _Lengths(
        horizon=horizon,
        decay=decay,
        warmup=_in_samples(schedule.warmup_iters, schedule.warmup_samples, batch, warmup),
        wsd_decay=_in_samples(
            schedule.wsd_decay_iters, schedule.wsd_decay_samples, batch, decay / 10
        ),
    )


def _in_samples(iters: int | None, samples: int | None, batch: int, default: float) -> float:
    if iters is not None:
        return iters * batch
    return samples if samples is not None else default


def _wsd_fits(lengths: _Lengths) -> bool:
    # The sum of two fractions of the decay length may round up.
    return lengths.warmup + lengths.wsd_decay <= lengths.decay * (1 + 1e-12)


# Below, the order of the floating point operations is upstream's, so that the results are equal to
# the last bit.


def _learning_rate(config: TrainConfig) -> Callable[[int], float]:
    schedule = config.schedule
    lengths = _lengths(config)
    lr = float(schedule.lr)
    decayed = _decay(config, lr)

    def learning_rate(n: int) -> float:
        if lengths.warmup > 0 and n <= lengths.warmup:
            return schedule.init_lr + (lr - schedule.init_lr) * n / lengths.warmup
        if schedule.decay == "constant":
            return lr
        if n > lengths.decay:
            return schedule.min_lr
        return decayed(n)

    return learning_rate


def _decay(config: TrainConfig, lr: float) -> Callable[[int], float]:
    """The learning rate between warm-up and the end of the decay length, if it is not constant."""
    schedule = config.schedule
    lengths = _lengths(config)
    min_lr = schedule.min_lr

    def inverse_square_root(n: int) -> float:
        return max(min_lr, lr * max(lengths.warmup, 1) ** 0.5 / max(n, 1) ** 0.5)

    def fall(shape: str, start: float, length: float) -> Callable[[int], float]:
        def decayed(n: int) -> float:
            left = _FALL[shape]((n - start) / length) if n > start else 1.0
            return min_lr + left * (lr - min_lr)

        return decayed

    if schedule.decay == "inverse-square-root":
        return inverse_square_root
    if schedule.decay == "wsd":
        start = lengths.decay - lengths.wsd_decay
        return fall(schedule.wsd_decay_style, start, lengths.wsd_decay)
    return fall(schedule.decay, lengths.warmup, lengths.decay - lengths.warmup)


def _weight_decay(config: TrainConfig) -> Callable[[int], float]:
    schedule = config.schedule
    if schedule.weight_decay_incr_style == "constant":
        return lambda n: schedule.weight_decay

    horizon = _lengths(config).horizon
    # `schedule_problems` asks for both ends of a ramp.
    start = schedule.start_weight_decay or 0.0
    end = schedule.end_weight_decay or 0.0
    rise = _RISE[schedule.weight_decay_incr_style]

    def weight_decay(n: int) -> float:
        if n > horizon:
            return end
        return start + rise(n / horizon) * (end - start)

    return weight_decay

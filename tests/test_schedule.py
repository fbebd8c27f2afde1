"""The schedule equals megatron-core's to the last bit, and says clearly what it refuses."""

import math
from types import SimpleNamespace

import attrs
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import ModelConfig, ScheduleConfig, TrainConfig
from megafn.pure.schedule import DECAYS, WSD_DECAY_STYLES, LrWd, make_schedule, schedule_problems

MODEL = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)


def run(global_batch_size=16, train_iters=100, train_samples=None, **schedule):
    return TrainConfig(
        model=MODEL,
        micro_batch_size=1,
        global_batch_size=global_batch_size,
        train_iters=train_iters,
        train_samples=train_samples,
        schedule=ScheduleConfig(**schedule),
    )


def upstream(config):
    """megatron-core's scheduler over one group, with the arguments that Megatron-LM computes."""
    s = config.schedule
    batch = config.global_batch_size
    horizon = config.train_samples
    if config.train_iters is not None:
        horizon = config.train_iters * batch

    decay = s.decay_samples or horizon
    if s.decay_iters is not None:
        decay = s.decay_iters * batch

    warmup = s.warmup_samples or 0
    if s.warmup_iters is not None:
        warmup = s.warmup_iters * batch
    if s.warmup_fraction is not None:
        warmup = s.warmup_fraction * decay

    wsd = s.wsd_decay_samples if s.wsd_decay_samples is not None else decay / 10
    if s.wsd_decay_iters is not None:
        wsd = s.wsd_decay_iters * batch

    constant = s.weight_decay_incr_style == "constant"
    return OptimizerParamScheduler(
        SimpleNamespace(param_groups=[{}]),
        init_lr=s.init_lr,
        max_lr=s.lr,
        min_lr=s.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style="WSD" if s.decay == "wsd" else s.decay,
        wsd_decay_steps=wsd,
        lr_wsd_decay_style=s.wsd_decay_style,
        wd_incr_steps=horizon,
        wd_incr_style=s.weight_decay_incr_style,
        start_wd=s.weight_decay if constant else s.start_weight_decay,
        end_wd=s.weight_decay if constant else s.end_weight_decay,
    )


def current(scheduler):
    [group] = scheduler.optimizer.param_groups
    return LrWd(group["lr"], group["weight_decay"])


@st.composite
def configs(draw):
    batch = draw(st.integers(1, 64))
    lr = draw(st.floats(1e-6, 1.0))
    schedule = {
        "lr": lr,
        "min_lr": draw(st.floats(0.0, lr)),
        "init_lr": draw(st.floats(0.0, lr)),
        "decay": draw(st.sampled_from(DECAYS)),
    }
    horizon = draw(st.sampled_from(("train_iters", "train_samples")))
    length = draw(st.integers(1, 200 if horizon == "train_iters" else 12_000))
    decay = length * batch if horizon == "train_iters" else length
    unit = draw(st.sampled_from((None, "decay_iters", "decay_samples")))
    if unit:
        schedule[unit] = draw(st.integers(1, 300))
        decay = schedule[unit] * (batch if unit == "decay_iters" else 1)
    unit = draw(st.sampled_from((None, "warmup_iters", "warmup_samples", "warmup_fraction")))
    warmup = 0
    if unit == "warmup_fraction":
        schedule[unit] = draw(st.floats(0.0, 0.99))
        warmup = schedule[unit] * decay
    elif unit:
        scale = batch if unit == "warmup_iters" else 1
        schedule[unit] = draw(st.integers(0, (decay - 1) // scale))
        warmup = schedule[unit] * scale
    if schedule["decay"] == "wsd":
        schedule["wsd_decay_style"] = draw(st.sampled_from(WSD_DECAY_STYLES))
        unit = draw(st.sampled_from((None, "wsd_decay_iters", "wsd_decay_samples")))
        if unit:
            scale = batch if unit == "wsd_decay_iters" else 1
            schedule[unit] = draw(st.integers(0, int(decay - warmup) // scale))
        else:
            assume(warmup <= 0.9 * decay)
    schedule["weight_decay_incr_style"] = draw(st.sampled_from(("constant", "linear", "cosine")))
    if schedule["weight_decay_incr_style"] == "constant":
        schedule["weight_decay"] = draw(st.floats(0.0, 1.0))
    else:
        start, end = sorted(draw(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0))))
        schedule |= {"start_weight_decay": start, "end_weight_decay": end}
    return run(batch, **{"train_iters": None, "train_samples": None, horizon: length}, **schedule)


@given(configs(), st.data())
def test_schedule_equals_megatron_cores_scheduler_to_the_last_bit(config, data):
    schedule, scheduler = make_schedule(config), upstream(config)
    assert schedule(0) == current(scheduler)
    consumed = 0
    beyond = 2 * max(scheduler.lr_decay_steps, scheduler.wd_incr_steps)
    # the joins, and one sample to either side of them, besides random places
    joins = {
        int(join) + by
        for by in (-1, 0, 1)
        for join in (
            scheduler.lr_warmup_steps,
            scheduler.lr_decay_steps,
            scheduler.wd_incr_steps,
            scheduler.lr_decay_steps - scheduler.wsd_decay_steps,
        )
    }
    for n in sorted(joins | set(data.draw(st.lists(st.integers(0, beyond), min_size=10)))):
        if n >= 0:
            scheduler.step(increment=n - consumed)
            consumed = n
            assert schedule(n) == current(scheduler), n


@given(configs())
def test_every_step_of_a_run_uses_the_samples_consumed_before_it(config):
    schedule, scheduler = make_schedule(config), upstream(config)
    for iteration in range(min(config.iterations, 50)):
        assert schedule(iteration * config.global_batch_size) == current(scheduler)
        # Megatron-LM: after the optimizer's step
        scheduler.step(increment=config.global_batch_size)


@pytest.mark.parametrize("wsd_decay_style", WSD_DECAY_STYLES)
@pytest.mark.parametrize("decay", ["linear", "cosine", "wsd"])
def test_learning_rate_is_continuous_where_its_pieces_join(decay, wsd_decay_style):
    samples = 10**6
    schedule = make_schedule(
        run(
            train_iters=None,
            train_samples=samples,
            lr=1.0,
            min_lr=0.1,
            init_lr=0.05,
            decay=decay,
            wsd_decay_style=wsd_decay_style,
            warmup_fraction=0.2,
        )
    )
    # minus_sqrt on its first sample; all others are far less steep
    steepest = math.sqrt(1 / (samples / 10))
    for join in (200_000, 900_000, samples):
        assert abs(schedule(join + 1).lr - schedule(join).lr) <= steepest, join
    assert schedule(200_000).lr == pytest.approx(1.0, rel=1e-12)
    assert schedule(samples).lr == schedule(samples + 1).lr == 0.1


def test_inverse_square_root_drops_to_the_minimum_after_its_last_step():
    schedule = make_schedule(run(lr=1.0, min_lr=0.01, decay="inverse-square-root", warmup_iters=4))
    assert schedule(64).lr == 1.0
    assert schedule(256).lr == 0.5
    assert schedule(1600).lr == 0.2
    assert schedule(1601).lr == 0.01


def test_wsd_falls_over_the_last_tenth_of_its_decay_length_unless_set_otherwise():
    schedule = make_schedule(run(lr=1.0, decay="wsd", wsd_decay_style="linear"))
    assert [schedule(n).lr for n in (0, 1440, 1520, 1600)] == [1.0, 1.0, 0.5, 0.0]
    schedule = make_schedule(run(lr=1.0, decay="wsd", wsd_decay_style="linear", wsd_decay_iters=50))
    assert [schedule(n).lr for n in (800, 1200, 1600)] == [1.0, 0.5, 0.0]


@given(st.integers(1, 10**6))
def test_a_warm_up_of_nine_tenths_leaves_room_for_the_default_wsd_decay(samples):
    make_schedule(run(train_iters=None, train_samples=samples, decay="wsd", warmup_fraction=0.9))


def test_warm_up_ends_at_exactly_the_peak_and_cosine_at_the_minimum():
    schedule = make_schedule(
        run(lr=1e-3, min_lr=1e-5, decay="cosine", warmup_iters=10, weight_decay=0.1)
    )
    assert schedule(0) == LrWd(lr=0.0, weight_decay=0.1)
    assert schedule(160).lr == 1e-3
    assert schedule(1600).lr == schedule(10**12).lr == 1e-5
    # 5e-4 + (5e-3 - 5e-4) is not 5e-3: the last sample of the warm-up belongs to the warm-up
    assert make_schedule(run(lr=5e-3, min_lr=5e-4, warmup_iters=10))(160).lr == 5e-3


def test_weight_decay_ramps_over_the_whole_run_though_the_learning_rate_decays_sooner():
    schedule = make_schedule(
        run(
            decay_iters=10,
            weight_decay_incr_style="linear",
            start_weight_decay=0.0,
            end_weight_decay=1.0,
        )
    )
    assert [schedule(n).weight_decay for n in (0, 400, 1600, 1601)] == [0.0, 0.25, 1.0, 1.0]


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"decay": "exponential"}, "schedule.decay"),
        ({"decay": "wsd", "wsd_decay_style": "step"}, "schedule.wsd_decay_style"),
        (
            {
                "weight_decay_incr_style": "quadratic",
                "start_weight_decay": 0.0,
                "end_weight_decay": 0.1,
            },
            "schedule.weight_decay_incr_style",
        ),
        ({"lr": -1.0, "min_lr": 0.0}, "schedule.lr"),
        ({"lr": math.nan}, "schedule.lr"),
        ({"lr": math.inf}, "schedule.lr"),
        ({"min_lr": 2e-3}, "schedule.min_lr"),
        ({"min_lr": -1e-9}, "schedule.min_lr"),
        ({"init_lr": 2e-3}, "schedule.init_lr"),
        ({"weight_decay": -0.1}, "schedule.weight_decay"),
        ({"start_weight_decay": 0.1}, "schedule.start_weight_decay"),
        ({"end_weight_decay": 0.1}, "schedule.end_weight_decay"),
        (
            {"weight_decay_incr_style": "linear", "end_weight_decay": 0.1},
            "schedule.weight_decay_incr_style",
        ),
        (
            {
                "weight_decay_incr_style": "linear",
                "start_weight_decay": 0.2,
                "end_weight_decay": 0.1,
            },
            "schedule.start_weight_decay",
        ),
        ({"warmup_iters": -1}, "schedule.warmup_iters"),
        ({"warmup_iters": 100}, "schedule.warmup_iters"),  # the whole decay length
        ({"warmup_samples": 1600}, "schedule.warmup_samples"),
        ({"warmup_fraction": 1.0}, "schedule.warmup_fraction"),
        ({"warmup_iters": 1, "warmup_fraction": 0.1}, "schedule.warmup_fraction"),
        ({"decay_iters": 0}, "schedule.decay_iters"),
        ({"decay_iters": 10, "decay_samples": 160}, "schedule.decay_samples"),
        ({"wsd_decay_iters": 10}, "schedule.wsd_decay_iters"),  # not with cosine
        ({"decay": "wsd", "wsd_decay_iters": 101}, "schedule.wsd_decay_iters"),
        ({"decay": "wsd", "warmup_iters": 91}, "schedule.warmup_iters"),
        ({"train_iters": None}, "train_iters"),
        ({"train_iters": 0}, "train_iters"),
        ({"train_samples": 1600}, "train_iters"),  # beside train_iters
        ({"train_iters": None, "train_samples": 0}, "train_samples"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused_with_its_field(changes, field):
    config = run(**changes)
    assert [problem.field for problem in schedule_problems(config)].count(field) == 1
    with pytest.raises(ConfigError, match=rf"(?m)^ *{field} = .+: .+"):
        make_schedule(config)


def test_all_problems_are_reported_at_once():
    config = run(decay="step", min_lr=1.0, warmup_iters=100)
    fields = [problem.field for problem in schedule_problems(config)]
    assert fields == ["schedule.decay", "schedule.min_lr", "schedule.warmup_iters"]


def test_whatever_upstream_asserts_against_is_refused():
    good = run(warmup_iters=2)
    for changes in (
        {"min_lr": 1.0},
        {"init_lr": 1.0},
        {"min_lr": -1.0},
        {"warmup_iters": 100},
        {"decay_iters": 0},
        {"weight_decay": -1.0},
    ):
        config = attrs.evolve(good, schedule=attrs.evolve(good.schedule, **changes))
        with pytest.raises(AssertionError):
            upstream(config)
        with pytest.raises(ConfigError):
            make_schedule(config)


def test_negative_consumed_samples_are_refused():
    with pytest.raises(ValueError, match="consumed_samples = -1: must be 0 or more"):
        make_schedule(run())(-1)

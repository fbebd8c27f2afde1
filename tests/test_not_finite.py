"""Numbers that go wrong: no rank updates, the run stops in time, the step can be run again."""

import math
import os
from functools import partial, reduce

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import megafn as mf
from checkpoint_runs import loader, same, text_config
from equivalence import assert_equal, local_parts, share, tiny, uneven
from megafn.pure.spikes import LEAST, WINDOW, append_norm, spike_limit
from megafn.runtime.families.gpt import gpt_batch
from megafn.runtime.model.losses import token_loss

SP, DIST = dict(sequence_parallel=True), dict(use_distributed_optimizer=True)
GRADIENT = 7.0  # the loss stays, its gradient is too large for a norm
BAD = {
    2: math.nan,
    3: math.inf,
    4: GRADIENT,
    6: -math.inf,
}  # iteration: what the last rows' loss is multiplied by


def batch(raw, config, pg):
    made = gpt_batch(raw, config, pg)
    return (
        made
        if "factor" not in raw
        else made
        | {"factor": torch.as_tensor(raw["factor"])[:, None].expand_as(made["tokens"]).contiguous()}
    )


def loss(logits, batch, pg):
    made = token_loss(logits, batch, pg)
    if "factor" in batch and batch["factor"].max() == GRADIENT:
        made.sum.register_hook(lambda gradient: gradient * 1e30)
        return made
    return attrs.evolve(made, sum=made.sum * batch["factor"].max()) if "factor" in batch else made


POISONED = mf.Step(batch=batch, forward=mf.step_fn("gpt").forward, loss=loss)


def rows_of(config, iteration, bad=BAD):
    """A global batch whose last micro-batch (of the last data-parallel rank) is poisoned.

    The keys of `bad` count iterations from 1.
    """
    rows = uneven(attrs.evolve(config, micro_batch_size=2), iteration)
    for i, row in enumerate(rows):
        row["factor"] = torch.tensor(
            bad.get(iteration + 1, 1.0) if i >= len(rows) - config.micro_batch_size else 1.0
        )
    return rows


def run(config):
    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size()), timeout_seconds=60
    ) as pg:
        state = mf.setup(config, pg)
        start, curve, seen = local_parts(state), [], []
        for iteration in range(config.train_iters):
            before = local_parts(state)
            state, metrics = mf.train_step(
                state, share(rows_of(config, iteration), config, pg), POISONED
            )
            assert metrics.skipped == (iteration + 1 in BAD) == (metrics.grad_norm is None)
            assert same(before, local_parts(state)) == (metrics.skipped or metrics.lr == 0)
            seen.append(
                (metrics.skipped, metrics.lr, state.skipped_in_a_row, state.skipped_samples)
            )
            if not metrics.skipped:
                curve.append((metrics.loss, metrics.grad_norm))
        return curve, start, local_parts(state), seen


@pytest.mark.parametrize(
    "n, layout",
    [
        (2, dict(tp=2, **SP)),
        (4, dict(pp=2, **DIST)),
        (4, dict(cp=2)),
        (2, DIST | dict(dtype="bf16")),
    ],
)
def test_an_update_that_is_not_finite_is_left_out_on_every_rank_alike(n, layout, pool):
    base = dict(steps=8, warmup_iters=1)
    single, results = pool(1, run, tiny(**base)), pool(n, run, tiny(**base, **layout))
    assert [one[0] for one in single[0][3]] == [i in BAD for i in range(1, 9)] and [
        one[2] for one in single[0][3]
    ] == [0, 1, 2, 3, 0, 1, 0, 0]
    assert all(result[3] == single[0][3] for result in results)
    if "dtype" not in layout:
        assert_equal(single[0][:3], [result[:3] for result in results])


def run_with_spikes(config, folder=None):
    """As `run`; with a folder, in two halves with a checkpoint between them, before the spike."""

    def go(state, iterations):
        seen = []
        for iteration in iterations:
            before = local_parts(state)
            state, metrics = mf.train_step(
                state, share(rows_of(config, iteration, {11: 1e4}), config, pg), POISONED
            )
            assert same(before, local_parts(state)) == (metrics.skipped or metrics.lr == 0)
            seen.append(
                (
                    metrics.skipped,
                    metrics.lr,
                    metrics.grad_norm,
                    metrics.loss,
                    state.skipped_in_a_row,
                )
            )
        return state, seen

    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size()), timeout_seconds=60
    ) as pg:
        state, seen = go(mf.setup(config, pg), range(10 if folder else config.train_iters))
        if folder is None:
            return seen, local_parts(state)
        mf.save(state, folder)
        state, more = go(mf.load(mf.setup(config, pg), folder), range(10, config.train_iters))
        return seen + more, local_parts(state)


def test_a_spike_of_the_gradient_norm_updates_nothing_in_every_layout_and_behind_a_checkpoint(
    pool, tmp_path
):
    base = dict(steps=13, warmup_iters=1, spike_factor=20.0)
    (single,) = pool(1, run_with_spikes, tiny(**base))
    assert [one[0] for one in single[0]] == [i == 11 for i in range(1, 14)] and single[0][10][
        2
    ] > 100 * single[0][9][2]
    assert [one[4] for one in single[0]] == [i == 11 for i in range(1, 14)], (
        "one left out, and not in a row with another"
    )
    assert (
        single[0][11][1]
        == pool(1, run_with_spikes, tiny(**base | dict(spike_factor=None)))[0][0][10][1]
    ), "the schedule did not move"
    for n, layout in ((2, dict(tp=2, **SP)), (4, dict(pp=2, **DIST))):
        for seen, _ in pool(n, run_with_spikes, tiny(**base, **layout)):
            for here, there in zip(seen, single[0], strict=True):
                assert here == pytest.approx(there, rel=1e-4)
    whole, halves = (
        pool(2, run_with_spikes, tiny(**base, **DIST), folder)[0]
        for folder in (None, str(tmp_path))
    )
    assert whole[0] == halves[0] and same(whole[1], halves[1])


norms = st.floats(1e-3, 1e3)


@given(st.lists(norms, max_size=60), norms, st.floats(1.01, 100))
def test_norms_that_rise_for_good_are_spikes_for_half_a_window_at_most(before, level, factor):
    seen, held = reduce(append_norm, before, ()), []
    for _ in range(WINDOW):
        held.append(level > spike_limit(seen, factor))
        seen = append_norm(seen, level)
    assert not any(held[WINDOW // 2 + 1 :])
    assert seen == (level,) * WINDOW and spike_limit(seen, factor) == factor * level


@given(st.lists(norms, min_size=LEAST, max_size=WINDOW), st.floats(1.01, 100))
def test_a_spike_is_above_so_many_times_the_usual_norm(before, factor):
    assert factor * min(before) <= spike_limit(before, factor) <= factor * max(before)
    assert spike_limit(before, None) == spike_limit(before[: LEAST - 1], factor) == math.inf
    assert (
        append_norm(before, math.nan)
        == append_norm(before, None)
        == append_norm(before, math.inf)
        == tuple(before)
    )


def poisoned_loader(config, bad):
    for number, made in enumerate(loader(config)):
        iteration, i = divmod(number, config.global_batch_size // config.micro_batch_size)
        yield made | {
            "factor": torch.full(
                (config.micro_batch_size,), math.nan if iteration + 1 in bad and i == 0 else 1.0
            )
        }


def test_so_many_in_a_row_end_the_run_and_the_step_can_be_run_again(tmp_path):
    config = attrs.evolve(
        text_config(tmp_path, steps=9, global_batch_size=8), data=None, stop_after_skipped=3
    )
    seen, give = [], partial(poisoned_loader, config, (2, 3, 5, 6, 7))
    with pytest.raises(
        FloatingPointError,
        match=r"iterations 5 to 7: .* 3 times in a row.*samples 32 to 55, of which 48 to 55 last; "
        r"replay\(config, 7\)",
    ):
        mf.train(config, step=POISONED, batches=give(), on_metrics=[seen.append])
    assert [m.skipped for m in seen] == [False, True, True, False, True, True, True] and [
        m.iteration for m in seen
    ] == [*range(1, 8)]
    for iteration in (1, 4, 7):
        again, there = (
            mf.replay(config, iteration, step=POISONED, batches=give()),
            seen[iteration - 1],
        )
        assert (again.iteration, again.lr, again.skipped, again.grad_norm) == (
            iteration,
            there.lr,
            there.skipped,
            there.grad_norm,
        )
        assert again.loss == there.loss or math.isnan(again.loss) and math.isnan(there.loss)
    assert sorted(os.listdir(tmp_path)) == [
        "iteration-00000002",
        "iteration-00000004",
        "iteration-00000006",
    ], "replay writes nothing"
    forgiving = attrs.evolve(config, stop_after_skipped=0)
    assert mf.train(forgiving, step=POISONED, batches=give()).iteration == 9
    with pytest.raises(
        mf.ConfigError, match="iteration = 10: the run has 1 to 9; give one of them"
    ):
        mf.replay(config, 10, step=POISONED, batches=give())


def test_a_step_of_a_run_on_text_is_replayed_bit_for_bit(tmp_path):
    config, seen = text_config(tmp_path, steps=5), []
    mf.train(config, on_metrics=[seen.append])
    for iteration in (1, 3, 4):
        again = mf.replay(config, iteration)
        assert (again.loss, again.grad_norm) == (
            seen[iteration - 1].loss,
            seen[iteration - 1].grad_norm,
        )

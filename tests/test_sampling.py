"""Every sample is read by one rank only, in an order that seed and consumed samples decide."""

import tracemalloc
from collections import Counter
from itertools import islice, pairwise, permutations
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megafn.pure import sampling
from megafn.pure.sampling import batch_indices, sample_indices, split_among_ranks

styles = st.sampled_from(("single", "cyclic"))
sizes = st.integers(1, 6)
seeds = st.integers(-(2**63), 2**64)


def global_batch(consumed, *, num_samples, global_batch_size, style="cyclic", seed=0):
    """The whole global batch in its order: what one rank with one micro-batch reads."""
    share = sample_indices(
        consumed,
        style=style,
        seed=seed,
        num_samples=num_samples,
        dp_rank=0,
        dp=1,
        global_batch_size=global_batch_size,
        micro_batch_size=global_batch_size,
    )
    return share[0] if share else ()


def gathered(shares):
    """The global order, from the shares of all ranks: micro step by micro step, rank by rank."""
    return tuple(
        index for step in zip(*shares, strict=True) for micro_batch in step for index in micro_batch
    )


@st.composite
def layouts_of(draw, global_batch_size):
    """A (micro_batch_size, dp) that cuts the global batch without a remainder."""
    divisors = [d for d in range(1, global_batch_size + 1) if global_batch_size % d == 0]
    dp = draw(st.sampled_from(divisors))
    return draw(st.sampled_from([d for d in divisors if (global_batch_size // dp) % d == 0])), dp


@given(styles, seeds, sizes, sizes, sizes, st.integers(1, 300), st.integers(0, 500))
def test_ranks_together_read_the_global_batch_each_sample_by_one_rank(
    style, seed, micro_batch_size, dp, num_micro_batches, num_samples, consumed
):
    size = micro_batch_size * dp * num_micro_batches
    num_samples = max(num_samples, size)
    shares = [
        sample_indices(
            consumed,
            style=style,
            seed=seed,
            num_samples=num_samples,
            global_batch_size=size,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp=dp,
        )
        for rank in range(dp)
    ]
    whole = global_batch(
        consumed, style=style, seed=seed, num_samples=num_samples, global_batch_size=size
    )
    assert gathered(shares) == whole
    if whole:
        assert all(len(share) == num_micro_batches for share in shares)
        assert {len(micro_batch) for share in shares for micro_batch in share} == {micro_batch_size}
        assert {type(index) for index in whole} == {int}
    if style == "single":
        assert whole == (
            tuple(range(consumed, consumed + size)) if consumed + size <= num_samples else ()
        )


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_the_split_is_megatrons_sampler_a_run_of_samples_for_each_rank_in_turn(
    micro_batch_size, dp, num_micro_batches
):
    """`MegatronPretrainingSampler` collects micro_batch_size * dp samples and keeps its slice."""
    step = micro_batch_size * dp
    for rank in range(dp):
        expected, collected = [], []
        for sample in range(step * num_micro_batches):
            collected.append(sample)
            if len(collected) == step:
                expected.append(
                    tuple(collected[rank * micro_batch_size : (rank + 1) * micro_batch_size])
                )
                collected = []
        assert split_among_ranks(
            range(step * num_micro_batches), micro_batch_size=micro_batch_size, dp_rank=rank, dp=dp
        ) == tuple(expected)


@given(seeds, st.integers(1, 200), st.integers(1, 40), st.integers(0, 3))
def test_cyclic_reads_each_sample_once_an_epoch_though_batches_run_across_the_border(
    seed, n, size, epoch
):
    first, last = epoch * n, (epoch + 1) * n
    start = first // size * size
    stream = [
        index
        for consumed in range(start, last, size)
        for index in global_batch(consumed, seed=seed, num_samples=n, global_batch_size=size)
    ]
    assert sorted(stream[first - start : last - start]) == list(range(n))


@given(st.integers(1, 2**40), st.integers(0, 2**50), seeds)
def test_cyclic_stays_within_the_samples_and_repeats_none_of_an_epoch_at_any_size(
    n, consumed, seed
):
    batch = global_batch(consumed, seed=seed, num_samples=n, global_batch_size=64)
    assert all(0 <= index < n for index in batch)
    epochs = [(consumed + k) // n for k in range(64)]
    assert len(set(zip(epochs, batch, strict=True))) == 64


@given(styles, seeds, st.integers(1, 100), st.integers(1, 12), st.data())
def test_resumed_equals_uninterrupted_though_dp_and_micro_batch_change_between(
    style, seed, extra, size, data
):
    n = size + extra
    common = {"style": style, "seed": seed, "num_samples": n, "global_batch_size": size}

    def orders(consumed, layout, count):
        micro_batch_size, dp = layout
        ranks = [
            batch_indices(
                consumed,
                count=count,
                micro_batch_size=micro_batch_size,
                dp_rank=rank,
                dp=dp,
                **common,
            )
            for rank in range(dp)
        ]
        return [gathered(shares) for shares in zip(*ranks, strict=True)]

    before, after = data.draw(layouts_of(size)), data.draw(layouts_of(size))
    stop = data.draw(st.integers(0, 6))
    stop = min(stop, n // size) if style == "single" else stop
    assert orders(0, before, stop) + orders(stop * size, after, 6 - stop) == orders(0, (size, 1), 6)


@given(st.integers(1, 100), st.integers(1, 12))
def test_single_drops_the_last_incomplete_global_batch_and_ends(n, size):
    n = n + size
    batches = list(
        batch_indices(
            style="single",
            seed=0,
            num_samples=n,
            global_batch_size=size,
            micro_batch_size=size,
            dp_rank=0,
            dp=1,
        )
    )
    assert [index for (batch,) in batches for index in batch] == list(range(n // size * size))


@given(st.integers(0, 5), st.integers(0, 40))
def test_count_ends_a_cyclic_stream_which_has_no_end_of_its_own(count, consumed):
    common = dict(
        style="cyclic",
        seed=0,
        num_samples=3,
        global_batch_size=2,
        micro_batch_size=1,
        dp_rank=0,
        dp=2,
    )
    counted = list(batch_indices(consumed, count=count, **common))
    assert len(counted) == count
    assert counted == list(islice(batch_indices(consumed, **common), count))


def test_epochs_and_seeds_draw_every_permutation_equally_often():
    """Chi-squared within 4 standard deviations for every permutation of 4 samples."""
    draws = 6000
    degrees = 23
    by_epoch = Counter(
        global_batch(4 * epoch, num_samples=4, global_batch_size=4) for epoch in range(draws)
    )
    by_seed = Counter(
        global_batch(0, seed=seed, num_samples=4, global_batch_size=4) for seed in range(draws)
    )
    for counts in (by_epoch, by_seed):
        chi2 = sum(
            (counts[order] - draws / 24) ** 2 / (draws / 24) for order in permutations(range(4))
        )
        assert abs(chi2 - degrees) < 4 * (2 * degrees) ** 0.5


def test_neighbours_in_the_data_are_not_neighbours_in_the_order():
    """Differences of successive samples are uniform: a shuffle that keeps runs fails this."""
    n = 100
    differences = Counter()
    for seed in range(200):
        order = global_batch(0, seed=seed, num_samples=n, global_batch_size=n)
        differences.update((b - a) % n for a, b in pairwise(order))
    degrees = n - 2
    chi2 = sum((differences[d] - 200) ** 2 / 200 for d in range(1, n))
    assert abs(chi2 - degrees) < 4 * (2 * degrees) ** 0.5


def test_the_shuffled_order_never_changes_between_versions_since_checkpoints_rely_on_it():
    assert global_batch(7, seed=1234, num_samples=10, global_batch_size=6) == (4, 2, 6, 0, 9, 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"style": "random"}, "style = 'random': must be one of single, cyclic"),
        ({"consumed_samples": -8}, "consumed_samples = -8: must be 0 or more"),
        ({"num_samples": 0}, "num_samples = 0: must be at least 1"),
        ({"num_samples": 7}, "num_samples = 7: less than one global batch of 8"),
        ({"global_batch_size": 0}, "global_batch_size = 0: must be at least 1"),
        ({"micro_batch_size": 0}, "micro_batch_size = 0: must be at least 1"),
        ({"dp": 0}, "dp = 0: must be at least 1"),
        ({"dp_rank": 2}, "dp_rank = 2: must be 0 to dp - 1 = 1"),
        ({"dp_rank": -1}, "dp_rank = -1: must be 0 to dp - 1 = 1"),
        (
            {"micro_batch_size": 3},
            r"global_batch_size = 8: must be a multiple of micro_batch_size \* dp = 3 \* 2",
        ),
        ({"count": -1}, "count = -1: must be 0 or more"),
    ],
)
def test_bad_arguments_are_reported_before_the_first_batch_is_asked_for(changes, message):
    good = dict(
        consumed_samples=0,
        style="single",
        seed=0,
        num_samples=20,
        global_batch_size=8,
        micro_batch_size=2,
        dp_rank=0,
        dp=2,
    )
    with pytest.raises(ValueError, match=message):
        batch_indices(**good | changes)


TRILLION = 10**12


def test_an_order_of_10_to_the_12_samples_costs_the_same_at_every_position():
    """Counted: numbers that are shuffled, and bytes. Walks that leave the range add a few."""
    for num_samples in (10_000, TRILLION, 2**40 - 1, 2**60):
        for consumed in (0, num_samples // 3, num_samples - 64, 5 * num_samples - 32):
            batch, shuffled, peak = counted_batch(consumed, num_samples)
            assert len(set(batch)) == 64 and 0 <= min(batch) and max(batch) < num_samples
            assert 64 <= shuffled <= 80
            assert peak < 100_000


def counted_batch(consumed, num_samples):
    """A global batch of 64, the numbers that `_shuffle_grid` was given for it, and peak bytes."""
    shuffle = sampling._shuffle_grid
    shuffled = 0

    def counting(value, *rest):
        nonlocal shuffled
        shuffled += value.size
        return shuffle(value, *rest)

    with mock.patch.object(sampling, "_shuffle_grid", counting):
        tracemalloc.start()
        batch = global_batch(consumed, num_samples=num_samples, global_batch_size=64)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return batch, shuffled, peak


def test_no_sample_among_10_to_the_12_comes_twice_in_what_is_looked_at():
    """20 stretches of an epoch, its last samples among them: 80,000 that are all different."""
    size = 4000
    starts = [*range(0, TRILLION - size, TRILLION // 19), TRILLION - size]
    seen = set()
    for start in starts:
        seen.update(global_batch(start, num_samples=TRILLION, global_batch_size=size))
    assert len(starts) == 20 and len(seen) == len(starts) * size
    # They lie everywhere: the mean of so many is within 1% of the middle.
    assert abs(sum(seen) / len(seen) / TRILLION - 0.5) < 0.01
    across_epochs = global_batch(TRILLION - 2, num_samples=TRILLION, global_batch_size=4)
    assert len(set(across_epochs)) == 4

"""Which samples a data-parallel rank reads: a pure function of how many samples the run has consumed.

The order of samples in the run depends neither on dp nor on micro_batch_size; these only say who reads which part of
a global batch. So a run resumed at another dp goes on with the same samples in the same order, from one number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count as count_from
from itertools import takewhile
from typing import TypeVar

import numpy as np

T = TypeVar("T")
STYLES = ("single", "cyclic")


def split_among_ranks(
    global_batch: Sequence[T], *, micro_batch_size: int, dp_rank: int, dp: int
) -> tuple[tuple[T, ...], ...]:
    """The micro-batches of one rank: each run of micro_batch_size * dp samples is dealt out, rank after rank.

    As `MegatronPretrainingSampler` of Megatron-LM does it. Returns [num_micro_batches][micro_batch_size] samples.
    Raises ValueError where the global batch is not a multiple of micro_batch_size * dp.

    >>> split_among_ranks("abcdefgh", micro_batch_size=2, dp_rank=1, dp=2)
    (('c', 'd'), ('g', 'h'))
    """
    _positive(micro_batch_size=micro_batch_size, dp=dp)
    if not 0 <= dp_rank < dp:
        raise ValueError(f"dp_rank = {dp_rank}: choose 0 to dp - 1 = {dp - 1}")
    step = micro_batch_size * dp
    if len(global_batch) % step:
        raise ValueError(
            f"global_batch_size = {len(global_batch)}: choose a multiple of "
            f"micro_batch_size * dp = {micro_batch_size} * {dp}"
        )
    starts = range(dp_rank * micro_batch_size, len(global_batch), step)
    return tuple(tuple(global_batch[start : start + micro_batch_size]) for start in starts)


def sample_indices(
    consumed_samples: int,
    *,
    style: str,
    seed: int,
    num_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp: int,
) -> tuple[tuple[int, ...], ...]:
    """This rank's share of the global batch that starts behind `consumed_samples` samples.

    "single": sample 0 to num_samples - 1 in order, once. "cyclic": endless; each epoch is another permutation of all
    samples, drawn from (seed, epoch), and a global batch may run across the border of two, so that none is left out.

    Returns [num_micro_batches][micro_batch_size] indices from 0 to num_samples - 1, cut as `split_among_ranks` cuts them; empty
    where "single" has no whole global batch left. Raises ValueError for arguments that fit no run.

    >>> run = dict(seed=1234, num_samples=10, global_batch_size=4, micro_batch_size=1, dp_rank=1, dp=2)
    >>> [sample_indices(consumed, style="single", **run) for consumed in (0, 4, 8)]
    [((1,), (3,)), ((5,), (7,)), ()]
    >>> [sample_indices(consumed, style="cyclic", **run) for consumed in (0, 4, 8)]
    [((7,), (3,)), ((8,), (4,)), ((6,), (9,))]
    """
    if style not in STYLES:
        raise ValueError(f"style = {style!r}: choose one of {', '.join(STYLES)}")
    _positive(num_samples=num_samples, global_batch_size=global_batch_size)
    if consumed_samples < 0:
        raise ValueError(
            f"consumed_samples = {consumed_samples}: a run starts at 0 samples; give 0 or more"
        )
    if style == "single" and num_samples < global_batch_size:
        raise ValueError(
            f"num_samples = {num_samples}: less than one global batch of {global_batch_size}; "
            'give more data, a smaller global_batch_size, or the sampler "cyclic"'
        )
    end = consumed_samples + global_batch_size
    share = split_among_ranks(
        range(consumed_samples, end), micro_batch_size=micro_batch_size, dp_rank=dp_rank, dp=dp
    )
    if style == "single":
        return share if end <= num_samples else ()
    epoch, position = np.divmod(np.asarray(share, dtype=np.uint64), np.uint64(num_samples))
    return tuple(map(tuple, _permute(position, num_samples, seed, epoch).tolist()))


def batch_indices(
    consumed_samples: int = 0,
    *,
    count: int | None = None,
    style: str,
    seed: int,
    num_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp: int,
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """This rank's shares of the global batches from `consumed_samples` on, each as `sample_indices` returns it.

    Ends after `count` global batches (None: never) and, where the style is "single", with the last whole one.

    >>> list(batch_indices(4, style="single", seed=1234, num_samples=13, global_batch_size=4, micro_batch_size=2,
    ...                    dp_rank=0, dp=2))
    [((4, 5),), ((8, 9),)]
    """
    if count is not None and count < 0:
        raise ValueError(f"count = {count}: give 0 or more global batches, or None for all")
    share = partial(
        sample_indices,
        style=style,
        seed=seed,
        num_samples=num_samples,
        dp_rank=dp_rank,
        dp=dp,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
    )
    share(consumed_samples)  # bad arguments raise here, not at the first `next`
    starts = (
        count_from(consumed_samples, global_batch_size)
        if count is None
        else range(
            consumed_samples, consumed_samples + count * global_batch_size, global_batch_size
        )
    )
    return takewhile(bool, map(share, starts))


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} = {size}: give 1 or more")


# A Feistel network, not numpy's permutation: an index costs the same at any num_samples, nothing is kept between calls
# (a permutation of 10^9 samples is 8 GB on every rank), and the order can't change with numpy's version, as
# `Generator.permutation` may (NEP 19), which would make a resumed run read some samples twice.

_ROUNDS = 6


def _permute(position: np.ndarray, n: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where `position` stands in the permutation of range(n) that (seed, epoch) draws; uint64 arrays of equal shape.

    A position is a pair (left, right) on an a x b grid just larger than n. Adding a hash of one half to the other can
    be undone, so rounds of it permute the grid; walking on until the value is below n permutes range(n) (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    rows = math.isqrt(n - 1) + 1
    a, b = np.uint64(rows), np.uint64(-(-n // rows))
    key = _mix(_mix(np.full_like(epoch, seed % 2**64)) + epoch)

    def shuffle_grid(value: np.ndarray, key: np.ndarray) -> np.ndarray:
        # The hash is reduced before the sum: a sum that wraps at 2^64 could not be undone.
        left, right = np.divmod(value, b)
        for _ in range(_ROUNDS):
            key = _mix(key)
            left = (left + _mix(key ^ right) % a) % a
            key = _mix(key)
            right = (right + _mix(key ^ left) % b) % b
        return left * b + right

    value = shuffle_grid(position, key)
    while (outside := value >= n).any():
        value[outside] = shuffle_grid(value[outside], key[outside])
    return value


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's step: a bijection of 64-bit words that looks random (Steele, Lea and Flood, OOPSLA 2014)."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

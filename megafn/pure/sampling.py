"""Which samples a data-parallel rank reads, as a function of how many samples the run has consumed.

The order of samples in the run depends neither on dp nor on micro_batch_size, which only decide
who reads which part of a global batch. So a run resumed with another dp continues with the same
samples in the same order, from one number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import count as count_from
from itertools import takewhile
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# One rank's share of a global batch: [num_micro_batches][micro_batch_size] indices.
Share = tuple[tuple[int, ...], ...]

STYLES = ("single", "cyclic")


def split_among_ranks(
    global_batch: Sequence[T], *, micro_batch_size: int, dp_rank: int, dp: int
) -> tuple[tuple[T, ...], ...]:
    """The micro-batches of one rank.

    Each run of micro_batch_size * dp samples gives every rank in turn micro_batch_size, as in
    Megatron-LM's `MegatronPretrainingSampler`. Returns [num_micro_batches][micro_batch_size]
    samples. Raises ValueError if the global batch is not a multiple of micro_batch_size * dp.

    >>> split_among_ranks("abcdefgh", micro_batch_size=2, dp_rank=1, dp=2)
    (('c', 'd'), ('g', 'h'))
    """
    _check_at_least_one(micro_batch_size=micro_batch_size, dp=dp)
    if not 0 <= dp_rank < dp:
        raise ValueError(f"dp_rank = {dp_rank}: must be 0 to dp - 1 = {dp - 1}")
    step = micro_batch_size * dp
    if len(global_batch) % step:
        raise ValueError(
            f"global_batch_size = {len(global_batch)}: must be a multiple of "
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
) -> Share:
    """This rank's share of the global batch that follows the first `consumed_samples` samples.

    "single": sample 0 to num_samples - 1 in order, once. "cyclic": endless; each epoch is another
    permutation of all samples, drawn from (seed, epoch), and a global batch may cross from one
    epoch to the next, so that no sample is left out.

    Returns [num_micro_batches][micro_batch_size] indices from 0 to num_samples - 1, cut as
    `split_among_ranks` cuts them; empty if "single" has no whole global batch left. Raises
    ValueError for arguments that fit no run.

    >>> run = dict(
    ...     seed=1234, num_samples=10, global_batch_size=4, micro_batch_size=1, dp_rank=1, dp=2)
    >>> [sample_indices(consumed, style="single", **run) for consumed in (0, 4, 8)]
    [((1,), (3,)), ((5,), (7,)), ()]
    >>> [sample_indices(consumed, style="cyclic", **run) for consumed in (0, 4, 8)]
    [((7,), (3,)), ((8,), (4,)), ((6,), (9,))]
    """
    if style not in STYLES:
        raise ValueError(f"style = {style!r}: must be one of {', '.join(STYLES)}")
    _check_at_least_one(num_samples=num_samples, global_batch_size=global_batch_size)
    if consumed_samples < 0:
        raise ValueError(f"consumed_samples = {consumed_samples}: must be 0 or more")
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
    numbers = np.asarray(share, dtype=np.uint64)
    epoch, position = np.divmod(numbers, np.uint64(num_samples))
    indices = _permute(position, num_samples, seed, epoch)
    return tuple(map(tuple, indices.tolist()))


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
) -> Iterator[Share]:
    """This rank's shares of the global batches after `consumed_samples` samples.

    Each is as `sample_indices` returns it. Ends after `count` global batches (None: never) and, if
    the style is "single", with the last whole one.

    >>> list(batch_indices(
    ...     4, style="single", seed=1234, num_samples=13, global_batch_size=4, micro_batch_size=2,
    ...     dp_rank=0, dp=2))
    [((4, 5),), ((8, 9),)]
    """
    if count is not None and count < 0:
        raise ValueError(f"count = {count}: must be 0 or more global batches, or None for all")
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
    # Bad arguments raise here, not at the first `next`.
    share(consumed_samples)
    starts: Iterable[int]
    if count is None:
        starts = count_from(consumed_samples, global_batch_size)
    else:
        end = consumed_samples + count * global_batch_size
        starts = range(consumed_samples, end, global_batch_size)
    return takewhile(bool, map(share, starts))


def _check_at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} = {size}: must be at least 1")


# A Feistel network, not numpy's permutation: an index costs the same at any num_samples, nothing is
# kept between calls (a permutation of 10^9 samples is 8 GB on every rank), and the order can't
# change with numpy's version, as `Generator.permutation` may (NEP 19), which would make a resumed
# run read some samples twice.

_ROUNDS = 6


def _permute(position: np.ndarray, n: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where `position` stands in the permutation of range(n) that (seed, epoch) draws.

    `position` and `epoch` are uint64 arrays of equal shape, as is the result.

    A position is a pair (left, right) on an a x b grid just larger than n. Adding a hash of one
    half to the other can be undone, so rounds of it permute the grid; repeating them until the
    value is below n permutes range(n) (Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002).
    """
    rows = math.isqrt(n - 1) + 1
    a = np.uint64(rows)
    b = np.uint64(-(-n // rows))
    key = _mix(_mix(np.full_like(epoch, seed % 2**64)) + epoch)
    value = _shuffle_grid(position, key, a, b)
    while (outside := value >= n).any():
        value[outside] = _shuffle_grid(value[outside], key[outside], a, b)
    return value


def _shuffle_grid(value: np.ndarray, key: np.ndarray, a: np.uint64, b: np.uint64) -> np.ndarray:
    """A permutation of range(a * b), drawn from `key`."""
    # The hash is reduced before the sum: a sum that wraps at 2^64 could not be undone.
    left, right = np.divmod(value, b)
    for _ in range(_ROUNDS):
        key = _mix(key)
        left = (left + _mix(key ^ right) % a) % a
        key = _mix(key)
        right = (right + _mix(key ^ left) % b) % b
    return left * b + right


def _mix(z: np.ndarray) -> np.ndarray:
    """A step of SplitMix64: a bijection of 64-bit words that looks random.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def epochs_in_words(samples: int, *, tokens: int, seq_length: int) -> str:
    """How often megatron-core reads a corpus of `tokens` for at least `samples` sequences.

    All that its order depends on besides corpus and seed. Several epochs are shuffled together,
    except the last one if less than 80% of it is read (`GPTDataset`).

    >>> epochs_in_words(8, tokens=65, seq_length=8), epochs_in_words(9, tokens=65, seq_length=8)
    ('1 epoch', '2 epochs, the last one apart')
    >>> epochs_in_words(15, tokens=65, seq_length=8)
    '2 epochs'
    """
    epochs = max(1, -(-(samples * seq_length + 1) // tokens))
    if epochs == 1:
        return "1 epoch"
    samples_before_last = ((epochs - 1) * tokens - 1) // seq_length
    samples_of_epoch = (tokens - 1) // seq_length
    is_apart = samples - samples_before_last < int(0.80 * samples_of_epoch)
    return f"{epochs} epochs" + (", the last one apart" if is_apart else "")

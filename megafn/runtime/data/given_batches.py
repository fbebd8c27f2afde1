"""Micro-batches that users give: how many rows they have, and whether they can be read again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data.dataloader import _BaseDataLoaderIter

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig, num_micro_batches

T = TypeVar("T")

_NONE_LEFT: Any = object()


def rows_of(raw: Any) -> int | None:
    """How many rows a raw micro-batch has, or None if its type does not say.

    >>> rows_of({"input_ids": torch.zeros(2, 16), "labels": torch.zeros(2)})
    2
    >>> rows_of([{"text": "one row"}])
    1
    """
    if isinstance(raw, (torch.Tensor, np.ndarray)):
        return len(raw) if raw.ndim > 0 else None
    if isinstance(raw, Mapping):
        return _common_length(raw.values())
    if isinstance(raw, (list, tuple)) and raw:
        if isinstance(raw[0], (torch.Tensor, np.ndarray)):
            # as a TensorDataset gives them; one-dimensional ones may be rows, or labels
            return _common_length(raw) if any(item.ndim > 1 for item in raw) else None
        return len(raw) if isinstance(raw[0], (Mapping, str)) else None
    return None


def _common_length(values: Iterable[Any]) -> int | None:
    lengths = set()
    for value in values:
        if isinstance(value, list) or getattr(value, "ndim", 0) > 0:
            lengths.add(len(value))
    return lengths.pop() if len(lengths) == 1 else None


def without_short_end(
    micro_batches: Iterable[T], rows: int, is_short: Callable[[T], bool]
) -> Iterator[T]:
    """The micro-batches, without the last one if it has fewer than `rows` rows.

    That is what a DataLoader gives at the end of its data unless it has drop_last=True. is_short
    confirms it. Only after one that looks short is another read, to see whether it is the last.

    >>> list(without_short_end(["ab", "cd", "e"], 2, lambda letters: len(letters) < 2))
    ['ab', 'cd', 'e']
    >>> batches = [torch.zeros(2, 4), torch.zeros(1, 4)]
    >>> len(list(without_short_end(batches, 2, lambda batch: len(batch) < 2)))
    1
    """
    iterator = iter(micro_batches)
    for micro_batch in iterator:
        count = rows_of(micro_batch)
        if count is None or count >= rows:
            yield micro_batch
            continue
        following = next(iterator, _NONE_LEFT)
        if following is _NONE_LEFT and is_short(micro_batch):
            return
        yield micro_batch
        if following is not _NONE_LEFT:
            yield following


def check_valid_batches(
    valid_batches: Iterable[Any], config: TrainConfig, dp: int, evaluations: int
) -> None:
    """Raises ConfigError if that many evaluations cannot be made of the batches.

    Nothing is read: an iterator, which can be read only once, is recognised, and a length that is
    too small.
    """
    if evaluations > 1 and is_read_once(valid_batches):
        raise ConfigError(
            f"valid_batches: an iterator ({type(valid_batches).__name__}) can be read only once, "
            f"and this run evaluates {evaluations} times; give what can be iterated anew, such as "
            "a DataLoader or a list"
        )
    length = known_length(valid_batches)
    least = num_micro_batches(config, dp)
    if evaluations > 0 and length is not None and length < least:
        raise ConfigError(
            f"valid_batches: {length} micro-batches, fewer than the {least} of one global batch on "
            "each rank; give more, or set eval_iters = 0"
        )


def is_read_once(values: Iterable[Any]) -> bool:
    """Whether these are a generator, or an iterator of Python or of a DataLoader.

    A class with both __iter__ and __next__ may well start over in __iter__.

    >>> is_read_once(iter([1])), is_read_once(zip([1])), is_read_once([1])
    (True, True, False)
    """
    if isinstance(values, (Generator, _BaseDataLoaderIter)):
        return True
    return isinstance(values, Iterator) and type(values).__module__ in ("builtins", "itertools")


def known_length(values: Iterable[Any]) -> int | None:
    """`len`, or None if there is none, as of a generator or a DataLoader of a stream."""
    try:
        return len(values)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def passes_over(valid_batches: Iterable[T]) -> Iterator[Iterable[T]]:
    """The batches for one evaluation after another.

    If nothing else says whether there are any, the first micro-batch is read now, and kept for the
    first evaluation. Raises ConfigError if there is none.
    """
    if known_length(valid_batches) is not None:
        return itertools.repeat(valid_batches)
    iterator = iter(valid_batches)
    first = next(iterator, _NONE_LEFT)
    if first is _NONE_LEFT:
        raise ConfigError(
            "valid_batches: it gives no micro-batch at all; give some, or set eval_iters = 0"
        )
    first_pass = itertools.chain([first], iterator)
    return itertools.chain([first_pass], itertools.repeat(valid_batches))

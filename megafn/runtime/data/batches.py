"""Batches: this rank's share of each global batch, from a config's corpora or a user's iterable."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

import torch
from attrs import field, frozen

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig, data_of
from megafn.pure.sampling import batch_indices
from megafn.runtime.data.datasets import build_dataset
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.text.documents import SPLITS

T = TypeVar("T")

# keys of megatron-core's samples that hold token ids
_TOKEN_IDS = ("tokens", "text", "text_enc", "text_dec", "labels")


class Samples(Protocol):
    """The samples of a split, each the tensors of one sequence."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, torch.Tensor]: ...


def batches(
    config: TrainConfig,
    pg: ProcessGroups,
    *,
    split: str = "train",
    consumed_samples: int | None = None,
    count: int | None = None,
    dataset: Samples | None = None,
) -> Iterator[tuple[dict[str, torch.Tensor], ...]]:
    """This data-parallel rank's share of each global batch: a tuple of micro-batches.

    A micro-batch is a dict of CPU tensors:

    GPT: tokens, labels (the next tokens), position_ids int64 and loss_mask float32, each
        [micro_batch_size, seq_length]; attention_mask bool [micro_batch_size, 1, seq_length,
        seq_length], True = hidden, only with reset_attention_mask.
    BERT: text, types, labels, loss_mask, padding_mask (1 = real) int64 [micro_batch_size,
        seq_length], and is_random, truncated [micro_batch_size].
    T5: text_enc, enc_mask [micro_batch_size, seq_length], text_dec, dec_mask, labels, loss_mask
        [micro_batch_size, decoder_seq_length] int64.

    Of `pg` only dp_rank and dp_size decide which samples these are (see `megafn.pure.sampling`):
    tensor-, context- and pipeline-parallel ranks read the same ones. Nothing is communicated.

    Reading begins after `consumed_samples` (None: the config's consumed_samples of the split).
    "train" continues to the end of the run, or for `count` global batches; the sampler "single"
    reads megatron-core's order straight, "cyclic" shuffles each epoch anew. "valid" and "test" give
    `count` (None: eval_iters) global batches, always the same ones, so that evaluations can be
    compared, and start over if the split is shorter. A thread reads `data.prefetch` global batches
    ahead; it ends when the iterator is closed or dropped. On CUDA the tensors are pinned.
    dataset: that of the split, if it was built before (see `build_dataset`).

    Raises ConfigError at once for data that is missing, damaged or too short (see `corpora`), and
    from the iterator for a token id outside the vocabulary.
    """
    if dataset is None:
        dataset = build_dataset(config, split)
    if consumed_samples is None:
        consumed_samples = config.consumed_samples[SPLITS.index(split)]
    shares = _shares(config, pg, split, len(dataset), consumed_samples, count)
    read = partial(
        _read_micro_batch,
        dataset,
        split=split,
        vocab_size=config.model.vocab_size,
        pin=torch.cuda.is_available(),
    )
    global_batches = (tuple(map(read, share)) for share in shares)
    return prefetched(global_batches, data_of(config).prefetch)


def _shares(
    config: TrainConfig,
    pg: ProcessGroups,
    split: str,
    samples: int,
    consumed_samples: int,
    count: int | None,
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """The samples of each micro-batch of each global batch, counted through all epochs."""
    batch_size = config.global_batch_size
    if split == "train":
        remaining = max(0, config.iterations * batch_size - consumed_samples) // batch_size
        count = remaining if count is None else min(count, remaining)
    elif count is None:
        count = config.eval_iters
    style = data_of(config).sampler if split == "train" else "single"
    if style == "single":
        # enough for the run: indices beyond the dataset start over, see _read_micro_batch
        samples = max(batch_size, consumed_samples + count * batch_size)
    return batch_indices(
        consumed_samples,
        count=count,
        style=style,
        seed=config.seed,
        num_samples=samples,
        global_batch_size=batch_size,
        micro_batch_size=config.micro_batch_size,
        dp_rank=pg.dp_rank,
        dp=pg.dp_size,
    )


def _read_micro_batch(
    dataset: Samples,
    indices: Sequence[int],
    *,
    split: str,
    vocab_size: int,
    pin: bool,
) -> dict[str, torch.Tensor]:
    rows = [dataset[index % len(dataset)] for index in indices]
    micro_batch = {}
    for key in rows[0]:
        if key != "dataset_id":  # the number of the corpus in its blend
            micro_batch[key] = _stack([row[key] for row in rows], pin)
    _check_token_ids(micro_batch, indices, split, vocab_size)
    return micro_batch


def _stack(rows: list[torch.Tensor], pin: bool) -> torch.Tensor:
    """[b, ...] of b rows, written once, into pinned memory if `pin`."""
    if not pin:
        return torch.stack(rows)
    pinned = torch.empty((len(rows), *rows[0].shape), dtype=rows[0].dtype, pin_memory=True)
    return torch.stack(rows, out=pinned)


def _check_token_ids(
    micro_batch: Mapping[str, torch.Tensor], indices: Sequence[int], split: str, vocab_size: int
) -> None:
    for key in _TOKEN_IDS:
        if key not in micro_batch:
            continue
        low, high = map(int, micro_batch[key].aminmax())
        if low < 0 or high >= vocab_size:
            raise ConfigError(
                f"data: token id {low if low < 0 else high} in the samples {indices} of {split}, "
                f"but model.vocab_size = {vocab_size}; raise it, or use the model's tokenizer"
            )


@frozen
class _Item(Generic[T]):
    """What the thread of `prefetched` passes on."""

    value: T


@frozen
class _Failure:
    """What it passes on if the next item raises."""

    error: BaseException


@frozen
class _Channel(Generic[T]):
    """Between the thread of `prefetched` and its reader."""

    free: threading.Semaphore  # places for items that are read ahead
    stop: threading.Event
    # None: no more items
    ready: SimpleQueue[_Item[T] | _Failure | None] = field(factory=SimpleQueue)


def prefetched(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items, up to `depth` of them read ahead by a thread; 0: no thread.

    The thread starts with the first item that is asked for, and has ended when the iterator is
    exhausted, closed or dropped, or when the interpreter exits. An exception in `items` is raised
    in place of its item.

    >>> list(prefetched(range(3), depth=2))
    [0, 1, 2]
    """
    if depth < 1:
        yield from items
        return
    channel: _Channel[T] = _Channel(threading.Semaphore(depth), threading.Event())
    thread = threading.Thread(
        target=_fill, args=(channel, items), name="megafn-prefetch", daemon=True
    )
    thread.start()
    # An iterator that nobody closes is also ended at exit, while Python still works: later, a
    # thread that wakes up in C++ code aborts the process.
    end = weakref.finalize(channel.ready, _end, channel.stop, channel.free, thread)
    try:
        while (item := channel.ready.get()) is not None:
            if isinstance(item, _Failure):
                raise item.error
            channel.free.release()
            yield item.value
    finally:
        end()


def _end(stop: threading.Event, free: threading.Semaphore, thread: threading.Thread) -> None:
    """End the thread of `prefetched`, once it has read the item that it is reading."""
    stop.set()
    free.release()  # wakes the thread, so that it sees the stop
    if thread is not threading.current_thread():  # the garbage collector may run in the thread
        thread.join()


def _fill(channel: _Channel[T], items: Iterable[T]) -> None:
    """In the thread: put items into the channel while there are free places."""
    try:
        iterator = iter(items)
        while channel.free.acquire() and not channel.stop.is_set():
            channel.ready.put(_Item(next(iterator)))
    except StopIteration:
        channel.ready.put(None)
    except BaseException as error:
        channel.ready.put(_Failure(error))


def group_batches(micro_batches: Iterable[T], num_micro_batches: int) -> Iterator[tuple[T, ...]]:
    """Tuples of `num_micro_batches` micro-batches, this rank's share of a global batch each.

    micro_batches: any iterable of this data-parallel rank's micro-batches, say a DataLoader. An
    incomplete last tuple is left out. Raises ValueError for num_micro_batches below 1.

    >>> list(group_batches("abcde", 2))
    [('a', 'b'), ('c', 'd')]
    """
    if num_micro_batches < 1:
        raise ValueError(f"num_micro_batches = {num_micro_batches}: give 1 or more")
    iterator = iter(micro_batches)
    return zip(*[iterator] * num_micro_batches, strict=False)

"""Batches: this rank's share of each global batch, out of a config's corpora or a user's iterable."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import TypeVar

import torch

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig
from megafn.pure.sampling import batch_indices
from megafn.runtime.data.corpora import build_dataset
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.text.documents import SPLITS

T = TypeVar("T")


def batches(
    config: TrainConfig,
    pg: ProcessGroups,
    *,
    split: str = "train",
    consumed_samples: int | None = None,
    count: int | None = None,
) -> Iterator[tuple[dict[str, torch.Tensor], ...]]:
    """This data-parallel rank's share of each global batch: a tuple of micro-batches, dicts of CPU tensors.

    GPT: tokens, labels (the next tokens), position_ids int64 and loss_mask float32, each [micro_batch_size, seq_length];
    attention_mask bool [micro_batch_size, 1, seq_length, seq_length], True = hidden, only under reset_attention_mask.
    BERT: text, types, labels, loss_mask, padding_mask (1 = real) int64, likewise, and is_random, truncated [micro_batch_size].
    T5: text_enc, enc_mask [micro_batch_size, seq_length], text_dec, dec_mask, labels, loss_mask [micro_batch_size, decoder_seq_length] int64.
    Which samples these are depends on dp_rank and dp_size alone of `pg`, see `megafn.pure.sampling`: tensor-, context-
    and pipeline-parallel ranks read the same ones. Nothing is communicated.

    Reading begins behind `consumed_samples` (None: what config.consumed_samples says of the split). "train" goes on to the end of the run, or for `count` global batches; "single" reads
    megatron-core's order straight, "cyclic" shuffles one epoch anew each time. "valid" and "test" give `count` (None:
    eval_iters) global batches, always the same ones, and begin again where the split is
    shorter: evaluations compare with each other. `data.prefetch` global batches are read ahead by a thread, which
    ends when the iterator is closed or dropped; on CUDA the tensors are pinned.

    Raises ConfigError at once for data that is missing, damaged or too short (see `corpora`), and from the iterator
    for a token id outside the vocabulary.
    """
    dataset = build_dataset(config, split)
    if consumed_samples is None:
        consumed_samples = config.consumed_samples[SPLITS.index(split)]
    samples, batch = len(dataset), config.global_batch_size
    if split == "train":
        left = max(0, config.iterations * batch - consumed_samples) // batch
        count = left if count is None else min(count, left)
    else:
        count = config.eval_iters if count is None else count
    cyclic = split == "train" and config.data.sampler != "single"
    shares = batch_indices(
        consumed_samples,
        count=count,
        style=config.data.sampler if cyclic else "single",
        seed=config.seed,
        num_samples=samples if cyclic else max(batch, consumed_samples + count * batch),
        global_batch_size=batch,
        micro_batch_size=config.micro_batch_size,
        dp_rank=pg.dp_rank,
        dp=pg.dp_size,
    )
    pin, vocab_size = torch.cuda.is_available(), config.model.vocab_size

    def micro_batch(indices: tuple[int, ...]) -> dict[str, torch.Tensor]:
        rows = [dataset[index % samples] for index in indices]
        made = {
            key: _stack([row[key] for row in rows], pin) for key in rows[0] if key != "dataset_id"
        }
        for ids in (
            made[key] for key in ("tokens", "text", "text_enc", "text_dec", "labels") if key in made
        ):
            low, high = map(int, ids.aminmax())
            if low < 0 or high >= vocab_size:
                raise ConfigError(
                    f"data: token id {low if low < 0 else high} in the samples {indices} of {split}, but "
                    f"model.vocab_size = {vocab_size}; raise it, or use the model's tokenizer"
                )
        return made

    return prefetched((tuple(map(micro_batch, share)) for share in shares), config.data.prefetch)


def _stack(rows: list[torch.Tensor], pin: bool) -> torch.Tensor:
    """[b, ...] out of b rows, written once, into pinned memory where that is wanted."""
    out = (
        torch.empty((len(rows), *rows[0].shape), dtype=rows[0].dtype, pin_memory=True)
        if pin
        else None
    )
    return torch.stack(rows, out=out)


def prefetched(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items, up to `depth` of them made ahead by a thread; 0: none, and no thread.

    The thread starts with the first item asked for and has ended when the iterator is exhausted, closed or
    dropped. An exception in `items` comes out where its item would have.

    >>> list(prefetched(range(3), depth=2))
    [0, 1, 2]
    """
    if depth < 1:
        yield from items
        return
    ready: SimpleQueue = SimpleQueue()
    free, stop = threading.Semaphore(depth), threading.Event()

    def fill() -> None:
        try:
            iterator = iter(items)
            while free.acquire() and not stop.is_set():
                ready.put((next(iterator), None))
        except StopIteration:
            ready.put(None)
        except BaseException as error:
            ready.put((None, error))

    thread = threading.Thread(target=fill, name="megafn-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            if (made := ready.get()) is None:
                return
            item, error = made
            if error is not None:
                raise error
            free.release()
            yield item
    finally:
        stop.set()
        free.release()
        if thread is not threading.current_thread():  # a collector of cycles may run there
            thread.join()


def group_batches(micro_batches: Iterable[T], num_micro_batches: int) -> Iterator[tuple[T, ...]]:
    """Micro-batches in tuples of `num_micro_batches`, a rank's share of a global batch; an incomplete last one is left out.

    micro_batches: whatever gives this data-parallel rank's micro-batches, say a DataLoader. Raises ValueError below 1.

    >>> list(group_batches("abcde", 2))
    [('a', 'b'), ('c', 'd')]
    """
    if num_micro_batches < 1:
        raise ValueError(f"num_micro_batches = {num_micro_batches}: give 1 or more")
    return zip(*[iter(micro_batches)] * num_micro_batches)

"""The samples of corpora, as megatron-core's datasets."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from megatron.core.datasets import blended_dataset, gpt_dataset
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megafn.pure.config.records import TrainConfig, data_of
from megafn.runtime.data.corpora import Corpus, corpora, family_data, tokenizer_of


def build_dataset(
    config: TrainConfig, split: str = "train", parts: Sequence[Corpus] | None = None
) -> MegatronDataset | blended_dataset.BlendedDataset:
    """The samples of one split as megatron-core's dataset: index -> dict of one sequence's tensors.

    For training with the sampler "single" it has as many samples as the run reads, a short corpus
    repeated and shuffled by megatron-core; else one epoch. Several corpora are blended by their
    weights, at every point of the run to within a sample each; without weights, by their tokens,
    and an epoch reads each of them once. Each rank holds the order of samples in memory: 12 bytes
    a sample and 4 a document, times epochs. No communication.
    parts: the split's corpora, if they were found before. The files stay open, so the dataset is
    the same if they are replaced or removed.
    """
    tokenizer = tokenizer_of(config)
    if parts is None:
        parts = corpora(config, split, tokenizer=tokenizer)
    kind, mcore = family_data(config).dataset(config, tokenizer)
    read = partial(_dataset_of, kind=kind, mcore=mcore, split=split)
    counts = samples_of_each(config, parts, split)
    with _without_cache_warnings():
        datasets = [read(corpus, count) for corpus, count in zip(parts, counts, strict=True)]
        if len(parts) == 1:
            return datasets[0]
        size = _size_of_blend(config, parts, split)
        if size is None:
            return _once_each(datasets, mcore)
        weights = _shares_of_blend(parts)
        return blended_dataset.BlendedDataset(datasets, weights, size, mcore)


def samples_of_each(
    config: TrainConfig, parts: Sequence[Corpus], split: str
) -> tuple[int | None, ...]:
    """How many samples megatron-core is asked for, at least, of each corpus; None: one epoch.

    The order of a corpus's samples depends on it once it takes more than one epoch.
    """
    size = _size_of_blend(config, parts, split)
    if size is None or len(parts) == 1:
        return (size,) * len(parts)
    # the blend takes the corpus furthest behind its weight: none gives more than its share and one
    return tuple(math.ceil(size * share) + 1 for share in _shares_of_blend(parts))


def _size_of_blend(config: TrainConfig, parts: Sequence[Corpus], split: str) -> int | None:
    """Samples of all corpora together; None: one epoch of each."""
    if split == "train" and data_of(config).sampler == "single":
        return config.iterations * config.global_batch_size
    if len(parts) == 1 or parts[0].weight is None:
        return None
    return sum((corpus.tokens - 1) // config.model.seq_length for corpus in parts)


def _shares_of_blend(parts: Sequence[Corpus]) -> list[float]:
    """The weight of each corpus, or its share of all tokens; they sum up to 1."""
    weights = [float(corpus.weight or corpus.tokens) for corpus in parts]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def read_samples(
    config: TrainConfig, split: str
) -> tuple[type[MegatronDataset], Callable[[Corpus, int | None], MegatronDataset]]:
    """megatron-core's class for a family's corpora, and (corpus, samples or None) -> dataset."""
    kind, mcore = family_data(config).dataset(config, tokenizer_of(config))

    def read(corpus: Corpus, samples: int | None) -> MegatronDataset:
        with _without_cache_warnings():
            return _dataset_of(corpus, samples, kind=kind, mcore=mcore, split=split)

    return kind, read


def _dataset_of(
    corpus: Corpus,
    samples: int | None,
    *,
    kind: type[MegatronDataset],
    mcore: BlendedMegatronDatasetConfig,
    split: str,
) -> MegatronDataset:
    """At least `samples` samples of one corpus, or one epoch if None."""
    return kind(
        kind.build_low_level_dataset(corpus.prefix, mcore),
        corpus.prefix,
        np.arange(corpus.begin, corpus.end, dtype=np.int32),
        samples,
        Split[split],
        mcore,
    )


def _once_each(
    datasets: Sequence[MegatronDataset], mcore: BlendedMegatronDatasetConfig
) -> blended_dataset.BlendedDataset:
    """One epoch of each corpus, interleaved in proportion to their samples."""
    sizes = [len(dataset) for dataset in datasets]
    return blended_dataset.BlendedDataset(datasets, sizes, None, mcore)


@contextlib.contextmanager
def _without_cache_warnings() -> Iterator[None]:
    """Leave out megatron-core's warnings that indices are not saved, which is intended here."""

    def is_other(record: logging.LogRecord) -> bool:
        return "path_to_cache is None" not in record.getMessage()

    loggers = [module.logger for module in (gpt_dataset, blended_dataset)]
    for logger in loggers:
        logger.addFilter(is_other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_other)

"""Corpora: where the tokens of a split lie, checked, and megatron-core's datasets of them."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from attrs import frozen
from megatron.core.datasets import blended_dataset, gpt_dataset
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.utils import Split

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig
from megafn.runtime.families.built_in import FAMILIES, family_of
from megafn.runtime.families.family import FamilyData
from megafn.runtime.text.indexing import LONG_SENTENCE, PARTS, indexed_text
from megafn.runtime.text.tokenizer import Tokenizer, load_tokenizer


@frozen(kw_only=True)
class Corpus:
    """The documents `begin` to `end` of an indexed dataset, and how many tokens they hold; weight as the config has it."""

    source: str
    prefix: str
    weight: float | None
    begin: int
    end: int
    tokens: int


def _family_data(config: TrainConfig) -> FamilyData:
    """How corpora are read for the config's family. Raises ConfigError if they are not."""
    family = family_of(config.model.family)
    if family.data is None:
        raise ConfigError(
            f"model.family = {family.name!r}: has no data of its own, as {', '.join(FAMILIES)} "
            "have; choose one of them, or pass batches"
        )
    return family.data


def corpora(
    config: TrainConfig, split: str = "train", *, tokenizer: Tokenizer | None = None
) -> tuple[Corpus, ...]:
    """Finds the corpora of one split, checked; a text is indexed first (once, into the cache folder).

    Without a corpus of its own, a split's share is cut out of `data.train` by the weights of `data.split`, where splits
    that have one weigh 0: of a text every document is cut, of an indexed dataset the list of documents (as megatron-core
    does it). Costs little once the text is indexed; no communication. Call it for "valid" before a long run.

    Raises ConfigError naming the source that is missing, truncated or too short for one sequence.
    """
    data = config.data
    if data is None:
        raise ConfigError("data = None: give a DataConfig, or pass batches")
    if split not in PARTS:
        raise ConfigError(f"split = {split!r}: choose one of {', '.join(PARTS)}")
    tokenizer = tokenizer or load_tokenizer(data.tokenizer)
    own = None if split == "train" else getattr(data, split)
    weights = [
        w if part == "train" or getattr(data, part) is None else 0.0
        for part, w in zip(PARTS, data.split)
    ]
    if own is not None:
        weights, part, field = [1.0, 0.0, 0.0], "train", f"data.{split}"
    else:
        own, part, field = data.train, split, "data.train"
    total = math.fsum(weights)
    if len(data.split) != len(PARTS) or not (
        0 < total < math.inf and weights[PARTS.index(part)] > 0
    ):
        raise ConfigError(
            f"data.split = {data.split}: no text is left for {split}; give each of {', '.join(PARTS)} a weight, "
            f"{split} one above 0"
            + ("" if split == "train" else f" or a corpus of its own in data.{split}")
        )
    blend = (
        [(None, own)]
        if isinstance(own, str)
        else [one if not isinstance(one, str) else (None, one) for one in own]
    )
    if (
        not blend
        or any(w is not None and not (0 < w < math.inf) for w, _ in blend)
        or len({w is None for w, _ in blend}) > 1
    ):
        raise ConfigError(
            f"{field} = {own!r}: give one source or more, all of them with a weight above 0 or none"
        )
    return tuple(
        _corpus(config, tokenizer, split, field, source, weight, weights, PARTS.index(part))
        for weight, source in blend
    )


def _corpus(
    config: TrainConfig,
    tokenizer: Tokenizer,
    split: str,
    field: str,
    source: str,
    weight: float | None,
    weights: list[float],
    part: int,
) -> Corpus:
    data, ends, total, sentences = (
        config.data,
        (0.0, 1.0),
        math.fsum(weights),
        _family_data(config).sentences(config.model),
    )
    if os.path.exists(f"{source}.idx") or os.path.exists(f"{source}.bin"):
        prefix, ends = (
            source,
            (math.fsum(weights[:part]) / total, math.fsum(weights[: part + 1]) / total),
        )
    elif not os.path.isfile(source):
        raise ConfigError(
            f"{field} = {source!r}: no such file, nor {source}.idx and .bin; give the path of a text "
            "or the prefix of an indexed dataset"
        )
    elif source.endswith((".idx", ".bin")):
        raise ConfigError(
            f"{field} = {source!r} is a file of an indexed dataset; give the prefix, {source[:-4]!r}"
        )
    else:
        made = indexed_text(
            source,
            tokenizer=tokenizer,
            split=weights,
            cache=data.cache,
            split_sentences=sentences > 0,
        )
        if PARTS[part] not in made:
            raise ConfigError(
                f"{field} = {source!r}: too short to give {split} any text; give more, or change "
                f"data.split = {data.split}"
            )
        prefix = made[PARTS[part]]
    lengths, documents, last_token = _read_index(prefix, field)
    marked = data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss
    if prefix == source and marked and last_token != tokenizer.eod:
        raise ConfigError(
            f"{field} = {source!r}: documents end with id {last_token}, but data.tokenizer = {data.tokenizer!r} "
            f"ends them with {tokenizer.eod}, where resets and masks are wanted; name the tokenizer that made it"
        )
    if sentences:

        def per_document(values: np.ndarray) -> np.ndarray:
            return np.diff(np.concatenate(([0], np.cumsum(values, dtype=np.int64)))[documents])

        count, long = np.diff(documents), per_document(lengths > LONG_SENTENCE)
        lengths = np.where(
            (count >= sentences) & ((count == 1) | (long == 0)), per_document(lengths), 0
        )
    begin, end = (int(round(at * float(len(lengths)))) for at in ends)
    tokens, wanted = int(lengths[begin:end].sum(dtype=np.int64)), config.model.seq_length + 1
    if sentences and not tokens:  # megatron-core would look for a sample without end
        raise ConfigError(
            f"{field} = {source!r}: no document for {split} has {sentences} sentence{'s' * (sentences > 1)} or more, each of "
            f"{LONG_SENTENCE} tokens at most; give more text, or write it again with split_sentences (--split-sentences)"
        )
    if (
        not sentences and tokens < wanted
    ):  # megatron-core would repeat them, or never end where there are none
        raise ConfigError(
            f"{field} = {source!r}: {tokens} tokens for {split}, less than one sequence, model.seq_length + 1 = "
            f"{wanted}; give more text, another data.split than {data.split}, or a smaller seq_length"
        )
    return Corpus(source=source, prefix=prefix, weight=weight, begin=begin, end=end, tokens=tokens)


def _read_index(prefix: str, field: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Lengths of the sequences of an indexed dataset, int32 [n], where each document begins and the last ends, int64, and its
    last token; ConfigError where the files don't fit."""

    def refuse(what: str) -> ConfigError:
        return ConfigError(
            f"{field}: {prefix}{what}; write it again (where it lies in the cache folder: remove its folder)"
        )

    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            raise refuse(f"{suffix} is missing")
    with open(prefix + ".idx", "rb") as file:
        head = file.read(34)
        if len(head) < 34 or head[:9] != b"MMIDIDX\0\0" or head[9:17] != struct.pack("<Q", 1):
            raise refuse(".idx is no index of megatron-core's format, version 1")
        code, sequences, documents = struct.unpack("<BQQ", head[17:])
        if code not in (1, 2, 3, 4, 5, 8):
            raise refuse(f".idx: type code {code} is no integer type")
        if os.path.getsize(file.name) < 34 + 12 * sequences + 8 * documents:
            raise refuse(
                f".idx is truncated: {sequences} sequences and {documents - 1} documents do not fit into it"
            )
        lengths, pointers, ends = (
            np.fromfile(file, np.int32, sequences),
            np.fromfile(file, np.int64, sequences),
            np.fromfile(file, np.int64, documents),
        )
    dtype = np.dtype(DType.dtype_from_code(code))
    begins = (
        np.cumsum(lengths, dtype=np.int64) - lengths
    )  # each sequence lies behind the one before it
    if (
        (lengths < 0).any()
        or (pointers != begins * dtype.itemsize).any()
        or [*ends[:1], *ends[-1:]] != [0, sequences]
        or (np.diff(ends) < 0).any()
    ):
        raise refuse(".idx is damaged: its lengths, places and documents do not fit together")
    size, stated = (
        os.path.getsize(prefix + ".bin"),
        int(lengths.sum(dtype=np.int64)) * dtype.itemsize,
    )
    if size != stated:
        raise refuse(f".bin is truncated or another's: {size} bytes, {stated} by its .idx")
    if size == 0:
        raise refuse(".bin is empty")
    with open(prefix + ".bin", "rb") as file:
        file.seek(-dtype.itemsize, os.SEEK_END)
        return lengths, ends, int(np.fromfile(file, dtype, 1)[0])


def build_dataset(config: TrainConfig, split: str = "train") -> torch.utils.data.Dataset:
    """The samples of one split as megatron-core's dataset: index -> dict of tensors of one sequence.

    For training with the sampler "single" as many samples as the run reads, a short corpus repeated and shuffled by
    megatron-core; else one epoch. Several corpora are blended by their weights, at every point of the run to within
    a sample each; without weights by their tokens, and an epoch reads each of them once. Each rank holds the order of
    samples in memory: 12 bytes a sample and 4 a document, times epochs. No communication.
    """
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data is not None else None
    found = corpora(config, split, tokenizer=tokenizer)
    kind, mcore = _family_data(config).dataset(config, tokenizer)

    def read(corpus: Corpus, samples: int | None) -> Any:
        indexed = kind.build_low_level_dataset(corpus.prefix, mcore)
        return kind(
            indexed,
            corpus.prefix,
            np.arange(corpus.begin, corpus.end, dtype=np.int32),
            samples,
            Split[split],
            mcore,
        )

    size = (
        config.iterations * config.global_batch_size
        if split == "train" and config.data.sampler == "single"
        else None
    )
    with _no_word_of_the_cache():
        if len(found) == 1:
            return read(found[0], size)
        if size is None and found[0].weight is None:
            parts = [read(corpus, None) for corpus in found]
            return blended_dataset.BlendedDataset(parts, [len(part) for part in parts], None, mcore)
        size = size or sum((corpus.tokens - 1) // config.model.seq_length for corpus in found)
        weights = [float(corpus.weight or corpus.tokens) for corpus in found]
        weights = [weight / math.fsum(weights) for weight in weights]
        # the blend takes the corpus furthest behind its weight, so none gives more than its share and one
        parts = [
            read(corpus, math.ceil(size * weight) + 1) for corpus, weight in zip(found, weights)
        ]
        return blended_dataset.BlendedDataset(parts, weights, size, mcore)


@contextlib.contextmanager
def _no_word_of_the_cache() -> Iterator[None]:
    """megatron-core warns of indices that are not saved; here that is meant."""

    def keep(record: logging.LogRecord) -> bool:
        return "path_to_cache is None" not in record.getMessage()

    loggers = [module.logger for module in (gpt_dataset, blended_dataset)]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)

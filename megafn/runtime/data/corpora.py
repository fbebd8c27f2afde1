"""Corpora: the indexed datasets that a split is read from, found and checked."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence

import numpy as np
from attrs import frozen

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import DataConfig, ModelConfig, TrainConfig, data_of
from megafn.runtime.families.built_in import FAMILIES, family_of
from megafn.runtime.families.family import FamilyData
from megafn.runtime.text.cache import indexed_text
from megafn.runtime.text.documents import SPLITS
from megafn.runtime.text.index_files import DatasetIndex, read_index
from megafn.runtime.text.indexing import LONG_SENTENCE, indexed_with, largest_id
from megafn.runtime.text.tokenizer import Tokenizer, identity_of, load_tokenizer


@frozen(kw_only=True)
class Corpus:
    """The documents `begin` to `end` of an indexed dataset."""

    source: str  # as the config names it
    prefix: str  # of the indexed dataset's two files
    weight: float | None  # in the blend, as the config has it
    begin: int
    end: int
    tokens: int  # that these documents hold


def family_data(config: TrainConfig) -> FamilyData:
    """How corpora are read for the config's family. Raises ConfigError if they are not."""
    family = family_of(config.model.family)
    if family.data is None:
        raise ConfigError(
            f"model.family = {family.name!r}: has no data of its own, as {', '.join(FAMILIES)} "
            "have; choose one of them, or pass batches"
        )
    return family.data


def tokenizer_of(config: TrainConfig) -> Tokenizer:
    """The tokenizer that the config's data names. Raises ConfigError if it has no data."""
    data = data_of(config)
    return load_tokenizer(data.tokenizer, eod_token=data.eod_token)


@frozen(kw_only=True)
class _SplitSource:
    """Where a split is read from: the config's field, its sources, and how their text is cut."""

    data: DataConfig
    split: str
    field: str  # "data.train", or the split's own
    sources: str | Sequence[str | tuple[float, str]]  # the field's value
    weights: tuple[float, ...]  # the text is cut by these, of train, valid and test
    part: int  # and this part of it is read


@frozen(kw_only=True)
class _Location:
    """An indexed dataset, and the share of its documents that is read, from `begin` to `end`."""

    prefix: str
    begin: float = 0.0
    end: float = 1.0


@frozen(kw_only=True)
class _Ids:
    """Where the token ids of each document are in a .bin."""

    dtype: np.dtype
    starts: np.ndarray  # first token of each document, and the end of the last [documents + 1]
    is_read: np.ndarray  # whether megatron-core's dataset reads it, bool [documents]


def corpora(
    config: TrainConfig, split: str = "train", *, tokenizer: Tokenizer | None = None
) -> tuple[Corpus, ...]:
    """Find and check the corpora of one split; a text is indexed first (once, into the cache).

    A split without a corpus of its own is cut out of `data.train` by the weights of `data.split`,
    where splits with their own corpus weigh 0. For a text, every document is cut; for an indexed
    dataset, the list of documents (as megatron-core does it). Costs little once the text is
    indexed; no communication. Call it for "valid" before a long run.

    Raises ConfigError naming the source that is missing, truncated or too short for one sequence.
    """
    data = data_of(config)
    if split not in SPLITS:
        raise ConfigError(f"split = {split!r}: choose one of {', '.join(SPLITS)}")
    tokenizer = tokenizer or tokenizer_of(config)
    split_source = _split_source(data, split)
    _check_weights(split_source)
    return tuple(
        _corpus(config, tokenizer, split_source, source, weight)
        for weight, source in _blend(split_source)
    )


def _split_source(data: DataConfig, split: str) -> _SplitSource:
    own_sources = None if split == "train" else getattr(data, split)
    if own_sources is not None:
        return _SplitSource(
            data=data,
            split=split,
            field=f"data.{split}",
            sources=own_sources,
            weights=(1.0, 0.0, 0.0),
            part=SPLITS.index("train"),
        )
    weights = [
        weight if name == "train" or getattr(data, name) is None else 0.0
        for name, weight in zip(SPLITS, data.split, strict=False)
    ]
    return _SplitSource(
        data=data,
        split=split,
        field="data.train",
        sources=data.train,
        weights=tuple(weights),
        part=SPLITS.index(split),
    )


def _check_weights(split_source: _SplitSource) -> None:
    data = split_source.data
    total = math.fsum(split_source.weights)
    if (
        len(data.split) == len(SPLITS)
        and 0 < total < math.inf
        and split_source.weights[split_source.part] > 0
    ):
        return
    split = split_source.split
    alternative = "" if split == "train" else f" or a corpus of its own in data.{split}"
    raise ConfigError(
        f"data.split = {data.split}: no text is left for {split}; give each of "
        f"{', '.join(SPLITS)} a weight, {split} one above 0{alternative}"
    )


def _blend(split_source: _SplitSource) -> list[tuple[float | None, str]]:
    """The sources as (weight, source), the weight None if the config gives none."""
    sources = split_source.sources
    if isinstance(sources, str):
        sources = [sources]
    blend: list[tuple[float | None, str]] = [
        (None, item) if isinstance(item, str) else item for item in sources
    ]
    weights = [weight for weight, _ in blend if weight is not None]
    all_or_none_weighted = len(weights) in (0, len(blend))
    if not blend or not all_or_none_weighted or not all(0 < w < math.inf for w in weights):
        raise ConfigError(
            f"{split_source.field} = {split_source.sources!r}: give one source or more, all of "
            "them with a weight above 0 or none"
        )
    return blend


def _corpus(
    config: TrainConfig,
    tokenizer: Tokenizer,
    split_source: _SplitSource,
    source: str,
    weight: float | None,
) -> Corpus:
    """Find one source, check it, and count its documents and tokens."""
    sentences = family_data(config).sentences(config.model)
    location = _locate(source, split_source, tokenizer, sentences > 0)
    index = read_index(location.prefix, split_source.field)
    if location.prefix == source:
        _check_tokenizer(split_source, source, tokenizer)
        _check_end_of_document(index, split_source, source, tokenizer)
    document_lengths = _document_lengths(index, sentences)
    begin = int(round(location.begin * float(len(document_lengths))))
    end = int(round(location.end * float(len(document_lengths))))
    corpus = Corpus(
        source=source,
        prefix=location.prefix,
        weight=weight,
        begin=begin,
        end=end,
        tokens=int(document_lengths[begin:end].sum(dtype=np.int64)),
    )
    _check_tokens(corpus, split_source, config.model, sentences)
    documents = index.documents if sentences else np.arange(len(index.lengths) + 1)
    ids = _Ids(
        dtype=index.dtype,
        starts=np.concatenate(([0], np.cumsum(index.lengths, dtype=np.int64)))[documents],
        is_read=document_lengths > 0,
    )
    _check_ids(corpus, split_source, ids, config.model.vocab_size)
    if sentences:
        _report_left_out(corpus, split_source, index, sentences)
    return corpus


def _locate(
    source: str, split_source: _SplitSource, tokenizer: Tokenizer, split_sentences: bool
) -> _Location:
    """The indexed dataset that a source names, or that is made of its text."""
    field = split_source.field
    weights = split_source.weights
    part = split_source.part
    if os.path.exists(f"{source}.idx") or os.path.exists(f"{source}.bin"):
        total = math.fsum(weights)
        return _Location(
            prefix=source,
            begin=math.fsum(weights[:part]) / total,
            end=math.fsum(weights[: part + 1]) / total,
        )
    if os.path.isdir(source):
        raise ConfigError(
            f"{field} = {source!r}: this is a folder; give the path of a text in it, the prefix of "
            "an indexed dataset, or a list of them"
        )
    if not os.path.isfile(source):
        raise ConfigError(
            f"{field} = {source!r}: no such file, nor {source}.idx and .bin; give the path of a "
            "text or the prefix of an indexed dataset"
        )
    if source.endswith((".idx", ".bin")):
        raise ConfigError(
            f"{field} = {source!r}: this is one file of an indexed dataset; "
            f"give the prefix, {source[:-4]!r}"
        )
    prefixes = indexed_text(
        source,
        tokenizer=tokenizer,
        split=weights,
        cache=split_source.data.cache,
        split_sentences=split_sentences,
        json_key=split_source.data.json_key,
    )
    if SPLITS[part] not in prefixes:
        raise ConfigError(
            f"{field} = {source!r}: too short to give {split_source.split} any text; give more, "
            f"or change data.split = {split_source.data.split}"
        )
    return _Location(prefix=prefixes[SPLITS[part]])


def _check_tokenizer(split_source: _SplitSource, source: str, tokenizer: Tokenizer) -> None:
    """Indexed data must have been written with the config's tokenizer, if it says with which."""
    written_by = indexed_with(source)
    configured = identity_of(tokenizer)
    if written_by is None or written_by.digest == configured.digest:
        return
    raise ConfigError(
        f"{split_source.field} = {source!r}: it was indexed with the tokenizer "
        f"{written_by.name!r} (digest {written_by.digest[:12]}), but data.tokenizer = "
        f"{configured.name!r} (digest {configured.digest[:12]}); name the one that wrote it, or "
        "index the text again"
    )


def _check_end_of_document(
    index: DatasetIndex, split_source: _SplitSource, source: str, tokenizer: Tokenizer
) -> None:
    """Resets and masks need the id that ends documents; a user's indexed data may have another."""
    data = split_source.data
    needed = data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss
    if needed and index.last_token != tokenizer.eod:
        raise ConfigError(
            f"{split_source.field} = {source!r}: documents end with id {index.last_token}, but "
            f"data.tokenizer = {data.tokenizer!r} ends them with {tokenizer.eod}, which resets and "
            "masks look for; name the tokenizer that wrote it"
        )


def _document_lengths(index: DatasetIndex, sentences: int) -> np.ndarray:
    """Tokens of each document that megatron-core's dataset reads, 0 for one that it leaves out.

    With sentences = 0 each sequence is a document. Else a document must have that many sentences,
    none of them long unless it is the only one.
    """
    if not sentences:
        return index.lengths
    counts = np.diff(index.documents)
    long_sentences = _sum_per_document(index.lengths > LONG_SENTENCE, index.documents)
    is_read = (counts >= sentences) & ((counts == 1) | (long_sentences == 0))
    return np.where(is_read, _sum_per_document(index.lengths, index.documents), 0)


def _sum_per_document(values: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Sums of the values [sequences] over each document, int64 [documents]."""
    sums_before = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    return np.diff(sums_before[documents])


def _check_tokens(
    corpus: Corpus, split_source: _SplitSource, model: ModelConfig, sentences: int
) -> None:
    """Refuse a corpus whose tokens megatron-core would repeat, or search for a sample for ever."""
    where = f"{split_source.field} = {corpus.source!r}"
    if sentences:
        if corpus.tokens == 0:
            noun = "sentence" if sentences == 1 else "sentences"
            raise ConfigError(
                f"{where}: no document for {split_source.split} has {sentences} {noun} or more, "
                f"each of {LONG_SENTENCE} tokens at most; give more text, or write it again with "
                "split_sentences (--split-sentences)"
            )
        return
    least = model.seq_length + 1
    if corpus.tokens < least:
        raise ConfigError(
            f"{where}: {corpus.tokens} tokens for {split_source.split}, less than one sequence, "
            f"model.seq_length + 1 = {least}; give more text, another data.split than "
            f"{split_source.data.split}, or a smaller seq_length"
        )


def _check_ids(
    corpus: Corpus,
    split_source: _SplitSource,
    ids: _Ids,
    vocab_size: int,
) -> None:
    """Raises ConfigError if the documents that are read hold an id outside the vocabulary.

    Only what is known counts, or found at small cost: the largest id, which indexing wrote down,
    or the ids of a small dataset. Batches are checked as they are read.
    """
    if np.iinfo(ids.dtype).max < vocab_size:
        return
    largest = largest_id(corpus.prefix)
    if largest is None and os.path.getsize(corpus.prefix + ".bin") > _SMALL:
        return
    if largest is not None and largest < vocab_size:
        return
    wrong = _id_outside(corpus, ids, vocab_size)
    if wrong is not None:
        raise ConfigError(
            f"{split_source.field} = {corpus.source!r}: it holds the token id {wrong} for "
            f"{split_source.split}, but model.vocab_size = {vocab_size}; raise it, or name the "
            "model's tokenizer in data.tokenizer"
        )


_SMALL = 2**28  # bytes of token ids that are looked through before a run
_CHUNK = 2**22  # ids that are looked at together


def _id_outside(corpus: Corpus, ids: _Ids, vocab_size: int) -> int | None:
    """An id outside the vocabulary in the documents that are read: a negative one, or the largest.

    None if there is none.
    """
    tokens = np.memmap(corpus.prefix + ".bin", dtype=ids.dtype, mode="r")
    end = int(ids.starts[corpus.end])
    wrong: list[int] = []
    for begin in range(int(ids.starts[corpus.begin]), end, _CHUNK):
        chunk = tokens[begin : min(begin + _CHUNK, end)].astype(np.int64)
        places = np.flatnonzero((chunk < 0) | (chunk >= vocab_size))
        documents = np.searchsorted(ids.starts, begin + places, side="right") - 1
        read = chunk[places[ids.is_read[documents]]]
        if len(read):
            wrong += [int(read.min()), int(read.max())]
    if not wrong:
        return None
    return min(wrong) if min(wrong) < 0 else max(wrong)


def _report_left_out(
    corpus: Corpus, split_source: _SplitSource, index: DatasetIndex, sentences: int
) -> None:
    """Warn on rank zero of the documents that megatron-core's dataset leaves out."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    part = slice(corpus.begin, corpus.end)
    counts = np.diff(index.documents)[part]
    lengths = _sum_per_document(index.lengths, index.documents)[part]
    left_out = (_document_lengths(index, sentences)[part] == 0) & (lengths > 0)
    if not left_out.any():
        return
    few = left_out & (counts < sentences)
    reasons = []
    if few.any():
        noun = "sentence" if sentences == 1 else "sentences"
        reasons.append(f"{few.sum()} with fewer than {sentences} {noun}")
    if (left_out & ~few).any():
        reasons.append(
            f"{(left_out & ~few).sum()} with a sentence of more than {LONG_SENTENCE} tokens"
        )
    warnings.warn(
        f"{split_source.field} = {corpus.source!r}: {left_out.sum()} of {len(left_out)} documents "
        f"for {split_source.split} are left out: {', '.join(reasons)}",
        stacklevel=3,
    )

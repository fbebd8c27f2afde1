"""Which corpora a run reads, by content: compared over all ranks, and with a checkpoint's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen
from megatron.core.datasets.gpt_dataset import GPTDataset

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig
from megafn.pure.sampling import epochs_in_words
from megafn.runtime.data.corpora import Corpus, corpora, tokenizer_of
from megafn.runtime.data.datasets import read_samples, samples_of_each
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.object_collectives import decide_on_rank_zero
from megafn.runtime.text.tokenizer import identity_of

# Bytes of a file that its fingerprint looks at: whole files up to this size, else blocks of it.
_BYTES_READ = 4 * 2**20
_BLOCK = 2**14


@frozen(kw_only=True)
class CorpusIdentity:
    """What one corpus of a split holds."""

    source: str  # as the config names it, which may differ from host to host
    fingerprint: str
    documents: int
    tokens: int

    @property
    def content(self) -> tuple[str, int, int]:
        """What must be the same wherever this corpus is read."""
        return self.fingerprint, self.documents, self.tokens


def identify(parts: Sequence[Corpus]) -> tuple[CorpusIdentity, ...]:
    """The identity of each corpus; reads at most 8 MiB of each, communicates nothing."""
    return tuple(
        CorpusIdentity(
            source=corpus.source,
            fingerprint=_fingerprint(corpus.prefix),
            documents=corpus.end - corpus.begin,
            tokens=corpus.tokens,
        )
        for corpus in parts
    )


def _fingerprint(prefix: str) -> str:
    """A digest of the sizes of an indexed dataset's two files, and of blocks all over them."""
    return fingerprint_of({suffix: prefix + suffix for suffix in (".idx", ".bin")})


def fingerprint_of(files: Mapping[str, str | Path]) -> str:
    """A digest of files, given by what each is called in it: sizes, and blocks all over them."""
    digest = hashlib.sha256()
    for name, path in files.items():
        size = os.path.getsize(path)
        digest.update(f"{name} {size} ".encode())
        with open(path, "rb") as file:
            if size <= _BYTES_READ:
                digest.update(file.read())
                continue
            blocks = _BYTES_READ // _BLOCK
            for i in range(blocks):
                file.seek(i * (size - _BLOCK) // (blocks - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def check_same_corpora(
    identities: Mapping[str, Sequence[CorpusIdentity]], pg: ProcessGroups
) -> None:
    """Raises ConfigError, on every rank, naming the corpora in which ranks differ, and the ranks.

    identities: of the corpora of each split that is read. Every rank calls it.
    """
    decide_on_rank_zero(dict(identities), _compare_ranks, pg)


def _compare_ranks(identities_by_rank: Sequence[Mapping[str, Sequence[CorpusIdentity]]]) -> None:
    problems = []
    for split, corpora_of_rank_zero in identities_by_rank[0].items():
        for i, expected in enumerate(corpora_of_rank_zero):
            others = {}
            for rank, identities_of_rank in enumerate(identities_by_rank):
                identity = _nth_or_none(identities_of_rank.get(split, ()), i)
                if identity is None or identity.content != expected.content:
                    others[rank] = identity
            if others:
                problems.append(_difference(split, expected, others))
    if problems:
        raise ConfigError("; ".join(problems))


def _nth_or_none(identities: Sequence[CorpusIdentity], n: int) -> CorpusIdentity | None:
    return identities[n] if n < len(identities) else None


def _difference(
    split: str, expected: CorpusIdentity, others: Mapping[int, CorpusIdentity | None]
) -> str:
    first = next(iter(others.values()))
    ranks = ", ".join(map(str, list(others)[:8])) + (", ..." if len(others) > 8 else "")
    return (
        f"data: the corpus {expected.source!r} of {split} is {_in_words(expected)} on rank 0, but "
        f"{_in_words(first)} on ranks {ranks}; give every host the same copy"
    )


def _in_words(identity: CorpusIdentity | None) -> str:
    if identity is None:
        return "missing"
    return (
        f"{identity.documents} documents of {identity.tokens} tokens "
        f"(fingerprint {identity.fingerprint})"
    )


# ------------------------------------------------------------------- what a checkpoint says of them


def describe_data(config: TrainConfig, parts: Sequence[Corpus] | None = None) -> dict[str, Any]:
    """The tokenizer and the corpora of a training run, as a checkpoint's manifest holds them.

    Of each corpus its identity, weight and how often it is read, which decides its order. For GPT
    that is computed; the datasets of BERT and T5 are built to see it. No communication. A custom
    loop calls it once, when it opens the data, and passes the result to `save` and `load`.
    parts: the corpora of config.data's training split, if they were found before.
    Raises ConfigError as `batches` does.
    """
    if parts is None:
        parts = corpora(config)
    tokenizer = tokenizer_of(config)
    described = []
    counts = samples_of_each(config, parts, "train")
    for corpus, identity, samples in zip(parts, identify(parts), counts, strict=True):
        epochs = _epochs(config, corpus, samples)
        described.append({**attrs.asdict(identity), "weight": corpus.weight, "epochs": epochs})
    return {"tokenizer": attrs.asdict(identity_of(tokenizer)), "corpora": described}


def _epochs(config: TrainConfig, corpus: Corpus, samples: int | None) -> str:
    if samples is None:
        return "1 epoch"
    kind, read = read_samples(config, "train")
    if issubclass(kind, GPTDataset):
        return epochs_in_words(samples, tokens=corpus.tokens, seq_length=config.model.seq_length)
    return f"epochs of {len(read(corpus, samples))} samples together"

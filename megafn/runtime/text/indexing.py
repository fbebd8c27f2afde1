"""Texts written as token ids in megatron-core's indexed format."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import numpy as np

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import DataConfig
from megafn.runtime.text.documents import SPLITS, cut_sentences, read_documents, split_documents
from megafn.runtime.text.tokenizer import (
    Tokenizer,
    TokenizerIdentity,
    identity_of,
    load_tokenizer,
)

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

# megatron-core's masked datasets leave out documents of several sentences if one is longer (tokens)
LONG_SENTENCE = 512

DEFAULT_SPLIT: tuple[float, ...] = attrs.fields(DataConfig).split.default
DEFAULT_JSON_KEY: str = attrs.fields(DataConfig).json_key.default

# the file beside an indexed dataset's .bin and .idx that says what its largest token id is
_IDS = ".ids.json"
# the file that says which tokenizer wrote an indexed dataset, beside its .bin and .idx
_WRITTEN_BY = ".tokenizer.json"

_LONGEST = 2**31 - 1  # tokens of a sequence: the index holds lengths as int32


def index_text(
    source: str | os.PathLike,
    prefix: str | os.PathLike,
    *,
    tokenizer: str | Tokenizer = "bytes",
    split: Sequence[float] = DEFAULT_SPLIT,
    split_sentences: bool = False,
    json_key: str = DEFAULT_JSON_KEY,
) -> dict[str, str]:
    """Write a text as megatron-core's indexed datasets; return split name -> prefix of its files.

    The text is read by `read_documents` with json_key, and every document is cut by the weights
    `split` of train, valid and test (see `split_documents`). Each piece ends with eod and is one
    document of its split, stored as uint16 (int32 from 65,500 ids on). A split without text is not
    written.
    With split_sentences, as BERT's and T5's datasets require, each sentence (see `cut_sentences`)
    is a sequence of its document, without eod. A sentence of more than 512 tokens is stored as
    several, because megatron-core would leave out the whole document.
    Files appear whole under `{prefix}_{split}.bin` and `.idx`, or not at all. Beside them an
    `.ids.json` holds the largest token id, and a `.tokenizer.json` the tokenizer's name and digest.
    Those of an earlier call with this prefix are replaced, or removed if their split is empty now.
    The longest document is held in memory.

    Raises ConfigError for a source that cannot be read, ValueError for a text that cannot be
    encoded or a split of other than three weights.
    """
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    if len(split) != len(SPLITS):
        raise ValueError(f"split = {tuple(split)}: give three weights, of train, valid and test")
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{prefix.name}.", dir=prefix.parent) as folder:
        builders: dict[str, IndexedDatasetBuilder] = {}
        largest: dict[str, int] = {}
        documents = read_documents(source, json_key=json_key)
        for number, pieces in enumerate(split_documents(documents, split), start=1):
            where = f"{source}, document {number}"
            start = 0
            for name, piece in zip(SPLITS, pieces, strict=True):
                sequences = _encode_piece(piece, where, start, tokenizer, split_sentences)
                start += len(piece)
                if not sequences:
                    continue
                if name not in builders:
                    builders[name] = _builder(f"{folder}/{name}.bin", tokenizer)
                ids = np.concatenate(sequences)
                builders[name].add_document(ids, [len(sequence) for sequence in sequences])
                largest[name] = max(largest.get(name, 0), int(ids.max()))
        for name, builder in builders.items():
            builder.finalize(f"{folder}/{name}.idx")
            content = json.dumps({"largest_id": largest[name]}) + "\n"
            Path(f"{folder}/{name}{_IDS}").write_text(content)
            _write_identity(f"{folder}/{name}{_WRITTEN_BY}", identity_of(tokenizer))
        _publish(folder, prefix, builders)
    return {name: f"{prefix}_{name}" for name in SPLITS if name in builders}


def _builder(path: str, tokenizer: Tokenizer) -> IndexedDatasetBuilder:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    return IndexedDatasetBuilder(path, DType.optimal_dtype(tokenizer.vocab_size))


def _encode_piece(
    piece: str, where: str, start: int, tokenizer: Tokenizer, split_sentences: bool
) -> list[np.ndarray]:
    """The sequences of token ids that one piece of a document becomes; [] for an empty piece.

    where, start: the document, and the character in it at which the piece begins, for errors.
    """
    if not split_sentences:
        ids = _encode(piece, where, start, tokenizer)
        return [np.append(ids, ids.dtype.type(tokenizer.eod))] if len(ids) else []
    sequences: list[np.ndarray] = []
    for sentence in cut_sentences(piece):
        ids = _encode(sentence, where, start, tokenizer)
        sequences += [ids[i : i + LONG_SENTENCE] for i in range(0, len(ids), LONG_SENTENCE)]
        start += len(sentence)
    return sequences


def _encode(text: str, where: str, start: int, tokenizer: Tokenizer) -> np.ndarray:
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"{where}, counted from its character {start}: {error}") from error
    if len(ids) >= _LONGEST:
        raise ValueError(
            f"{where}: {len(ids)} tokens in a piece, megatron-core's limit is {_LONGEST}; "
            "separate documents by form feeds"
        )
    return ids


def _publish(folder: str, prefix: Path, written: Collection[str]) -> None:
    """Move the files of the splits that were written to their prefix; remove those of the rest."""
    # a reader opens .idx first, so it comes last
    for suffix in (_IDS, _WRITTEN_BY, ".bin", ".idx"):
        for name in SPLITS:
            target = Path(f"{prefix}_{name}{suffix}")
            if name in written:
                os.replace(f"{folder}/{name}{suffix}", target)
            else:
                target.unlink(missing_ok=True)


def largest_id(prefix: str) -> int | None:
    """The largest token id of an indexed dataset, or None if it was not written by `index_text`."""
    try:
        return int(json.loads(Path(f"{prefix}{_IDS}").read_bytes())["largest_id"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


# ---------------------------------------------------------------- which tokenizer wrote the ids


def _write_identity(path: str, identity: TokenizerIdentity) -> None:
    Path(path).write_text(json.dumps(attrs.asdict(identity)) + "\n")


def indexed_with(prefix: str) -> TokenizerIdentity | None:
    """The tokenizer that wrote an indexed dataset, or None if other tools wrote it.

    Raises ConfigError if the file that names the tokenizer is damaged.
    """
    path = Path(f"{prefix}{_WRITTEN_BY}")
    try:
        fields = json.loads(path.read_bytes())
        return TokenizerIdentity(name=str(fields["name"]), digest=str(fields["digest"]))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ConfigError(
            f"{path} is damaged: expected the name and digest of a tokenizer; index the text "
            "again, or remove the file"
        ) from None

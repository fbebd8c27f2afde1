"""Texts written as token ids in megatron-core's indexed format."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import numpy as np
from attrs import frozen
from tqdm import tqdm

from megafn.pure.config.field_types import default_of
from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import DataConfig
from megafn.runtime.text.documents import (
    BETWEEN_WORDS,
    SPLITS,
    cut_sentences,
    documents_and_positions,
    split_documents,
)
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

DEFAULT_SPLIT: tuple[float, ...] = default_of(DataConfig, "split")
DEFAULT_JSON_KEY: str = default_of(DataConfig, "json_key")

# The file beside an indexed dataset's .bin and .idx that says which tokenizer wrote it, and what
# its largest token id is; and the two files in which an older megafn said so.
_TOKENS = ".tokens.json"
_OLD_IDS = ".ids.json"
_OLD_TOKENIZER = ".tokenizer.json"

_LONGEST = 2**31 - 1  # tokens of a sequence: the index holds lengths as int32


def index_text(
    source: str | os.PathLike[str],
    prefix: str | os.PathLike[str],
    *,
    tokenizer: str | Tokenizer = "bytes",
    eod_token: str | None = None,
    split: Sequence[float] = DEFAULT_SPLIT,
    split_sentences: bool = False,
    json_key: str = DEFAULT_JSON_KEY,
    overwrite: bool = True,
) -> dict[str, str]:
    """Write a text as megatron-core's indexed datasets; return split name -> prefix of its files.

    The text is read by `read_documents` with json_key, and every document is cut by the weights
    `split` of train, valid and test (see `split_documents`). Each piece ends with eod and is one
    document of its split, stored as uint16 (int32 from 65,500 ids on). A split without text is not
    written.
    With split_sentences, as BERT's and T5's datasets require, each sentence (see `cut_sentences`)
    is a sequence of its document, without eod. A sentence of more than 512 tokens is stored as
    several, because megatron-core would leave out the whole document.
    Files appear whole under `{prefix}_{split}.bin` and `.idx`, or not at all. Beside them a
    `.tokens.json` holds the largest token id, and the tokenizer's name and digest. Those of an
    earlier call with this prefix are replaced, or removed if their split is empty now; with
    overwrite=False they are refused before the text is read.
    The longest document is held in memory; it is encoded in fragments, cut where the ids stay the
    same, and by a tokenizer.json on all cores.
    eod_token: as for `load_tokenizer`, if the tokenizer is a name.

    Raises ConfigError for a source that cannot be read or a prefix that is taken, ValueError for a
    text that cannot be encoded or a split of other than three weights.
    """
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, eod_token=eod_token)
    elif eod_token is not None:
        raise ValueError(
            f"eod_token = {eod_token!r}: the Tokenizer has its eod already; pass it to "
            "load_tokenizer"
        )
    if len(split) != len(SPLITS):
        raise ValueError(f"split = {tuple(split)}: give three weights, of train, valid and test")
    prefix = Path(prefix)
    if not overwrite:
        _check_prefix_is_free(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{prefix.name}.", dir=prefix.parent) as folder:
        builders: dict[str, IndexedDatasetBuilder] = {}
        largest: dict[str, int] = {}
        fragments = _fragments(source, json_key, split, tokenizer, split_sentences)
        encoded = _with_progress(_encode(fragments, source, tokenizer), source)
        for name, sequences in _documents(encoded, source, tokenizer, split_sentences):
            if not sequences:
                continue
            if name not in builders:
                builders[name] = _builder(f"{folder}/{name}.bin", tokenizer)
            ids = np.concatenate(sequences)
            builders[name].add_document(ids, [len(sequence) for sequence in sequences])
            largest[name] = max(largest.get(name, 0), int(ids.max()))
        for name, builder in builders.items():
            builder.finalize(f"{folder}/{name}.idx")
            _describe_tokens(f"{folder}/{name}{_TOKENS}", largest[name], identity_of(tokenizer))
        _publish(folder, prefix, builders)
    return {name: f"{prefix}_{name}" for name in SPLITS if name in builders}


def _check_prefix_is_free(prefix: Path) -> None:
    for name in SPLITS:
        index = Path(f"{prefix}_{name}.idx")
        if index.exists():
            raise ConfigError(
                f"{index} exists already; name another prefix, or pass overwrite=True "
                f"(--overwrite) to replace every {prefix}_*"
            )


def _builder(path: str, tokenizer: Tokenizer) -> IndexedDatasetBuilder:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    return IndexedDatasetBuilder(path, DType.optimal_dtype(tokenizer.vocab_size))


# ---------------------------------------------------------------- encoded in fragments of documents

# Characters of a fragment, and of those that are encoded at once: a tokenizer.json takes about 200
# bytes of memory for each.
_FRAGMENT = 2**15
_BATCH = 2**20

_CANDIDATES = 16  # places for a cut that are tried


@frozen(kw_only=True)
class _Fragment:
    """A part of a document that is encoded by itself."""

    text: str
    split: str
    document: int  # its number, from 1
    start: int  # character of the document at which the text begins
    position: int  # bytes of the file up to the end of the text, roughly
    ends_sequence: bool
    ends_document: bool  # the document's part in this split


def _fragments(
    source: str | os.PathLike[str],
    json_key: str,
    split: Sequence[float],
    tokenizer: Tokenizer,
    split_sentences: bool,
) -> Iterator[_Fragment]:
    """All that is to be encoded, in order."""
    documents, positions = tee(documents_and_positions(source, json_key=json_key))
    pieces_of_documents = split_documents((text for text, _ in documents), split)
    before = 0
    for number, pieces in enumerate(pieces_of_documents, start=1):
        text, after = next(positions)
        start = 0
        for name, piece in zip(SPLITS, pieces, strict=True):
            parts = _parts(piece, tokenizer, split_sentences)
            for i, (part, ends_sequence) in enumerate(parts, start=1):
                end = start + len(part)
                yield _Fragment(
                    text=part,
                    split=name,
                    document=number,
                    start=start,
                    position=before + (after - before) * end // len(text),
                    ends_sequence=ends_sequence,
                    ends_document=i == len(parts),
                )
                start = end
        before = after


def _parts(piece: str, tokenizer: Tokenizer, split_sentences: bool) -> list[tuple[str, bool]]:
    """A piece of a document cut for encoding: (text, whether it ends a sequence)."""
    if not piece:
        return []
    parts = []
    for sequence in cut_sentences(piece) if split_sentences else (piece,):
        *beginning, end = _cut_for_encoding(sequence, tokenizer)
        parts += [(part, False) for part in beginning]
        parts.append((end, True))
    return parts


def _cut_for_encoding(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    """Cut a long text where the ids stay the same, into fragments of `_FRAGMENT` or more."""
    start = 0
    while tokenizer.may_cut is not None and len(text) - start > 2 * _FRAGMENT:
        candidates = islice(BETWEEN_WORDS.finditer(text, start + _FRAGMENT), _CANDIDATES)
        cuts = (match.start() for match in candidates)
        cut = next((i for i in cuts if tokenizer.may_cut(text, i)), None)
        if cut is None:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _encode(
    fragments: Iterable[_Fragment], source: str | os.PathLike[str], tokenizer: Tokenizer
) -> Iterator[tuple[_Fragment, np.ndarray]]:
    """The fragments with their ids, encoded in batches."""
    for batch in _batches(fragments):
        yield from zip(batch, _encode_batch(batch, source, tokenizer), strict=True)


def _encode_batch(
    batch: list[_Fragment], source: str | os.PathLike[str], tokenizer: Tokenizer
) -> list[np.ndarray]:
    if tokenizer.encode_batch is not None:
        # after an error the fragments are encoded singly, which tells the place
        with contextlib.suppress(ValueError):
            return tokenizer.encode_batch([fragment.text for fragment in batch])
    return [_encode_fragment(fragment, source, tokenizer) for fragment in batch]


def _batches(fragments: Iterable[_Fragment]) -> Iterator[list[_Fragment]]:
    batch: list[_Fragment] = []
    characters = 0
    for fragment in fragments:
        batch.append(fragment)
        characters += len(fragment.text)
        if characters >= _BATCH:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def _encode_fragment(
    fragment: _Fragment, source: str | os.PathLike[str], tokenizer: Tokenizer
) -> np.ndarray:
    try:
        return tokenizer.encode(fragment.text)
    except ValueError as error:
        raise ValueError(
            f"{source}, document {fragment.document}, counted from its character "
            f"{fragment.start}: {error}"
        ) from error


def _with_progress(
    encoded: Iterable[tuple[_Fragment, np.ndarray]], source: str | os.PathLike[str]
) -> Iterator[tuple[_Fragment, np.ndarray]]:
    """The same items, with a bar on standard error if that is a terminal."""
    with tqdm(
        total=os.path.getsize(source) if os.path.isfile(source) else None,
        desc=f"indexing {Path(source).name}",
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None,
    ) as bar:
        for fragment, ids in encoded:
            yield fragment, ids
            bar.update(fragment.position - bar.n)


def _documents(
    encoded: Iterable[tuple[_Fragment, np.ndarray]],
    source: str | os.PathLike[str],
    tokenizer: Tokenizer,
    split_sentences: bool,
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """The split and the sequences of token ids of each piece of a document; they may be none."""
    parts: list[np.ndarray] = []
    sequences: list[np.ndarray] = []
    for fragment, part in encoded:
        parts.append(part)
        if not fragment.ends_sequence:
            continue
        ids = np.concatenate(parts)
        parts = []
        _check_ids(ids, f"{source}, document {fragment.document}", tokenizer)
        if split_sentences:
            sequences += [ids[i : i + LONG_SENTENCE] for i in range(0, len(ids), LONG_SENTENCE)]
        elif len(ids):
            sequences.append(np.append(ids, ids.dtype.type(tokenizer.eod)))
        if fragment.ends_document:
            yield fragment.split, sequences
            sequences = []


def _check_ids(ids: np.ndarray, where: str, tokenizer: Tokenizer) -> None:
    if len(ids) >= _LONGEST:
        raise ValueError(
            f"{where}: {len(ids)} tokens in a piece, megatron-core's limit is {_LONGEST}; "
            "separate documents by form feeds"
        )
    if (ids == tokenizer.eod).any():
        token = tokenizer.inv_vocab.get(tokenizer.eod, tokenizer.eod)
        raise ValueError(
            f"{where}: its text contains the token that ends documents, {token!r}; name another "
            "in data.eod_token (--eod-token)"
        )


def _publish(folder: str, prefix: Path, written: Collection[str]) -> None:
    """Move the files of the splits that were written to their prefix; remove those of the rest."""
    # a reader opens .idx first, so it comes last
    for suffix in (_TOKENS, ".bin", ".idx"):
        for name in SPLITS:
            target = Path(f"{prefix}_{name}{suffix}")
            if name in written:
                os.replace(f"{folder}/{name}{suffix}", target)
            else:
                target.unlink(missing_ok=True)
    for suffix in (_OLD_IDS, _OLD_TOKENIZER):
        for name in SPLITS:
            Path(f"{prefix}_{name}{suffix}").unlink(missing_ok=True)


# ------------------------------------------------------------------ what is known of the token ids


def _describe_tokens(path: str, largest: int, tokenizer: TokenizerIdentity) -> None:
    content = {"largest_id": largest, "tokenizer": attrs.asdict(tokenizer)}
    Path(path).write_text(json.dumps(content) + "\n")


def largest_id(prefix: str) -> int | None:
    """The largest token id of an indexed dataset, or None if it was not written by `index_text`."""
    for suffix in (_TOKENS, _OLD_IDS):
        try:
            return int(json.loads(Path(f"{prefix}{suffix}").read_bytes())["largest_id"])
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return None


def indexed_with(prefix: str) -> TokenizerIdentity | None:
    """The tokenizer that wrote an indexed dataset, or None if other tools wrote it.

    Raises ConfigError if the file that names the tokenizer is damaged.
    """
    path = Path(f"{prefix}{_TOKENS}")
    is_old = not path.exists()
    if is_old:
        path = Path(f"{prefix}{_OLD_TOKENIZER}")
    try:
        content = json.loads(path.read_bytes())
        fields = content if is_old else content["tokenizer"]
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

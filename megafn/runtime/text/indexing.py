"""Documents out of text files, the demo text, and texts written in megatron-core's indexed format."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megafn.pure.config.problems import ConfigError
from megafn.runtime.text.tokenizer import Tokenizer, load_tokenizer

PARTS = ("train", "valid", "test")
SPLIT = (949.0, 50.0, 1.0)
_LONGEST = 2**31 - 1  # tokens of a document: the index holds lengths as int32
LONG_SENTENCE = 512  # tokens: megatron-core's masked datasets leave out documents of several sentences with a longer one
_SENTENCE_END = re.compile(r"""[.!?]['")\]]*\s+(?![a-z])|\n\s*\n\s*""")


def read_documents(path: str | os.PathLike) -> Iterator[str]:
    """The documents of a UTF-8 text file, one at a time; those that hold nothing but white space are left out.

    Form feeds ("\\f", ASCII's "new page") separate documents; a `.jsonl` file holds an object with the key "text" a line.
    Raises ConfigError where the file is missing, holds no text, or is no UTF-8 (told with the byte) or JSON (with the line).
    """
    path = Path(path)

    def decoded(raw: bytes, start: int) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"text file {path}: byte {start + error.start} is not UTF-8; convert it, for instance "
                "with iconv -t UTF-8"
            ) from None

    def of_json(raw: bytes, start: int, line: int) -> str:
        text = decoded(raw, start)
        with contextlib.suppress(ValueError, RecursionError):
            if not text.strip():
                return ""
            record = json.loads(text)
            if isinstance(record, dict) and isinstance(record.get("text"), str):
                return record["text"]
        raise ConfigError(
            f'text file {path}: line {line} is not JSON of the form {{"text": "..."}}; mend or remove it'
        )

    try:
        file = open(path, "rb")
    except OSError as error:
        raise ConfigError(
            f"text file {path} can't be read: {error.strerror}; give the path of a text file"
        ) from error
    empty = True
    with file:
        is_json, start = path.suffix.lower() == ".jsonl", 0
        for number, raw in enumerate(file if is_json else _pages(file), start=1):
            text = of_json(raw, start, number) if is_json else decoded(raw, start)
            start += len(raw) + (not is_json)  # a page comes without its form feed
            if text.strip():
                empty = False
                yield text
    if empty:
        raise ConfigError(f"text file {path} holds no text; give one that does")


def _pages(file: Any, block: int = 2**20) -> Iterator[bytes]:
    """What stands between form feeds; no byte of another UTF-8 character equals one."""
    page: list[bytes] = []
    while data := file.read(block):
        *ended, rest = data.split(b"\f")
        for part in ended:
            yield b"".join((*page, part))
            page = []
        page.append(rest)
    yield b"".join(page)


def split_documents(
    documents: Iterable[str], weights: Sequence[float], *, reach: int = 16
) -> Iterator[tuple[str, ...]]:
    """Cuts each document, in order, into one piece per weight; joined, the pieces are the document.

    A cut moves to white space where there is some within `reach` characters. What a document gave too much or too
    little of a part is made up for by the next, so at any time a part holds its share of the characters so far
    to within reach + 1, even where documents are too short to give each part its share.
    Raises ValueError for weights that are negative or all zero.

    >>> list(split_documents(["seven words stand here to be cut", "so do five here"], (3, 1)))
    [('seven words stand here ', 'to be cut'), ('so do five ', 'here')]
    """
    total = math.fsum(weights)
    if not (total > 0 and min(weights) >= 0 and math.isfinite(total)):
        raise ValueError(
            f"split = {tuple(weights)}: give weights of 0 or more, one of them above 0"
        )
    shares = [
        math.fsum(weights[:i]) / total for i in range(1, len(weights))
    ]  # of the text up to each cut
    given, seen = [0] * len(shares), 0  # characters before each cut, and in all
    for text in documents:
        seen, cuts = seen + len(text), [0]
        for i, share in enumerate(shares):
            low, cut = cuts[-1], round(share * seen) - given[i]
            if weights[i] == 0:
                cut = low
            elif low < cut < len(text):
                near = range(max(low + 1, cut - reach), min(len(text) - 1, cut + reach) + 1)
                cut = min(
                    (p for p in near if text[p - 1].isspace()),
                    key=lambda p: abs(p - cut),
                    default=cut,
                )
            cuts.append(min(max(cut, low), len(text)))
            given[i] += cuts[-1]
        yield tuple(text[a:b] for a, b in pairwise((*cuts, len(text))))


def cut_sentences(text: str) -> list[str]:
    r"""Cuts a text behind sentences and at empty lines; joined, the pieces are the text.

    A sentence ends with . ! or ?, closing quotes and brackets, and white space before what is no small letter.

    >>> cut_sentences("Is it so? (It is.) See e.g. this.\n\nA title\n\nThe end")
    ['Is it so? ', '(It is.) ', 'See e.g. this.\n\n', 'A title\n\n', 'The end']
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [text[a:b] for a, b in pairwise((0, *ends, len(text))) if a < b]


def index_text(
    source: str | os.PathLike,
    prefix: str | os.PathLike,
    *,
    tokenizer: str | Tokenizer = "bytes",
    split: Sequence[float] = SPLIT,
    split_sentences: bool = False,
) -> dict[str, str]:
    """Writes a text (see `read_documents`) as megatron-core's indexed datasets; returns part -> prefix of its two files.

    Every document is cut by the weights `split` of train, valid and test (see `split_documents`); each piece ends with
    eod, is one document of its part, and stands as uint16 (int32 from 65,500 ids on). A part without text is not written.
    With split_sentences, as BERT's and T5's datasets want it, each sentence (see `cut_sentences`) is a sequence of its
    document, without eod; one of more than 512 tokens is several, for megatron-core would leave out the whole document.
    Files appear whole under `{prefix}_{part}.bin` and `.idx`, or not at all; those of an earlier call with this
    prefix are replaced, or removed where their part is empty now. Memory: the longest document.

    Raises ConfigError for a source that can't be read, ValueError for a text that can't be encoded or a bad split.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if len(split) != len(PARTS):
        raise ValueError(f"split = {tuple(split)}: give three weights, of train, valid and test")
    target = Path(prefix)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        builders: dict[str, Any] = {}
        for number, pieces in enumerate(split_documents(read_documents(source), split), start=1):
            start = 0
            for part, piece in zip(PARTS, pieces):
                runs: list[np.ndarray] = []
                for text in cut_sentences(piece) if split_sentences else [piece]:
                    try:
                        ids = tokenizer.encode(text)
                    except ValueError as error:
                        raise ValueError(
                            f"{source}, document {number}, counted from its character {start}: {error}"
                        ) from error
                    if len(ids) >= _LONGEST:
                        raise ValueError(
                            f"{source}, document {number}: {len(ids)} tokens in a piece, megatron-core's limit is "
                            f"{_LONGEST}; separate documents by form feeds"
                        )
                    start += len(text)
                    if split_sentences:
                        runs += [
                            ids[i : i + LONG_SENTENCE] for i in range(0, len(ids), LONG_SENTENCE)
                        ]
                    elif len(ids):
                        runs.append(np.append(ids, ids.dtype.type(tokenizer.eod)))
                if runs:
                    if part not in builders:
                        builders[part] = IndexedDatasetBuilder(
                            f"{folder}/{part}.bin", DType.optimal_dtype(tokenizer.vocab_size)
                        )
                    builders[part].add_document(np.concatenate(runs), list(map(len, runs)))
        for part, builder in builders.items():
            builder.finalize(f"{folder}/{part}.idx")
        for suffix in (".bin", ".idx"):  # a reader looks at .idx first, so it comes last
            for part in PARTS:
                if part in builders:
                    os.replace(f"{folder}/{part}{suffix}", f"{target}_{part}{suffix}")
                else:
                    Path(f"{target}_{part}{suffix}").unlink(missing_ok=True)
    return {part: f"{target}_{part}" for part in PARTS if part in builders}


def cache_folder(folder: str | None = None) -> Path:
    """`folder`, or megafn's in the user's cache ($XDG_CACHE_HOME, else ~/.cache), made where it is missing.

    Raises ConfigError where that can't be.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    path = (
        Path(folder)
        if folder
        else (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "megafn"
    )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data.cache = {folder!r}: {path} can't be made ({error.strerror}); name a folder that "
            "can be written to in data.cache or XDG_CACHE_HOME"
        ) from error
    return path


def indexed_text(
    source: str,
    *,
    tokenizer: Tokenizer,
    split: Sequence[float],
    cache: str | None = None,
    split_sentences: bool = False,
) -> dict[str, str]:
    """As `index_text`, into the cache folder, once: later calls, and other processes, find it there.

    It is found again by the source's path, size and time of change, the tokenizer and the split. On each host one
    process writes while the others wait; where hosts share the folder, who is first to finish wins.
    """
    try:
        status = os.stat(source)
    except OSError as error:
        raise ConfigError(
            f"text file {source} can't be read: {error.strerror}; give the path of a text file"
        ) from error
    identity = [
        os.path.realpath(source),
        status.st_size,
        status.st_mtime_ns,
        dict(tokenizer.unique_identifiers),
        [float(weight) for weight in split],
        *["sentences"] * split_sentences,
    ]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = cache_folder(cache)
    home = folder / f"{Path(source).stem}-{key}"
    with open(folder / f".{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a process that dies lets go of it
        if not home.is_dir():
            made = tempfile.mkdtemp(prefix=f".{key}.", dir=folder)
            try:
                index_text(
                    source,
                    f"{made}/text",
                    tokenizer=tokenizer,
                    split=split,
                    split_sentences=split_sentences,
                )
                shutil.copymode(folder, made)
                os.rename(made, home)  # whole or not at all
            except OSError:
                if not home.is_dir():  # another host was first: as good
                    raise
            finally:
                shutil.rmtree(made, ignore_errors=True)
    return {
        part: str(home / f"text_{part}") for part in PARTS if (home / f"text_{part}.idx").exists()
    }


def demo_text() -> str:
    """The path of about 460 kB of English prose: the 79 documents of Python's `pydoc_data.topics`, under the PSF licence.

    Written into the user's cache folder where it is not there yet, in one stroke, since every rank calls this.
    """
    from pydoc_data.topics import topics

    content = "\f".join(topics[name] for name in sorted(topics)).encode("utf-8")
    path = cache_folder() / f"python-topics-{hashlib.sha256(content).hexdigest()[:12]}.txt"
    if not path.exists() or path.stat().st_size != len(content):
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write(content)
        os.replace(file.name, path)
    return str(path)

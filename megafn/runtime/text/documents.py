"""Documents of text files: read one at a time, cut into splits, cut into sentences."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from megafn.pure.config.problems import ConfigError

SPLITS = ("train", "valid", "test")

_SENTENCE_END = re.compile(r"""[.!?]['")\]]*\s+(?![a-z])|\n\s*\n\s*""")


def read_documents(path: str | os.PathLike[str]) -> Iterator[str]:
    """Read the documents of a UTF-8 text file, one at a time; leave out those of white space only.

    Form feeds ("\\f", ASCII's "new page") separate documents. Each line of a `.jsonl` file is an
    object with the key "text".
    Raises ConfigError if the file is missing or holds no text, is not UTF-8 (the error names the
    byte) or not JSON (the error names the line).
    """
    path = Path(path)
    decode_documents = _from_json_lines if path.suffix.lower() == ".jsonl" else _from_pages
    holds_text = False
    with _open(path) as file:
        for text in decode_documents(file, path):
            if text.strip():
                holds_text = True
                yield text
    if not holds_text:
        raise ConfigError(f"text file {path} holds no text; give one that does")


def unreadable(path: str | os.PathLike[str], error: OSError) -> ConfigError:
    """The error for a text file that the operating system refuses to read."""
    return ConfigError(
        f"text file {path} can't be read: {error.strerror}; give the path of a text file"
    )


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from error


def _from_pages(file: BinaryIO, path: Path) -> Iterator[str]:
    """The texts between form feeds."""
    start = 0
    for page in _pages(file):
        yield _decode(page, path, start)
        start += len(page) + 1  # the form feed


def _from_json_lines(file: BinaryIO, path: Path) -> Iterator[str]:
    """The text of each line's JSON object; "" for an empty line."""
    start = 0
    for number, line in enumerate(file, start=1):
        yield _text_of_json(_decode(line, path, start), path, number)
        start += len(line)


def _pages(file: BinaryIO, block: int = 2**20) -> Iterator[bytes]:
    """The bytes between form feeds; no byte of another UTF-8 character equals a form feed."""
    page: list[bytes] = []
    while data := file.read(block):
        *ends_of_pages, rest = data.split(b"\f")
        for end_of_page in ends_of_pages:
            yield b"".join((*page, end_of_page))
            page = []
        page.append(rest)
    yield b"".join(page)


def _decode(raw: bytes, path: Path, start: int) -> str:
    """`raw` as text; `start` is where in the file it begins, for the error."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"text file {path}: byte {start + error.start} is not UTF-8; convert it, for instance "
            "with iconv -t UTF-8"
        ) from None


def _text_of_json(line: str, path: Path, number: int) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ConfigError(
            f'text file {path}: line {number} is not JSON of the form {{"text": "..."}}; '
            "correct or remove it"
        )
    return record["text"]


def split_documents(
    documents: Iterable[str], weights: Sequence[float], *, reach: int = 16
) -> Iterator[tuple[str, ...]]:
    """Cut each document, in order, into one piece per weight; joined, the pieces are the document.

    A cut moves to white space if there is some within `reach` characters. If a document gave a
    split too much or too little, the next document makes up for it: at any time a split holds its
    share of the characters so far to within reach + 1, even if documents are too short to give
    each split its share.
    Raises ValueError for weights that are negative or all zero.

    >>> list(split_documents(["seven words stand here to be cut", "so do five here"], (3, 1)))
    [('seven words stand here ', 'to be cut'), ('so do five ', 'here')]
    """
    total_weight = math.fsum(weights)
    if not (total_weight > 0 and min(weights) >= 0 and math.isfinite(total_weight)):
        raise ValueError(
            f"split = {tuple(weights)}: give weights of 0 or more, one of them above 0"
        )
    # the share of the text that lies before each cut
    shares = [math.fsum(weights[:i]) / total_weight for i in range(1, len(weights))]
    characters = 0
    characters_before_cut = [0] * len(shares)
    for text in documents:
        characters += len(text)
        cuts = [0]
        for i, share in enumerate(shares):
            cut = round(share * characters) - characters_before_cut[i]
            if weights[i] == 0:
                cut = cuts[-1]
            else:
                cut = _move_to_white_space(text, cut, cuts[-1], reach)
            cut = min(max(cut, cuts[-1]), len(text))
            cuts.append(cut)
            characters_before_cut[i] += cut
        yield tuple(text[start:end] for start, end in pairwise((*cuts, len(text))))


def _move_to_white_space(text: str, cut: int, lowest: int, reach: int) -> int:
    """The place after white space that is nearest to `cut` and within `reach`, or `cut` itself."""
    if not lowest < cut < len(text):
        return cut
    first = max(lowest + 1, cut - reach)
    last = min(len(text) - 1, cut + reach)
    after_white_space = [i for i in range(first, last + 1) if text[i - 1].isspace()]
    return min(after_white_space, key=lambda i: abs(i - cut), default=cut)


def cut_sentences(text: str) -> list[str]:
    r"""Cut a text after each sentence and at empty lines; joined, the pieces are the text.

    A sentence ends with . ! or ?, closing quotes and brackets, and white space, unless a lowercase
    letter follows.

    >>> cut_sentences("Is it so? (It is.) See e.g. this.\n\nA title\n\nThe end")
    ['Is it so? ', '(It is.) ', 'See e.g. this.\n\n', 'A title\n\n', 'The end']
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [text[start:end] for start, end in pairwise((0, *ends, len(text))) if start < end]

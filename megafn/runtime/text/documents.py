"""Documents of text files: read one at a time, cut into splits, cut into sentences."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader, BytesIO
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import BinaryIO, cast

from megafn.pure.config.problems import ConfigError

SPLITS = ("train", "valid", "test")


def read_documents(path: str | os.PathLike[str], *, json_key: str = "text") -> Iterator[str]:
    """Read the documents of a UTF-8 text file, one at a time; leave out those of white space only.

    Form feeds ("\\f", ASCII's "new page") separate documents. If the file holds one JSON object a
    line, whatever its name, each is a document: its text stands under `json_key`. Other JSON is
    refused; a file that begins with a form feed is plain text, even if JSON follows. A byte order
    mark is left out. The file may be compressed by gzip.
    Raises ConfigError if the file is missing or holds no text, is not UTF-8 (the error names the
    byte) or not such JSON (the error names the line).
    """
    for text, _ in documents_and_positions(path, json_key=json_key):
        yield text


def documents_and_positions(
    path: str | os.PathLike[str], *, json_key: str
) -> Iterator[tuple[str, int]]:
    """As `read_documents`, each with the bytes of the file that have been read then (0: a pipe)."""
    path = Path(path)
    holds_text = False
    with _open(path) as file:
        try:
            for text in _decode_documents(path, _decompressed(file, path), json_key):
                if text.strip():
                    holds_text = True
                    yield text, file.tell() if file.seekable() else 0
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ConfigError(
                f"text file {path}: its gzip compression is damaged ({error}); compress it again"
            ) from error
    if not holds_text:
        raise ConfigError(f"text file {path} holds no text; give one that does")


def unreadable(path: str | os.PathLike[str], error: OSError) -> ConfigError:
    """The error for a text file that the operating system refuses to read."""
    return ConfigError(
        f"text file {path} can't be read: {error.strerror}; give the path of a text file"
    )


def _open(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from error


# ---------------------------------------------------------------------------- the form of a file

# The first bytes of compressed files, none of which is UTF-8 text.
_GZIP = b"\x1f\x8b"
_OTHER_COMPRESSIONS = {
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"\xfd7zXZ\x00": ("xz", "xz -d"),
    b"BZh91AY&SY": ("bzip2", "bzip2 -d"),
    b"PK\x03\x04": ("zip", "unzip"),
}

_JSON_NAMES = (".json", ".jsonl", ".jsonlines", ".ndjson")

# How an array or an object of JSON begins; plain text hardly does.
_JSON_ARRAY = re.compile(rb"\[\s*(?:\{\s*\"|\[\s*\{)")
_JSON_OBJECT = re.compile(rb"""\{\s*"(?:[^"\\\n]|\\.)*"\s*:""")

_BLANK = b" \t\r\n"


def _decompressed(file: BufferedReader, path: Path) -> BinaryIO:
    head = file.peek(16)
    if head.startswith(_GZIP):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    for magic, (name, command) in _OTHER_COMPRESSIONS.items():
        if head.startswith(magic):
            raise ConfigError(
                f"text file {path}: it is compressed by {name}, and only gzip is read; "
                f"decompress it with {command}"
            )
    return file


def _decode_documents(path: Path, file: BinaryIO, json_key: str) -> Iterator[str]:
    """The documents in the form that the beginning of the file shows, or the file's name."""
    head = file.read(2**16)
    start = 0
    if head.startswith(codecs.BOM_UTF8):
        start = len(codecs.BOM_UTF8)
        head = head[start:]
    name = path.name.lower().removesuffix(".gz")
    named_json = name.endswith(_JSON_NAMES)
    if named_json or head.lstrip(_BLANK).startswith((b"{", b"[")):
        head = _with_two_whole_lines(head, file)
        problem = _problem_of_json(head, named_json)
        if problem:
            raise ConfigError(f"text file {path}: {problem}")
    if named_json or _begins_with_json_lines(head, json_key):
        lines = chain(BytesIO(head), file)
        yield from _from_json_lines(lines, path, start, json_key)
    else:
        yield from _from_pages(head, file, path, start)


def _with_two_whole_lines(head: bytes, file: BinaryIO) -> bytes:
    """`head` and what the file needs after it to complete its last line, and its second one."""
    head += file.readline()
    while len(_first_lines(head)) < 2 and (line := file.readline()):
        head += line
    return head


def _first_lines(head: bytes) -> list[bytes]:
    """The first two lines that are not blank, or fewer if there are not two."""
    return list(islice((line for line in BytesIO(head) if line.strip(_BLANK)), 2))


def _problem_of_json(head: bytes, named_json: bool) -> str | None:
    """Why the beginning of a file is JSON, but not one object a line; None if that is not so."""
    lines = _first_lines(head)
    if not lines or isinstance(_json_of(lines[0]), dict):
        return None
    text = head.lstrip(_BLANK)
    remedy = 'write one object of the form {"text": "..."} on each line, for instance with '
    remedy_for_text = "" if named_json else " (or begin the file with a form feed if it is text)"
    if _JSON_ARRAY.match(text) or (named_json and text.startswith(b"[")):
        return f"it begins with a JSON array; {remedy}jq -c '.[]'{remedy_for_text}"
    if _JSON_OBJECT.match(text):
        return (
            "it begins with a JSON object that its first line does not hold whole; "
            f"{remedy}jq -c .{remedy_for_text}"
        )
    return None


def _begins_with_json_lines(head: bytes, json_key: str) -> bool:
    """Whether the first line is an object, and has the key or is followed by another object."""
    lines = _first_lines(head)
    if not head.lstrip(_BLANK).startswith(b"{") or not lines:
        return False
    first, *rest = [_json_of(line) for line in lines]
    return isinstance(first, dict) and (
        json_key in first or all(isinstance(line, dict) for line in rest)
    )


def _json_of(line: bytes | str) -> object:
    """What a line says as JSON, or None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _from_pages(head: bytes, file: BinaryIO, path: Path, start: int) -> Iterator[str]:
    """The texts between form feeds; `start`: where `head` begins in the file."""
    for page in _pages(head, file):
        yield _decode(page, path, start)
        start += len(page) + 1  # the form feed


def _from_json_lines(
    lines: Iterable[bytes], path: Path, start: int, json_key: str
) -> Iterator[str]:
    """The text of each line's JSON object; "" for an empty line."""
    for number, line in enumerate(lines, start=1):
        yield _text_of_json(_decode(line, path, start), path, number, json_key)
        start += len(line)


def _pages(head: bytes, file: BinaryIO, block: int = 2**20) -> Iterator[bytes]:
    """The bytes between form feeds; no byte of another UTF-8 character equals a form feed."""
    page: list[bytes] = []
    data = head
    while data:
        *ends_of_pages, rest = data.split(b"\f")
        for end_of_page in ends_of_pages:
            yield b"".join((*page, end_of_page))
            page = []
        page.append(rest)
        data = file.read(block)
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


def _text_of_json(line: str, path: Path, number: int, json_key: str) -> str:
    if not line.strip():
        return ""
    record = _json_of(line)
    where = f"text file {path}: line {number}"
    if not isinstance(record, dict):
        raise ConfigError(
            f'{where} is not JSON of the form {{"{json_key}": "..."}}; correct or remove it'
        )
    if json_key not in record:
        keys = ", ".join(map(repr, islice(record, 8)))
        raise ConfigError(
            f"{where}: this JSON object has no key {json_key!r}, but {keys or 'none at all'}; name "
            "the key of the text in data.json_key (--json-key)"
        )
    text = record[json_key]
    if not isinstance(text, str):
        raise ConfigError(
            f"{where}: the value of the JSON key {json_key!r} is not a string "
            f"({type(text).__name__}); correct the line, or name another key in data.json_key "
            "(--json-key)"
        )
    return text


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


# ------------------------------------------------------------------------- words and sentences

# Where a long text may be cut, because most tokenizers begin a new word there: before white space
# or a Chinese comma or full stop, between two letters.
BETWEEN_WORDS = re.compile(
    "(?<=[^\\W\\d_])[ \\n\u3001\u3002\uff0c\uff01\uff1f\uff1a\uff1b](?=[^\\W\\d_])"
)

# Marks that end a sentence if white space follows, and those that always do: of Chinese and
# Japanese, Hindi and other languages of India, Arabic and Urdu, Armenian, Ethiopic, Burmese, Khmer.
_STOPS = ".!?\u2026\u203c\u203d\u2047\u2048\u2049"
_STOPS_ALONE = (
    "\u3002\uff01\uff1f\uff61"  # 。 ！ ？ ｡
    "\u0964\u0965"  # danda, double danda
    "\u061f\u06d4"  # Arabic question mark, Urdu full stop
    "\u0589\u1362\u1367\u1368"  # Armenian, Ethiopic
    "\u104a\u104b\u17d4\u17d5"  # Burmese, Khmer
)
# Quotation marks and brackets that close after a stop.
_CLOSING = "'\")\\]}\u2019\u201d\u00bb\u203a\u300d\u300f\uff09\u3011\u300b\u3009\uff3d\uff02"
# These close in German. In English they open, with white space before them.
_CLOSING_BEFORE_SPACE = _CLOSING + "\u2018\u201c\u00ab\u2039"
# French quotation marks stand off by a space.
_CLOSED_BEFORE_SPACE = rf"(?:[{_CLOSING_BEFORE_SPACE}]|[ \u00a0\u202f]+[\u00bb\u203a](?=\s))*"

_SENTENCE_END = re.compile(
    rf"[{_STOPS}]{_CLOSED_BEFORE_SPACE}(?P<space>\s+)"
    rf"|[{_STOPS_ALONE}][{_STOPS}{_STOPS_ALONE}]*[{_CLOSING}]*\s*"
    r"|\n\s*\n\s*"
)
_EMPTY_LINE = re.compile(r"\n\s*\n")


def cut_sentences(text: str) -> list[str]:
    r"""Cut a text after each sentence and at empty lines; joined, the pieces are the text.

    A sentence ends with . ! ? or an ellipsis, closing quotes and brackets, and white space, unless
    a lowercase letter follows; or with a mark that only ends sentences, such as 。 or the danda,
    with or without white space after it.

    >>> cut_sentences("Is it so? (It is.) See e.g. this.\n\nA title\n\nThe end")
    ['Is it so? ', '(It is.) ', 'See e.g. this.\n\n', 'A title\n\n', 'The end']
    >>> cut_sentences("今天天气很好。我们去公园散步吧！“好。”他说。")
    ['今天天气很好。', '我们去公园散步吧！', '“好。”', '他说。']
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if _ends_sentence(text, match)]
    return [text[start:end] for start, end in pairwise((0, *ends, len(text))) if start < end]


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    space = match["space"]
    following = text[match.end() : match.end() + 1]
    return space is None or not following.islower() or bool(_EMPTY_LINE.search(space))

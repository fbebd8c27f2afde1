"""Tokenizers: frozen records of two functions, text to token ids and back, and the special ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from attrs import field, frozen

from megafn.pure.config.problems import ConfigError

if TYPE_CHECKING:
    import tokenizers


@frozen(kw_only=True, eq=False)
class Tokenizer:
    """Text to token ids and back; the attributes are those that megatron-core's datasets read.

    encode: str -> integer ids [n], without special ids. decode: ids [n] -> str, special ids left
    out. `eod` ends each document. If the vocabulary lacks a special token, `pad` is -1, the other
    ids are None, the sentinels empty. `unique_identifiers` (JSON) distinguishes tokenizers.
    """

    name: str
    vocab_size: int
    encode: Callable[[str], np.ndarray]
    decode: Callable[[Iterable[int]], str]
    unique_identifiers: Mapping[str, str]
    eod: int
    pad: int = -1
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    additional_special_tokens_ids: tuple[int, ...] = ()  # T5's sentinels
    # id -> token; a token that continues a word begins with "##"
    inv_vocab: Mapping[int, str] = field(factory=dict, repr=False)


@frozen(kw_only=True)
class TokenizerIdentity:
    """Which tokenizer made token ids."""

    # As it was given: "bytes", or a path, which may be another's today.
    name: str
    # Of the tokenizer's definition, the same under any path.
    digest: str


def identity_of(tokenizer: Tokenizer) -> TokenizerIdentity:
    """A tokenizer's name, and a digest of what distinguishes it from others."""
    identifiers = json.dumps(dict(tokenizer.unique_identifiers), sort_keys=True)
    digest = hashlib.sha256(identifiers.encode()).hexdigest()
    return TokenizerIdentity(name=tokenizer.name, digest=digest)


# bytes that no UTF-8 text holds
_NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))
_BYTES_EOD = 0


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes as vocabulary: a text's ids are its UTF-8 bytes.

    Special ids are bytes that no UTF-8 text holds: 0 (NUL, refused in texts) is eod; 0xC0, 0xC1,
    0xF5 to 0xFF are pad, cls, sep, mask, bos, eos, unk and six sentinels. `encode` raises
    ValueError on NUL and on lone surrogates. `decode` replaces invalid UTF-8 by U+FFFD, and raises
    ValueError on ids that are not bytes.

    >>> tokenizer = byte_tokenizer()
    >>> ids = tokenizer.encode("né")
    >>> ids.tolist(), tokenizer.decode([*ids, tokenizer.eod, tokenizer.pad])
    ([110, 195, 169], 'né')
    """
    names = ("pad", "cls", "sep", "mask", "bos", "eos", "unk")
    return Tokenizer(
        name="bytes",
        vocab_size=256,
        encode=_encode_bytes,
        decode=_decode_bytes,
        eod=_BYTES_EOD,
        **dict(zip(names, _NEVER_IN_UTF8, strict=False)),
        additional_special_tokens_ids=_NEVER_IN_UTF8[len(names) :],
        inv_vocab={i: chr(i) for i in range(256) if i not in _NEVER_IN_UTF8},
        unique_identifiers={"tokenizer": "bytes"},
    )


def _encode_bytes(text: str) -> np.ndarray:
    nul = text.find("\0")
    if nul >= 0:
        raise ValueError(
            f"text: character {nul} is NUL, the id that ends a document; remove NULs from the text"
        )
    return np.frombuffer(text.encode("utf-8"), np.uint8)


def _decode_bytes(ids: Iterable[int]) -> str:
    ids = np.fromiter(ids, np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < 256:
        raise ValueError(
            f"ids from {ids.min()} to {ids.max()}: this tokenizer's ids are bytes, 0 to 255"
        )
    special = np.isin(ids, (_BYTES_EOD, *_NEVER_IN_UTF8))
    return ids[~special].astype(np.uint8).tobytes().decode("utf-8", "replace")


# usual names in the vocabularies of BERT, T5, GPT and Llama; the first that is there counts
_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>")
_SPECIAL_NAMES = {
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "unk": ("<unk>", "[UNK]"),
}


def load_tokenizer(name: str) -> Tokenizer:
    """`byte_tokenizer()` for "bytes", else the tokenizer in the Hugging Face tokenizer.json `name`.

    Its eod is the first of <|endoftext|>, <|end_of_text|>, </s>, <eos>, [SEP] in the vocabulary;
    the other special ids follow the usual names of BERT, T5 and Llama. Truncation and padding that
    the file asks for are off, and a special token spelled out in a text is ordinary text, so that
    no document can end itself.

    Raises ConfigError if the file is missing, not a tokenizer or without an eod, or if the library
    `tokenizers` is not installed.
    """
    if name == "bytes":
        return byte_tokenizer()
    content, tokenizer = _read_tokenizer_json(name)
    vocabulary = tokenizer.get_vocab()
    eod = _first_id(vocabulary, _EOD_NAMES)
    if eod is None:
        raise ConfigError(
            f"data.tokenizer = {name!r}: it has no token that ends a document; "
            f"add one of {', '.join(_EOD_NAMES)}"
        )
    pad = _first_id(vocabulary, _PAD_NAMES)
    special = {key: _first_id(vocabulary, names) for key, names in _SPECIAL_NAMES.items()}
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    return Tokenizer(
        name=name,
        vocab_size=max(vocabulary.values()) + 1,
        encode=partial(_encode_with, tokenizer),
        decode=partial(_decode_with, tokenizer),
        eod=eod,
        pad=-1 if pad is None else pad,
        **special,
        additional_special_tokens_ids=tuple(
            vocabulary[sentinel] for sentinel in sentinels if sentinel in vocabulary
        ),
        inv_vocab={i: token for token, i in vocabulary.items()},
        unique_identifiers={
            "tokenizer": "tokenizer.json",
            "sha256": _digest_of_definition(content),
        },
    )


def _digest_of_definition(content: bytes) -> str:
    """The sha256 of what a tokenizer.json defines, however it is laid out.

    Without truncation and padding, which are off here.
    """
    definition = json.loads(content)
    for unused in ("truncation", "padding"):
        definition.pop(unused, None)
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def _read_tokenizer_json(name: str) -> tuple[bytes, tokenizers.Tokenizer]:
    """The content of a tokenizer.json, and the tokenizer that the library makes of it."""
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            f"data.tokenizer = {name!r}: the library tokenizers is not installed; "
            'install megafn[hf], or choose the tokenizer "bytes"'
        ) from error
    try:
        content = Path(name).read_bytes()
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(
            f"data.tokenizer = {name!r}: not a Hugging Face tokenizer.json ({error}); "
            'give the path of one, or "bytes"'
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return content, tokenizer


def _first_id(vocabulary: Mapping[str, int], names: Iterable[str]) -> int | None:
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def _encode_with(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
    # of a lone surrogate the library says that the text is not a str; this error is clearer
    text.encode("utf-8")
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _decode_with(tokenizer: tokenizers.Tokenizer, ids: Iterable[int]) -> str:
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

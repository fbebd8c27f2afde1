"""Tokenizers: frozen records of two functions, text to token ids and back, and the special ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    # `encode` of several texts at once, on all cores; None: one after another
    encode_batch: Callable[[Sequence[str]], list[np.ndarray]] | None = None
    # (text, i) -> whether text[:i] and text[i:] have the ids of the whole text; None: never
    may_cut: Callable[[str, int], bool] | None = None


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
        may_cut=_anywhere,
    )


def _anywhere(text: str, i: int) -> bool:
    """Bytes may be cut at any character."""
    return True


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


def load_tokenizer(name: str, *, eod_token: str | None = None) -> Tokenizer:
    """`byte_tokenizer()` for "bytes", else the tokenizer in the Hugging Face tokenizer.json `name`.

    `name` may be the directory of that file, too, as transformers saves it.
    Its eod is `eod_token`, or the first of <|endoftext|>, <|end_of_text|>, </s>, <eos>, [SEP] in
    the vocabulary; the other special ids follow the usual names of BERT, T5 and Llama. Truncation
    and padding that the file asks for are off, and a special token or eod spelled out in a text is
    ordinary text, so that no document can end itself.

    Raises ConfigError if the file is missing, not a tokenizer or without that eod, or if the
    library `tokenizers` is not installed.
    """
    if name == "bytes":
        if eod_token is not None:
            raise ConfigError(
                f'data.eod_token = {eod_token!r}: the tokenizer "bytes" ends documents with NUL; '
                "leave eod_token out, or choose a tokenizer.json"
            )
        return byte_tokenizer()
    content, tokenizer = _read_tokenizer_json(name)
    vocabulary = tokenizer.get_vocab()
    usual_eod = next((token for token in _EOD_NAMES if token in vocabulary), None)
    eod_token = usual_eod if eod_token is None else eod_token
    if eod_token is None:
        raise ConfigError(
            f"data.tokenizer = {name!r}: it has no token that ends a document; name one in "
            f"data.eod_token, or add one of {', '.join(_EOD_NAMES)}"
        )
    if eod_token not in vocabulary:
        raise ConfigError(
            f"data.eod_token = {eod_token!r}: data.tokenizer = {name!r} has no such token; name "
            "one of its vocabulary"
        )
    _make_special(tokenizer, vocabulary[eod_token])
    identifiers = {
        "tokenizer": "tokenizer.json",
        "sha256": _digest_of_definition(content),
    }
    if eod_token != usual_eod:
        identifiers["eod_token"] = eod_token
    pad = _first_id(vocabulary, _PAD_NAMES)
    special = {key: _first_id(vocabulary, names) for key, names in _SPECIAL_NAMES.items()}
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    return Tokenizer(
        name=name,
        vocab_size=max(vocabulary.values()) + 1,
        encode=partial(_encode_with, tokenizer),
        decode=partial(_decode_with, tokenizer),
        encode_batch=partial(_encode_batch_with, tokenizer),
        # without a pre-tokenizer, a token may reach from any word into the next
        may_cut=None if tokenizer.pre_tokenizer is None else partial(_may_cut, tokenizer),
        eod=vocabulary[eod_token],
        pad=-1 if pad is None else pad,
        **special,
        additional_special_tokens_ids=tuple(
            vocabulary[sentinel] for sentinel in sentinels if sentinel in vocabulary
        ),
        inv_vocab={i: token for token, i in vocabulary.items()},
        unique_identifiers=identifiers,
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
        path = Path(name)
        content = (path / "tokenizer.json" if path.is_dir() else path).read_bytes()
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


def _make_special(tokenizer: tokenizers.Tokenizer, i: int) -> None:
    """Make an added token special: as an ordinary one it would be found in texts."""
    token = tokenizer.get_added_tokens_decoder().get(i)
    if token is not None and not token.special:
        token.special = True
        tokenizer.add_special_tokens([token])


def _first_id(vocabulary: Mapping[str, int], names: Iterable[str]) -> int | None:
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def _encode_with(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
    # of a lone surrogate the library says that the text is not a str; this error is clearer
    text.encode("utf-8")
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _encode_batch_with(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    for text in texts:
        text.encode("utf-8")  # as in _encode_with
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


_CONTEXT = 64  # characters on either side of a cut that are encoded to check it


def _may_cut(tokenizer: tokenizers.Tokenizer, text: str, i: int) -> bool:
    """Whether the text around a cut has the same ids when it is cut.

    A pre-tokenizer that begins a new word at a cut between words does so whatever stands further
    away. One that adds something to the beginning of a text, or a normalizer that strips it, shows
    in the ids.
    """
    before = text[max(i - _CONTEXT, 0) : i]
    after = text[i : i + _CONTEXT]
    try:
        whole, *parts = _encode_batch_with(tokenizer, (before + after, before, after))
    except UnicodeEncodeError:  # reported when the text is encoded
        return False
    return np.array_equal(whole, np.concatenate(parts))


def _decode_with(tokenizer: tokenizers.Tokenizer, ids: Iterable[int]) -> str:
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

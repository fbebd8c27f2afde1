"""Text to token ids and back, as frozen records of two functions and the special ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import field, frozen

from megafn.pure.config.problems import ConfigError


@frozen(kw_only=True, eq=False)
class Tokenizer:
    """Text to token ids and back; the attributes are those that megatron-core's datasets read.

    encode: str -> ids, integers [n], no special ids added. decode: ids [n] -> str, special ids left out. `eod` ends
    each document; `pad` is -1 and the rest None or empty where the vocabulary has none. `unique_identifiers`
    (JSON) tells this tokenizer from others.
    """

    name: str
    vocab_size: int
    encode: Callable[[str], np.ndarray]
    decode: Callable[[Iterable[int]], str]
    unique_identifiers: Mapping[str, Any]
    eod: int
    pad: int = -1
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    additional_special_tokens_ids: tuple[int, ...] = ()  # T5's sentinels
    inv_vocab: Mapping[int, str] = field(
        factory=dict, repr=False
    )  # id to token; one that goes on with a word begins with "##"


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes as vocabulary: a text's ids are its UTF-8 bytes.

    Special ids are bytes that no UTF-8 text holds: 0 (NUL, refused in texts) is eod; 0xC0, 0xC1, 0xF5 to 0xFF are pad,
    cls, sep, mask, bos, eos, unk and six sentinels. `encode` raises ValueError on NUL and on lone surrogates;
    `decode` puts U+FFFD for bytes that are no UTF-8, and raises ValueError on ids that are no bytes.

    >>> tokenizer = byte_tokenizer()
    >>> tokenizer.encode("né").tolist(), tokenizer.decode([110, 195, 169, tokenizer.eod, tokenizer.pad])
    ([110, 195, 169], 'né')
    """
    never = (0xC0, 0xC1, *range(0xF5, 0x100))
    special = dict(zip(("pad", "cls", "sep", "mask", "bos", "eos", "unk"), never))
    drop = np.array((0, *never))

    def encode(text: str) -> np.ndarray:
        if (at := text.find("\0")) >= 0:
            raise ValueError(
                f"text: character {at} is NUL, the id that ends a document; remove NULs from the text"
            )
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(ids: Iterable[int]) -> str:
        ids = np.fromiter(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < 256:
            raise ValueError(
                f"ids from {ids.min()} to {ids.max()}: this tokenizer's ids are bytes, 0 to 255"
            )
        return ids[~np.isin(ids, drop)].astype(np.uint8).tobytes().decode("utf-8", "replace")

    return Tokenizer(
        name="bytes",
        vocab_size=256,
        encode=encode,
        decode=decode,
        eod=0,
        **special,
        additional_special_tokens_ids=never[len(special) :],
        inv_vocab={i: chr(i) for i in range(256) if i not in never},
        unique_identifiers={"tokenizer": "bytes"},
    )


def load_tokenizer(name: str) -> Tokenizer:
    """`byte_tokenizer()` for "bytes", else the tokenizer in the file `name`, a Hugging Face tokenizer.json.

    Its eod is the first of <|endoftext|>, <|end_of_text|>, </s>, <eos>, [SEP] that the vocabulary has; its other special
    ids go by BERT's, T5's and Llama's usual names. Truncation and padding that the file asks for are off, and a special
    token spelled out in a text is ordinary text: no document can end itself.

    Raises ConfigError where the file is missing, no tokenizer or without an eod, or the library `tokenizers` is missing.
    """
    if name == "bytes":
        return byte_tokenizer()
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            f"data.tokenizer = {name!r}: the library tokenizers is missing; install megafn[hf], "
            'or choose the tokenizer "bytes"'
        ) from error
    try:
        content = Path(name).read_bytes()
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(
            f"data.tokenizer = {name!r} is no Hugging Face tokenizer.json ({error}); "
            'give the path of one, or "bytes"'
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    vocab = tokenizer.get_vocab()

    def first(*tokens: str) -> int | None:
        return next((vocab[token] for token in tokens if token in vocab), None)

    ends = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
    if (eod := first(*ends)) is None:
        raise ConfigError(
            f"data.tokenizer = {name!r} has no token that ends a document; add one of {', '.join(ends)}"
        )

    def encode(text: str) -> np.ndarray:
        text.encode(
            "utf-8"
        )  # the library's own word on a lone surrogate is that the text is no str
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    pad = first("[PAD]", "<pad>", "<|pad|>")
    sentinels = (first(f"<extra_id_{i}>") for i in range(100))
    return Tokenizer(
        name=name,
        vocab_size=max(vocab.values()) + 1,
        encode=encode,
        decode=lambda ids: tokenizer.decode([int(i) for i in ids], skip_special_tokens=True),
        eod=eod,
        pad=-1 if pad is None else pad,
        cls=first("[CLS]", "<s>"),
        sep=first("[SEP]", "</s>"),
        mask=first("[MASK]", "<mask>"),
        bos=first("<s>", "<bos>", "<|begin_of_text|>", "[CLS]"),
        eos=first("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
        unk=first("<unk>", "[UNK]"),
        additional_special_tokens_ids=tuple(i for i in sentinels if i is not None),
        inv_vocab={i: token for token, i in vocab.items()},
        unique_identifiers={
            "tokenizer": "tokenizer.json",
            "sha256": hashlib.sha256(content).hexdigest(),
        },
    )

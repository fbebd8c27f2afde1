"""A byte-level BPE, trained on the documents of a text file by the library tokenizers."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megafn.pure.config.problems import ConfigError
from megafn.runtime.text.documents import BETWEEN_WORDS, read_documents
from megafn.runtime.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import tokenizers

_BYTES = 256

# Characters of a fragment: the library takes about 200 bytes of memory for each.
_FRAGMENT = 2**15


def train_tokenizer(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    vocab_size: int,
    eod_token: str = "<|endoftext|>",
    special_tokens: Sequence[str] = (),
    json_key: str = "text",
) -> Tokenizer:
    """Train a byte-level BPE, as GPT-2's, on a text; return it as `load_tokenizer` loads it.

    The text is read by `read_documents` with json_key, the documents whole. The vocabulary is
    `eod_token`, the `special_tokens`, the 256 bytes, so that any text can be encoded, and merges up
    to `vocab_size`. It is smaller if the text holds no pair of tokens twice.
    `directory` must not exist. It appears whole or not at all, with tokenizer.json, which
    `data.tokenizer` names, and tokenizer_config.json, with which transformers' AutoTokenizer loads
    it: eod is its `eos_token`. Special tokens with a usual name ([PAD], [CLS], [SEP], [MASK]) are
    known by it to megafn and to transformers.

    Raises ConfigError if the text cannot be read, the directory exists, vocab_size does not hold
    the bytes and special tokens, or the library `tokenizers` is not installed; ValueError naming
    the document that cannot be encoded.
    """
    directory = Path(directory)
    special = tuple(dict.fromkeys((eod_token, *special_tokens)))
    _check(directory, vocab_size, special)
    tokenizer = _train(source, vocab_size, special, json_key)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as hidden:
        folder = Path(hidden, directory.name)
        folder.mkdir()
        file = folder / "tokenizer.json"
        file.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        loaded = load_tokenizer(str(file), eod_token=eod_token)
        content = json.dumps(_transformers_config(loaded, eod_token), indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(content, encoding="utf-8")
        os.rename(folder, directory)
    return load_tokenizer(str(directory / "tokenizer.json"), eod_token=eod_token)


def _check(directory: Path, vocab_size: int, special: tuple[str, ...]) -> None:
    if os.path.lexists(directory):
        raise ConfigError(f"{directory} exists already; name a new directory, or remove this one")
    if "" in special:
        raise ConfigError("special token = '': must not be empty; give it a name, or leave it out")
    smallest = _BYTES + len(special)
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size = {vocab_size}: must hold {_BYTES} bytes and the special tokens "
            f"({', '.join(special)}); set it to {smallest} or more (--vocab-size)"
        )


def _train(
    source: str | os.PathLike[str], vocab_size: int, special: tuple[str, ...], json_key: str
) -> tokenizers.Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError("the library tokenizers is not installed; install megafn[hf]") from error
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(special),
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_fragments(source, json_key), trainer)
    return tokenizer


def _fragments(source: str | os.PathLike[str], json_key: str) -> Iterator[str]:
    """The documents, long ones cut between words, where the pre-tokenizer cuts too."""
    for number, text in enumerate(read_documents(source, json_key=json_key), start=1):
        _check_encodable(text, f"{source}, document {number}")
        start = 0
        while len(text) - start > 2 * _FRAGMENT:
            match = BETWEEN_WORDS.search(text, start + _FRAGMENT)
            if match is None:
                break
            yield text[start : match.start()]
            start = match.start()
        yield text[start:]


def _check_encodable(text: str, where: str) -> None:
    """Raises ValueError for a lone surrogate, as JSON can write it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {error}") from error


def _transformers_config(tokenizer: Tokenizer, eod_token: str) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": eod_token,
    }
    special = {
        "bos_token": tokenizer.bos,
        "pad_token": tokenizer.pad,
        "cls_token": tokenizer.cls,
        "sep_token": tokenizer.sep,
        "mask_token": tokenizer.mask,
        "unk_token": tokenizer.unk,
    }
    for name, i in special.items():
        if i is not None and i in tokenizer.inv_vocab:  # pad is -1 if there is none
            config[name] = tokenizer.inv_vocab[i]
    return config

"""Train a byte-level BPE on a text, and write it as a directory with its tokenizer.json.

Prints the path of the tokenizer.json, as data.tokenizer takes it, and the size of its vocabulary.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import attrs

import megafn as mf


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "text", help="documents separated by form feeds, or one JSON object a line; possibly .gz"
    )
    parser.add_argument("directory", help="a new directory to write the tokenizer to")
    parser.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        help="number of tokens: 256 bytes, the special tokens, and merges",
    )
    parser.add_argument(
        "--eod-token",
        default="<|endoftext|>",
        help="the special token that ends a document (default: %(default)s)",
    )
    parser.add_argument(
        "--special-token",
        action="append",
        default=[],
        help="another special token; may be repeated, for BERT: [PAD], [CLS], [SEP], [MASK]",
    )
    parser.add_argument(
        "--json-key",
        default=attrs.fields(mf.DataConfig).json_key.default,
        help="key of the text in each JSON object (default: %(default)s)",
    )


def run(arguments: Namespace) -> int:
    tokenizer = mf.train_tokenizer(
        arguments.text,
        arguments.directory,
        vocab_size=arguments.vocab_size,
        eod_token=arguments.eod_token,
        special_tokens=arguments.special_token,
        json_key=arguments.json_key,
    )
    print(f"{tokenizer.name}: {tokenizer.vocab_size} tokens")
    return 0

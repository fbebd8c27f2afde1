"""Train a byte-level BPE on a text, and write it as a directory with its tokenizer.json.

Prints the path of the tokenizer.json, as data.tokenizer takes it, and the size of its vocabulary.

Example:
  python -m megafn tokenizer corpus.txt bpe --vocab-size 8192
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import megafn as mf
from megafn.commands.arguments import add_json_key, add_text


def add_arguments(parser: ArgumentParser) -> None:
    add_text(parser)
    parser.add_argument("directory", metavar="DIRECTORY", help="a new directory to write to")
    parser.add_argument(
        "--vocab-size",
        metavar="N",
        type=int,
        required=True,
        help="number of tokens: 256 bytes, the special tokens, and merges",
    )
    parser.add_argument(
        "--eod-token",
        metavar="TOKEN",
        default="<|endoftext|>",
        help="the special token that ends a document (default: %(default)s)",
    )
    parser.add_argument(
        "--special-token",
        metavar="TOKEN",
        action="append",
        default=[],
        help="another special token; may be repeated, for BERT: [PAD], [CLS], [SEP], [MASK]",
    )
    add_json_key(parser)


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

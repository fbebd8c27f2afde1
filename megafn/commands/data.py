"""Turn text into indexed data: PREFIX_train, PREFIX_valid and PREFIX_test.

Prints the prefixes that were written, as data.train, data.valid and data.test take them.

Examples:
  python -m megafn data corpus.txt indexed/corpus
  python -m megafn data corpus.jsonl.gz indexed/corpus --tokenizer bpe/tokenizer.json --split 98,2,0
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import megafn as mf
from megafn.commands.arguments import add_json_key, add_text


def add_arguments(parser: ArgumentParser) -> None:
    defaults = mf.DataConfig(train="")
    add_text(parser)
    parser.add_argument(
        "prefix",
        metavar="PREFIX",
        help="where to write: folder/name gives folder/name_train.bin, .idx and so on",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="TOKENIZER",
        default=defaults.tokenizer,
        help="bytes, or the path of a tokenizer.json (default: %(default)s)",
    )
    parser.add_argument(
        "--eod-token",
        metavar="TOKEN",
        help="the token of a tokenizer.json that ends a document (default: the first usual name)",
    )
    parser.add_argument(
        "--split",
        metavar="WEIGHTS",
        default=",".join(f"{weight:g}" for weight in defaults.split),
        help="weights of train, valid and test; each document is divided (default: %(default)s)",
    )
    parser.add_argument(
        "--split-sentences",
        action="store_true",
        help="make each sentence a sequence of its document, for BERT and T5",
    )
    add_json_key(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the indexed data of an earlier call with this PREFIX",
    )


def run(arguments: Namespace) -> int:
    prefixes = mf.index_text(
        arguments.text,
        arguments.prefix,
        tokenizer=arguments.tokenizer,
        eod_token=arguments.eod_token,
        split=_weights(arguments.split),
        split_sentences=arguments.split_sentences,
        json_key=arguments.json_key,
        overwrite=arguments.overwrite,
    )
    for prefix in prefixes.values():
        print(prefix)
    return 0


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(weight) for weight in text.split(","))
    except ValueError:
        raise mf.ConfigError(f"--split = {text!r}: give three numbers, such as 949,50,1") from None

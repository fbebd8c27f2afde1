"""Write a checkpoint as a Hugging Face directory, which transformers loads.

One plain process; the checkpoint may be of any layout. Prints the directory.

Examples:
  python -m megafn export runs/7 model
  python -m megafn export runs/7 model --dtype bf16 --tokenizer bpe/tokenizer.json
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import megafn as mf


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a checkpoint, or a directory of them (the newest is read)",
    )
    parser.add_argument("directory", metavar="DIRECTORY", help="a new directory to write to")
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="fp32, bf16 or fp16 (default: that of the weights that the run started from, else "
        "precision.dtype)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a tokenizer.json, or a directory whose tokenizer is copied (default: none)",
    )


def run(arguments: Namespace) -> int:
    directory = mf.export(
        arguments.checkpoint,
        arguments.directory,
        dtype=arguments.dtype,
        tokenizer=arguments.tokenizer,
    )
    print(directory)
    return 0

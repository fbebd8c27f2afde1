"""Write a checkpoint as a Hugging Face directory, which transformers loads.

One plain process; the checkpoint may be of any layout. Prints the directory.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import megafn as mf


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", help="a checkpoint, or a directory of them, of which the newest is read"
    )
    parser.add_argument("directory", help="a new directory")
    parser.add_argument(
        "--dtype",
        help="fp32, bf16 or fp16 (default: that of the weights that the run started from, else "
        "precision.dtype)",
    )
    parser.add_argument(
        "--tokenizer", help="a tokenizer.json, or a directory whose tokenizer is copied"
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

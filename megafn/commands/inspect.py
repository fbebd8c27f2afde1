"""Say what a checkpoint or a Hugging Face directory holds: its model, and each tensor.

Reads headers, not weights.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import megafn as mf


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", help="a checkpoint, a directory of them, or a model's directory")


def run(arguments: Namespace) -> int:
    print(mf.describe_weights(arguments.path))
    return 0

"""Say what a checkpoint or a Hugging Face directory holds: its model, and each tensor.

Reads headers, not weights.

Example:
  python -m megafn inspect runs/7
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import megafn as mf
from megafn.commands.arguments import add_weights


def add_arguments(parser: ArgumentParser) -> None:
    add_weights(parser)


def run(arguments: Namespace) -> int:
    print(mf.describe_weights(arguments.path))
    return 0

"""Train a model as a TOML file describes.

A run that has checkpoints in checkpoint.directory resumes from the newest.

Examples:
  python -m megafn train config.toml
  torchrun --nproc-per-node 4 -m megafn train config.toml
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import megafn as mf
from megafn.commands.arguments import add_config


def add_arguments(parser: ArgumentParser) -> None:
    add_config(parser)


def run(arguments: Namespace) -> int:
    mf.train(mf.load_config(arguments.config))
    return 0

"""Train a model as a TOML file describes.

Several processes: torchrun --nproc-per-node 4 -m megafn train config.toml
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import megafn as mf


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", help="a TOML file as dump_config writes it")


def run(arguments: Namespace) -> int:
    mf.train(mf.load_config(arguments.config))
    return 0

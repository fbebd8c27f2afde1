"""Run one training step of one rank without its memory: bytes, FLOP and messages of that rank.

Runs the code of train itself, for any number of processes, in this one and without a GPU. Prints
bytes by kind after set-up and at the peak of a step, what is sent over each group, and memory over
the step.

Example:
  python -m megafn dry-run config.toml --world-size 1024 --rank 0 --picture memory.png
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import megafn as mf
from megafn.commands.arguments import add_config, add_world_size


def add_arguments(parser: ArgumentParser) -> None:
    add_config(parser)
    add_world_size(parser)
    parser.add_argument(
        "--rank", metavar="N", type=int, default=0, help="which process (default: %(default)s)"
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="draw memory over the step here, as a PNG"
    )


def run(arguments: Namespace) -> int:
    config = mf.load_config(arguments.config)
    report = mf.dry_run(config, arguments.world_size, arguments.rank)
    print(report)
    print()
    print(mf.draw_dry_run(report))
    if arguments.picture is not None:
        mf.plot_dry_run(report, arguments.picture)
        print(f"memory as a picture: {arguments.picture}")
    return 0

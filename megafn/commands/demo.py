"""Train a small model on English prose, and draw its loss.

Examples:
  python -m megafn demo
  torchrun --nproc-per-node 4 -m megafn demo --family bert
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--family",
        metavar="FAMILY",
        default="gpt",
        help="gpt, bert, t5 or finetune (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        metavar="DIRECTORY",
        help="where logs and the picture go (default: runs/demo-FAMILY)",
    )
    parser.add_argument(
        "--iterations",
        metavar="N",
        type=int,
        help="length of the run (default: as many as take a few minutes)",
    )


def run(arguments: Namespace) -> int:
    from megafn.demo.demo import demo  # brings torch

    demo(folder=arguments.folder, iterations=arguments.iterations, family=arguments.family)
    return 0

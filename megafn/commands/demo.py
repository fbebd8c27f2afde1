"""Train a small model on English prose.

Several processes: torchrun --nproc-per-node 4 -m megafn demo
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--family", default="gpt", help="gpt, bert, t5 or finetune (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", help="where logs and the picture go (default: runs/demo-FAMILY)"
    )
    parser.add_argument("--iterations", type=int, help="length of the run (default: a few minutes)")


def run(arguments: Namespace) -> int:
    from megafn.demo.demo import demo  # brings torch

    demo(folder=arguments.folder, iterations=arguments.iterations, family=arguments.family)
    return 0

"""Run one training step of one rank without its memory: bytes, FLOP and messages of that rank.

Runs the code of train itself, for any number of processes, in this one and without a GPU. Prints
bytes by kind after set-up and at the peak of a step, what is sent over each group, and memory over
the step; with --machine also whether the rank fits a device.

Example:
  python -m megafn dry-run config.toml --world-size 1024 --machine h100 --picture memory.png
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import megafn as mf
from megafn.commands.arguments import (
    add_config,
    add_world_size,
    check_picture,
    machine_named,
)
from megafn.pure.planner.plans.table import gigabytes, usable_in_words


def add_arguments(parser: ArgumentParser) -> None:
    add_config(parser)
    add_world_size(parser)
    parser.add_argument(
        "--rank", metavar="N", type=int, default=0, help="which process (default: %(default)s)"
    )
    parser.add_argument(
        "--machine",
        metavar="NAME",
        help=f"a device to fit: {', '.join(mf.MACHINES)}, or a TOML file with a Machine's fields",
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="draw memory over the step here, as a PNG"
    )


def run(arguments: Namespace) -> int:
    if arguments.picture is not None:
        check_picture("--picture", arguments.picture)
    machine = None if arguments.machine is None else machine_named(arguments.machine)
    config = mf.load_config(arguments.config)
    report = mf.dry_run(config, arguments.world_size, arguments.rank)
    print(report)
    if machine is not None:
        print()
        print(_verdict(report, machine))
    print()
    print(mf.draw_dry_run(report, machine))
    if arguments.picture is not None:
        mf.plot_dry_run(report, arguments.picture, machine)
        print(f"memory as a picture: {arguments.picture}")
    return 0


def _verdict(report: mf.DryRun, machine: mf.Machine) -> str:
    """Whether the rank fits into what a training step may fill of a device."""
    left = machine.usable_bytes - report.memory.peak_on_gpu.total
    sign = "fits" if left >= 0 else "does not fit"
    amount = f"{gigabytes(abs(left))} GB {'free' if left >= 0 else 'too much'}"
    return f"{sign} {machine.name}, {usable_in_words(machine)}: {amount} on this rank"

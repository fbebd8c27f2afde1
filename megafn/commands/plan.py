"""Say what a config costs on a machine, and rank all its layouts, before a GPU is rented.

Prints the plan of the config in the layout that it has, and its fastest layouts. Starts no process
and needs no GPU. Ends with exit code 1 if no layout fits into memory.

Example:
  python -m megafn plan config.toml --machine h100 --world-size 256 --output best.toml
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import megafn as mf
from megafn.commands.arguments import add_config, add_world_size


def add_arguments(parser: ArgumentParser) -> None:
    add_config(parser)
    add_world_size(parser)
    parser.add_argument(
        "--machine",
        metavar="NAME",
        required=True,
        help=f"{', '.join(mf.MACHINES)}, or a TOML file with the fields of a Machine",
    )
    parser.add_argument(
        "--implementation",
        metavar="NAME",
        default="megafn",
        help="whose speed: megafn, or megatron, with overlap and fused kernels "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--top", metavar="N", type=int, default=10, help="layouts to show (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", help="write the config in the best layout here")
    parser.add_argument("--picture", metavar="FILE", help="draw the best layout here, as a PNG")


def run(arguments: Namespace) -> int:
    if arguments.top < 1:
        raise mf.ConfigError(f"--top = {arguments.top}: must be at least 1")
    config = mf.load_config(arguments.config)
    machine = machine_of(arguments.machine)
    ranking = mf.rank_plans(
        config, machine, arguments.world_size, implementation=arguments.implementation
    )
    print(f"{arguments.config} as it stands:")
    print(_as_it_stands(config, ranking))
    print()
    print("its layouts, the fastest first:")
    print(ranking.table(arguments.top))
    if not ranking.plans:
        return 1

    best = ranking.plans[0]
    if arguments.output is not None:
        mf.dump_config(mf.apply_plan(config, best), arguments.output)
        print(f"plan 0 as a config: {arguments.output}")
    if arguments.picture is not None:
        mf.plot_plan(best, arguments.picture)
        print(f"plan 0 as a picture: {arguments.picture}")
    return 0


def machine_of(name: str) -> mf.Machine:
    """One of MACHINES by its name, or that of a TOML file."""
    if name in mf.MACHINES:
        return mf.MACHINES[name]
    if name.endswith(".toml") or Path(name).exists():
        return mf.load_machine(name)
    raise mf.ConfigError(
        f"--machine = {name!r}: choose one of {', '.join(mf.MACHINES)}, or give a TOML file"
    )


def _as_it_stands(config: mf.TrainConfig, ranking: mf.Ranking) -> str:
    """The plan of the config, or why it cannot run in the layout that it has."""
    problems = mf.validate(config, ranking.world_size)
    if problems:
        return "\n  ".join(["cannot run in the layout that it has:", *map(str, problems)])
    plan = mf.plan(
        config, ranking.machine, ranking.world_size, implementation=ranking.implementation
    )
    return str(plan)

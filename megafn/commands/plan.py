"""Say what a config costs on a machine, and rank all its layouts, before a GPU is rented.

Prints the plan of the config in the layout that it has, and its fastest layouts. Starts no process
and needs no GPU. Of several numbers of devices, prints the fastest layout of each instead. Ends
with exit code 1, and writes no file, if no layout fits into memory.

Examples:
  python -m megafn plan config.toml --machine h100 --world-size 256 --output best.toml
  python -m megafn plan config.toml --machine h100 --world-size 64,128,256
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace

import megafn as mf
from megafn.commands.arguments import (
    add_config,
    check_output,
    check_picture,
    machine_named,
)
from megafn.pure.planner.plans.table import LAYOUT_COLUMNS, aligned, in_seconds, layout_cells

# Of the fastest layout on a number of devices, named as in a ranking.
_COLUMNS = (*LAYOUT_COLUMNS, "s/step", "tokens/s", "MFU")


def add_arguments(parser: ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--world-size",
        dest="world_sizes",
        metavar="N",
        type=_world_sizes,
        required=True,
        help="number of processes, or several such as 64,128,256",
    )
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
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the file of --output if there is one"
    )


def run(arguments: Namespace) -> int:
    if arguments.top < 1:
        raise mf.ConfigError(f"--top = {arguments.top}: must be at least 1")
    if len(arguments.world_sizes) > 1 and (arguments.output or arguments.picture):
        raise mf.ConfigError("--output and --picture: give one --world-size, whose plan is written")
    if arguments.output is not None:
        check_output("--output", arguments.output, overwrite=arguments.overwrite)
    if arguments.picture is not None:
        check_picture("--picture", arguments.picture)
    config = mf.load_config(arguments.config)
    machine = machine_named(arguments.machine)
    if len(arguments.world_sizes) > 1:
        return _compare_sizes(config, machine, arguments)
    return _rank(config, machine, arguments)


def _world_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ArgumentTypeError(
            f"{text!r}: give a whole number, or several such as 64,128,256"
        ) from None


def _compare_sizes(config: mf.TrainConfig, machine: mf.Machine, arguments: Namespace) -> int:
    """Print the fastest layout of each number of devices."""
    rows = [[machine.name, *_COLUMNS]]
    without = []
    for world_size in arguments.world_sizes:
        ranking = mf.rank_plans(
            config, machine, world_size, implementation=arguments.implementation
        )
        if ranking.plans:
            rows.append([f"{world_size:,}", *_cells(ranking.plans[0])])
        else:
            without.append(f"{world_size:,}")
    if len(rows) > 1:
        print("\n".join(aligned(rows)))
        print("tokens/s: per device. With one --world-size, plan says how far to trust its times.")
    if without:
        print(f"no layout fits on {', '.join(without)}; plan with one --world-size says why")
    return 0 if len(rows) > 1 else 1


def _cells(plan: mf.Plan) -> list[str]:
    return [
        *layout_cells(plan.layout),
        in_seconds(plan.time.total),
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.mfu:.1%}",
    ]


def _rank(config: mf.TrainConfig, machine: mf.Machine, arguments: Namespace) -> int:
    """Print the plan of the config and its fastest layouts, and write the best one."""
    ranking = mf.rank_plans(
        config, machine, arguments.world_sizes[0], implementation=arguments.implementation
    )
    print(f"{arguments.config} as it stands:")
    print(_as_it_stands(config, ranking))
    print()
    print("its layouts, the fastest first:")
    print(ranking.table(arguments.top))
    if not ranking.plans:
        files = [file for file in (arguments.output, arguments.picture) if file is not None]
        if files:
            print(f"no layout fits, so nothing is written to {' and '.join(files)}")
        return 1

    best = ranking.plans[0]
    if arguments.output is not None:
        mf.dump_config(mf.apply_plan(config, best), arguments.output)
        print(f"plan 0 as a config: {arguments.output}")
    if arguments.picture is not None:
        mf.plot_plan(best, arguments.picture)
        print(f"plan 0 as a picture: {arguments.picture}")
    return 0


def _as_it_stands(config: mf.TrainConfig, ranking: mf.Ranking) -> str:
    """The plan of the config, or why it cannot run in the layout that it has."""
    problems = mf.validate(config, ranking.world_size)
    if problems:
        return "\n  ".join(["cannot run in the layout that it has:", *map(str, problems)])
    plan = mf.plan(
        config, ranking.machine, ranking.world_size, implementation=ranking.implementation
    )
    return str(plan)

"""Report every problem of a TOML file at once, or describe its layout and draw its pipeline.

Looks at no data and starts no process. Ends with exit code 1 if the config cannot run.

Example:
  python -m megafn check config.toml --world-size 4
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import megafn as mf
from megafn.commands.arguments import add_config, add_world_size


def add_arguments(parser: ArgumentParser) -> None:
    add_config(parser)
    add_world_size(parser)


def run(arguments: Namespace) -> int:
    path = arguments.config
    world_size = arguments.world_size
    config = mf.load_config(path)
    problems = mf.validate(config, world_size)
    if problems:
        print(f"{path} cannot run on {_processes(world_size)}:", *problems, sep="\n  ")
        return 1
    print(f"{path} can run on {_processes(world_size)}: {_summary(config, world_size)}")
    parallel = config.parallel
    if parallel.pp > 1:
        micro_batches = mf.num_micro_batches(config, _dp_size(config, world_size))
        print(mf.draw_pipeline(parallel.pp, parallel.vpp, micro_batches))
    return 0


def _processes(world_size: int) -> str:
    return "1 process" if world_size == 1 else f"{world_size} processes"


def _summary(config: mf.TrainConfig, world_size: int) -> str:
    """The layout and the length of the run, in a line."""
    parallel = config.parallel
    dp = _dp_size(config, world_size)
    return (
        f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {dp}, "
        f"{config.iterations} iterations of {mf.num_micro_batches(config, dp)} micro-batches "
        f"of {config.micro_batch_size} on each data-parallel rank"
    )


def _dp_size(config: mf.TrainConfig, world_size: int) -> int:
    return mf.build_groups(config.parallel, world_size).dp_size

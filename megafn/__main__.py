"""The command line: `python -m megafn train config.toml`, `check`, `data` and so on.

Each command is a module of `megafn.commands`: its docstring is its help, `add_arguments` its
arguments, `run` what it does. All share the exit codes: 0 for success, 1 if `check` finds problems,
2 with one sentence on standard error if the input is at fault.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from types import ModuleType
from typing import Any

from megafn.commands import check, data, demo, export, generate, inspect, plan, tokenizer, train

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "check": check,
    "data": data,
    "plan": plan,
    "tokenizer": tokenizer,
    "demo": demo,
    "export": export,
    "inspect": inspect,
    "generate": generate,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that the arguments name; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            return arguments.run(arguments)
    except (ValueError, OSError) as error:
        # On every process: torchrun ends the others when one has failed.
        print(f"megafn: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megafn",
        description="Megatron-scale training as functions. "
        "For several processes, run train and demo under torchrun.",
        epilog="Exit codes: 0 success, 1 check found problems or plan no layout that fits, "
        "2 an error in the input.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary, _, details = (command.__doc__ or "").partition("\n\n")
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary}\n\n{details}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _print_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print a warning as one line; the progress bar is drawn again after it."""
    from tqdm import tqdm

    tqdm.write(f"{category.__name__}: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

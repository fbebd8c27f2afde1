"""The command line: `python -m megafn train config.toml`, `check`, `data` and so on.

Each command is a module of `megafn.commands`: its docstring is its help and has examples,
`add_arguments` its arguments, `run` what it does, and what `run` returns the exit code. `run`
raises ConfigError, another ValueError or an OSError if the input is at fault. Parsing, errors and
exit codes are the same for all, here and in `commands.arguments` and `commands.failures`.
"""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from types import ModuleType
from typing import Any

import megafn as mf
from megafn.commands import (
    check,
    data,
    demo,
    dry_run,
    export,
    failures,
    generate,
    inspect,
    plan,
    tokenizer,
    train,
)
from megafn.commands.arguments import Parser
from megafn.pure.config.problems import did_you_mean

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "check": check,
    "plan": plan,
    "dry-run": dry_run,
    "data": data,
    "tokenizer": tokenizer,
    "demo": demo,
    "export": export,
    "inspect": inspect,
    "generate": generate,
}

DESCRIPTION = "Megatron-scale training as functions."

EPILOG = """\
Exit codes:
  0    success
  1    check found problems, or plan no layout that fits
  2    the input is at fault; one sentence on standard error says why
  130  Ctrl-C

For several processes, run train, demo and generate under torchrun:
  torchrun --nproc-per-node 4 -m megafn train config.toml
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command that the arguments name; returns the exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            return _run_or_report(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return failures.INTERRUPTED


def _run_or_report(argv: list[str]) -> int:
    try:
        return _run(argv)
    except (ValueError, OSError) as error:
        reader_has_left = isinstance(error, BrokenPipeError) and failures.output_is_closed()
        failures.flush_or_discard_output()
        if reader_has_left:  # as `head` does
            return failures.OUTPUT_CLOSED
        failures.report(error)
        return failures.BAD_INPUT


def _run(argv: list[str]) -> int:
    if not argv:
        build_parser().print_help(sys.stderr)
        return failures.BAD_INPUT
    try:
        arguments = parse(argv)
        exit_code = arguments.run(arguments)
    except SystemExit:  # help was printed, or a run has ended on a signal: its exit code stays
        failures.flush_or_discard_output()
        raise
    if sys.stdout is not None:
        # A closed pipe or a full disk is an error here, not a remark as Python ends.
        sys.stdout.flush()
    return exit_code


def parse(argv: list[str]) -> Namespace:
    """The arguments of a command, and its function as `run`. Raises ConfigError."""
    _refuse_near_miss(argv[0])
    arguments, unknown = build_parser().parse_known_args(argv)
    arguments.parser.refuse_unknown(unknown)
    return arguments


def _refuse_near_miss(command: str) -> None:
    """argparse would list all commands, and not name the one that is meant."""
    hint = did_you_mean(command, COMMANDS)
    if command not in COMMANDS and not command.startswith("-") and hint:
        raise mf.ConfigError(f"there is no command {command!r}{hint}")


def build_parser() -> Parser:
    parser = Parser("megafn", DESCRIPTION, EPILOG)
    parser.add_argument("--version", action="version", version=f"megafn {mf.__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    for name, command in COMMANDS.items():
        summary, _, details = (command.__doc__ or "").partition("\n\n")
        subparser = commands.add_parser(
            name, help=summary, description=f"{summary}\n\n{details}".strip()
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, parser=subparser)
    return parser


def _print_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print a warning as one line; the progress bar is drawn again after it."""
    from tqdm import tqdm

    tqdm.write(f"{category.__name__}: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

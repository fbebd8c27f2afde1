"""What the commands share: how arguments are parsed and refused, and arguments of several commands.

An argument that several commands take has one name, one placeholder and one help text, here.
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser
from collections.abc import Iterable
from typing import NoReturn

import attrs

import megafn as mf


class Parser(ArgumentParser):
    """An ArgumentParser that raises ConfigError, as everything else does that refuses an input.

    An option must be written out, so that one that is added later makes no other ambiguous.
    """

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise mf.ConfigError(f"{message}; see {self.prog} --help")

    def refuse_unknown(self, unknown: Iterable[str]) -> None:
        """Raises ConfigError that names the first of the arguments that no action takes."""
        for argument in unknown:
            self.error(f"unknown argument {argument!r}")


def add_config(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a TOML file as dump_config writes it")


def add_world_size(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--world-size", metavar="N", type=int, required=True, help="number of processes"
    )


def add_text(parser: ArgumentParser) -> None:
    parser.add_argument(
        "text",
        metavar="TEXT",
        help="documents separated by form feeds, or one JSON object a line; possibly .gz",
    )


def add_json_key(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--json-key",
        metavar="KEY",
        default=attrs.fields(mf.DataConfig).json_key.default,
        help="key of the text in each JSON object (default: %(default)s)",
    )


def add_weights(parser: ArgumentParser) -> None:
    parser.add_argument(
        "path",
        metavar="PATH",
        help="a checkpoint, a directory of them (the newest is read), or a model's directory",
    )

"""What the commands share: how arguments are parsed and refused, and arguments of several commands.

An argument that several commands take has one name, one placeholder and one help text, here.
"""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import attrs

import megafn as mf
from megafn.pure.config.problems import did_you_mean


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


def machine_named(name: str) -> mf.Machine:
    """One of MACHINES by its name, in upper or lower case, or that of a TOML file."""
    if name.lower() in mf.MACHINES:
        return mf.MACHINES[name.lower()]
    if name.endswith(".toml") or Path(name).exists():
        return mf.load_machine(name)
    raise mf.ConfigError(
        f"--machine = {name!r}: choose one of {', '.join(mf.MACHINES)}, or give a TOML file"
        f"{did_you_mean(name, mf.MACHINES)}"
    )


def check_output(option: str, path: str, *, overwrite: bool) -> None:
    """Raises ConfigError if a file cannot be written at `path`, or is there and is to be kept.

    Called before the work whose result is written there.
    """
    _check_folder(option, path)
    if os.path.lexists(path) and not overwrite:
        raise mf.ConfigError(
            f"{path} exists already; name another file, or pass --overwrite to replace it"
        )


def check_picture(option: str, path: str) -> None:
    """Raises ConfigError if a picture cannot be written at `path`. An older one is replaced."""
    if Path(path).suffix.lower() != ".png":
        raise mf.ConfigError(
            f"{option} = {path!r}: pictures are PNG; name a file that ends in .png"
        )
    _check_folder(option, path)


def _check_folder(option: str, path: str) -> None:
    folder = Path(path).parent
    if not folder.is_dir():
        raise mf.ConfigError(f"{option} = {path!r}: there is no folder {folder}; make it first")
    if Path(path).is_dir():
        raise mf.ConfigError(f"{option} = {path!r}: this is a folder; name a file in it")
    if not os.access(folder, os.W_OK):
        raise mf.ConfigError(
            f"{option} = {path!r}: the folder {folder} cannot be written to; name another"
        )

"""A machine from a TOML file."""

from __future__ import annotations

import os

import attrs

from megafn.pure.config.problems import ConfigError, Problem, config_error, did_you_mean
from megafn.pure.config.serialization import from_dict, read_toml
from megafn.pure.planner.machine import Machine


def load_machine(path: str | os.PathLike[str]) -> Machine:
    """The Machine in a TOML file, which holds its fields, in bytes, bytes/s and FLOP/s.

    Raises ConfigError naming the file, with every problem in it.

    >>> load_machine("nowhere.toml")
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: nowhere.toml: cannot be read \
(No such file or directory); give the path of a TOML file
    """
    mapping = read_toml(path)
    names = [attribute.name for attribute in attrs.fields(Machine)]
    problems = []
    for key in mapping.keys() - set(names):
        hint = did_you_mean(key, names) or f"; choose one of {', '.join(names)}"
        problems.append(Problem(key, mapping[key], f"there is no such field{hint}"))
    try:
        if problems:
            raise config_error(problems)
        return from_dict(mapping, Machine)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None

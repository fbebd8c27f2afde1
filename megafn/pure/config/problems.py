"""What is wrong with a config as values (field, value, remedy), and the error that reports them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from attrs import frozen

# Characters of a value that an error shows.
_LONGEST_VALUE = 100


class ConfigError(ValueError):
    """A config that cannot be read or cannot run; names each field, its value and the remedy."""


@frozen
class Problem:
    """One reason why a config is refused. `str` of it is "field = value: remedy"."""

    # Dotted, as in "parallel.tp".
    field: str
    value: Any
    # What is required of the field, and what to do.
    remedy: str

    def __str__(self) -> str:
        return f"{self.field} = {_shortened(self.value)}: {self.remedy}"


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # an int of thousands of digits has no repr, and some objects have none
        text = f"<{type(value).__name__}>"
    if len(text) <= _LONGEST_VALUE:
        return text
    return f"{text[: _LONGEST_VALUE - 3]}..."


def config_error(problems: Iterable[Problem | ConfigError | str]) -> ConfigError:
    """The error that reports all problems, one a line."""
    lines = [str(problem) for problem in problems]
    if len(lines) == 1:
        return ConfigError(lines[0])
    return ConfigError("\n  ".join([f"{len(lines)} problems:", *lines]))


def choice_problem(field: str, value: Any, choices: Iterable[str]) -> Problem:
    """The problem of a value that is none of the choices of its field.

    >>> print(choice_problem("optimizer.name", "adan", ("adam", "sgd")))
    optimizer.name = 'adan': choose one of adam, sgd; did you mean "adam"?
    """
    names = list(choices)
    hint = did_you_mean(value, names) if isinstance(value, str) else ""
    return Problem(field, value, f"choose one of {', '.join(names)}{hint}")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that proposes the name most like `name`, or "" if none is like it.

    >>> did_you_mean("GTP", ["gpt", "bert"])
    '; did you mean "gpt"?'
    """
    nearest = nearest_name(name, names)
    return f'; did you mean "{nearest}"?' if nearest is not None else ""


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The name most like `name`, upper and lower case alike, or None if none is like it.

    >>> nearest_name("GTP", ["gpt", "bert"])
    'gpt'
    """
    lower = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return lower[close[0]] if close else None

"""What is wrong with a config, as values: field, value, remedy; and the error that reports them all."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from attrs import frozen


class ConfigError(ValueError):
    """A config that cannot be read or cannot run; the message names each field, its value and the remedy."""


@frozen
class Problem:
    """One reason for which a config is refused. `str` of it is "field = value: remedy"."""

    field: str  # dotted, as in "parallel.tp"
    value: Any
    remedy: str  # what is asked of the field, and what to do

    def __str__(self) -> str:
        return f"{self.field} = {_shown(self.value)}: {self.remedy}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # an int of thousands of digits has no repr, nor has every object
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:97]}..."


def config_error(problems: Iterable[Problem | str]) -> ConfigError:
    """The error that tells of all problems, one a line."""
    lines = [str(problem) for problem in problems]
    return ConfigError(
        lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems:", *lines])
    )


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that proposes the name most like `name`; empty where none is like it.

    >>> did_you_mean("GTP", ["gpt", "bert"])
    '; did you mean "gpt"?'
    """
    lower = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return f'; did you mean "{lower[close[0]]}"?' if close else ""

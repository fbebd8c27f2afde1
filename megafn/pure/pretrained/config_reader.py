"""Values of a config.json, checked: what is wrong with it is collected, so that all is reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
from attrs import frozen

from megafn.pure.config.field_types import has_type
from megafn.pure.config.problems import Problem, choice_problem

# A parsed config.json.
ConfigJson = Mapping[str, Any]

_REQUIRED = object()
_LARGEST_SIZE = 2**31 - 1
_MOST_LAYERS = 100_000


@frozen(kw_only=True)
class ConfigReader:
    """Reads the keys of one config.json and notes in `problems` what is wrong with them.

    A method that notes a problem returns a value of the right type all the same, so that reading
    continues. An absent key has the default; without one the key is required.
    """

    config: ConfigJson
    problems: list[Problem] = attrs.field(factory=list)

    def refuse(self, name: str, value: Any, remedy: str) -> None:
        """Note a problem, once for each key."""
        if name not in [problem.field for problem in self.problems]:
            self.problems.append(Problem(name, value, remedy))

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key, unchecked."""
        return self.config.get(name, default)

    def integer(
        self,
        name: str,
        default: Any = _REQUIRED,
        *,
        at_least: int = 1,
        at_most: int = _LARGEST_SIZE,
    ) -> int:
        value = self._value(name, default)
        if has_type(value, int) and at_least <= value <= at_most:
            return value
        if value is not _REQUIRED:
            self.refuse(name, value, f"must be an integer of {at_least} to {at_most}; correct it")
        return at_least

    def layers(self, name: str, default: Any = _REQUIRED) -> int:
        """A number of layers."""
        return self.integer(name, default, at_most=_MOST_LAYERS)

    def head_size(self, hidden_key: str, heads_key: str) -> int:
        """The width of a head that follows from the hidden size."""
        hidden = self.integer(hidden_key)
        heads = self.integer(heads_key)
        if hidden % heads:
            self.refuse(
                hidden_key, hidden, f"must be a multiple of {heads_key} = {heads}; correct it"
            )
        return max(1, hidden // heads)

    def optional_integer(self, name: str, default: int | None = None) -> int | None:
        """An integer, or None for null and for an absent key without a default."""
        if self.config.get(name, default) is None:
            return None
        return self.integer(name, default)

    def number(self, name: str, default: Any = _REQUIRED, *, at_least: float = 0.0) -> float:
        value = self._value(name, default)
        if has_type(value, float) and at_least <= value < math.inf:
            return float(value)
        if value is not _REQUIRED:
            self.refuse(name, value, f"must be a number of at least {at_least}; correct it")
        return 1.0

    def boolean(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self._value(name, default)
        if isinstance(value, bool):
            return value
        if value is not _REQUIRED:
            self.refuse(name, value, "must be true or false; correct it")
        return False

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object; empty for null and for an absent key."""
        value = self.config.get(name)
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return value
        self.refuse(name, value, "must be an object of names and values, or null; correct it")
        return {}

    def translated(self, name: str, table: Mapping[str, str], default: str) -> str:
        """megafn's word for the value of a key, by a table."""
        value = self.config.get(name, default)
        if isinstance(value, str) and value in table:
            return table[value]
        self.problems.append(choice_problem(name, value, table))
        return table[default]

    def require(self, name: str, only: Any, remedy: str) -> None:
        """Refuses another value than the only one that megafn's layers have, which is the default.

        remedy: the end of the sentence, about what the other value would need.
        """
        value = self.config.get(name, only)
        if value != only:
            self.refuse(name, value, remedy)

    def require_equal(self, name: str, default: float, other: str, expected: float) -> None:
        """Refuses two dropouts that differ where megafn's layers have one."""
        value = self.number(name, default)
        if value != expected:
            remedy = f"megafn has one dropout here, {other} = {expected}; make the two equal"
            self.refuse(name, value, remedy)

    def _value(self, name: str, default: Any) -> Any:
        value = self.config.get(name, default)
        if value is None and default is not _REQUIRED:
            value = default
        if value is None or value is _REQUIRED:
            self.refuse(name, None, "must be given; add it to config.json")
            return _REQUIRED
        return value

"""What may stand in `ModelConfig.family` in place of a built-in family's name."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class FamilyRecord(Protocol):
    """A family as a value: a `megafn.Family`, or its pure half, a `megafn.FamilySpec`.

    A config refers to it without importing either. In a file it is its name.
    """

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> Any:
        """The `FamilySpec`; a spec gives itself."""


def family_name(family: str | FamilyRecord) -> str:
    """The name of a family that is given by its name or as a record.

    >>> family_name("gpt")
    'gpt'
    """
    return family if isinstance(family, str) else family.name

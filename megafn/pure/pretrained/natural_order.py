"""Names with numbers in the order that people expect."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(\d+)")


def in_natural_order(names: Iterable[str]) -> list[str]:
    """The distinct names in order.

    >>> in_natural_order(["layers.10.a", "layers.2.b", "layers.2.b", "head"])
    ['head', 'layers.2.b', 'layers.10.a']
    """
    return sorted(set(names), key=_key)


def _key(name: str) -> list[tuple[int, int | str]]:
    """Numbers are compared with numbers only: the first number of each pair says which it is."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in _NUMBER.split(name)]

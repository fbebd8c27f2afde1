"""Attributes of modules and classes, exchanged for the length of a `with`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

# (owner, name of the attribute, its value inside the `with`)
Exchange = tuple[object, str, object]


@contextlib.contextmanager
def exchanged(exchanges: Sequence[Exchange]) -> Iterator[None]:
    """Set attributes until the `with` is left, then as they were, after an exception too."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in exchanges]
    try:
        for owner, name, value in exchanges:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)

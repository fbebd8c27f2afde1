"""The fields of a config: their paths and types, whether a value is of its type, and a type in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import attrs

from megafn.pure.config.family_record import FamilyRecord


def all_fields(config: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, value, type) of every field of a config, sections included; one that has a wrong type is not entered."""
    kinds = get_type_hints(type(config))
    for attribute in attrs.fields(type(config)):
        value, kind = getattr(config, attribute.name), kinds[attribute.name]
        yield at + attribute.name, value, kind
        if is_section(kind) and attrs.has(type(value)) and has_type(value, kind):
            yield from all_fields(value, f"{at}{attribute.name}.")


def is_section(kind: Any) -> bool:
    """Whether a field's type is a config, which has fields of its own."""
    return any(attrs.has(arm) for arm in (kind, *get_args(kind)))


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type. An int will do for a float, a bool for no number; an int has 64 bits, as in TOML.

    >>> has_type(3, float), has_type(True, int), has_type(("a", "b"), tuple[str, ...] | None)
    (True, False, True)
    """
    arms = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(has_type(value, arm) for arm in arms)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        return (
            all(has_type(item, arms[0]) for item in value)
            if arms[-1] is Ellipsis
            else len(value) == len(arms) and all(map(has_type, value, arms))
        )
    if isinstance(value, int) and kind in (int, float):
        return not isinstance(value, bool) and -(2**63) <= value < 2**63
    try:
        return isinstance(value, kind)
    except (
        Exception
    ):  # a Protocol looks at the value's attributes, which may be functions that fail
        return False


def type_in_words(kind: Any) -> str:
    """A field's type in words.

    >>> type_in_words(str | tuple[tuple[float, str], ...] | None)
    'a string or an array (tuple) of [number, string] pairs, or leave it out'
    """
    arms = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        words = " or ".join(type_in_words(arm) for arm in arms if arm is not NoneType)
        return f"{words}, or leave it out" if NoneType in arms else words
    if kind is FamilyRecord:
        return "a Family record, in code"
    if kind is Callable:
        return "a function, in code"
    words = {int: "integer", float: "number", bool: "true or false", str: "string"}
    if get_origin(kind) is tuple:
        pair = ", ".join(words[arm] for arm in get_args(arms[0]) if arm in words)
        return f"an array (tuple) of {f'[{pair}] pairs' if pair else f'{words[arms[0]]}s'}"
    if kind not in words:
        return f"a table ({kind.__name__})"
    return words[kind] if kind is bool else f"{'an' if kind is int else 'a'} {words[kind]}"

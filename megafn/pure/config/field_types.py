"""The fields of configs and their types: whether a value has a type, a type in words, a default."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import attrs

from megafn.pure.config.family_record import FamilyRecord
from megafn.pure.config.problems import Problem

# A type as an annotation holds it: int, str | None, tuple[float, ...], Callable[[str, Any], bool].
FieldType = Any

_WORDS: dict[FieldType, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
}
_PLURALS: dict[FieldType, str] = {int: "integers", float: "numbers", str: "strings"}


def all_fields(
    config: attrs.AttrsInstance, prefix: str = ""
) -> Iterator[tuple[str, Any, FieldType]]:
    """(dotted path, value, type) of every field of a config and of its sections.

    A section whose value has a wrong type is not entered.
    """
    kinds = _field_kinds(type(config))
    for attribute in attrs.fields(type(config)):
        path = prefix + attribute.name
        value = getattr(config, attribute.name)
        kind = kinds[attribute.name]
        yield path, value, kind
        if is_section(kind) and attrs.has(type(value)) and has_type(value, kind):
            yield from all_fields(value, f"{path}.")


@functools.cache
def _field_kinds(cls: type) -> Mapping[str, FieldType]:
    """The type of each field of a config class; their annotations are strings, slow to evaluate."""
    return MappingProxyType(get_type_hints(cls))


def all_field_types(cls: type, prefix: str = "") -> Iterator[tuple[str, FieldType]]:
    """(dotted path, type) of every field of a config class and of its sections."""
    for name, kind in _field_kinds(cls).items():
        path = prefix + name
        yield path, kind
        for section in _sections_in(kind):
            yield from all_field_types(section, f"{path}.")


def section_types(cls: type) -> dict[str, type]:
    """The sections of a config class: the class of each, by the name of its field.

    >>> from megafn.pure.config.records import TrainConfig
    >>> section_types(TrainConfig)["data"].__name__
    'DataConfig'
    """
    kinds = _field_kinds(cls)
    return {name: _sections_in(kind)[0] for name, kind in kinds.items() if is_section(kind)}


def default_of(cls: type[attrs.AttrsInstance], field: str) -> Any:
    """The default of a field of a config class.

    >>> from megafn.pure.config.records import DataConfig
    >>> default_of(DataConfig, "sampler")
    'single'
    """
    return attrs.fields_dict(cls)[field].default


def is_section(kind: FieldType) -> bool:
    """Whether a field's type is a config, which has fields itself.

    >>> from megafn.pure.config.records import DataConfig
    >>> is_section(DataConfig | None), is_section(int)
    (True, False)
    """
    return bool(_sections_in(kind))


def _sections_in(kind: FieldType) -> list[type]:
    return [arm for arm in (kind, *get_args(kind)) if attrs.has(arm)]


def has_type(value: Any, kind: FieldType) -> bool:
    """Whether a value is of a field's type.

    An int passes for a float, a bool does not pass for a number; an int has 64 bits, as in TOML.

    >>> has_type(3, float), has_type(True, int), has_type(("a", "b"), tuple[str, ...] | None)
    (True, False, True)
    """
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(has_type(value, arm) for arm in get_args(kind))
    if origin is tuple:
        return isinstance(value, tuple) and _has_item_types(value, get_args(kind))
    if origin is Callable:
        return callable(value)
    if isinstance(value, int) and kind in (int, float):
        return not isinstance(value, bool) and -(2**63) <= value < 2**63
    try:
        return isinstance(value, kind)
    except Exception:
        # A Protocol looks at the value's attributes, which may be properties that raise.
        return False


def _has_item_types(items: tuple[Any, ...], kinds: tuple[FieldType, ...]) -> bool:
    """Whether the items have the types that tuple[...] is written with."""
    if kinds[-1] is Ellipsis:
        return all(has_type(item, kinds[0]) for item in items)
    return len(items) == len(kinds) and all(map(has_type, items, kinds))


def type_in_words(kind: FieldType) -> str:
    """A field's type in words.

    >>> type_in_words(str | tuple[tuple[float, str], ...] | None)
    'a string or an array (tuple) of [number, string] pairs, or leave it out'
    """
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        arms = get_args(kind)
        words = " or ".join(type_in_words(arm) for arm in arms if arm is not NoneType)
        return f"{words}, or leave it out" if NoneType in arms else words
    if origin is tuple:
        return f"an array (tuple) of {_items_in_words(get_args(kind)[0])}"
    if origin is Callable:
        return "a function, in code"
    if kind is FamilyRecord:
        return "a Family record, in code"
    if kind in _WORDS:
        return _WORDS[kind]
    return f"a table ({kind.__name__})"


def _items_in_words(kind: FieldType) -> str:
    """The items of an array: numbers, strings, or pairs of them."""
    if get_origin(kind) is not tuple:
        return _PLURALS[kind]
    names = [_PLURALS[arm].removesuffix("s") for arm in get_args(kind)]
    return f"[{', '.join(names)}] pairs"


def type_problem(field: str, value: Any, kind: FieldType) -> Problem:
    """The problem of a value that is not of its field's type.

    >>> print(type_problem("parallel.tp", "2", int))
    parallel.tp = '2': give an integer
    """
    return Problem(field, value, f"give {type_in_words(kind)}")

"""What is wrong with a mapping that should be a config: cattrs' tree of errors as flat problems."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import attrs
from cattrs import AttributeValidationNote, ClassValidationError, ForbiddenExtraKeysError

from megafn.pure.config.field_types import FieldType, all_field_types, type_in_words, type_problem
from megafn.pure.config.problems import Problem, did_you_mean

# An error names the fields of a section if there are no more than this.
_MOST_NAMES = 12


class WrongType(ValueError):
    """Raised while structuring: a value that is not of its field's type."""

    def __init__(self, value: Any, kind: FieldType):
        self.value = value
        self.kind = kind


def problems_in(
    error: ClassValidationError | WrongType, mapping: Any, cls: type
) -> list[Problem | str]:
    """Why `mapping` is not a config of class `cls`, in the order of the fields."""
    return _without_consequences(list(_problems_below(error, mapping, cls, "")))


def _problems_below(
    error: Exception, mapping: Any, cls: type, path: str
) -> Iterator[Problem | str]:
    """The problems of the subtree of errors whose mapping stands at `path` of the whole."""
    if isinstance(error, WrongType):
        yield type_problem(path or "config", error.value, error.kind)
    elif isinstance(error, KeyError):
        yield f"{path} is missing: give {type_in_words(dict(all_field_types(cls))[path])}"
    elif isinstance(error, ForbiddenExtraKeysError):
        for key in sorted(error.extra_fields, key=str):
            hint = _hint(_joined(path, key), str(key), error.cl, cls)
            yield Problem(_joined(path, key), mapping[key], f"there is no such field{hint}")
    elif isinstance(error, ClassValidationError):
        for inner in error.exceptions:
            name = _field_name(inner)
            if name is None:
                yield from _problems_below(inner, mapping, cls, path)
            else:
                yield from _problems_below(inner, mapping.get(name), cls, _joined(path, name))
    else:
        raise error


def _field_name(error: Exception) -> str | None:
    """The field that cattrs noted on an error, or None if it is about the mapping as a whole."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return note.name
    return None


def _hint(path: str, key: str, section: type, cls: type) -> str:
    """The end of a sentence about a key that `section` of `cls` does not have: what to write."""
    if path == "parallel.dp":
        return (
            "; data parallelism follows from the number of processes: world_size / (tp * pp * cp)"
        )
    for known, _ in all_field_types(cls):
        if known.endswith(f".{key}"):
            return f'; did you mean "{known}"?'
    names = [attribute.name for attribute in attrs.fields(section)]
    return did_you_mean(key, names) or _all_names(names)


def _all_names(names: list[str]) -> str:
    if len(names) > _MOST_NAMES:
        return f"; docs/configuration.md lists the {len(names)} fields"
    return f"; choose one of {', '.join(names)}"


def _without_consequences(problems: list[Problem | str]) -> list[Problem | str]:
    """Leaves out "is missing" for a field whose misspelt name is reported already."""
    meant: set[str] = set()
    for problem in problems:
        if not isinstance(problem, Problem):
            continue
        hint = re.search(r'did you mean "(.+)"', problem.remedy)
        if hint is not None:
            meant |= {hint[1], _joined(problem.field.rpartition(".")[0], hint[1])}
    return [
        problem
        for problem in problems
        if isinstance(problem, Problem) or problem.partition(" is missing")[0] not in meant
    ]


def _joined(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)

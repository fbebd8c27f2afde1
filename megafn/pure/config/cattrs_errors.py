"""What is wrong with a mapping that should be a config: cattrs' tree of errors as flat problems."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
from attrs import frozen
from cattrs import AttributeValidationNote, ClassValidationError, ForbiddenExtraKeysError

from megafn.pure.config.field_types import FieldType, all_field_types, type_in_words, type_problem
from megafn.pure.config.problems import Problem, nearest_name

# An error names the fields of a section if there are no more than this.
_MOST_NAMES = 12


class WrongType(ValueError):
    """Raised while structuring: a value that is not of its field's type."""

    def __init__(self, value: Any, kind: FieldType):
        self.value = value
        self.kind = kind


@frozen
class _Finding:
    """A problem, with the path of the field that is missing, or that an unknown key may mean."""

    problem: Problem | str
    missing: str | None = None
    meant: str | None = None


def problems_in(
    error: ClassValidationError | WrongType, mapping: Any, cls: type
) -> list[Problem | str]:
    """Why `mapping` is not a config of class `cls`, in the order of the fields.

    A misspelt name is one problem: the field that it means is not reported as missing.
    """
    findings = list(_findings_below(error, mapping, cls, ""))
    meant = {finding.meant for finding in findings if finding.meant is not None}
    return [finding.problem for finding in findings if finding.missing not in meant]


def _findings_below(error: Exception, mapping: Any, cls: type, path: str) -> Iterator[_Finding]:
    """The findings in a subtree of errors about `mapping`, which stands at `path` of the whole."""
    if isinstance(error, WrongType):
        yield _Finding(type_problem(path or "config", error.value, error.kind))
    elif isinstance(error, KeyError):
        words = type_in_words(dict(all_field_types(cls))[path])
        yield _Finding(f"{path} is missing: give {words}", missing=path)
    elif isinstance(error, ForbiddenExtraKeysError):
        for key in sorted(error.extra_fields, key=str):
            yield _unknown_key(path, key, mapping[key], error.cl, cls)
    elif isinstance(error, ClassValidationError):
        for inner in error.exceptions:
            name = _field_name(inner)
            if name is None:
                yield from _findings_below(inner, mapping, cls, path)
            else:
                yield from _findings_below(inner, mapping.get(name), cls, _joined(path, name))
    else:
        raise error


def _field_name(error: Exception) -> str | None:
    """The field that cattrs noted on an error, or None if it is about the mapping as a whole."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return note.name
    return None


def _unknown_key(prefix: str, key: Any, value: Any, section: type, cls: type) -> _Finding:
    """A key that `section`, which stands at `prefix` of `cls`, does not have."""
    path = _joined(prefix, key)
    if path == "parallel.dp":
        return _no_such_field(
            path,
            value,
            "; data parallelism follows from the number of processes: world_size / (tp * pp * cp)",
        )
    for known, _ in all_field_types(cls):
        if known.endswith(f".{key}"):
            return _no_such_field(path, value, f'; did you mean "{known}"?', meant=known)
    names = [attribute.name for attribute in attrs.fields(section)]
    nearest = nearest_name(str(key), names)
    if nearest is not None:
        hint = f'; did you mean "{nearest}"?'
        return _no_such_field(path, value, hint, meant=_joined(prefix, nearest))
    if len(names) <= _MOST_NAMES:
        return _no_such_field(path, value, f"; choose one of {', '.join(names)}")
    return _no_such_field(path, value, f"; docs/configuration.md lists the {len(names)} fields")


def _no_such_field(path: str, value: Any, hint: str, meant: str | None = None) -> _Finding:
    return _Finding(Problem(path, value, f"there is no such field{hint}"), meant=meant)


def _joined(prefix: str, name: Any) -> str:
    return f"{prefix}.{name}" if prefix else str(name)

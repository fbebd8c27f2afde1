"""Config fields as several sources set them, merged; two sources that disagree are a problem."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from attrs import frozen

from megafn.pure.config.problems import ConfigError, Problem


@frozen
class Setting:
    """The value of a config field, and the name of the argument that it comes from."""

    # Dotted, as in "parallel.tp".
    path: str
    value: Any
    source: str
    # A default: any other source may set something else.
    weak: bool = False


# What a source says: values of fields, and what is wrong with it.
Finding: TypeAlias = Setting | Problem | ConfigError


@frozen
class Merged:
    """Values by path, their sources (only of settings that are not weak), and the problems."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]
    problems: tuple[Problem | ConfigError, ...]


def merge(findings: Iterable[Finding]) -> Merged:
    """The value of each field: the first setting that is not weak, else the first weak one.

    >>> findings = [
    ...     Setting("seed", 1234, "seed", weak=True),
    ...     Setting("optimizer.lr_mult", 2.0, "lr_mult"),
    ...     Setting("seed", 5, "other_megatron_args['seed']"),
    ...     Setting("optimizer.lr_mult", 3.0, "optimizer"),
    ... ]
    >>> dict(merge(findings).values)
    {'seed': 5, 'optimizer.lr_mult': 2.0}
    >>> print(*merge(findings).problems)
    optimizer = 3.0: contradicts lr_mult = 2.0; give one of the two
    """
    defaults: dict[str, Any] = {}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    problems: list[Problem | ConfigError] = []
    for finding in findings:
        if not isinstance(finding, Setting):
            problems.append(finding)
        elif finding.weak:
            defaults.setdefault(finding.path, finding.value)
        elif finding.path not in values:
            values[finding.path] = finding.value
            sources[finding.path] = finding.source
        elif not _same(values[finding.path], finding.value):
            problems.append(_contradiction(finding, values, sources))
    return Merged(values=defaults | values, sources=sources, problems=tuple(problems))


def known_values(findings: Iterable[Finding]) -> Mapping[str, Any]:
    """The merged values by path, for sources whose meaning depends on what others said."""
    return merge(findings).values


def _same(value: Any, other: Any) -> bool:
    """Equal and of one type: True is not 1."""
    return type(value) is type(other) and value == other


def _contradiction(
    setting: Setting, values: Mapping[str, Any], sources: Mapping[str, str]
) -> Problem:
    earlier = f"{sources[setting.path]} = {values[setting.path]!r}"
    return Problem(setting.source, setting.value, f"contradicts {earlier}; give one of the two")

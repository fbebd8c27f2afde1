"""A rule between fields of a config, as a value that `validate` applies."""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen


@frozen(kw_only=True)
class Rule:
    """What the values of some fields must satisfy together.

    fields: dotted paths as in "parallel.tp", or "world_size"; the first is the one that is blamed.
    remedy: called with the values of the fields, in their order; returns what is required and what
        to do, or None if there is nothing to object to. Applied only if each value has the right
        type and lies in its range.
    """

    fields: tuple[str, ...]
    remedy: Callable[..., str | None]


def rule(*fields: str) -> Callable[[Callable[..., str | None]], Rule]:
    """A decorator that makes a function of the values of `fields` a `Rule`.

    >>> @rule("parallel.vpp", "parallel.pp")
    ... def interleaving_needs_stages(vpp, pp):
    ...     if vpp > 1 and pp == 1:
    ...         return "needs pp of at least 2; raise pp or set vpp to 1"
    >>> interleaving_needs_stages.fields
    ('parallel.vpp', 'parallel.pp')
    >>> interleaving_needs_stages.remedy(2, 1)
    'needs pp of at least 2; raise pp or set vpp to 1'
    """

    def with_fields(remedy: Callable[..., str | None]) -> Rule:
        # pickle finds a function by this name, and the rule takes its place in the module
        remedy.__qualname__ = f"{remedy.__qualname__}.remedy"
        return Rule(fields=fields, remedy=remedy)

    return with_fields

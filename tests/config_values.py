"""Every config that the types of its fields allow, drawn by hypothesis."""

import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from megafn.pure.config.family_record import FamilyRecord
from megafn.pure.config.records import TrainConfig


def values_of(kind: Any) -> st.SearchStrategy:
    """Every value of a field's type, nan apart, which equals nothing."""
    if kind in (int, float):
        whole = st.integers(-(2**63), 2**63 - 1)
        return whole if kind is int else st.floats(allow_nan=False) | whole
    if kind in (bool, str, types.NoneType):
        return {bool: st.booleans(), str: st.text(), types.NoneType: st.none()}[kind]
    if kind is FamilyRecord or get_origin(kind) is Callable:
        return st.nothing()  # no file holds one
    if get_origin(kind) in (Union, types.UnionType):
        return st.one_of(*map(values_of, get_args(kind)))
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        return (
            st.lists(values_of(first)).map(tuple)
            if rest == [...]
            else st.tuples(*map(values_of, get_args(kind)))
        )
    return configs_of(kind)


def configs_of(cls: type) -> st.SearchStrategy:
    return st.fixed_dictionaries(
        {name: values_of(kind) for name, kind in get_type_hints(cls).items()}
    ).map(lambda f: cls(**f))


CONFIGS = configs_of(TrainConfig)

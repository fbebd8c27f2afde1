"""The families that come with megafn, and the family of a config."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megafn.pure.config.family_record import FamilyRecord
from megafn.pure.config.problems import ConfigError
from megafn.runtime.families.bert import BERT
from megafn.runtime.families.family import Family
from megafn.runtime.families.gpt import GPT
from megafn.runtime.families.step import Step
from megafn.runtime.families.t5 import T5

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.name: family for family in (GPT, BERT, T5)}
)


def family_of(family: str | FamilyRecord) -> Family:
    """The family of a built-in name, or the `Family` itself: what stands in `ModelConfig.family`.

    Raises ConfigError for another name, and for a `FamilySpec` alone, which cannot be run.

    >>> family_of("bert").spec.stacks
    ('encoder',)
    """
    if isinstance(family, Family):
        return family
    if isinstance(family, str) and family in FAMILIES:
        return FAMILIES[family]
    raise ConfigError(
        f"model.family = {family!r}: choose one of {', '.join(map(repr, FAMILIES))}, "
        "or give a megafn.Family."
    )


def step_fn(family: str | FamilyRecord) -> Step:
    """The built-in functions of a family. Raises ConfigError as `family_of`.

    >>> step_fn("gpt").loss.__name__
    'token_loss'
    """
    return family_of(family).step

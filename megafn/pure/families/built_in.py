"""The built-in families, and functions that ask the family of a config."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import ModelConfig, ParallelConfig
from megafn.pure.families.bert import BERT_SPEC
from megafn.pure.families.family_spec import FamilySpec, StageLayout
from megafn.pure.families.gpt import GPT_SPEC
from megafn.pure.families.stages import one_stack_layout
from megafn.pure.families.t5 import T5_SPEC

BUILT_IN_SPECS: Mapping[str, FamilySpec] = MappingProxyType(
    {spec.name: spec for spec in (GPT_SPEC, BERT_SPEC, T5_SPEC)}
)


def find_spec(family: object) -> FamilySpec | None:
    """The spec of a value of `ModelConfig.family`; None for an unknown name or another object."""
    if isinstance(family, str):
        return BUILT_IN_SPECS.get(family)
    spec = getattr(family, "spec", None)
    return spec if isinstance(spec, FamilySpec) else None


def spec_of(model: ModelConfig) -> FamilySpec:
    """The spec of a model's family. Raises ConfigError if there is none.

    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> spec_of(model).name
    'gpt'
    """
    spec = find_spec(model.family)
    if spec is None:
        raise ConfigError(
            f"model.family = {model.family!r}: choose one of {', '.join(BUILT_IN_SPECS)}, "
            "or give a megafn.Family"
        )
    return spec


def sample_tokens(model: ModelConfig) -> int:
    """Tokens of one sample; for T5, of encoder and decoder together.

    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> sample_tokens(model)
    32
    """
    return spec_of(model).sample_tokens(model)


def stage_layout(parallel: ParallelConfig, model: ModelConfig | None) -> StageLayout:
    """Which pipeline stages hold what; without a model, as for one stack of layers.

    Raises ValueError if this layout leaves a stack without a stage.
    """
    if model is None:
        return one_stack_layout(parallel)
    return spec_of(model).stage_layout(parallel, model)


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the whole model, without padding of the vocabulary.

    A tied output layer has none: it is the word table. Raises ConfigError if the family's spec does
    not know them.

    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> parameter_shapes(model)["decoder.layers.1.mlp.linear_fc1.weight"]
    (256, 64)
    """
    spec = spec_of(model)
    if spec.parameter_shapes is None:
        raise ConfigError(
            f"model.family = {spec.name!r}: its FamilySpec does not say what parameters it has; "
            "give it parameter_shapes"
        )
    return spec.parameter_shapes(model)


def own_fields() -> dict[str, tuple[str, ...]]:
    """Each config field that not all built-in families read, with the names of those that do."""
    readers: dict[str, tuple[str, ...]] = {}
    for name, spec in BUILT_IN_SPECS.items():
        for path in spec.fields:
            readers[path] = (*readers.get(path, ()), name)
    return readers

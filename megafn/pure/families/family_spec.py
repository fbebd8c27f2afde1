"""The pure half of a family of models: one record of functions that need no torch."""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from megafn.pure.config.records import ModelConfig, ParallelConfig
from megafn.pure.config.rule import Rule


@frozen
class Constant:
    """An initial value that is the same everywhere."""

    value: float


@frozen
class Normal:
    """Initial values drawn from a normal distribution with mean 0."""

    std: float


@frozen(kw_only=True)
class StageLayout:
    """Which pipeline stages hold which layers and tables; stages count from 0."""

    stacks: tuple[range, ...]  # stages of each stack that has stages of its own, in their order
    word_tables: tuple[int, ...]  # stages with a copy of the word table, tied output layer included
    position_tables: tuple[int, ...]  # stages with a copy of a learned position table


@frozen(kw_only=True)
class FamilySpec:
    """The pure half of a family: what `validate` and the planning functions ask about its models.

    To add a family, change a built-in one, `attrs.evolve(megafn.family_of("gpt").spec, name=...)`.

    name: what stands in configs and checkpoints.
    stacks: names of the stacks of layers in the whole model, as parameters are named, in pipeline
        order: "decoder" for GPT, "encoder" for BERT, both for T5.
    fields: config fields that only some families read, and this one does, as dotted paths; for
        other families a value that is not the default is refused.
    rules: what a config must satisfy beyond the rules for every family.
    training_flops(model, sequences): operations of one forward and backward pass, or None.
    initial_distribution(name, shape, model): of a parameter, by its name in the whole model; None
        for a name that the family does not know, whose module's own value is kept.
    sample_tokens(model): tokens of one sample.
    stage_layout(parallel, model): which pipeline stages hold what. Raises ValueError if there is
        none for this layout.
    parameter_shapes(model): name and shape of every parameter of the whole model. None: not known,
        and such a model cannot be planned or exported.
    """

    name: str
    stacks: tuple[str, ...]
    fields: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    training_flops: Callable[[ModelConfig, int], float | None]
    initial_distribution: Callable[[str, tuple[int, ...], ModelConfig], Constant | Normal | None]
    sample_tokens: Callable[[ModelConfig], int]
    stage_layout: Callable[[ParallelConfig, ModelConfig], StageLayout]
    parameter_shapes: Callable[[ModelConfig], dict[str, tuple[int, ...]]] | None = None

    @property
    def spec(self) -> FamilySpec:
        """Itself, so that a config accepts a spec in place of a family."""
        return self

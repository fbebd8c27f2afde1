"""What each pipeline stage holds: how many layers of which stack, which tables, which ends."""

from __future__ import annotations

from functools import lru_cache

import attrs
from attrs import frozen

from megafn.pure.config.records import ModelConfig, ParallelConfig
from megafn.pure.families.built_in import spec_of
from megafn.pure.planner.records import Layout


@frozen(kw_only=True)
class StageContents:
    """One pipeline stage. Stacks are numbered as in `FamilySpec.stacks`."""

    # Layers of each stack, all chunks together.
    layers: tuple[int, ...]
    # Begins with tables of words and positions.
    embeds: bool
    # Ends with the output layer or another head.
    has_head: bool
    # Stacks whose last layer is here, and with it the final norm.
    ends: tuple[int, ...]


def contents_of_stages(
    model: ModelConfig, layout: Layout, split_rank: int | None
) -> tuple[StageContents, ...]:
    """By pipeline stage. split_rank: the first stage of T5's decoder, if given."""
    return _contents_of_stages(
        model,
        layout.pp,
        layout.num_layers_in_first_pipeline_stage,
        layout.num_layers_in_last_pipeline_stage,
        split_rank,
    )


# Cached by what decides the stages, which many layouts share.
@lru_cache(maxsize=1024)
def _contents_of_stages(
    model: ModelConfig, pp: int, first: int | None, last: int | None, split: int | None
) -> tuple[StageContents, ...]:
    spec = spec_of(model)
    parallel = ParallelConfig(
        pp=pp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        pipeline_model_parallel_split_rank=split if pp > 1 else None,
    )
    stages_of_stacks = spec.stage_layout(parallel, model).stacks
    if len(stages_of_stacks) < len(spec.stacks):
        # no pipeline: the only stage holds all stacks
        stages_of_stacks = stages_of_stacks[:1] * len(spec.stacks)

    contents = [StageContents(layers=(), embeds=False, has_head=False, ends=())] * pp
    for stack, stages in enumerate(stages_of_stacks):
        total = model.num_layers if stack == 0 else model.decoder_layers
        counts = layers_by_stage(total, len(stages), first, last)
        for stage, held in enumerate(contents):
            here = stage in stages
            contents[stage] = attrs.evolve(
                held,
                layers=(*held.layers, counts[stage - stages.start] if here else 0),
                embeds=held.embeds or stage == stages.start,
                ends=(*held.ends, stack) if stage == stages.stop - 1 else held.ends,
            )
    contents[-1] = attrs.evolve(contents[-1], has_head=True)
    return tuple(contents)


def layers_by_stage(
    layers: int, stages: int, first: int | None = None, last: int | None = None
) -> tuple[int, ...]:
    """Layers of each stage; the first and the last may be given, the others are alike.

    >>> layers_by_stage(8, 4), layers_by_stage(14, 4, last=2)
    ((2, 2, 2, 2), (4, 4, 4, 2))
    """
    if stages == 1:
        return (layers,)
    middle_stages = stages - (first is not None) - (last is not None)
    left = layers - (first or 0) - (last or 0)
    middle = (left // middle_stages,) * middle_stages if middle_stages else ()
    first_stage = () if first is None else (first,)
    last_stage = () if last is None else (last,)
    return (*first_stage, *middle, *last_stage)

"""Pipeline stages that take equally long, counted: most of 64 stages are alike, and priced once."""

from __future__ import annotations

from functools import lru_cache

from attrs import frozen

from megafn.pure.config.records import ModelConfig, TrainConfig
from megafn.pure.planner.memory.parameter_counts import parameters_by_stage
from megafn.pure.planner.memory.stage_contents import contents_of_stages
from megafn.pure.planner.records import Layout


@frozen(kw_only=True)
class DistinctStage:
    """What one stage holds, and how many stages hold the same."""

    # Layers of each stack.
    layers: tuple[int, ...]
    embeds: bool
    has_head: bool
    # Of one rank, the most among these stages.
    parameters: int
    count: int


def distinct_stages(config: TrainConfig, layout: Layout) -> tuple[DistinctStage, ...]:
    """Raises ConfigError if the family does not say which parameters its models have."""
    # Of a layout, only what decides the stages: many layouts share an entry of the cache.
    stages = Layout(
        tp=layout.tp,
        pp=layout.pp,
        num_layers_in_first_pipeline_stage=layout.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=layout.num_layers_in_last_pipeline_stage,
    )
    return _distinct_stages(
        config.model, stages, config.parallel.pipeline_model_parallel_split_rank
    )


@lru_cache(maxsize=4096)
def _distinct_stages(
    model: ModelConfig, layout: Layout, split_rank: int | None
) -> tuple[DistinctStage, ...]:
    contents = contents_of_stages(model, layout, split_rank)
    parameters = parameters_by_stage(model, layout, split_rank)
    parameters_of: dict[tuple[tuple[int, ...], bool, bool], list[int]] = {}
    for count, held in zip(parameters, contents, strict=True):
        parameters_of.setdefault((held.layers, held.embeds, held.has_head), []).append(count)
    return tuple(
        DistinctStage(
            layers=layers,
            embeds=embeds,
            has_head=has_head,
            parameters=max(counts),
            count=len(counts),
        )
        for (layers, embeds, has_head), counts in parameters_of.items()
    )

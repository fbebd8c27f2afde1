"""Pipeline stages that take equally long, counted: a pipeline of 64 stages has three kinds."""

from __future__ import annotations

from functools import lru_cache

from attrs import frozen

from megafn.pure.config.records import ModelConfig, ParallelConfig, TrainConfig
from megafn.pure.planner.memory.parameter_counts import parameters_by_stage
from megafn.pure.planner.memory.stage_contents import contents_of_stages
from megafn.pure.planner.records import Layout


@frozen(kw_only=True)
class DistinctStage:
    """What one stage holds, and how many stages hold as much."""

    # Layers of each stack.
    layers: tuple[int, ...]
    embeds: bool
    has_head: bool
    # Of one rank, the most among these stages.
    parameters: int
    stages: int


def distinct_stages(config: TrainConfig, layout: Layout) -> tuple[DistinctStage, ...]:
    """Raises ConfigError if the family does not say which parameters its models have."""
    return _kinds(
        config.model,
        layout.tp,
        layout.pp,
        layout.num_layers_in_first_pipeline_stage,
        layout.num_layers_in_last_pipeline_stage,
        config.parallel.pipeline_model_parallel_split_rank,
    )


@lru_cache(maxsize=4096)
def _kinds(
    model: ModelConfig, tp: int, pp: int, first: int | None, last: int | None, split: int | None
) -> tuple[DistinctStage, ...]:
    parallel = ParallelConfig(
        pp=pp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        pipeline_model_parallel_split_rank=split,
    )
    layout = Layout(
        tp=tp,
        pp=pp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    contents = contents_of_stages(model, pp, first, last, split)
    parameters = parameters_by_stage(model, parallel, layout)
    kinds: dict[tuple[tuple[int, ...], bool, bool], list[int]] = {}
    for count, held in zip(parameters, contents, strict=True):
        kinds.setdefault((held.layers, held.embeds, held.has_head), []).append(count)
    return tuple(
        DistinctStage(
            layers=layers,
            embeds=embeds,
            has_head=has_head,
            parameters=max(counts),
            stages=len(counts),
        )
        for (layers, embeds, has_head), counts in kinds.items()
    )

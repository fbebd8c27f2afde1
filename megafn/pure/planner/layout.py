"""Between a config and its `Layout`."""

from __future__ import annotations

import attrs

from megafn.pure.config.records import TrainConfig, num_micro_batches
from megafn.pure.planner.records import Layout


def layout_of(config: TrainConfig, world_size: int) -> Layout:
    """The layout that a config has on `world_size` ranks."""
    parallel = config.parallel
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    return Layout(
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        dp=dp,
        micro_batch_size=config.micro_batch_size,
        num_micro_batches=num_micro_batches(config, dp),
        sequence_parallel=parallel.sequence_parallel,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        recompute=config.recompute,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
    )


def with_layout(config: TrainConfig, layout: Layout) -> TrainConfig:
    """The config in another layout; its global batch stays."""
    return attrs.evolve(
        config,
        parallel=attrs.evolve(
            config.parallel,
            tp=layout.tp,
            pp=layout.pp,
            vpp=layout.vpp,
            cp=layout.cp,
            sequence_parallel=layout.sequence_parallel,
            num_layers_in_first_pipeline_stage=layout.num_layers_in_first_pipeline_stage,
            num_layers_in_last_pipeline_stage=layout.num_layers_in_last_pipeline_stage,
        ),
        optimizer=attrs.evolve(
            config.optimizer, use_distributed_optimizer=layout.use_distributed_optimizer
        ),
        recompute=layout.recompute,
        micro_batch_size=layout.micro_batch_size,
    )

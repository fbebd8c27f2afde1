"""The built-in model function: one chunk of a family's model."""

from __future__ import annotations

import torch

from megafn.pure.config.records import TrainConfig
from megafn.runtime.families.built_in import family_of
from megafn.runtime.model.chunk import Chunk, ChunkPlan
from megafn.runtime.model.layers import transformer_config
from megafn.runtime.model.weights import initialize_weights
from megafn.runtime.parallel.groups import ProcessGroups


def build_chunk(
    config: TrainConfig,
    pg: ProcessGroups,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> Chunk:
    """The built-in model function: one chunk of the family's model, with its initial weights.

    They are a function of (config.seed, parameter name), so that every layout begins alike.

    A custom model function takes the same arguments and returns a module with what megatron-core's
    schedules ask of it (`config`, `set_input_tensor`, `model_type`, ...); wrapping this one is the
    easy way.
    """
    mcore = transformer_config(config, pg)
    mcore.init_method = _ask_for_the_initial_value
    mcore.output_layer_init_method = _ask_for_the_initial_value
    mcore.embedding_init_method = _ask_for_the_initial_value
    plan = ChunkPlan(
        config=config,
        mcore=mcore,
        pg=pg,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    )
    chunk = Chunk(plan, family_of(config.model.family).chunk)
    chunk.to(device=pg.device, dtype=mcore.params_dtype)
    initialize_weights(chunk, config.model, pg, config.seed)
    return chunk


def _ask_for_the_initial_value(weight: torch.Tensor) -> torch.Tensor:
    """In place of megatron-core's initial values: `initialize_weights` follows."""
    weight.initialize_by_name = True  # type: ignore[attr-defined]
    return weight

"""Bytes of each pipeline stage by kind, without building anything."""

from __future__ import annotations

from collections.abc import Sequence

from megafn.pure.config.records import ModelConfig, OptimizerConfig, TrainConfig
from megafn.pure.pipeline import peak_of_stage
from megafn.pure.planner.activations import (
    ELEMENT_BYTES,
    Cut,
    chunk_activations,
    cut_of,
    embedding_activations,
    head_activations,
    layer_activations,
)
from megafn.pure.planner.parameter_counts import parameters_by_stage
from megafn.pure.planner.records import Layout, Memory
from megafn.pure.planner.stage_contents import StageContents, contents_of_stages

# Gradients are summed in fp32, whatever the parameters are.
_GRADIENT_BYTES = 4
# Token ids, labels and the loss mask, int64.
_BATCH_BYTES = 24


def memory_by_stage(
    config: TrainConfig,
    layout: Layout,
    *,
    implementation: str = "megafn",
    stages: Sequence[int] | None = None,
) -> tuple[Memory, ...]:
    """Bytes of the fullest rank of each pipeline stage, at the moment of a step with the most.

    Of `config` count the model, the precision, the optimizer's name, uneven first and last stages
    and T5's split; everything else is read from `layout`. implementation: "megafn", or "megatron"
    for its fused kernels. stages: only these, in their order; None: all.

    State is that of mixed precision with sharding over data-parallel ranks (ZeRO 1, arXiv
    1910.02054), activations are those of `planner.activations`, and a stage holds as many of them
    as `peak_activations` says. Not counted: what the allocator and libraries reserve, up to 2 GB.

    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=1, global_batch_size=8, train_iters=1)
    >>> memory_by_stage(config, Layout(pp=2, num_micro_batches=8))[0].optimizer_state
    547328.0
    """
    contents = contents_of_stages(config.model, config.parallel, layout)
    parameters = parameters_by_stage(config.model, config.parallel, layout)
    cut = cut_of(layout, config.precision.dtype, implementation)
    batch = _BATCH_BYTES * layout.num_micro_batches * _tokens(config.model, layout)
    return tuple(
        Memory(
            **_state_bytes(parameters[stage], config, layout),
            activations=_activation_bytes(config.model, contents[stage], layout, cut, stage),
            other=batch,
        )
        for stage in (range(layout.pp) if stages is None else stages)
    )


def _tokens(model: ModelConfig, layout: Layout) -> float:
    return model.seq_length * layout.micro_batch_size / layout.cp


def _state_bytes(parameters: int, config: TrainConfig, layout: Layout) -> dict[str, float]:
    """Parameters, gradients and the optimizer's state of one rank."""
    element = ELEMENT_BYTES[config.precision.dtype]
    numbers = _state_numbers(config.optimizer)
    if element < 4:
        # an fp32 copy of the parameters
        numbers += 1
    shards = layout.dp * layout.cp if layout.use_distributed_optimizer else 1
    return {
        "parameters": parameters * element,
        "gradients": parameters * _GRADIENT_BYTES,
        "optimizer_state": 4 * numbers * parameters / shards,
    }


def _state_numbers(optimizer: OptimizerConfig) -> int:
    """Numbers that an optimizer keeps for each parameter."""
    if optimizer.name == "sgd":
        return 1 if optimizer.momentum else 0
    return 2


def _activation_bytes(
    model: ModelConfig, contents: StageContents, layout: Layout, cut: Cut, stage: int
) -> float:
    in_flight = peak_of_stage(layout.pp, layout.vpp, layout.num_micro_batches, stage)
    chunk = 0.0
    backward = 0.0
    for stack, layers in enumerate(contents.layers):
        if layers == 0:
            continue
        layer = layer_activations(model, cut, stack)
        kept, most = chunk_activations(layer, layers / layout.vpp, layout.recompute)
        chunk += kept
        backward = max(backward, most)
    total = in_flight * chunk
    if contents.embeds:
        first_stack = 0 if contents.layers[0] else 1
        embedding = embedding_activations(model, cut, first_stack)
        chunks_with_embedding = in_flight if layout.vpp == 1 else min(in_flight, layout.pp)
        total += chunks_with_embedding * embedding.kept
    if not contents.has_head:
        return total + backward
    tied_here = contents.embeds and model.tie_word_embeddings
    head = head_activations(model, cut, tied_here=tied_here)
    return total + max(head.kept + head.backward, backward + head.remains)

"""Bytes of each pipeline stage by kind, without building anything."""

from __future__ import annotations

from collections.abc import Sequence

from megafn.pure.config.records import ModelConfig, OptimizerConfig, TrainConfig
from megafn.pure.pipeline import peak_of_stage
from megafn.pure.planner.memory.activations import (
    ELEMENT_BYTES,
    MicroBatchActivations,
    chunk_activations,
    cut_of,
    micro_batch_activations,
)
from megafn.pure.planner.memory.parameter_counts import parameters_by_stage
from megafn.pure.planner.memory.stage_contents import StageContents, contents_of_stages
from megafn.pure.planner.records import Layout, Memory

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

    Of `config` count the model, the precision, the optimizer's name and T5's split; everything else
    is read from `layout`. implementation: "megafn", or "megatron" for its fused kernels and its
    loss. stages: only these, in their order; None: all.

    State is that of mixed precision with sharding over data-parallel ranks (ZeRO 1, arXiv
    1910.02054), activations are those of `memory.activations`, and a stage holds as many of them
    as `peak_activations` says. Not counted: what the allocator and libraries reserve, up to 2 GB,
    and the logits that `config.return_logits` keeps.

    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=1, global_batch_size=8, train_iters=1)
    >>> memory_by_stage(config, Layout(pp=2, num_micro_batches=8))[0].optimizer_state
    547328.0
    """
    model = config.model
    split_rank = config.parallel.pipeline_model_parallel_split_rank
    parameters = parameters_by_stage(model, layout, split_rank)
    contents = contents_of_stages(model, layout, split_rank)
    cut = cut_of(layout, config.precision.dtype, implementation)
    micro_batch = micro_batch_activations(model, cut)
    state = _state_bytes(config, layout)
    positions = model.seq_length * layout.micro_batch_size / layout.cp
    batch = _BATCH_BYTES * layout.num_micro_batches * positions
    return tuple(
        Memory(
            parameters=parameters[stage] * state.parameters,
            gradients=parameters[stage] * state.gradients,
            optimizer_state=parameters[stage] * state.optimizer_state,
            activations=_activation_bytes(model, contents[stage], layout, micro_batch, stage),
            other=batch,
        )
        for stage in (range(layout.pp) if stages is None else stages)
    )


def _state_bytes(config: TrainConfig, layout: Layout) -> Memory:
    """Of one parameter: itself, its gradient, and what the optimizer keeps of it."""
    element = ELEMENT_BYTES[config.precision.dtype]
    numbers = _state_numbers(config.optimizer)
    if element < 4:
        # an fp32 copy of the parameters
        numbers += 1
    shards = layout.dp * layout.cp if layout.use_distributed_optimizer else 1
    return Memory(
        parameters=element, gradients=_GRADIENT_BYTES, optimizer_state=4 * numbers / shards
    )


def _state_numbers(optimizer: OptimizerConfig) -> int:
    """Numbers that an optimizer keeps for each parameter."""
    if optimizer.name == "sgd":
        return 1 if optimizer.momentum else 0
    return 2


def _activation_bytes(
    model: ModelConfig,
    contents: StageContents,
    layout: Layout,
    micro_batch: MicroBatchActivations,
    stage: int,
) -> float:
    """Bytes of one stage when the most are alive: what forwards in flight keep, and a backward."""
    recompute = layout.recompute
    in_flight = peak_of_stage(layout.pp, layout.vpp, layout.num_micro_batches, stage)
    chunk = 0.0
    backward = 0.0
    for layers, layer, shared in zip(
        contents.layers, micro_batch.layers, micro_batch.shared, strict=True
    ):
        if layers:
            kept, backward = chunk_activations(layer, layers / layout.vpp, recompute)
            chunk += kept + shared
    if recompute.granularity == "full":
        chunk += micro_batch.shared_recomputed
    if len(contents.layers) > 1:
        chunk += _between_halves(contents, layout, micro_batch)
    total = in_flight * chunk + micro_batch.gathered
    if stage > 0:
        # the gradient that is being sent
        total += micro_batch.message
    if layout.vpp > 1:
        # what was received ahead, in both directions
        total += 2 * micro_batch.message

    largest = backward
    tied_here = contents.embeds and contents.has_head and model.tie_word_embeddings
    if contents.has_head:
        # the gradient of a tied table waits for its other half
        remains = micro_batch.word_table if tied_here else 0.0
        head = micro_batch.head
        largest = max(head.kept + head.backward, backward + remains)
    if contents.embeds:
        embedding = micro_batch.embeddings[0 if contents.layers[0] else 1]
        chunks_with_embedding = in_flight if layout.vpp == 1 else min(in_flight, layout.pp)
        total += chunks_with_embedding * embedding.kept
        largest = max(largest, embedding.backward * (2 if tied_here else 1) - chunk)
    return total + largest


def _between_halves(
    contents: StageContents, layout: Layout, micro_batch: MicroBatchActivations
) -> float:
    """What a stage of T5 keeps because one tensor carries both halves.

    The first layer's input, a part of it, is counted with that layer.
    """
    encoder_output, decoder_hidden = micro_batch.hidden
    final_norm = encoder_output if 0 in contents.ends else 0.0
    if layout.pp == 1:
        return final_norm + encoder_output
    in_encoder = contents.layers[0] > 0
    if contents.embeds:
        return final_norm + (0.0 if in_encoder else micro_batch.message)
    return final_norm + (decoder_hidden if in_encoder else encoder_output)

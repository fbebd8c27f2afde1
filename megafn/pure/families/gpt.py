"""The pure half of GPT: one stack of decoder layers, predicting the next token."""

from __future__ import annotations

from megafn.pure.config.records import ModelConfig
from megafn.pure.config.rule import rule
from megafn.pure.families.family_spec import FamilySpec
from megafn.pure.families.parameter_shapes import gpt_parameter_shapes
from megafn.pure.families.stages import ONE_STACK_RULES, one_stack_layout
from megafn.pure.families.transformer import (
    initial_distribution,
    one_sequence_tokens,
    one_stack_flops,
)


def gpt_training_flops(model: ModelConfig, sequences: int) -> float:
    """Operations of the layers and the output layer, forward and backward."""
    return one_stack_flops(model, sequences, head=2 * model.hidden_size * model.vocab_size)


@rule("model.position_embedding")
def no_relative_positions(embedding: str) -> str | None:
    if embedding == "relative":
        return "only T5 has relative positions; choose learned_absolute, rope or none"
    return None


@rule("model.layers_without_rope", "model.num_layers")
def layers_without_rope_are_there(layers: tuple[int, ...], count: int) -> str | None:
    in_order = list(layers) == sorted(set(layers))
    if not in_order or not all(0 <= layer < count for layer in layers):
        return f"must be numbers of layers in ascending order; give some of 0 to {count - 1}"
    if len(layers) == count:
        return (
            "leaves no layer with rotary positions; leave a layer out, "
            'or choose position_embedding = "none"'
        )
    return None


GPT_SPEC = FamilySpec(
    name="gpt",
    stacks=("decoder",),
    fields=(
        "model.layers_without_rope",
        "model.sliding_window",
        "model.parallel_residual",
        "data.reset_position_ids",
        "data.reset_attention_mask",
        "data.eod_mask_loss",
    ),
    rules=(*ONE_STACK_RULES, no_relative_positions, layers_without_rope_are_there),
    training_flops=gpt_training_flops,
    initial_distribution=initial_distribution,
    sample_tokens=one_sequence_tokens,
    stage_layout=one_stack_layout,
    parameter_shapes=gpt_parameter_shapes,
)

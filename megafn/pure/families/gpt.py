"""The pure half of GPT: one stack of decoder layers, predicting the next token."""

from __future__ import annotations

from megafn.pure.config.records import ModelConfig
from megafn.pure.config.rule import rule
from megafn.pure.families.family_spec import FamilySpec
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


GPT_SPEC = FamilySpec(
    name="gpt",
    stacks=("decoder",),
    fields=("data.reset_position_ids", "data.reset_attention_mask", "data.eod_mask_loss"),
    rules=(*ONE_STACK_RULES, no_relative_positions),
    training_flops=gpt_training_flops,
    initial_distribution=initial_distribution,
    sample_tokens=one_sequence_tokens,
    stage_layout=one_stack_layout,
)

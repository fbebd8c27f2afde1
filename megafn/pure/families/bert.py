"""The pure half of BERT: one stack of encoder layers, predicting masked tokens or labels."""

from __future__ import annotations

from megafn.pure.config.records import DataConfig, ModelConfig
from megafn.pure.config.rule import rule
from megafn.pure.families.family_spec import FamilySpec
from megafn.pure.families.gpt import no_relative_positions
from megafn.pure.families.parameter_shapes import bert_parameter_shapes
from megafn.pure.families.stages import ONE_STACK_RULES, one_stack_layout
from megafn.pure.families.transformer import (
    initial_distribution,
    one_sequence_tokens,
    one_stack_flops,
)

SHORTEST_SAMPLE = 8


def bert_training_flops(model: ModelConfig, sequences: int) -> float:
    """Operations of the layers and the masked-token head, forward and backward.

    Heads that read one position of a sequence are not counted.
    """
    if model.num_labels is not None:
        return one_stack_flops(model, sequences, head=0)
    masked_head = 2 * model.hidden_size * model.hidden_size
    output_layer = 2 * model.hidden_size * model.vocab_size
    return one_stack_flops(model, sequences, head=masked_head + output_layer)


@rule("model.bert_binary_head", "model.num_labels")
def one_head_for_whole_sequences(binary_head: bool, labels: int | None) -> str | None:
    if binary_head and labels is not None:
        return f"the head of num_labels = {labels} takes its place; leave one of the two out"
    return None


@rule("model.problem_type", "model.num_labels")
def problem_type_fits_labels(problem_type: str | None, labels: int | None) -> str | None:
    if problem_type is not None and labels is None:
        return "describes num_labels; give num_labels or leave it out"
    if problem_type == "single_label_classification" and labels == 1:
        return (
            "with one label there is nothing to choose; "
            "raise num_labels, or choose regression or multi_label_classification"
        )
    return None


@rule("model.tie_word_embeddings", "model.num_labels")
def labels_leave_no_output_layer(tied: bool, labels: int | None) -> str | None:
    if not tied and labels is not None:
        return (
            f"the head of num_labels = {labels} takes the place of the output layer; leave it out"
        )
    return None


@rule("model.seq_length", "data")
def sample_has_room_for_sentences(length: int, data: DataConfig | None) -> str | None:
    if data is not None and length < SHORTEST_SAMPLE:
        return (
            f"three tokens of a sample mark the two sentences; must be at least {SHORTEST_SAMPLE}"
        )
    return None


@rule("data", "model.num_labels")
def corpora_have_no_labels(data: DataConfig | None, labels: int | None) -> str | None:
    if data is not None and labels is not None:
        return "corpora have no labels for num_labels; leave it out and pass batches"
    return None


BERT_SPEC = FamilySpec(
    name="bert",
    stacks=("encoder",),
    fields=(
        "model.num_tokentypes",
        "model.bert_binary_head",
        "model.num_labels",
        "model.problem_type",
        "data.mask_prob",
        "data.short_seq_prob",
    ),
    rules=(
        *ONE_STACK_RULES,
        no_relative_positions,
        one_head_for_whole_sequences,
        problem_type_fits_labels,
        labels_leave_no_output_layer,
        sample_has_room_for_sentences,
        corpora_have_no_labels,
    ),
    training_flops=bert_training_flops,
    initial_distribution=initial_distribution,
    sample_tokens=one_sequence_tokens,
    stage_layout=one_stack_layout,
    parameter_shapes=bert_parameter_shapes,
)

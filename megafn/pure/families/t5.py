"""The pure half of T5: an encoder and a decoder, each with pipeline stages of its own."""

from __future__ import annotations

from megafn.pure.config.records import DataConfig, ModelConfig, ParallelConfig
from megafn.pure.config.rule import Rule, rule
from megafn.pure.config.sequence_unit import sequence_unit
from megafn.pure.families.family_spec import Constant, FamilySpec, Normal, StageLayout
from megafn.pure.families.parameter_shapes import t5_parameter_shapes
from megafn.pure.families.stages import RECOMPUTE, one_stack_layout, recompute_problem
from megafn.pure.families.transformer import initial_distribution, layer_flops

SHORTEST_SAMPLE = 8

SPLIT = "parallel.pipeline_model_parallel_split_rank"
ENCODER_CUT = ("model.num_layers", "parallel.pp", SPLIT)
DECODER_CUT = ("model.num_decoder_layers", "parallel.pp", SPLIT)


# ------------------------------------------------------------------------------------- stages


def decoder_stage(parallel: ParallelConfig) -> int | None:
    """The pipeline stage at which the decoder begins; None if the only stage holds both halves.

    >>> decoder_stage(ParallelConfig(pp=4)), decoder_stage(ParallelConfig(pp=1))
    (2, None)
    """
    if parallel.pp == 1:
        return None
    return _split(parallel.pp, parallel.pipeline_model_parallel_split_rank)


def _split(pp: int, given: int | None) -> int:
    return pp // 2 if given is None else given


def t5_stage_layout(parallel: ParallelConfig, model: ModelConfig) -> StageLayout:
    """Encoder stages, then decoder stages; the first one of each begins with an embedding.

    >>> model = ModelConfig(
    ...     family="t5", num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32
    ... )
    >>> layout = t5_stage_layout(ParallelConfig(pp=4), model)
    >>> layout.stacks, layout.word_tables, layout.position_tables
    ((range(0, 2), range(2, 4)), (0, 2, 3), (0, 2))
    """
    pp = parallel.pp
    split = decoder_stage(parallel)
    if split is None:
        return one_stack_layout(parallel)
    if not 0 < split < pp:
        raise ValueError(
            f"parallel.pipeline_model_parallel_split_rank = {split}: must be 1 to {pp - 1}, "
            "so that both the encoder and the decoder have a stage"
        )
    word_tables = {0, split}
    if model.tie_word_embeddings:
        word_tables.add(pp - 1)
    learned = model.position_embedding == "learned_absolute"
    return StageLayout(
        stacks=(range(split), range(split, pp)),
        word_tables=tuple(sorted(word_tables)),
        position_tables=(0, split) if learned else (0,),
    )


@rule(SPLIT, "parallel.pp")
def each_half_has_a_stage(split: int | None, pp: int) -> str | None:
    if split is None or 0 < split < pp:
        return None
    if pp == 1:
        return "with pp = 1 the only stage holds both encoder and decoder; leave it out or raise pp"
    return f"encoder and decoder have at least one stage each; give 1 to pp - 1 = {pp - 1}"


def _half_problem(half: str, layers: int, pp: int, given: int | None) -> str | None:
    """Why the layers of one half cannot be cut into its stages."""
    split = _split(pp, given)
    if not 0 < split < pp:  # no pipeline, or `each_half_has_a_stage` objects
        return None
    stages = split if half == "encoder" else pp - split
    if layers % stages == 0:
        return None
    return (
        f"the {half} has {stages} of pp = {pp} stages (the decoder begins at "
        f"pipeline_model_parallel_split_rank = {split}), which must divide its {layers} layers; "
        f"choose a multiple of {stages}, another pp or another split rank"
    )


@rule(*ENCODER_CUT, "model.num_decoder_layers")
def layers_fit_into_stages(
    layers: int, pp: int, split: int | None, decoder_layers: int | None
) -> str | None:
    """The encoder's layers, and the decoder's if it has as many because no number is given."""
    problem = _half_problem("encoder", layers, pp, split)
    if problem is None and decoder_layers is None:
        problem = _half_problem("decoder", layers, pp, split)
    return problem


@rule(*DECODER_CUT)
def decoder_layers_fit_into_stages(layers: int | None, pp: int, split: int | None) -> str | None:
    return None if layers is None else _half_problem("decoder", layers, pp, split)


@rule(*RECOMPUTE, *ENCODER_CUT, "model.num_decoder_layers")
def recomputed_layers_fit(
    count: int,
    granularity: str | None,
    method: str,
    layers: int,
    pp: int,
    given: int | None,
    decoder_layers: int | None,
) -> str | None:
    if decoder_layers is None:
        decoder_layers = layers
    if _half_problem("encoder", layers, pp, given) or _half_problem(
        "decoder", decoder_layers, pp, given
    ):
        return None
    split = _split(pp, given)
    if 0 < split < pp:
        sizes = {layers // split, decoder_layers // (pp - split)}
    else:
        sizes = {layers, decoder_layers}
    return recompute_problem(count, granularity, method, sizes)


def _stages_follow_from_the_split(layers: int | None) -> str | None:
    if layers is None:
        return None
    return (
        "T5's stages are balanced by pipeline_model_parallel_split_rank; "
        "set that and leave this out"
    )


stages_follow_from_the_split = tuple(
    Rule(
        fields=(f"parallel.num_layers_in_{end}_pipeline_stage",),
        remedy=_stages_follow_from_the_split,
    )
    for end in ("first", "last")
)


@rule("parallel.vpp")
def no_interleaving(vpp: int) -> str | None:
    if vpp > 1:
        return (
            "megatron-core's interleaved schedule has no place for the embedding with which "
            "T5's decoder begins; set it to 1"
        )
    return None


# ----------------------------------------------------------------------- layers and sequences


@rule("parallel.cp")
def no_context_parallelism(cp: int) -> str | None:
    if cp > 1:
        return "context parallelism is not built for T5, which has two sequences; set it to 1"
    return None


@rule("model.num_query_groups", "model.num_attention_heads")
def no_grouped_queries(groups: int | None, heads: int) -> str | None:
    if groups not in (None, heads):
        return "megatron-core's cross-attention has no grouped queries; leave it out"
    return None


@rule("model.decoder_seq_length", "parallel.tp", "parallel.cp", "parallel.sequence_parallel")
def decoder_sequence_can_be_cut(
    length: int | None, tp: int, cp: int, sequence_parallel: bool
) -> str | None:
    unit = sequence_unit(tp, cp, sequence_parallel)
    if length is not None and length % unit:
        return f"sequence_parallel (tp = {tp}) cuts it; choose a multiple of {unit}"
    return None


@rule("model.max_position_embeddings", "model.position_embedding", "model.decoder_seq_length")
def position_table_reaches_the_decoder(
    rows: int | None, embedding: str, length: int | None
) -> str | None:
    if embedding == "learned_absolute" and rows and length and rows < length:
        return f"must be at least decoder_seq_length = {length}; raise it or shorten that"
    return None


@rule("model.decoder_start_token_id", "model.vocab_size")
def start_token_is_in_the_vocabulary(token: int, size: int) -> str | None:
    if token >= size:
        return f"is outside vocab_size = {size}; give 0 to {size - 1}"
    return None


@rule("model.seq_length", "data")
def sample_has_room_for_spans(length: int, data: DataConfig | None) -> str | None:
    if data is not None and length < SHORTEST_SAMPLE:
        return (
            "two tokens of a sample are kept free and spans are taken from the rest; "
            f"must be at least {SHORTEST_SAMPLE}"
        )
    return None


# ------------------------------------------------------------------------------------- the spec


def t5_training_flops(model: ModelConfig, sequences: int) -> float:
    """Operations of both halves, cross-attention and the output layer, forward and backward."""
    hidden = model.hidden_size
    inner = model.num_attention_heads * model.head_size
    s = model.seq_length
    t = model.decoder_length
    encoder = model.num_layers * s * layer_flops(model, s)
    queries_and_output = t * (2 * hidden * 2 * inner + 4 * s * inner)
    keys_and_values = s * 2 * hidden * 2 * inner
    cross_attention = queries_and_output + keys_and_values
    decoder = model.decoder_layers * (t * layer_flops(model, t) + cross_attention)
    output_layer = t * 2 * hidden * model.vocab_size
    return 3.0 * sequences * (encoder + decoder + output_layer)


def t5_initial_distribution(
    name: str, shape: tuple[int, ...], model: ModelConfig
) -> Constant | Normal | None:
    """As for the other families, but the table that reads scaled outputs is as much larger.

    So the first logits are as large as without the scale. transformers' T5 begins with larger
    tables too.
    """
    distribution = initial_distribution(name, shape, model)
    tied = model.tie_word_embeddings
    table = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    if model.scale_decoder_outputs and name == table:
        return Normal(model.init_method_std * model.hidden_size**0.5)
    return distribution


def t5_sample_tokens(model: ModelConfig) -> int:
    """Tokens of the encoder and of the decoder."""
    return model.seq_length + model.decoder_length


T5_SPEC = FamilySpec(
    name="t5",
    stacks=("encoder", "decoder"),
    fields=(
        "model.num_decoder_layers",
        "model.decoder_seq_length",
        "model.decoder_start_token_id",
        "model.scale_decoder_outputs",
        "model.output_layer_bias",
        "data.mask_prob",
        "data.short_seq_prob",
        SPLIT,
    ),
    rules=(
        layers_fit_into_stages,
        decoder_layers_fit_into_stages,
        each_half_has_a_stage,
        recomputed_layers_fit,
        *stages_follow_from_the_split,
        no_interleaving,
        no_context_parallelism,
        no_grouped_queries,
        decoder_sequence_can_be_cut,
        position_table_reaches_the_decoder,
        start_token_is_in_the_vocabulary,
        sample_has_room_for_spans,
    ),
    training_flops=t5_training_flops,
    initial_distribution=t5_initial_distribution,
    sample_tokens=t5_sample_tokens,
    stage_layout=t5_stage_layout,
    parameter_shapes=t5_parameter_shapes,
)

"""Parameters of one rank, by pipeline stage: counted from the shapes of the whole model."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import lru_cache

from attrs import frozen

from megafn.pure.config.records import ModelConfig, padded_vocab_size
from megafn.pure.families.built_in import parameter_shapes, spec_of
from megafn.pure.planner.memory.stage_contents import StageContents, contents_of_stages
from megafn.pure.planner.records import Layout

# Ends of the names of parameters that tensor parallelism cuts (arXiv 1909.08053): columns of the
# first matrix of a pair with their bias, rows of the second.
_CUT = (
    *(
        f"{layer}.{kind}"
        for layer in ("linear_qkv", "linear_q", "linear_kv", "linear_fc1")
        for kind in ("weight", "bias")
    ),
    "linear_proj.weight",
    "linear_fc2.weight",
)
# Cut over the vocabulary, which is padded to a multiple of tp first.
_CUT_OVER_THE_VOCABULARY = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "output_layer.bias",
)


@frozen(kw_only=True)
class Count:
    """Parameters that tensor parallelism cuts, and others, which every rank holds."""

    cut: int = 0
    whole: int = 0
    # Parameters of one token id: their vocabulary is padded, then cut.
    of_a_token: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            cut=self.cut + other.cut,
            whole=self.whole + other.whole,
            of_a_token=self.of_a_token + other.of_a_token,
        )

    def on_a_rank(self, vocab_size: int, tp: int) -> int:
        rows = padded_vocab_size(vocab_size, tp) // tp
        return self.cut // tp + self.whole + self.of_a_token * rows


@frozen(kw_only=True)
class ModelCounts:
    """Parameters of a whole model by the place at which a pipeline holds them."""

    # By stack, in one layer. Layers of a stack are alike.
    layer: tuple[Count, ...]
    final_norm: tuple[Count, ...]
    # Tables that each stage of a stack holds a copy of.
    every_stage: tuple[Count, ...]
    embedding: Count
    # The output layer and other heads. A tied word table is not among them.
    head: Count
    # The word table, on a stage that has a head and no embedding; nothing if it is not tied.
    tied_table: Count


@lru_cache(maxsize=64)
def count_parameters(model: ModelConfig) -> ModelCounts:
    """The parameters of a model by place. Raises ConfigError if its family does not know them."""
    stacks = spec_of(model).stacks
    counts: dict[str, Count] = defaultdict(Count)
    for name, shape in parameter_shapes(model).items():
        counts[_place(name, stacks)] += _count(name, shape)

    num_layers = (model.num_layers, model.decoder_layers)
    layers = [
        _one_of(counts[f"{stack}.layers"], number)
        for stack, number in zip(stacks, num_layers, strict=False)
    ]
    tied = model.tie_word_embeddings and model.num_labels is None
    return ModelCounts(
        layer=tuple(layers),
        final_norm=tuple(counts[f"{stack}.final_layernorm"] for stack in stacks),
        every_stage=tuple(counts[f"{stack}_relative_pos_emb"] for stack in stacks),
        embedding=counts["embedding"],
        head=counts["head"],
        tied_table=Count(of_a_token=model.hidden_size) if tied else Count(),
    )


def _place(name: str, stacks: tuple[str, ...]) -> str:
    if name.startswith("embedding."):
        return "embedding"
    for stack in stacks:
        for place in (f"{stack}.layers", f"{stack}.final_layernorm", f"{stack}_relative_pos_emb"):
            if name.startswith(f"{place}."):
                return place
    return "head"


def _count(name: str, shape: tuple[int, ...]) -> Count:
    if name.endswith(_CUT_OVER_THE_VOCABULARY):
        return Count(of_a_token=math.prod(shape[1:]))
    if name.endswith(_CUT):
        return Count(cut=math.prod(shape))
    return Count(whole=math.prod(shape))


def _one_of(layers: Count, number: int) -> Count:
    return Count(cut=layers.cut // number, whole=layers.whole // number)


def _on_a_rank(model: ModelConfig, contents: StageContents, tp: int) -> int:
    counts = count_parameters(model)
    total = Count()
    for stack, layers in enumerate(contents.layers):
        layer = counts.layer[stack]
        total += Count(cut=layer.cut * layers, whole=layer.whole * layers)
        if layers:
            total += counts.every_stage[stack]
    for stack in contents.ends:
        total += counts.final_norm[stack]
    if contents.embeds:
        total += counts.embedding
    if contents.has_head:
        total += counts.head
        if not contents.embeds:
            total += counts.tied_table
    return total.on_a_rank(model.vocab_size, tp)


def parameters_by_stage(
    model: ModelConfig, layout: Layout, split_rank: int | None = None
) -> tuple[int, ...]:
    """Parameters of one rank of each pipeline stage, all of its chunks together.

    Equal to what the modules hold. split_rank: the first stage of T5's decoder, if given. Layers of
    a stack are taken to be alike; adapters and other parts that `config.prepare_model` adds are not
    counted.

    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> parameters_by_stage(model, Layout(pp=2, tp=2))
    (35424, 33504)
    """
    return _by_stage(
        model,
        layout.pp,
        layout.tp,
        layout.num_layers_in_first_pipeline_stage,
        layout.num_layers_in_last_pipeline_stage,
        split_rank,
    )


@lru_cache(maxsize=4096)
def _by_stage(
    model: ModelConfig, pp: int, tp: int, first: int | None, last: int | None, split: int | None
) -> tuple[int, ...]:
    layout = Layout(
        pp=pp, num_layers_in_first_pipeline_stage=first, num_layers_in_last_pipeline_stage=last
    )
    stages = contents_of_stages(model, layout, split)
    return tuple(_on_a_rank(model, contents, tp) for contents in stages)

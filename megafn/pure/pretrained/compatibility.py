"""May the weights of one model start another?"""

from __future__ import annotations

import re
from typing import Any

from megafn.pure.config.family_record import FamilyRecord
from megafn.pure.config.problems import Problem
from megafn.pure.config.records import ModelConfig
from megafn.pure.pretrained.architecture import canonical, different_fields

# What a run may choose anew: lengths, the reach of rotary positions and of attention, and the head.
# Sizes of tables are compared as shapes, a tied table by whether another is stored.
FREE_FIELDS = (
    "seq_length",
    "decoder_seq_length",
    "max_position_embeddings",
    "vocab_size",
    "num_tokentypes",
    "tie_word_embeddings",
    "rotary_base",
    "rope_scaling",
    "sliding_window",
    "bert_binary_head",
    "num_labels",
    "decoder_start_token_id",
    "output_layer_bias",
)

_HEAD = re.compile(r"(output_layer|lm_head|pooler|binary_head|classification_head)\.")

_VOCABULARY = ("word_embeddings.weight", "output_layer.weight", "output_layer.bias")


def model_problems(stored: ModelConfig, model: ModelConfig, path: str) -> tuple[Problem, ...]:
    """Why weights of `stored`, at a path, would not mean the same in `model`; () if they do.

    >>> import attrs
    >>> stored = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> model_problems(stored, attrs.evolve(stored, seq_length=8, ffn_hidden_size=256), "base")
    ()
    >>> print(*model_problems(stored, attrs.evolve(stored, activation="relu"), "base"))
    model.activation = 'relu': the weights at base are of a model with 'gelu'; set that, or start
    from others
    """
    problems = []
    for name in different_fields(stored, model):
        if name not in FREE_FIELDS and _value(stored, name) != _value(model, name):
            remedy = (
                f"the weights at {path} are of a model with {_value(stored, name)!r}; set that, or "
                "start from others"
            )
            problems.append(Problem(f"model.{name}", _value(model, name), remedy))
    return tuple(problems)


def changed_reach(stored: ModelConfig | None, model: ModelConfig) -> tuple[str, ...]:
    """What a run chose anew of the reach of rotary positions and of attention, a sentence each.

    >>> import attrs
    >>> stored = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> changed_reach(stored, attrs.evolve(stored, rotary_base=500_000.0))
    ()
    >>> rotary = attrs.evolve(stored, position_embedding="rope")
    >>> changed_reach(rotary, attrs.evolve(rotary, rotary_base=500_000.0))
    ('model.rotary_base = 500000.0, where the weights were trained with 10000.0',)
    """
    if stored is None:
        return ()
    return tuple(
        f"model.{name} = {_value(model, name)!r}, where the weights were trained with "
        f"{_value(stored, name)!r}"
        for name in different_fields(stored, model)
        if name in ("rotary_base", "rope_scaling", "sliding_window")
    )


def _value(model: ModelConfig, name: str) -> Any:
    value = getattr(canonical(model), name)
    return value.name if isinstance(value, FamilyRecord) else value


def has_another_head(stored: ModelConfig | None, model: ModelConfig) -> bool:
    """Whether a config replaces the head of stored weights, or leaves it out.

    >>> import attrs
    >>> bert = ModelConfig(
    ...     family="bert", num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32
    ... )
    >>> has_another_head(bert, attrs.evolve(bert, num_labels=3))
    True
    """
    if stored is None:
        return True
    return _head(stored) != _head(model)


def _head(model: ModelConfig) -> tuple[Any, ...]:
    return _value(model, "family"), model.num_labels, model.bert_binary_head


def is_head(name: str) -> bool:
    """Whether a parameter of the whole model belongs to its head.

    >>> is_head("classification_head.weight"), is_head("encoder.final_layernorm.weight")
    (True, False)
    """
    return _HEAD.match(name) is not None


def shape_problem(name: str, shape: tuple[int, ...], stored: tuple[int, ...], path: str) -> str:
    """The sentence for a parameter whose stored shape is another.

    >>> shape_problem("embedding.word_embeddings.weight", (97, 32), (99, 32), "base")
    'model.vocab_size = 97: the weights at base are of 99 token ids; set that, or start from others'
    """
    has_rows = len(stored) == len(shape) and shape[1:] == stored[1:]
    if name.endswith(_VOCABULARY) and has_rows:
        return (
            f"model.vocab_size = {shape[0]}: the weights at {path} are of {stored[0]} token ids; "
            "set that, or start from others"
        )
    return (
        f"{name}: the model has it in shape {list(shape)}, {path} in shape {list(stored)}; "
        "set the sizes of the config to those of the weights"
    )

"""Sizes of architectures whose config.json names them alike, and without groups of queries."""

from __future__ import annotations

from typing import Any

from megafn.pure.config.records import ModelConfig
from megafn.pure.pretrained.config_reader import ConfigReader


def read_sizes(reader: ConfigReader) -> dict[str, Any]:
    """The fields of `ModelConfig` that are sizes."""
    heads = reader.integer("num_attention_heads")
    positions = reader.integer("max_position_embeddings")
    return {
        "num_layers": reader.layers("num_hidden_layers"),
        "hidden_size": reader.integer("hidden_size"),
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": reader.head_size("hidden_size", "num_attention_heads"),
        "ffn_hidden_size": reader.integer("intermediate_size"),
        "vocab_size": reader.integer("vocab_size"),
        "seq_length": positions,
        "max_position_embeddings": positions,
    }


def sizes_config(model: ModelConfig) -> dict[str, Any]:
    """The inverse: what config.json says of them."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.position_rows,
    }

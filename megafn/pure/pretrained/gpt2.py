"""GPT-2: learned positions, LayerNorm, biases, matrices stored as [in, out]."""

from __future__ import annotations

from typing import Any

from megafn.pure.config.records import ModelConfig
from megafn.pure.pretrained.activations import PLAIN, name_in_transformers
from megafn.pure.pretrained.architecture import Architecture, tied_to
from megafn.pure.pretrained.config_reader import ConfigReader
from megafn.pure.pretrained.stored_slice import fused_query_key_value, renamed, slices_by_name


def _fields(reader: ConfigReader) -> dict[str, Any]:
    reader.require(
        "scale_attn_by_inverse_layer_idx",
        False,
        "attention scores scaled by the layer's number are not built; choose a model without them",
    )
    reader.require(
        "add_cross_attention",
        False,
        "a decoder beside an encoder is built for T5 only; choose a model without cross-attention",
    )
    dropout = reader.number("resid_pdrop", 0.1)
    reader.require_equal("embd_pdrop", 0.1, "resid_pdrop", dropout)
    heads = reader.integer("n_head")
    positions = reader.integer("n_positions")
    return {
        "family": "gpt",
        "num_layers": reader.layers("n_layer"),
        "hidden_size": reader.integer("n_embd"),
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": reader.head_size("n_embd", "n_head"),
        "ffn_hidden_size": reader.integer("n_inner", 4 * reader.integer("n_embd")),
        "vocab_size": reader.integer("vocab_size"),
        "seq_length": positions,
        "max_position_embeddings": positions,
        "softmax_scale": None if reader.boolean("scale_attn_weights", True) else 1.0,
        "activation": reader.translated("activation_function", PLAIN, "gelu_new"),
        "norm_epsilon": reader.number("layer_norm_epsilon", 1e-5),
        "hidden_dropout": dropout,
        "attention_dropout": reader.number("attn_pdrop", 0.1),
        "init_method_std": reader.number("initializer_range", 0.02),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", True),
    }


def _config(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_size,
        "vocab_size": model.vocab_size,
        "n_positions": model.position_rows,
        "scale_attn_weights": model.softmax_scale != 1.0,
        "activation_function": name_in_transformers(model.activation, PLAIN),
        "layer_norm_epsilon": model.norm_epsilon,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.tie_word_embeddings,
    }


_LAYER = "transformer.h.{layer}."
_IN_OUR_LAYER = "decoder.layers.*."

GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    base_model="GPT2Model",
    base_prefix="transformer.",
    fields=_fields,
    config=_config,
    slice_function=slices_by_name(
        {
            "embedding.word_embeddings": renamed("transformer.wte"),
            "embedding.position_embeddings": renamed("transformer.wpe"),
            f"{_IN_OUR_LAYER}input_layernorm": renamed(f"{_LAYER}ln_1"),
            f"{_IN_OUR_LAYER}self_attention.linear_qkv": fused_query_key_value(
                f"{_LAYER}attn.c_attn", transposed=True
            ),
            f"{_IN_OUR_LAYER}self_attention.linear_proj": renamed(
                f"{_LAYER}attn.c_proj", transposed=True
            ),
            f"{_IN_OUR_LAYER}pre_mlp_layernorm": renamed(f"{_LAYER}ln_2"),
            f"{_IN_OUR_LAYER}mlp.linear_fc1": renamed(f"{_LAYER}mlp.c_fc", transposed=True),
            f"{_IN_OUR_LAYER}mlp.linear_fc2": renamed(f"{_LAYER}mlp.c_proj", transposed=True),
            "decoder.final_layernorm": renamed("transformer.ln_f"),
            "output_layer": renamed("lm_head"),
        }
    ),
    # causal masks that transformers once saved
    buffers=(r"\bh\.\d+\.attn\.(masked_)?bias$",),
    copies=tied_to("transformer.wte.weight", "lm_head.weight"),
)

"""T5 1.0 and 1.1 (and Flan): relative positions, RMSNorm, no biases, unscaled attention scores.

T5 1.0 has a tied output layer and multiplies the decoder's output by hidden_size ** -0.5; T5 1.1
has a layer of its own and does not. transformers 4 says which in `tie_word_embeddings`;
transformers 5 writes that as true for both and keeps the fact in `scale_decoder_outputs`.
"""

from __future__ import annotations

from typing import Any

from megafn.pure.config.records import ModelConfig
from megafn.pure.pretrained.activations import OF_T5, name_in_transformers
from megafn.pure.pretrained.architecture import Architecture
from megafn.pure.pretrained.config_reader import ConfigReader
from megafn.pure.pretrained.stored_slice import (
    NamedParameter,
    SliceRule,
    Slices,
    key_value,
    query_key_value,
    renamed,
    slices_by_name,
    stacked,
)

# For a T5 that names no number of positions, of which it could have any.
_DEFAULT_POSITIONS = 512


def _fields(reader: ConfigReader) -> dict[str, Any]:
    reader.require(
        "is_encoder_decoder",
        True,
        "half a T5 is not built; choose a model with encoder and decoder",
    )
    layers = reader.layers("num_layers")
    heads = reader.integer("num_heads")
    positions = reader.integer("n_positions", _DEFAULT_POSITIONS)
    dropout = reader.number("dropout_rate", 0.1)
    padding = reader.integer("pad_token_id", 0, at_least=0)
    tied = _is_tied(reader)
    return {
        "family": "t5",
        "num_layers": layers,
        "num_decoder_layers": reader.layers("num_decoder_layers", layers),
        "hidden_size": reader.integer("d_model"),
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": reader.integer("d_kv"),
        "ffn_hidden_size": reader.integer("d_ff"),
        "vocab_size": reader.integer("vocab_size"),
        "seq_length": positions,
        "max_position_embeddings": positions,
        "position_embedding": "relative",
        "relative_attention_num_buckets": reader.integer("relative_attention_num_buckets", 32),
        "relative_attention_max_distance": reader.integer("relative_attention_max_distance", 128),
        "softmax_scale": 1.0,
        "activation": reader.translated("feed_forward_proj", OF_T5, "relu"),
        "normalization": "RMSNorm",
        "norm_epsilon": reader.number("layer_norm_epsilon", 1e-6),
        "add_bias_linear": False,
        "hidden_dropout": dropout,
        "attention_dropout": dropout,
        "tie_word_embeddings": tied,
        "scale_decoder_outputs": tied,
        "output_layer_bias": False,
        "decoder_start_token_id": reader.integer("decoder_start_token_id", padding, at_least=0),
    }


def _is_tied(reader: ConfigReader) -> bool:
    """Whether it is tied, and its decoder's output scaled: both are true of T5 1.0 alone."""
    tied = reader.boolean("tie_word_embeddings", True)
    scaled = reader.boolean("scale_decoder_outputs", tied)
    if scaled and not tied:
        reader.refuse(
            "scale_decoder_outputs",
            scaled,
            "only a tied output layer has a scaled input; set tie_word_embeddings to true, "
            "or this to false",
        )
    return scaled


def _config(model: ModelConfig) -> dict[str, Any]:
    return {
        "is_encoder_decoder": True,
        "num_layers": model.num_layers,
        "num_decoder_layers": model.decoder_layers,
        "d_model": model.hidden_size,
        "num_heads": model.num_attention_heads,
        "d_kv": model.head_size,
        "d_ff": model.ffn_size,
        "vocab_size": model.vocab_size,
        "n_positions": model.position_rows,
        "relative_attention_num_buckets": model.relative_attention_num_buckets,
        "relative_attention_max_distance": model.relative_attention_max_distance,
        "feed_forward_proj": name_in_transformers(model.activation, OF_T5),
        "layer_norm_epsilon": model.norm_epsilon,
        "dropout_rate": model.hidden_dropout,
        "tie_word_embeddings": model.tie_word_embeddings,
        "scale_decoder_outputs": model.tie_word_embeddings,
        "decoder_start_token_id": model.decoder_start_token_id,
        # transformers' T5 shifts labels with it
        "pad_token_id": 0,
    }


# ------------------------------------------------------------------------ where parameters lie


def _mlp_input(template: str) -> SliceRule:
    """One matrix, or two that are multiplied: gate and up."""

    def rule(parameter: NamedParameter) -> Slices:
        if parameter.model.gated:
            return stacked(f"{template}_0", f"{template}_1")(parameter)
        return renamed(template)(parameter)

    return rule


def _half(half: str, mlp: int) -> dict[str, SliceRule]:
    """The rules of one half, in whose layers the MLP is sublayer number `mlp`."""
    layer = f"{half}.block.{{layer}}.layer."
    attention = f"{layer}0.SelfAttention."
    in_our_layer = f"{half}.layers.*."
    return {
        f"{half}_relative_pos_emb.relative_attention_bias": renamed(
            f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias"
        ),
        f"{in_our_layer}input_layernorm": renamed(f"{layer}0.layer_norm"),
        f"{in_our_layer}self_attention.linear_qkv": query_key_value(
            f"{attention}q", f"{attention}k", f"{attention}v"
        ),
        f"{in_our_layer}self_attention.linear_proj": renamed(f"{attention}o"),
        f"{in_our_layer}pre_mlp_layernorm": renamed(f"{layer}{mlp}.layer_norm"),
        f"{in_our_layer}mlp.linear_fc1": _mlp_input(f"{layer}{mlp}.DenseReluDense.wi"),
        f"{in_our_layer}mlp.linear_fc2": renamed(f"{layer}{mlp}.DenseReluDense.wo"),
        f"{half}.final_layernorm": renamed(f"{half}.final_layer_norm"),
    }


_CROSS = "decoder.block.{layer}.layer.1."
_CROSS_ATTENTION = f"{_CROSS}EncDecAttention."
_IN_OUR_DECODER = "decoder.layers.*."


def _copies(model: ModelConfig) -> dict[str, str]:
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    if model.tie_word_embeddings:
        names.append("lm_head.weight")
    return dict.fromkeys(names, "shared.weight")


T5 = Architecture(
    name="T5ForConditionalGeneration",
    model_type="t5",
    family="t5",
    base_model="T5Model",
    base_prefix="",
    fields=_fields,
    config=_config,
    slice_function=slices_by_name(
        {
            "embedding.word_embeddings": renamed("shared"),
            **_half("encoder", mlp=1),
            **_half("decoder", mlp=2),
            f"{_IN_OUR_DECODER}pre_cross_attn_layernorm": renamed(f"{_CROSS}layer_norm"),
            f"{_IN_OUR_DECODER}cross_attention.linear_q": renamed(f"{_CROSS_ATTENTION}q"),
            f"{_IN_OUR_DECODER}cross_attention.linear_kv": key_value(
                f"{_CROSS_ATTENTION}k", f"{_CROSS_ATTENTION}v"
            ),
            f"{_IN_OUR_DECODER}cross_attention.linear_proj": renamed(f"{_CROSS_ATTENTION}o"),
            "output_layer": renamed("lm_head"),
        }
    ),
    # in the files of the first T5s, and read by nothing
    buffers=(r"EncDecAttention\.relative_attention_bias\.weight$",),
    copies=_copies,
    # a T5 1.1 that transformers 5 made has a tied layer, though its config.json reads as untied
    stand_ins={"lm_head.weight": "shared.weight"},
)

"""GPT-NeoX and Pythia: rotary positions on a part of each head, biases, parallel residuals."""

from __future__ import annotations

from typing import Any

from megafn.pure.config.records import ModelConfig
from megafn.pure.pretrained.activations import PLAIN, name_in_transformers
from megafn.pure.pretrained.architecture import Architecture, tied_to
from megafn.pure.pretrained.config_reader import ConfigReader
from megafn.pure.pretrained.rotary import read_rotary, rotary_config
from megafn.pure.pretrained.sizes import read_sizes, sizes_config
from megafn.pure.pretrained.stored_slice import renamed, slices_by_name


def _fields(reader: ConfigReader) -> dict[str, Any]:
    reader.require(
        "attention_bias",
        True,
        "must be true, for megafn's linear layers all have a bias or none has; choose such a model",
    )
    return {
        "family": "gpt",
        **read_sizes(reader),
        "activation": reader.translated("hidden_act", PLAIN, "gelu"),
        "norm_epsilon": reader.number("layer_norm_eps", 1e-5),
        "parallel_residual": reader.boolean("use_parallel_residual", True),
        "hidden_dropout": reader.number("hidden_dropout", 0.0),
        "attention_dropout": reader.number("attention_dropout", 0.0),
        "init_method_std": reader.number("initializer_range", 0.02),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        **read_rotary(
            reader, base_key="rotary_emb_base", percent_key="rotary_pct", default_percent=0.25
        ),
    }


def _config(model: ModelConfig) -> dict[str, Any]:
    return {
        **sizes_config(model),
        "hidden_act": name_in_transformers(model.activation, PLAIN),
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": model.add_bias_linear,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.tie_word_embeddings,
        **rotary_config(model, base_key="rotary_emb_base", percent_key="rotary_pct"),
    }


_LAYER = "gpt_neox.layers.{layer}."
_IN_OUR_LAYER = "decoder.layers.*."

GPT_NEOX = Architecture(
    name="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    base_model="GPTNeoXModel",
    base_prefix="gpt_neox.",
    fields=_fields,
    config=_config,
    slice_function=slices_by_name(
        {
            "embedding.word_embeddings": renamed("gpt_neox.embed_in"),
            f"{_IN_OUR_LAYER}input_layernorm": renamed(f"{_LAYER}input_layernorm"),
            # [head, (query, key, value), head size] on both sides
            f"{_IN_OUR_LAYER}self_attention.linear_qkv": renamed(
                f"{_LAYER}attention.query_key_value"
            ),
            f"{_IN_OUR_LAYER}self_attention.linear_proj": renamed(f"{_LAYER}attention.dense"),
            f"{_IN_OUR_LAYER}pre_mlp_layernorm": renamed(f"{_LAYER}post_attention_layernorm"),
            f"{_IN_OUR_LAYER}mlp.linear_fc1": renamed(f"{_LAYER}mlp.dense_h_to_4h"),
            f"{_IN_OUR_LAYER}mlp.linear_fc2": renamed(f"{_LAYER}mlp.dense_4h_to_h"),
            "decoder.final_layernorm": renamed("gpt_neox.final_layer_norm"),
            "output_layer": renamed("embed_out"),
        }
    ),
    heads=("embed_out.", "lm_head."),
    buffers=(r"\.attention\.(masked_)?bias$", r"\.rotary_emb\.inv_freq$"),
    copies=tied_to("gpt_neox.embed_in.weight", "embed_out.weight"),
    # transformers 5 calls it so in memory, and embed_out in files
    spellings={"lm_head.weight": "embed_out.weight"},
)

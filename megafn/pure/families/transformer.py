"""What transformers have in common: operations of a layer, and initial values."""

from __future__ import annotations

import math
import re

from megafn.pure.config.records import ModelConfig
from megafn.pure.families.family_spec import Constant, Normal


def layer_flops(model: ModelConfig, length: int) -> float:
    """Forward operations for one token in one layer that attends to `length` tokens.

    Those of matrix products, two for each multiply and add; attention is counted in full, causal
    or not, as in arXiv 2104.04473 (appendix), and with a sliding window to `sliding_window` tokens,
    also at the start of a sequence.
    """
    if model.sliding_window is not None:
        length = min(length, model.sliding_window)
    hidden = model.hidden_size
    inner = model.num_attention_heads * model.head_size
    keys_and_values = 2 * model.query_groups * model.head_size
    projections = 2 * hidden * (2 * inner + keys_and_values)
    attention = 4 * length * inner
    matrices = 3 if model.gated else 2
    mlp = 2 * hidden * model.ffn_size * matrices
    return projections + attention + mlp


def one_stack_flops(model: ModelConfig, sequences: int, head: float) -> float:
    """Forward and backward operations of one stack of layers and a head; `head`: a token's there.

    A backward pass costs twice a forward one; recomputation is not counted.
    """
    tokens = sequences * model.seq_length
    return 3.0 * tokens * (model.num_layers * layer_flops(model, model.seq_length) + head)


# Names of the built-in families' parameters: within a layer, and outside of layers.
_NAMES_IN_A_LAYER = (
    r"(input|pre_mlp|pre_cross_attn)_layernorm"
    r"|self_attention\.(linear_qkv|linear_proj|q_layernorm|k_layernorm)"
    r"|cross_attention\.(linear_q|linear_kv|linear_proj|q_layernorm|k_layernorm)"
    r"|mlp\.linear_fc[12]"
)
_NAMES_OUTSIDE = (
    r"embedding\.(word|position|tokentype)_embeddings"
    r"|output_layer|classification_head|pooler\.dense|lm_head\.(dense|layer_norm)"
    r"|(encoder|decoder)_relative_pos_emb\.relative_attention_bias"
)
_KNOWN = re.compile(
    rf"((encoder|decoder)\.(final_layernorm|layers\.\d+\.({_NAMES_IN_A_LAYER}))|{_NAMES_OUTSIDE})"
    r"\.(weight|bias)"
)


def initial_distribution(
    name: str, shape: tuple[int, ...], model: ModelConfig
) -> Constant | Normal | None:
    """That of `distribution_by_name` for the built-in families' parameters; None for others."""
    return distribution_by_name(name, shape, model) if _KNOWN.fullmatch(name) else None


def distribution_by_name(
    name: str, shape: tuple[int, ...], model: ModelConfig
) -> Constant | Normal:
    """GPT-2's: matrices normal with `init_method_std`, norms one, biases zero.

    Matrices that write to the residual stream have that std over sqrt(2 * layers of their stack).
    Of an adapter (arXiv 2106.09685), A has the variance 1 / (3 * its inputs), and B is zero.
    """
    if name.endswith(".lora_a.weight"):
        return Normal(1 / math.sqrt(3 * shape[1]))
    if name.endswith(".lora_b.weight"):
        return Constant(0.0)
    if len(shape) == 1:
        return Constant(1.0 if name.endswith("norm.weight") else 0.0)
    if not name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return Normal(model.init_method_std)
    layers = model.decoder_layers if name.startswith("decoder.") else model.num_layers
    return Normal(model.init_method_std / math.sqrt(2 * layers))


def one_sequence_tokens(model: ModelConfig) -> int:
    """Tokens of a sample that is one sequence."""
    return model.seq_length

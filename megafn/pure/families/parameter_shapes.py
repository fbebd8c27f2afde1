"""Names and shapes of the parameters of the whole model, for each built-in family."""

from __future__ import annotations

from megafn.pure.config.records import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def gpt_parameter_shapes(model: ModelConfig) -> Shapes:
    """Embedding, decoder layers and output layer."""
    shapes = embedding_shapes(model)
    for layer in range(model.num_layers):
        shapes |= layer_shapes(model, f"decoder.layers.{layer}")
    shapes |= norm_shapes(model, "decoder.final_layernorm", model.hidden_size)
    shapes |= output_layer_shapes(model, bias=False)
    return shapes


def bert_parameter_shapes(model: ModelConfig) -> Shapes:
    """Embedding, encoder layers and the heads that the config asks for."""
    hidden = model.hidden_size
    shapes = embedding_shapes(model)
    for layer in range(model.num_layers):
        shapes |= layer_shapes(model, f"encoder.layers.{layer}")
    shapes |= norm_shapes(model, "encoder.final_layernorm", hidden)
    if model.bert_binary_head or model.num_labels is not None:
        shapes |= linear_shapes("pooler.dense", hidden, hidden, bias=True)
    if model.num_labels is not None:
        return shapes | linear_shapes("classification_head", model.num_labels, hidden, bias=True)
    shapes |= linear_shapes("lm_head.dense", hidden, hidden, bias=True)
    shapes |= norm_shapes(model, "lm_head.layer_norm", hidden)
    shapes |= output_layer_shapes(model, bias=True)
    if model.bert_binary_head:
        shapes |= linear_shapes("binary_head", 2, hidden, bias=True)
    return shapes


def t5_parameter_shapes(model: ModelConfig) -> Shapes:
    """Embedding, both halves with their tables of relative positions, and the output layer."""
    shapes = embedding_shapes(model)
    for half, layers in (("encoder", model.num_layers), ("decoder", model.decoder_layers)):
        if model.position_embedding == "relative":
            table = f"{half}_relative_pos_emb.relative_attention_bias.weight"
            shapes[table] = (model.relative_attention_num_buckets, model.num_attention_heads)
        for layer in range(layers):
            name = f"{half}.layers.{layer}"
            shapes |= layer_shapes(model, name)
            if half == "decoder":
                shapes |= cross_attention_shapes(model, name)
        shapes |= norm_shapes(model, f"{half}.final_layernorm", model.hidden_size)
    tied_bias = model.tie_word_embeddings and model.output_layer_bias
    return shapes | output_layer_shapes(model, bias=tied_bias)


# ------------------------------------------------------------------------------------- the parts


def embedding_shapes(model: ModelConfig) -> Shapes:
    """Tables of words, learned positions and token types, as far as the config has them."""
    tables = {"word": model.vocab_size}
    if model.position_embedding == "learned_absolute":
        tables["position"] = model.position_rows
    if model.num_tokentypes:
        tables["tokentype"] = model.num_tokentypes
    return {
        f"embedding.{kind}_embeddings.weight": (rows, model.hidden_size)
        for kind, rows in tables.items()
    }


def output_layer_shapes(model: ModelConfig, *, bias: bool) -> Shapes:
    """A tied output layer's weight is the word table."""
    shapes = linear_shapes("output_layer", model.vocab_size, model.hidden_size, bias=bias)
    if model.tie_word_embeddings:
        del shapes["output_layer.weight"]
    return shapes


def layer_shapes(model: ModelConfig, name: str) -> Shapes:
    """Self-attention and MLP of one layer."""
    hidden = model.hidden_size
    size = model.head_size
    queries = model.num_attention_heads * size
    keys_and_values = 2 * model.query_groups * size
    attention = f"{name}.self_attention"
    bias = model.add_bias_linear
    shapes = norm_shapes(model, f"{name}.input_layernorm", hidden)
    shapes |= linear_shapes(
        f"{attention}.linear_qkv",
        queries + keys_and_values,
        hidden,
        bias=bias or model.add_qkv_bias,
    )
    if model.qk_layernorm:
        shapes |= norm_shapes(model, f"{attention}.q_layernorm", size)
        shapes |= norm_shapes(model, f"{attention}.k_layernorm", size)
    shapes |= linear_shapes(f"{attention}.linear_proj", hidden, queries, bias=bias)
    shapes |= norm_shapes(model, f"{name}.pre_mlp_layernorm", hidden)
    inner = model.ffn_size
    rows = 2 * inner if model.gated else inner
    shapes |= linear_shapes(f"{name}.mlp.linear_fc1", rows, hidden, bias=bias)
    shapes |= linear_shapes(f"{name}.mlp.linear_fc2", hidden, inner, bias=bias)
    return shapes


def cross_attention_shapes(model: ModelConfig, name: str) -> Shapes:
    """What a layer of T5's decoder has beside self-attention and MLP."""
    hidden = model.hidden_size
    inner = model.num_attention_heads * model.head_size
    attention = f"{name}.cross_attention"
    bias = model.add_bias_linear
    shapes = norm_shapes(model, f"{name}.pre_cross_attn_layernorm", hidden)
    shapes |= linear_shapes(f"{attention}.linear_q", inner, hidden, bias=bias)
    shapes |= linear_shapes(f"{attention}.linear_kv", 2 * inner, hidden, bias=bias)
    shapes |= linear_shapes(f"{attention}.linear_proj", hidden, inner, bias=bias)
    return shapes


def linear_shapes(name: str, rows: int, columns: int, *, bias: bool) -> Shapes:
    """[out, in], and the bias [out]."""
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    if bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def norm_shapes(model: ModelConfig, name: str, size: int) -> Shapes:
    """A norm's weight, and LayerNorm's bias."""
    shapes: Shapes = {f"{name}.weight": (size,)}
    if model.normalization == "LayerNorm":
        shapes[f"{name}.bias"] = (size,)
    return shapes

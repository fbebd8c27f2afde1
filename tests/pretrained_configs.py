"""config.json of tiny models of each architecture, and of well-known ones."""

from hypothesis import strategies as st

# What each model type needs, tiny. Special ids are left out: their defaults are outside of 97.
NO_IDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
_DECODER = NO_IDS | dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
)
TINY = {
    "gpt2": NO_IDS | dict(vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=64),
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER | dict(head_dim=12),
    "phi3": _DECODER,
    "starcoder2": _DECODER,
    "smollm3": _DECODER,
    "gpt_neox": {key: value for key, value in _DECODER.items() if "value" not in key},
    "megatron-bert": {key: value for key, value in _DECODER.items() if "value" not in key},
    "t5": dict(
        vocab_size=97,
        d_model=32,
        d_kv=12,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=None,
    ),
}

_LLAMA_31 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
_TIED = dict(tie_word_embeddings=True)
_UNTIED = dict(tie_word_embeddings=False)

# (model type, head or None for the first, changes): every feature that an architecture has.
VARIANTS = [
    ("gpt2", None, {}),
    ("gpt2", None, _UNTIED | dict(n_inner=40, activation_function="relu")),
    ("gpt2", None, dict(scale_attn_weights=False)),
    ("llama", None, {}),
    ("llama", None, _TIED | dict(head_dim=12, attention_bias=True, mlp_bias=True)),
    ("llama", None, dict(rope_theta=5e5, rope_scaling=_LLAMA_31)),
    ("llama", None, dict(rope_parameters=_LLAMA_31 | dict(rope_theta=5e5))),
    ("mistral", None, dict(sliding_window=8)),
    ("mistral", None, dict(sliding_window=None, hidden_act="gelu_pytorch_tanh")),
    ("qwen2", None, _TIED),
    ("qwen2", None, dict(use_sliding_window=True, sliding_window=8, max_window_layers=0)),
    ("qwen3", None, {}),
    ("phi3", None, dict(sliding_window=9, partial_rotary_factor=0.5)),
    ("starcoder2", None, {}),
    ("starcoder2", None, _UNTIED | dict(sliding_window=8, use_bias=False)),
    ("smollm3", None, {}),
    ("smollm3", None, _UNTIED | dict(no_rope_layers=[1, 0, 0, 1])),
    ("gpt_neox", None, {}),
    ("gpt_neox", None, _TIED | dict(use_parallel_residual=False, rotary_pct=1.0)),
    ("megatron-bert", "MegatronBertForMaskedLM", {}),
    ("megatron-bert", "MegatronBertForMaskedLM", _UNTIED | dict(type_vocab_size=3)),
    ("megatron-bert", "MegatronBertForPreTraining", {}),
    ("megatron-bert", "MegatronBertForSequenceClassification", dict(num_labels=3)),
    ("t5", None, {}),
    ("t5", None, _UNTIED | dict(feed_forward_proj="gated-gelu", decoder_start_token_id=3)),
]

# What the files of well-known models say, as transformers 4 wrote them: the keys that matter.
WELL_KNOWN = {
    "gpt2": dict(
        architectures=["GPT2LMHeadModel"],
        model_type="gpt2",
        activation_function="gelu_new",
        attn_pdrop=0.1,
        bos_token_id=50256,
        embd_pdrop=0.1,
        eos_token_id=50256,
        initializer_range=0.02,
        layer_norm_epsilon=1e-05,
        n_ctx=1024,
        n_embd=768,
        n_head=12,
        n_layer=12,
        n_positions=1024,
        resid_pdrop=0.1,
        vocab_size=50257,
    ),
    "Llama-2-7b": dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=11008,
        max_position_embeddings=4096,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        tie_word_embeddings=False,
        torch_dtype="float16",
        vocab_size=32000,
    ),
    "Llama-3.1-8B": dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        attention_bias=False,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=14336,
        max_position_embeddings=131072,
        mlp_bias=False,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_scaling=dict(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
            rope_type="llama3",
        ),
        rope_theta=500000.0,
        tie_word_embeddings=False,
        vocab_size=128256,
    ),
    "Mistral-7B-v0.1": dict(
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=14336,
        max_position_embeddings=32768,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_theta=10000.0,
        sliding_window=4096,
        tie_word_embeddings=False,
        vocab_size=32000,
    ),
    "Qwen2-0.5B": dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        hidden_act="silu",
        hidden_size=896,
        intermediate_size=4864,
        max_position_embeddings=131072,
        max_window_layers=24,
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=131072,
        tie_word_embeddings=True,
        use_sliding_window=False,
        vocab_size=151936,
    ),
    "Phi-3-mini-4k": dict(
        architectures=["Phi3ForCausalLM"],
        model_type="phi3",
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        embd_pdrop=0.0,
        hidden_act="silu",
        hidden_size=3072,
        intermediate_size=8192,
        max_position_embeddings=4096,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        original_max_position_embeddings=4096,
        resid_pdrop=0.0,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=10000.0,
        sliding_window=2047,
        tie_word_embeddings=False,
        vocab_size=32064,
    ),
    "SmolLM3-3B": dict(
        architectures=["SmolLM3ForCausalLM"],
        model_type="smollm3",
        attention_bias=False,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=11008,
        max_position_embeddings=65536,
        mlp_bias=False,
        no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0] * 9,
        num_attention_heads=16,
        num_hidden_layers=36,
        num_key_value_heads=4,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=5000000.0,
        sliding_window=None,
        use_sliding_window=False,
        vocab_size=128256,
    ),
    "pythia-70m": dict(
        architectures=["GPTNeoXForCausalLM"],
        model_type="gpt_neox",
        hidden_act="gelu",
        hidden_size=512,
        intermediate_size=2048,
        layer_norm_eps=1e-05,
        max_position_embeddings=2048,
        num_attention_heads=8,
        num_hidden_layers=6,
        rotary_emb_base=10000,
        rotary_pct=0.25,
        tie_word_embeddings=False,
        use_parallel_residual=True,
        vocab_size=50304,
    ),
    "t5-small": dict(
        architectures=["T5ForConditionalGeneration"],
        model_type="t5",
        d_ff=2048,
        d_kv=64,
        d_model=512,
        decoder_start_token_id=0,
        dropout_rate=0.1,
        eos_token_id=1,
        is_encoder_decoder=True,
        layer_norm_epsilon=1e-06,
        n_positions=512,
        num_heads=8,
        num_layers=6,
        pad_token_id=0,
        relative_attention_num_buckets=32,
        vocab_size=32128,
    ),
    "flan-t5-small": dict(
        architectures=["T5ForConditionalGeneration"],
        model_type="t5",
        d_ff=1024,
        d_kv=64,
        d_model=512,
        decoder_start_token_id=0,
        dropout_rate=0.1,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-06,
        num_decoder_layers=8,
        num_heads=6,
        num_layers=8,
        relative_attention_max_distance=128,
        relative_attention_num_buckets=32,
        tie_word_embeddings=False,
        vocab_size=32128,
    ),
}


@st.composite
def random_configs(draw):
    """(architecture's name or None, config.json) of a random tiny model of any architecture."""
    kind, head, changes = draw(st.sampled_from(VARIANTS))
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    width = 2 * draw(st.integers(1, 4))
    inner = draw(st.integers(1, 9))
    layers = draw(st.integers(1, 3))
    vocabulary = draw(st.integers(5, 40))
    config = TINY[kind] | changes | dict(model_type=kind, vocab_size=vocabulary)
    if head is not None:
        config["architectures"] = [head]
    if kind == "gpt2":
        return config | dict(n_embd=heads * width, n_head=heads, n_layer=layers, n_inner=inner)
    if kind == "t5":
        sizes = dict(d_model=inner + 1, num_heads=heads, d_kv=width, d_ff=inner)
        return config | sizes | dict(num_layers=layers, num_decoder_layers=4 - layers)
    config |= dict(num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner)
    config |= dict(hidden_size=heads * width)
    if "num_key_value_heads" in config:
        config |= dict(num_key_value_heads=groups)
    return config

"""The law: every layout trains as the single process does.

And the single process computes what others say a GPT computes.
"""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F

import megafn as mf
from equivalence import (
    as_of_two,
    assert_equal,
    assert_obeys,
    recomputation,
    run_layout,
    short,
    tiny,
)
from megafn.runtime.model.weights import local_parameters
from megafn.runtime.parallel.megatron_context import megatron_context
from single_steps import TOLERANCE, assert_close, halves, noisy


@pytest.fixture(scope="session")
def single(pool):
    """The single process's run of a config, made once a session."""
    return cache(lambda config: pool(1, run_layout, config, as_of_two)[0])


def obeys(pool, single, processes, base, layout, *, make=tiny, **tolerances):
    assert_obeys(
        single,
        make(**base),
        pool(processes, run_layout, make(**base, **layout), as_of_two),
        **tolerances,
    )


# ---------------------------------------------------------------------------------------- layouts

SP, DIST, DEEP = (
    dict(sequence_parallel=True),
    dict(use_distributed_optimizer=True),
    dict(num_layers=8),
)
LAYOUTS = {  # name: (processes, layout, what it asks of the model)
    "tp2": (2, dict(tp=2)),
    "tp4": (4, dict(tp=4)),
    "tp2-sp": (2, dict(tp=2, **SP)),
    "tp4-sp": (4, dict(tp=4, **SP)),
    "pp2": (2, dict(pp=2)),
    "pp4": (4, dict(pp=4)),
    "pp2-vpp2": (2, dict(pp=2, vpp=2)),
    "pp4-vpp2": (4, dict(pp=4, vpp=2), DEEP),
    "pp2-vpp4": (2, dict(pp=2, vpp=4), DEEP),
    "cp2": (2, dict(cp=2)),
    "cp4": (4, dict(cp=4)),
    "dp2": (2, dict()),
    "dp8": (8, dict()),
    "dp2-dist": (2, DIST),
    "dp4-dist": (4, DIST),
    "tp2-pp2": (4, dict(tp=2, pp=2)),
    "tp2-pp2-sp": (4, dict(tp=2, pp=2, **SP)),
    "tp2-cp2-sp": (4, dict(tp=2, cp=2, **SP)),
    "pp2-dp2-dist": (4, dict(pp=2, **DIST)),  # the tied table lies in two stages and in shards
    "pp2-vpp2-dp2": (4, dict(pp=2, vpp=2)),
    "cp2-dp2-dist": (4, dict(cp=2, **DIST)),
    "cp2-pp2": (4, dict(cp=2, pp=2)),
    "tp2-dp4-dist": (8, dict(tp=2, **DIST)),
    "tp2-pp2-dp2-sp-dist": (8, dict(tp=2, pp=2, **SP, **DIST)),
    "tp2-cp2-pp2-sp": (8, dict(tp=2, cp=2, pp=2, **SP)),
    "tp2-cp2-dp2-sp-dist": (8, dict(tp=2, cp=2, **SP, **DIST)),
    "pp4-vpp2-dp2-dist": (8, dict(pp=4, vpp=2, **DIST), DEEP),
    # uneven stages
    "pp2-first3": (2, dict(pp=2, num_layers_in_first_pipeline_stage=3)),
    "pp2-last3": (2, dict(pp=2, num_layers_in_last_pipeline_stage=3)),
    "pp4-first1-last3": (
        4,
        dict(pp=4, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=3),
        DEEP,
    ),
    "pp2-vpp2-first6": (2, dict(pp=2, vpp=2, num_layers_in_first_pipeline_stage=6), DEEP),
    # other orders of the ranks: groups of neighbours and groups with strides change places
    "order-pp-dp-tp": (8, dict(tp=2, pp=2, order="pp-dp-cp-ep-tp", **SP, **DIST)),
    "order-dp-cp-tp": (8, dict(tp=2, cp=2, order="dp-cp-tp-pp-ep", **SP)),
    "order-pp-tp": (4, dict(tp=2, pp=2, order="pp-tp-cp-ep-dp")),
    "order-cp-pp": (4, dict(pp=2, cp=2, order="pp-cp-tp-dp-ep")),
    # recomputation
    "selective": (1, dict(granularity="selective")),
    "selective-tp2-cp2": (4, dict(tp=2, cp=2, granularity="selective")),
    "full-uniform": (1, dict(granularity="full")),
    "full-uniform2-tp2-sp": (2, dict(tp=2, granularity="full", num_layers=2, **SP)),
    "full-block1-pp2-cp2": (4, dict(pp=2, cp=2, granularity="full", method="block")),
    "full-uniform-pp2-vpp2": (2, dict(pp=2, vpp=2, granularity="full")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_the_single_process_does(name, pool, single):
    processes, layout, *base = LAYOUTS[name]
    layout = dict(layout)
    obeys(pool, single, processes, *(base or [{}]), layout | recomputation(layout))


# ----------------------------------------------------------------------------------- model shapes

GPT2 = dict(
    position_embedding="learned_absolute",
    activation="gelu_tanh",
    normalization="LayerNorm",
    vocab_size=96,
)
LLAMA = dict(
    position_embedding="rope",
    activation="swiglu",
    normalization="RMSNorm",
    num_query_groups=2,
    ffn_hidden_size=48,
    add_bias_linear=False,
    tie_word_embeddings=False,
)
SHAPES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "llama-tied": LLAMA | dict(tie_word_embeddings=True),
    # without rotation the keys' bias has no gradient: softmax is blind to it
    "qk-layernorm": dict(qk_layernorm=True, position_embedding="rope"),
    "qk-rmsnorm": LLAMA | dict(qk_layernorm=True),
    "qkv-bias": LLAMA | dict(add_qkv_bias=True),
    "rotary-half": dict(position_embedding="rope", rotary_percent=0.5, rotary_base=500.0),
    "wide-heads": dict(kv_channels=12, ffn_hidden_size=20),
    "geglu": dict(activation="geglu"),
    "relu": dict(activation="relu", normalization="RMSNorm", norm_epsilon=1e-3),
    "no-positions": dict(position_embedding="none", init_method_std=0.1),
    "more-positions": dict(max_position_embeddings=40),
    "scaled-rope-window": LLAMA
    | dict(
        rotary_base=500.0,
        rope_scaling=mf.RopeScaling(factor=8.0, original_max_position_embeddings=64),
        layers_without_rope=(1, 2),
        sliding_window=11,
    ),
    "parallel-residual": dict(
        parallel_residual=True, position_embedding="rope", rotary_percent=0.5, softmax_scale=0.7
    ),
}


@pytest.mark.parametrize("layout", ["tp2-pp2-sp", "tp2-cp2-dist"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_model_shape_obeys_the_law(shape, layout, pool, single):
    made = dict(tp=2, pp=2, **SP) if layout == "tp2-pp2-sp" else dict(tp=2, cp=2, **DIST)
    if shape in ("gpt2", "llama") and layout == "tp2-cp2-dist":
        made |= SP | dict(pp=2)  # the two shapes that most models have: over 8 processes
        return obeys(pool, single, 8, SHAPES[shape], made, make=short)
    # ReLU's derivative jumps: an activation within rounding of 0 may fall on either side of it
    # (1.3e-3 seen, norms at 3e-6)
    obeys(
        pool,
        single,
        4,
        SHAPES[shape],
        made,
        make=short,
        **(dict(parameter=5e-3) if shape == "relu" else {}),
    )


# ----------------------------------------------------------------- optimizers, schedules, cutting


@pytest.mark.parametrize(
    "base, processes, layout",
    [
        (dict(clip_grad=0.0), 2, dict(tp=2, **SP)),
        (dict(clip_grad=0.05), 4, dict(pp=2, **DIST)),
        (dict(name="sgd", momentum=0.5, lr=0.5, eps=1e-8), 4, dict(tp=2, pp=2)),
        (
            dict(
                decay="wsd",
                wsd_decay_iters=4,
                weight_decay=0.01,  # the default: a ramp does not read it
                weight_decay_incr_style="linear",
                start_weight_decay=0.0,
                end_weight_decay=1.0,
            ),
            4,
            dict(cp=2, **DIST),
        ),
    ],
    ids=["no clipping", "hard clipping", "sgd", "wsd and a ramp of weight decay"],
)
def test_optimizers_and_schedules_obey_the_law(base, processes, layout, pool, single):
    obeys(pool, single, processes, base, layout)


@pytest.mark.parametrize(
    "micro_batch_size, processes, layout",
    [
        (1, 1, {}),
        (16, 1, {}),
        (4, 2, dict(pp=2)),
        (8, 2, {}),
        (1, 4, dict(pp=2, vpp=2)),
        (4, 4, dict(tp=2, **DIST)),
    ],
)
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(
    micro_batch_size, processes, layout, pool, single
):
    obeys(pool, single, processes, {}, layout | dict(micro_batch_size=micro_batch_size))


def test_the_law_can_be_broken(pool, single):
    """Data, weights or a learning rate that differ a little fail it.

    So the comparison sees what it should.
    """
    reference = single(tiny())
    for changes in (dict(seed=4321), dict(lr=1.01e-2), dict(weight_decay=0.2), dict(eps=1.1e-3)):
        with pytest.raises(AssertionError):
            assert_equal(reference, [single(tiny(**changes))])


# ------------------------------------------------------------------------------------------- bf16


@pytest.mark.parametrize(
    "processes, layout",
    [(2, DIST), (2, dict(pp=2, vpp=2)), (8, dict(tp=2, cp=2, **SP, **DIST))],
    ids=["dp2-dist", "pp2-vpp2", "tp2-cp2-dp2-sp-dist"],
)
def test_bf16_errs_in_a_layout_as_in_one_process(processes, layout, pool, single):
    obeys(pool, single, processes, dict(dtype="bf16"), layout)


# ------------------------------------------------------------- the single process itself is right


def one_step(config, batch):
    """Loss, weights before and gradients of one step of one process, by name."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg, model=noisy)
        weights = mf.whole_parameters(state.chunks, config.model, pg)
        _, metrics = mf.train_step(state, batch, mf.step_fn("gpt"))
        return (
            metrics.loss,
            weights,
            {
                part.name: part.parameter.main_grad.clone()
                for part in local_parameters(state.chunks[0], config.model, pg)
            },
        )


def hugging_face_batch(*, padded=0):
    """input_ids, labels and attention_mask, each [4, 32].

    Some labels don't count, and one row has `padded` tokens on its left.
    """
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 97, (4, 32), generator=draw)
    labels = ids.masked_fill(torch.rand(4, 32, generator=draw) < 0.3, -100)
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    labels[1, : padded + 1] = -100
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}


def step_config(**shape):
    """One step of one process in two micro-batches.

    Nothing is clipped: `main_grad` is the gradient.
    """
    return tiny(steps=1, global_batch_size=4, clip_grad=0.0, warmup_iters=None, **shape)


def plain_gpt(weights, model, tokens):
    """Logits [batch, sequence, vocabulary] as a textbook has them.

    No parallelism, no fused attention.
    """
    batch, length = tokens.shape
    heads, groups, size = model.num_attention_heads, model.query_groups, model.head_size
    activation = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "swiglu": F.silu,
        "geglu": F.gelu,
    }

    def linear(x, name):
        y = x @ weights[name + ".weight"].T
        return y + weights[name + ".bias"] if name + ".bias" in weights else y

    def norm(x, name):
        if model.normalization == "LayerNorm":
            x = x - x.mean(-1, keepdim=True)
        y = (
            x
            / (x.pow(2).mean(-1, keepdim=True) + model.norm_epsilon).sqrt()
            * weights[name + ".weight"]
        )
        return y + weights[name + ".bias"] if model.normalization == "LayerNorm" else y

    def turned(x):  # arXiv 2104.09864, halves paired as in Llama; x [b, heads, s, size]
        width = int(size * model.rotary_percent)
        frequencies = model.rotary_base ** -(torch.arange(0, width, 2) / width)
        if model.rope_scaling is not None:
            frequencies *= torch.tensor([stretched(f.item()) for f in frequencies])
        angle = torch.outer(torch.arange(length), frequencies).double()
        a, b, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
        return torch.cat(
            [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1
        )

    def stretched(frequency):  # Llama 3.1's factor of a frequency
        rule = model.rope_scaling
        turns = rule.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = (turns - rule.low_freq_factor) / (rule.high_freq_factor - rule.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        return kept + (1 - kept) / rule.factor

    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (model.sliding_window or length))
    scale = model.softmax_scale or size**-0.5
    x = weights["embedding.word_embeddings.weight"][tokens]
    if model.position_embedding == "learned_absolute":
        x = x + weights["embedding.position_embeddings.weight"][:length]
    for i in range(model.num_layers):
        attention, mlp = f"decoder.layers.{i}.self_attention.", f"decoder.layers.{i}.mlp."
        qkv = linear(norm(x, f"decoder.layers.{i}.input_layernorm"), attention + "linear_qkv")
        # each group: queries, key, value
        qkv = qkv.view(batch, length, groups, heads // groups + 2, size).transpose(1, 2)
        q = qkv[..., :-2, :].transpose(2, 3).reshape(batch, heads, length, size)
        k = qkv[..., -2, :]
        v = qkv[..., -1, :]
        if model.qk_layernorm:
            q, k = norm(q, attention + "q_layernorm"), norm(k, attention + "k_layernorm")
        if model.position_embedding == "rope" and i not in model.layers_without_rope:
            q, k = turned(q), turned(k)
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) * scale).masked_fill(hidden, -torch.inf)
        before = x
        x = x + linear(
            (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), attention + "linear_proj"
        )
        read = before if model.parallel_residual else x
        h = linear(norm(read, f"decoder.layers.{i}.pre_mlp_layernorm"), mlp + "linear_fc1")
        gate, up = h.chunk(2, -1) if model.gated else (h, 1)
        x = x + linear(activation[model.activation](gate) * up, mlp + "linear_fc2")
    table = (
        "embedding.word_embeddings.weight" if model.tie_word_embeddings else "output_layer.weight"
    )
    return norm(x, "decoder.final_layernorm") @ weights[table].T


@pytest.mark.parametrize("shape", SHAPES)
def test_the_single_process_computes_what_a_textbook_gpt_does(shape, pool):
    config = step_config(**SHAPES[shape])
    batch = hugging_face_batch()
    batch["input_ids"] %= config.model.vocab_size
    batch["labels"] = batch["labels"].where(
        batch["labels"] == -100, batch["labels"] % config.model.vocab_size
    )
    loss, weights, gradients = pool(1, one_step, config, halves(batch))[0]
    weights = {name: value.double().requires_grad_() for name, value in weights.items()}
    logits = plain_gpt(weights, config.model, batch["input_ids"])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected.backward()
    assert (
        loss == pytest.approx(expected.item(), rel=TOLERANCE) and gradients.keys() == weights.keys()
    )
    for name, value in weights.items():
        assert_close(name, gradients[name], value.grad)


def as_gpt2(whole, model):
    """Weights (or gradients) under the names of transformers' GPT-2.

    Its linear layers are stored [in, out].
    """
    heads, size = model.num_attention_heads, model.head_size

    def qkv(value):  # [heads, (q, k, v), size] -> [(q, k, v), heads, size]
        return value.view(heads, 3, size, -1).transpose(0, 1).reshape(value.shape)

    made = {
        "transformer.wte.weight": whole["embedding.word_embeddings.weight"],
        "lm_head.weight": whole["embedding.word_embeddings.weight"],
        "transformer.wpe.weight": whole["embedding.position_embeddings.weight"],
    }
    for kind in ("weight", "bias"):
        made[f"transformer.ln_f.{kind}"] = whole[f"decoder.final_layernorm.{kind}"]
        for i in range(model.num_layers):
            layer = {
                theirs: whole[f"decoder.layers.{i}.{ours}.{kind}"]
                for ours, theirs in {
                    "input_layernorm": "ln_1",
                    "self_attention.linear_qkv": "attn.c_attn",
                    "self_attention.linear_proj": "attn.c_proj",
                    "pre_mlp_layernorm": "ln_2",
                    "mlp.linear_fc1": "mlp.c_fc",
                    "mlp.linear_fc2": "mlp.c_proj",
                }.items()
            }
            layer["attn.c_attn"] = qkv(layer["attn.c_attn"])
            made |= {
                f"transformer.h.{i}.{name}.{kind}": value.T if value.dim() == 2 else value
                for name, value in layer.items()
            }
    return made


def as_llama(whole, model):
    """Weights (or gradients) under the names of transformers' Llama."""
    heads, groups, size = model.num_attention_heads, model.query_groups, model.head_size
    made = {
        "model.embed_tokens.weight": whole["embedding.word_embeddings.weight"],
        "lm_head.weight": whole["output_layer.weight"],
        "model.norm.weight": whole["decoder.final_layernorm.weight"],
    }
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        qkv = whole[ours + "self_attention.linear_qkv.weight"].view(
            groups, heads // groups + 2, size, -1
        )
        gate, up = whole[ours + "mlp.linear_fc1.weight"].chunk(2)
        made |= {
            theirs + name + ".weight": value
            for name, value in {
                "input_layernorm": whole[ours + "input_layernorm.weight"],
                "post_attention_layernorm": whole[ours + "pre_mlp_layernorm.weight"],
                "self_attn.q_proj": qkv[:, :-2].flatten(0, 2),
                "self_attn.k_proj": qkv[:, -2].flatten(0, 1),
                "self_attn.v_proj": qkv[:, -1].flatten(0, 1),
                "self_attn.o_proj": whole[ours + "self_attention.linear_proj.weight"],
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": whole[ours + "mlp.linear_fc2.weight"],
            }.items()
        }
    return made


def as_gpt_neox(whole, model):
    """Weights (or gradients) under the names of transformers' GPT-NeoX."""
    names = {
        "embedding.word_embeddings": "gpt_neox.embed_in",
        "decoder.final_layernorm": "gpt_neox.final_layer_norm",
        "output_layer": "lm_head",
    }
    for i in range(model.num_layers):
        names |= {
            f"decoder.layers.{i}.{ours}": f"gpt_neox.layers.{i}.{theirs}"
            for ours, theirs in {
                "input_layernorm": "input_layernorm",
                "self_attention.linear_qkv": "attention.query_key_value",
                "self_attention.linear_proj": "attention.dense",
                "pre_mlp_layernorm": "post_attention_layernorm",
                "mlp.linear_fc1": "mlp.dense_h_to_4h",
                "mlp.linear_fc2": "mlp.dense_4h_to_h",
            }.items()
        }
    return {
        f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": value
        for name, value in whole.items()
    }


COMMON = dict(vocab_size=97, attn_implementation="sdpa", hidden_size=32, num_attention_heads=4)
LIKE_LLAMA = COMMON | dict(
    num_hidden_layers=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
NEOX = dict(
    position_embedding="rope",
    rotary_percent=0.5,
    parallel_residual=True,
    tie_word_embeddings=False,
    ffn_hidden_size=48,
)
SCALING = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
# name: (the shape here, the renaming, class in transformers, fields of its config)
IN_TRANSFORMERS = {
    "gpt2": (
        GPT2 | dict(vocab_size=97),
        as_gpt2,
        "GPT2LMHeadModel",
        dict(
            vocab_size=97,
            attn_implementation="sdpa",
            n_layer=4,
            n_embd=32,
            n_head=4,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
    ),
    "llama": (LLAMA, as_llama, "LlamaForCausalLM", LIKE_LLAMA),
    "llama3.1": (
        LLAMA | dict(rotary_base=500.0, rope_scaling=mf.RopeScaling(**SCALING)),
        as_llama,
        "LlamaForCausalLM",
        LIKE_LLAMA | dict(rope_parameters=dict(rope_type="llama3", rope_theta=500.0, **SCALING)),
    ),
    "mistral": (
        LLAMA | dict(sliding_window=11),
        as_llama,
        "MistralForCausalLM",
        LIKE_LLAMA | dict(sliding_window=11),
    ),
    "smollm3": (
        LLAMA | dict(layers_without_rope=(1, 3)),
        as_llama,
        "SmolLM3ForCausalLM",
        LIKE_LLAMA
        | dict(
            # 1 = with rotary positions
            no_rope_layers=[1, 0, 1, 0],
            rope_parameters=dict(rope_type="default", rope_theta=10_000.0),
            pad_token_id=0,
        ),
    ),
    "gpt-neox": (
        NEOX,
        as_gpt_neox,
        "GPTNeoXForCausalLM",
        COMMON
        | dict(
            num_hidden_layers=4,
            intermediate_size=48,
            max_position_embeddings=32,
            layer_norm_eps=1e-5,
            rope_parameters=dict(
                rope_type="default", rope_theta=10_000.0, partial_rotary_factor=0.5
            ),
        ),
    ),
}


@pytest.mark.parametrize(
    "family, padded",
    [(family, 0) for family in IN_TRANSFORMERS] + [("gpt2", 5), ("llama", 5), ("mistral", 5)],
)
def test_loss_and_gradients_are_those_of_transformers(family, padded, pool):
    transformers = pytest.importorskip("transformers")
    shape, renamed, name, fields = IN_TRANSFORMERS[family]
    config = step_config(**shape)
    their_model = getattr(transformers, name)
    theirs = their_model(their_model.config_class(**fields))
    batch = hugging_face_batch(padded=padded)
    loss, weights, gradients = pool(1, one_step, config, halves(batch))[0]
    told = theirs.load_state_dict(renamed(weights, config.model), strict=False)
    assert not told.unexpected_keys and not [
        key for key in told.missing_keys if "inv_freq" not in key and ".attn.bias" not in key
    ]
    expected = theirs.double()(**batch).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=TOLERANCE)
    gradients = renamed(gradients, config.model)
    for name, parameter in theirs.named_parameters():
        assert_close(name, gradients[name], parameter.grad)


def beside_megatron(config, tokens):
    """Logits of the built-in stage and of megatron-core's own GPTModel with the same weights.

    [s, b, vocabulary / tp] each.
    """
    from megatron.core.models.gpt import GPTModel  # warns that Apex is not there
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    model = config.model
    with (
        mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg,
        megatron_context(pg, 1),
        torch.no_grad(),
    ):
        stage = noisy(config, pg, pre_process=True, post_process=True, vp_stage=None)
        spec = get_gpt_layer_local_spec(
            qk_layernorm=model.qk_layernorm, normalization=model.normalization
        )
        theirs = GPTModel(
            mf.transformer_config(config, pg),
            spec,
            mf.padded_vocab_size(model.vocab_size, config.parallel.tp),
            model.seq_length,
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type=model.position_embedding,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            pg_collection=pg.collection,
        )
        theirs.load_state_dict(stage.state_dict())
        stage.eval(), theirs.eval()
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        hidden = torch.ones(1, 1, tokens.size(1), tokens.size(1)).triu(1).bool()
        return stage(tokens), theirs(tokens, positions, hidden).transpose(0, 1)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qkv-bias", "rotary-half"])
def test_logits_are_those_of_megatron_cores_own_model(shape, pool):
    tokens = torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(5))
    for ours, theirs in pool(
        2, beside_megatron, tiny(tp=2, **SHAPES[shape] | dict(vocab_size=96)), tokens
    ):
        assert_close("logits", ours, theirs)

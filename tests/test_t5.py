"""T5: every layout trains as the single process does; and that one computes what megatron-core's
and transformers' T5 do."""

from functools import cache, partial
from unittest import mock

import attrs
import pytest
import torch

import megafn as mf
from equivalence import (
    assert_equal,
    assert_obeys,
    local_parts,
    recomputation,
    run_layout,
    share,
    tiny,
)
from megafn.runtime.model.weights import local_parameters
from megafn.runtime.parallel.megatron_context import megatron_context
from single_steps import assert_close, halves, noisy
from t5_rows import RELATIVE, T5, of_many_lengths, of_one_sum, pairs

SP, DIST = dict(sequence_parallel=True), dict(use_distributed_optimizer=True)


@pytest.fixture(scope="session")
def single(pool):
    """The single process's run of a config, made once a session."""
    return cache(lambda config, data: pool(1, run_layout, config, data)[0])


def obeys(pool, single, processes, base, layout, data=pairs):
    assert_obeys(
        partial(single, data=data),
        tiny(**T5 | base),
        pool(processes, run_layout, tiny(**T5 | base | layout), data),
    )


def split(rank):
    return dict(pp=4, pipeline_model_parallel_split_rank=rank)


# ------------------------------------------------------------------------------------------ layouts

LAYOUTS = {  # name: (processes, layout, what it asks of the model)
    "tp2": (2, dict(tp=2)),
    "tp2-sp": (2, dict(tp=2, **SP)),
    "tp2-dp2-dist": (4, dict(tp=2, **DIST)),
    "pp2": (2, dict(pp=2)),
    "pp4": (4, dict(pp=4)),
    "pp4-split1": (4, split(1), dict(num_decoder_layers=3)),
    "pp4-split3": (4, split(3), dict(num_layers=6, num_decoder_layers=1)),
    "tp2-pp2": (4, dict(tp=2, pp=2)),
    "tp2-pp2-sp": (4, dict(tp=2, pp=2, **SP)),
    "pp2-dp2-dist": (4, dict(pp=2, **DIST)),
    "pp4-dp2-dist": (8, dict(pp=4, **DIST)),
    "tp2-pp2-dp2-sp-dist": (8, dict(tp=2, pp=2, **SP, **DIST)),
    "order-pp-dp-tp": (8, dict(tp=2, pp=2, order="pp-dp-cp-ep-tp", **DIST)),
    "selective-pp2": (2, dict(pp=2, granularity="selective")),
    "full-uniform2-tp2-sp": (2, dict(tp=2, granularity="full", num_layers=2, **SP)),
    "full-block-pp4": (4, dict(pp=4, granularity="full", method="block")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_the_single_process_does(name, pool, single):
    processes, layout, *base = LAYOUTS[name]
    layout = dict(layout)
    obeys(pool, single, processes, *(base or [{}]), layout | recomputation(layout))


LLAMA = dict(
    position_embedding="rope",
    activation="swiglu",
    normalization="RMSNorm",
    ffn_hidden_size=48,
    add_bias_linear=False,
)
UNTIED = dict(tie_word_embeddings=False)
SHAPES = {
    "untied": UNTIED,
    "rope": LLAMA,
    "rope-untied": LLAMA | UNTIED,
    # as T5 1.0 of transformers
    "relative": RELATIVE
    | dict(
        normalization="RMSNorm",
        activation="gelu_tanh",
        add_bias_linear=False,
        softmax_scale=1.0,
        scale_decoder_outputs=True,
        output_layer_bias=False,
    ),
    "relative-untied": RELATIVE | UNTIED | dict(activation="geglu_tanh"),
    "no-positions": dict(position_embedding="none"),
    "qk-layernorm": dict(qk_layernorm=True, position_embedding="rope"),
    "wide-heads": dict(kv_channels=12, ffn_hidden_size=20),
    "longer-decoder": dict(seq_length=12, decoder_seq_length=20, max_position_embeddings=28),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_model_shape_obeys_the_law(shape, pool, single):
    """Cut in every way at once; and where tables have most copies: each half over two stages."""
    obeys(pool, single, 4, SHAPES[shape], dict(tp=2, pp=2, **SP))
    obeys(pool, single, 4, SHAPES[shape], dict(pp=4))


def test_a_relative_table_on_every_stage_is_learnt_in_shards(pool, single):
    obeys(pool, single, 8, SHAPES["relative"], dict(pp=4, **DIST))


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_relative_positions_learn_alike_under_recomputation(granularity, pool, single):
    obeys(
        pool, single, 2, RELATIVE, dict(pp=2, recompute=mf.RecomputeConfig(granularity=granularity))
    )


@pytest.mark.parametrize("data", [of_many_lengths, of_one_sum])
@pytest.mark.parametrize("shape", ["rope", "relative-untied"])
def test_lengths_that_differ_between_micro_batches_obey_the_law(shape, data, pool, single):
    obeys(pool, single, 4, SHAPES[shape], dict(pp=4), data)


@pytest.mark.parametrize(
    "processes, layout",
    [(2, dict(pp=2)), (4, dict(tp=2, **DIST)), (4, dict(tp=2, pp=2, **SP))],
    ids=["pp2", "tp2-dp2-dist", "tp2-pp2-sp"],
)
def test_bf16_errs_in_a_layout_as_in_one_process(processes, layout, pool, single):
    """Weights five times as large as elsewhere: at 0.02 the layers hardly count beside the
    embedding."""
    obeys(pool, single, processes, RELATIVE | dict(dtype="bf16", init_method_std=0.1), layout)


@pytest.mark.parametrize(
    "processes, layout", [(1, {}), (4, dict(tp=2, pp=2, **SP))], ids=["single", "tp2-pp2-sp"]
)
def test_recomputation_with_dropout_changes_no_bit(processes, layout, pool):
    base = T5 | RELATIVE | dict(hidden_dropout=0.1, attention_dropout=0.1, steps=3) | layout
    plain = pool(processes, run_layout, tiny(**base), pairs)
    assert (
        plain[0][0]
        != pool(processes, run_layout, tiny(**base | dict(hidden_dropout=0.0)), pairs)[0][0]
    )
    for granularity in ("selective", "full"):
        again = pool(
            processes,
            run_layout,
            tiny(**base, recompute=mf.RecomputeConfig(granularity=granularity)),
            pairs,
        )
        for (curve, _, end), (other, _, others) in zip(plain, again, strict=True):
            assert curve == other and all(
                torch.equal(a, b) for (_, a, *_), (_, b, *_) in zip(end, others, strict=True)
            )


def own_batch(raw, config, pg):
    """Texts of one's own under names of one's own; `decoder_tokens` is what stages must know of,
    see `Step`."""
    return {
        "tokens": raw["input_ids"],
        "decoder_tokens": raw["written"],
        "wanted": raw["labels"],
        "counted": (raw["labels"] >= 0).float(),
    }


def own_forward(model, batch):
    return model(batch["tokens"], batch["decoder_tokens"])


def own_loss(logits, batch, pg, *, weight):
    losses = (
        mf.cross_entropy(logits, batch["wanted"].clamp(min=0), pg)
        + weight * mf.logsumexp(logits, pg) ** 2
    )
    right = mf.argmax(logits, pg) == batch["wanted"]
    return mf.Loss(
        sum=(losses * batch["counted"]).sum(),
        count=batch["counted"].sum(),
        report={"accuracy": (right * batch["counted"]).sum()},
    )


OWN = mf.Step(batch=own_batch, forward=own_forward, loss=partial(own_loss, weight=1e-2))


def own_pairs(config, iteration):
    """Rows of `pairs` without masks, with the decoder's inputs drawn freely."""
    draw = torch.Generator().manual_seed(iteration)
    return [
        {
            "input_ids": row["input_ids"],
            "labels": row["labels"],
            "written": torch.randint(0, 97, row["labels"].shape, generator=draw),
        }
        for row in pairs(config, iteration)
    ]


@pytest.mark.parametrize(
    "processes, layout",
    [(2, dict(pp=2)), (4, dict(tp=2, pp=2, **SP)), (4, split(1)), (4, dict(tp=2, **DIST))],
    ids=["pp2", "tp2-pp2-sp", "pp4-split1", "tp2-dp2-dist"],
)
def test_a_step_of_ones_own_obeys_the_law(processes, layout, pool):
    base = dict(T5, num_decoder_layers=3)
    (alone,) = pool(1, run_layout, tiny(**base), own_pairs, OWN)
    assert_equal(alone, pool(processes, run_layout, tiny(**base | layout), own_pairs, OWN))
    assert abs(alone[0][0][0] - pool(1, run_layout, tiny(**base), own_pairs)[0][0][0][0]) > 1e-2, (
        "the weight of its own counts"
    )


# --------------------------------------------------------------- the single process itself is right


def one_step(config, batch):
    """Loss, weights before and gradients of one step of one process, by name."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg, model=noisy)
        weights = mf.whole_parameters(state.chunks, config.model, pg)
        _, metrics = mf.train_step(state, batch, mf.step_fn("t5"))
        return (
            metrics.loss,
            weights,
            {
                part.name: part.parameter.main_grad.clone()
                for part in local_parameters(state.chunks[0], config.model, pg)
            },
        )


def step_config(**shape):
    """One step of one process in two micro-batches, unclipped: `main_grad` is the gradient."""
    return tiny(**T5 | dict(steps=1, global_batch_size=4, clip_grad=0.0, warmup_iters=None) | shape)


def hugging_face_batch():
    """Four pairs; rows of both sides end early, and a label in the middle does not count."""
    draw = torch.Generator().manual_seed(3)
    ids, labels = (
        torch.randint(1, 97, (4, 24), generator=draw),
        torch.randint(1, 97, (4, 16), generator=draw),
    )
    read, write = torch.tensor([24, 7, 1, 20])[:, None], torch.tensor([16, 3, 12, 1])[:, None]
    labels = labels.masked_fill(torch.arange(16)[None] >= write, -100)
    labels[0, 5] = -100
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(24)[None] < read).long(),
        "labels": labels,
    }


def as_transformers(whole, model):
    """Weights (or gradients) under the names of transformers' T5."""
    heads, size = model.num_attention_heads, model.head_size
    words = whole["embedding.word_embeddings.weight"]
    made = {
        "shared.weight": words,
        "encoder.embed_tokens.weight": words,
        "decoder.embed_tokens.weight": words,
        "lm_head.weight": words if model.tie_word_embeddings else whole["output_layer.weight"],
    }
    for half, layers in (("encoder", model.num_layers), ("decoder", model.decoder_layers)):
        made[f"{half}.final_layer_norm.weight"] = whole[f"{half}.final_layernorm.weight"]
        made[f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = whole[
            f"{half}_relative_pos_emb.relative_attention_bias.weight"
        ]
        for i in range(layers):
            ours, theirs = f"{half}.layers.{i}.", f"{half}.block.{i}.layer."
            last = 2 if half == "decoder" else 1
            q, k, v = (
                whole[ours + "self_attention.linear_qkv.weight"]
                .view(heads, 3, size, -1)
                .transpose(0, 1)
                .flatten(1, 2)
            )
            made |= {
                f"{theirs}0.SelfAttention.q.weight": q,
                f"{theirs}0.SelfAttention.k.weight": k,
                f"{theirs}0.SelfAttention.v.weight": v,
                f"{theirs}0.SelfAttention.o.weight": whole[
                    ours + "self_attention.linear_proj.weight"
                ],
                f"{theirs}0.layer_norm.weight": whole[ours + "input_layernorm.weight"],
                f"{theirs}{last}.layer_norm.weight": whole[ours + "pre_mlp_layernorm.weight"],
            }
            if half == "decoder":
                k, v = (
                    whole[ours + "cross_attention.linear_kv.weight"]
                    .view(heads, 2, size, -1)
                    .transpose(0, 1)
                    .flatten(1, 2)
                )
                made |= {
                    f"{theirs}1.EncDecAttention.q.weight": whole[
                        ours + "cross_attention.linear_q.weight"
                    ],
                    f"{theirs}1.EncDecAttention.k.weight": k,
                    f"{theirs}1.EncDecAttention.v.weight": v,
                    f"{theirs}1.EncDecAttention.o.weight": whole[
                        ours + "cross_attention.linear_proj.weight"
                    ],
                    f"{theirs}1.layer_norm.weight": whole[ours + "pre_cross_attn_layernorm.weight"],
                }
            fc1 = whole[ours + "mlp.linear_fc1.weight"]
            made |= {
                f"{theirs}{last}.DenseReluDense.{name}.weight": value
                for name, value in (
                    zip(("wi_0", "wi_1"), fc1.chunk(2), strict=True)
                    if model.gated
                    else [("wi", fc1)]
                )
            }
            made[f"{theirs}{last}.DenseReluDense.wo.weight"] = whole[ours + "mlp.linear_fc2.weight"]
    return made


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("activation, theirs", [("relu", "relu"), ("geglu_tanh", "gated-gelu")])
def test_loss_and_gradients_are_those_of_transformers(tied, activation, theirs, pool):
    """Norms, relative biases (of self-attention only), masks, shifted labels and the loss agree.

    megatron-core's T5 differs: it divides scores by the root of the head size, its tied output
    layer has a bias, it does not divide that layer's input by the root of the hidden size, and it
    has biases and LayerNorm. The config has a field for each, so the weights are the same ones.
    Labels shifted right after token 0 are transformers' own.
    """
    transformers = pytest.importorskip("transformers")
    config = step_config(
        activation=activation,
        tie_word_embeddings=tied,
        normalization="RMSNorm",
        add_bias_linear=False,
        softmax_scale=1.0,
        scale_decoder_outputs=tied,
        output_layer_bias=False,
        kv_channels=12,
        ffn_hidden_size=48,
        norm_epsilon=1e-5,
        num_layers=3,
        num_decoder_layers=2,
        **RELATIVE,
    )
    reference = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=97,
            d_model=32,
            d_kv=12,
            d_ff=48,
            num_layers=3,
            num_decoder_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=12,
            dropout_rate=0.0,
            layer_norm_epsilon=1e-5,
            feed_forward_proj=theirs,
            tie_word_embeddings=tied,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )
    if not tied:
        # from version 5 on it ties them whatever the config says, and only does not divide
        reference.lm_head.weight = torch.nn.Parameter(torch.empty_like(reference.lm_head.weight))
    batch = hugging_face_batch()
    loss, weights, gradients = pool(1, one_step, config, halves(batch))[0]
    told = reference.load_state_dict(as_transformers(weights, config.model), strict=False)
    assert not told.unexpected_keys and not told.missing_keys
    expected = reference.double()(**batch).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    made = as_transformers(gradients, config.model)
    names = dict(reference.named_parameters())
    assert len(names) > 40 and names.keys() <= made.keys()
    for name, parameter in names.items():
        assert_close(name, made[name], parameter.grad)


def beside_megatron(config):
    """Logits and gradients of the built-in stage and of megatron-core's own T5Model with the same
    weights, on sequences padded with 0."""
    from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset
    from megatron.core.models.T5 import T5Model  # warns that Apex is not there
    from megatron.core.models.T5.t5_spec import (
        decoder_model_with_local_spec,
        encoder_model_with_local_spec,
    )
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megafn.runtime.model.layers import Attention

    class Biased(Attention):
        """megatron-core's own refuses a bias."""

        def forward(self, query, key, value, attention_mask, attention_bias=None, **options):
            if attention_bias is not None:
                attention_mask = attention_bias.masked_fill(attention_mask, -10000.0)
            return super().forward(query, key, value, attention_mask, **options)

    model, draw = config.model, torch.Generator().manual_seed(5)
    tokens, decoder_tokens = (
        torch.randint(1, 96, (2, 24), generator=draw),
        torch.randint(1, 96, (2, 16), generator=draw),
    )
    tokens[0, 9:], decoder_tokens[1, 4:] = 0, 0
    masks = T5MaskedWordPieceDataset.config_attention_mask(
        tokens, decoder_tokens, tokens > 0, decoder_tokens > 0, use_local=True
    )
    with (
        mf.init_groups(mf.build_groups(config.parallel, 1)) as pg,
        megatron_context(pg, 1),
        mock.patch.object(
            ProcessGroupCollection, "use_mpu_process_groups", lambda *_, **__: pg.collection
        ),
    ):
        stage = noisy(config, pg, pre_process=True, post_process=True, vp_stage=None)
        encoder, decoder = encoder_model_with_local_spec(), decoder_model_with_local_spec()
        cross = decoder.submodules.cross_attention.submodules
        # megatron-core passes them no group
        cross.linear_q = cross.linear_kv = partial(cross.linear_q, tp_group=pg.tp)
        if model.position_embedding == "relative":
            for layer in (encoder, decoder):
                layer.submodules.self_attention.submodules.core_attention = Biased
        mcore = [
            attrs.evolve(config, model=attrs.evolve(model, num_layers=layers))
            for layers in (model.decoder_layers, model.num_layers)
        ]
        theirs = T5Model(
            *(mf.transformer_config(one, pg) for one in mcore),
            encoder,
            decoder,
            model.vocab_size,
            model.position_rows,
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type=model.position_embedding,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=12,
            pg_collection=pg.collection,
        )
        own = stage.state_dict()
        own |= {
            "lm_head." + name: value
            for name, value in own.items()
            if name.startswith("output_layer.")
        }
        if "embedding.position_embeddings.weight" in own:
            own["position_embeddings.weight"] = own["embedding.position_embeddings.weight"]
        theirs.load_state_dict(own)
        batch = mf.step_fn("t5").batch(
            {
                "text_enc": tokens,
                "text_dec": decoder_tokens,
                "labels": decoder_tokens,
                "enc_mask": (tokens > 0).long(),
                "dec_mask": (decoder_tokens > 0).long(),
            },
            config,
            pg,
        )
        real, found = (decoder_tokens > 0)[..., None], []
        for net, logits in (
            (stage, mf.step_fn("t5").forward(stage, batch).transpose(0, 1)),
            (theirs, theirs(tokens, decoder_tokens, *masks)),
        ):
            (logits * real * torch.linspace(-1, 1, logits.size(-1))).sum().backward()
            found.append(
                {"logits": (logits * real).detach()}
                | {name.removeprefix("lm_head."): p.grad for name, p in net.named_parameters()}
            )
        return found


@pytest.mark.parametrize(
    "shape",
    [{}, UNTIED, dict(position_embedding="rope", num_decoder_layers=2), RELATIVE],
    ids=["learned", "untied", "rope", "relative"],
)
def test_logits_and_gradients_are_those_of_megatron_cores_own_model(shape, pool):
    ours, theirs = pool(1, beside_megatron, tiny(**T5 | dict(vocab_size=96) | shape))[0]
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(name, ours[name], theirs[name])


# -------------------------------------------------------------------------------- batches and masks


def batch_of(raw, config):
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        return mf.step_fn("t5").batch(raw, config, pg)


CONFIG = tiny(**T5)
RAW = {
    "input_ids": torch.arange(8).view(2, 4),
    "labels": torch.tensor([[5, 6, -100], [7, -100, 9]]),
}


def test_labels_shift_right_behind_the_start_token():
    batch = batch_of(RAW, tiny(**T5, decoder_start_token_id=3))
    assert (
        batch["decoder_tokens"].tolist() == [[3, 5, 6], [3, 7, 3]]
        and batch["labels"].tolist() == RAW["labels"].tolist()
    )
    assert batch["loss_mask"].tolist() == [[1, 1, 0], [1, 0, 1]] and not [
        key for key in batch if key.endswith("attention_mask")
    ]
    given = batch_of(RAW | {"decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}, CONFIG)
    assert given["decoder_tokens"].tolist() == [[1, 1, 1]] * 2


def test_masks_hide_padding_on_both_sides_and_what_comes_later():
    batch = batch_of(
        RAW
        | {
            "attention_mask": torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]),
            "decoder_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        },
        CONFIG,
    )
    assert (
        batch["attention_mask"].tolist()
        == batch["cross_attention_mask"].tolist()
        == [[[[False, False, True, True]]], [[[True, False, False, False]]]]
    )
    assert batch["decoder_attention_mask"][1, 0].tolist() == [
        [False, True, True],
        [False, False, True],
        [False] * 3,
    ]
    assert batch["decoder_attention_mask"][0, 0, :2].tolist() == [
        [False, True, True],
        [False, False, True],
    ]
    assert batch["loss_mask"].tolist() == [[1, 1, 0], [1, 0, 1]]  # padding predicts nothing


@pytest.mark.parametrize(
    "changes, told",
    [
        (
            {"labels": None},
            "expected 'text_enc', 'text_dec' and 'labels', or 'input_ids' and 'labels'.",
        ),
        (
            {"labels": torch.ones(3, 3, dtype=torch.long)},
            "expected 2 rows, as batch['input_ids'] has",
        ),
        (
            {"labels": torch.full((2, 3), 97)},
            "batch['labels']: token id 97 is outside the vocabulary",
        ),
        (
            {"input_ids": torch.full((2, 4), -1)},
            "batch['input_ids']: token id -1 is outside the vocabulary",
        ),
        ({"decoder_input_ids": torch.ones(2, 4, dtype=torch.long)}, "batch['decoder_input_ids']"),
        (
            {"attention_mask": torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])},
            "batch['attention_mask'] hides every token of row 0",
        ),
        ({"attention_mask": torch.full((2, 4), 2)}, "batch['attention_mask'] holds 2"),
        (
            {"decoder_attention_mask": torch.ones(2, 4)},
            "batch['decoder_attention_mask'] of shape [2, 4]",
        ),
        (
            {"labels": torch.ones(2, 30, dtype=torch.long)},
            "sequences of 30 tokens, and the position table has 24 rows",
        ),
    ],
)
def test_a_bad_batch_is_refused_with_a_sentence(changes, told):
    with pytest.raises(ValueError) as raised:
        batch_of(RAW | changes, CONFIG)
    assert told in str(raised.value)


# ----------------------------------------------------------------------------------------- features


def through_logits(config):
    """The loss of a step, as it says and as its logits have it; None on stages that get none."""
    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size(), model=config.model)
    ) as pg:
        state = mf.setup(config, pg)
        batch = share(pairs(config, 0), config, pg)
        with pytest.raises(mf.ConfigError, match="needs more than token ids"):
            mf.logits(state, batch[0]["input_ids"])
        _, metrics = mf.train_step(state, batch, mf.step_fn("t5"))
        if metrics.logits is None:
            return metrics.loss, None
        losses = [
            torch.nn.functional.cross_entropy(
                one.flatten(0, 1), raw["labels"].flatten(), reduction="sum"
            )
            for one, raw in zip(metrics.logits, batch, strict=True)
        ]
        return metrics.loss, (
            sum(losses) / sum((raw["labels"] != -100).sum() for raw in batch)
        ).item()


def test_logits_are_returned_whole_and_give_the_loss(pool):
    for where in ("last_stage", "every_stage"):
        results = pool(4, through_logits, tiny(**T5 | dict(tp=2, pp=2, return_logits=where)))
        given = [found for _, found in results if found is not None]
        assert len(given) == (2 if where == "last_stage" else 4) and given == pytest.approx(
            [results[0][0]] * len(given), rel=1e-5
        )


def with_groups_of_a_gpt(config):
    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size()), timeout_seconds=20
    ) as pg:
        with pytest.raises(mf.ConfigError, match="make them from mf.build_groups"):
            mf.setup(config, pg)


def test_groups_that_know_nothing_of_the_split_are_refused(pool):
    pool(2, with_groups_of_a_gpt, tiny(**T5, pp=2))


def goes_on_elsewhere(config, folder, reading):
    """Three steps of a layout, and a checkpoint; or the three behind it, in another: curve,
    parameters before all steps and after."""
    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size(), model=config.model)
    ) as pg:
        state, curve = mf.setup(config, pg), []
        start = local_parts(state)
        if reading:
            state = mf.load(state, folder)
        for iteration in range(state.iteration, state.iteration + 3):
            state, metrics = mf.train_step(
                state, share(pairs(config, iteration), config, pg), mf.step_fn("t5")
            )
            curve.append((metrics.loss, metrics.grad_norm))
        if not reading:
            mf.save(state, folder)
        return curve, start, local_parts(state)


def test_a_checkpoint_goes_on_in_another_layout(pool, single, tmp_path):
    pool(8, goes_on_elsewhere, tiny(**T5 | RELATIVE | dict(pp=4, **DIST)), str(tmp_path), False)
    curve, before, after = single(tiny(**T5 | RELATIVE), data=pairs)
    assert_equal(
        (curve[3:], before, after),
        pool(4, goes_on_elsewhere, tiny(**T5 | RELATIVE | dict(tp=2, pp=2)), str(tmp_path), True),
    )


def counted(config):
    """Operations of one forward pass over two pairs, as torch counts them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with (
        mf.init_groups(mf.build_groups(config.parallel, 1)) as pg,
        megatron_context(pg, 1),
        torch.no_grad(),
        # the CPU's fused kernel is not counted
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        stage = mf.build_chunk(config, pg, pre_process=True, post_process=True, vp_stage=None)
        stage(torch.zeros(2, 24, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long))
        return counter.get_total_flops()


def test_the_operations_of_a_t5_are_those_that_torch_counts(pool):
    config = tiny(**T5 | SHAPES["wide-heads"] | dict(num_decoder_layers=3, activation="swiglu"))
    assert 3 * pool(1, counted, config)[0] == mf.training_flops(config.model, 2)
    assert mf.sample_tokens(config.model) == 40


def test_the_table_that_reads_scaled_outputs_begins_larger():
    words, output = "embedding.word_embeddings.weight", "output_layer.weight"
    for changes, larger in (
        ({}, None),
        (dict(scale_decoder_outputs=True), words),
        (dict(scale_decoder_outputs=True, **UNTIED), output),
    ):
        model = tiny(**T5 | changes).model
        for name in (words, output):
            std = 0.02 * (32**0.5 if name == larger else 1)
            drawn = mf.family_of("t5").spec.initial_distribution(name, (97, 32), model)
            assert drawn == mf.Normal(std)

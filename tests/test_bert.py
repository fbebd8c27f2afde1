"""BERT obeys the law in every layout, and the single process computes what megatron-core's and
transformers' BERT compute."""

import contextlib
from functools import cache, partial

import attrs
import pytest
import torch

import megafn as mf
from bert_rows import MASKED, PAIRS, bert_rows, labelled_rows
from equivalence import (
    as_of_two,
    assert_equal,
    assert_obeys,
    local_parts,
    run_layout,
    share,
    short,
    stack,
    tiny,
)
from megafn.runtime.model.weights import local_parameters
from megafn.runtime.parallel.megatron_context import megatron_context
from single_steps import assert_close, halves, noisy

rows_of_two = partial(as_of_two, data=bert_rows)
TYPES = ("regression", "single_label_classification", "multi_label_classification")


@pytest.fixture(scope="session")
def alone(pool):
    """The single process's run of a config, made once a session."""
    return cache(lambda config, data: pool(1, run_layout, config, partial(as_of_two, data=data))[0])


def obeys(pool, alone, processes, base, layout, data=bert_rows, *, make=tiny):
    results = pool(processes, run_layout, make(**base, **layout), partial(as_of_two, data=data))
    assert_obeys(partial(alone, data=data), make(**base), results)


# ------------------------------------------------------------------------------------------ the law

SP, DIST = dict(sequence_parallel=True), dict(use_distributed_optimizer=True)
FULL, SELECTIVE = (
    dict(recompute=mf.RecomputeConfig(granularity="full")),
    dict(recompute=mf.RecomputeConfig(granularity="selective")),
)
LAYOUTS = {
    "tp2": (2, dict(tp=2)),
    "tp2-sp": (2, dict(tp=2, **SP)),
    "tp2-dp2-dist": (4, dict(tp=2, **DIST)),
    "pp2": (2, dict(pp=2)),
    "pp4": (4, dict(pp=4)),
    "pp2-tp2-sp": (4, dict(pp=2, tp=2, **SP)),
    "pp2-vpp2": (2, dict(pp=2, vpp=2)),
    "pp2-vpp2-dp2-dist": (4, dict(pp=2, vpp=2, **DIST)),
    "cp2": (2, dict(cp=2)),
    "tp2-cp2-sp": (4, dict(tp=2, cp=2, **SP)),
    "dp4": (4, {}),
    "selective-pp2": (2, dict(pp=2, **SELECTIVE)),
    "full-tp2-sp": (2, dict(tp=2, **SP, **FULL)),
    "full-pp2-vpp2": (2, dict(pp=2, vpp=2, **FULL)),
    "micro-batches-of-four": (2, dict(micro_batch_size=4)),
}


@pytest.mark.parametrize("base", [MASKED, PAIRS], ids=["masked", "pairs"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_the_single_process_does(name, base, pool, alone):
    processes, layout = LAYOUTS[name]
    obeys(pool, alone, processes, base, layout)


def test_eight_processes_train_as_one(pool, alone):
    obeys(pool, alone, 8, PAIRS, dict(tp=2, pp=2, **SP, **DIST))


SHAPES = {
    "untied": PAIRS | dict(tie_word_embeddings=False),
    "rope": PAIRS | dict(position_embedding="rope"),
    "rope-untied-masked": MASKED | dict(position_embedding="rope", tie_word_embeddings=False),
    "types-without-pairs": MASKED | dict(num_tokentypes=2, vocab_size=96),
    "rms-swiglu-gqa": PAIRS
    | dict(
        position_embedding="rope",
        normalization="RMSNorm",
        activation="swiglu",
        num_query_groups=2,
        add_bias_linear=False,
    ),
}


@pytest.mark.parametrize(
    "layout", [dict(tp=2, pp=2, **SP), dict(cp=2, **DIST)], ids=["tp2-pp2-sp", "cp2-dp2-dist"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_model_shape_obeys_the_law(shape, layout, pool, alone):
    obeys(pool, alone, 4, SHAPES[shape], layout, make=short)


@pytest.mark.parametrize(
    "processes, layout",
    [(4, dict(tp=2, pp=2, **SP)), (4, dict(tp=2, **DIST)), (2, dict(pp=2, vpp=2)), (4, dict(cp=2))],
    ids=["tp2-pp2-sp", "tp2-dp2-dist", "pp2-vpp2", "cp2-dp2"],
)
@pytest.mark.parametrize("kind", TYPES)
def test_fine_tuning_obeys_the_law(kind, processes, layout, pool, alone):
    obeys(
        pool,
        alone,
        processes,
        MASKED | dict(num_labels=3, problem_type=kind),
        layout,
        labelled_rows,
    )


@pytest.mark.parametrize(
    "processes, layout",
    [(4, dict(tp=2, **SP, **DIST)), (2, dict(pp=2, vpp=2))],
    ids=["tp2-dp2-sp-dist", "pp2-vpp2"],
)
def test_bf16_errs_in_a_layout_as_in_one_process(processes, layout, pool, alone):
    obeys(pool, alone, processes, PAIRS | dict(dtype="bf16"), layout)


@pytest.mark.parametrize(
    "processes, layout", [(1, {}), (4, dict(tp=2, pp=2, **SP))], ids=["single", "tp2-pp2-sp"]
)
def test_recomputation_with_dropout_changes_no_bit(processes, layout, pool):
    base = PAIRS | dict(hidden_dropout=0.1, attention_dropout=0.1, steps=3) | layout
    plain = pool(processes, run_layout, tiny(**base), bert_rows)
    assert (
        plain[0][0]
        != pool(processes, run_layout, tiny(**base | dict(hidden_dropout=0.0)), bert_rows)[0][0]
    )
    for recompute in (SELECTIVE, FULL):
        recomputed = pool(processes, run_layout, tiny(**base, **recompute), bert_rows)
        for (curve, _, end), (again, _, other) in zip(plain, recomputed, strict=True):
            assert curve == again and all(
                torch.equal(a, b) for (_, a, *_), (_, b, *_) in zip(end, other, strict=True)
            )


def whole(config):
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        return mf.whole_parameters(mf.setup(config, pg).chunks, config.model, pg)


def test_whole_parameters_have_no_row_that_pads_the_vocabulary(pool):
    (alone,), (cut, _) = pool(1, whole, tiny(**PAIRS)), pool(2, whole, tiny(**PAIRS, tp=2))
    assert (
        alone.keys() == cut.keys()
        and all(torch.equal(alone[name], cut[name]) for name in alone)
        and alone["output_layer.bias"].shape == (97,)
    )


# --------------------------------------------------------------- the single process itself is right


def step_config(**shape):
    return tiny(steps=1, global_batch_size=4, clip_grad=0.0, warmup_iters=None, **shape)


def one_step(config, batch, backwards=False):
    """Metrics, weights before and gradients of one step of one process, by name."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg, model=noisy)
        weights = mf.whole_parameters(state.chunks, config.model, pg)
        _, metrics = mf.train_step(state, batch, mf.step_fn("bert"))
        return (
            metrics,
            weights,
            {
                part.name: part.parameter.main_grad.clone()
                for part in local_parameters(state.chunks[0], config.model, pg)
            },
        )


def hugging_face_batch(**labels):
    """Four sequences of 32, 20, 9 and 30 tokens, in which about a third of the tokens is to be
    predicted."""
    draw = torch.Generator().manual_seed(3)
    n = torch.tensor([32, 20, 9, 30])[:, None]
    ids, at = torch.randint(0, 97, (4, 32), generator=draw), torch.arange(32)[None]
    wanted = torch.randint(0, 97, (4, 32), generator=draw).masked_fill(
        (torch.rand(4, 32, generator=draw) < 0.7) | (at >= n), -100
    )
    return {
        "input_ids": ids,
        "attention_mask": (at < n).long(),
        "token_type_ids": ((at >= n // 2) & (at < n)).long(),
        "labels": wanted,
    } | labels


def as_megatron_bert(whole, model):
    """Weights (or gradients) under the names of transformers' MegatronBert."""
    heads, size, names = (
        model.num_attention_heads,
        model.head_size,
        {"lm_head.layer_norm": "cls.predictions.transform.LayerNorm"},
    )
    made = {
        f"bert.embeddings.{ours.replace('tokentype', 'token_type')}.weight": whole[
            f"embedding.{ours}.weight"
        ]
        for ours in ("word_embeddings", "position_embeddings", "tokentype_embeddings")
    }
    names |= {
        "encoder.final_layernorm": "bert.encoder.ln",
        "lm_head.dense": "cls.predictions.transform.dense",
        "pooler.dense": "bert.pooler.dense",
        "binary_head": "cls.seq_relationship",
        "classification_head": "classifier",
    }
    for i in range(model.num_layers):
        names |= {
            f"encoder.layers.{i}.{ours}": f"bert.encoder.layer.{i}.{theirs}"
            for ours, theirs in {
                "input_layernorm": "attention.ln",
                "self_attention.linear_proj": "attention.output.dense",
                "pre_mlp_layernorm": "ln",
                "mlp.linear_fc1": "intermediate.dense",
                "mlp.linear_fc2": "output.dense",
            }.items()
        }
    for kind in ("weight", "bias"):
        made |= {
            f"{theirs}.{kind}": whole[f"{ours}.{kind}"]
            for ours, theirs in names.items()
            if f"{ours}.{kind}" in whole
        }
        for i in range(model.num_layers):
            qkv = (
                whole[f"encoder.layers.{i}.self_attention.linear_qkv.{kind}"]
                .view(heads, 3, size, -1)
                .unbind(1)
            )
            made |= {
                f"bert.encoder.layer.{i}.attention.self.{name}.{kind}": x.flatten(0, 1)
                if kind == "weight"
                else x.flatten()
                for name, x in zip(("query", "key", "value"), qkv, strict=True)
            }
    if "output_layer.bias" in whole:
        made |= {
            "cls.predictions.bias": whole["output_layer.bias"],
            "cls.predictions.decoder.bias": whole["output_layer.bias"],
            "cls.predictions.decoder.weight": whole["embedding.word_embeddings.weight"],
        }
    return made


PROBLEMS = {
    "MegatronBertForMaskedLM": (dict(num_tokentypes=2), {}),
    "MegatronBertForPreTraining": (PAIRS, dict(next_sentence_label=torch.tensor([1, 0, 0, -100]))),
    "one of several": (
        dict(num_tokentypes=2, num_labels=3),
        dict(labels=torch.tensor([1, 0, -100, 2])),
    ),
    "several of several": (
        dict(num_tokentypes=2, num_labels=3),
        dict(labels=torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])),
    ),
    "a number": (
        dict(num_tokentypes=2, num_labels=1),
        dict(labels=torch.tensor([0.5, -1.0, 2.0, 3.0])),
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_loss_and_gradients_are_those_of_transformers(problem, pool):
    transformers = pytest.importorskip("transformers")
    shape, labels = PROBLEMS[problem]
    config, batch = step_config(**MASKED | shape), hugging_face_batch(**labels)
    theirs = getattr(
        transformers, problem if " " not in problem else "MegatronBertForSequenceClassification"
    )(
        transformers.MegatronBertConfig(
            num_hidden_layers=4,
            hidden_size=32,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=32,
            vocab_size=97,
            layer_norm_eps=1e-5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=config.model.num_labels or 2,
            pad_token_id=None,
        )
    )
    metrics, weights, gradients = pool(1, one_step, config, halves(batch))[0]
    told = theirs.load_state_dict(as_megatron_bert(weights, config.model), strict=False)
    assert not told.unexpected_keys and not [
        key for key in told.missing_keys if "position_ids" not in key
    ]
    expected = theirs.double()(
        **{
            key: value.double() if value.is_floating_point() else value
            for key, value in batch.items()
        }
    ).loss
    expected.backward()
    assert metrics.loss == pytest.approx(expected.item(), rel=1e-5)
    gradients, exact = (
        as_megatron_bert(gradients, config.model),
        {name: parameter.grad for name, parameter in theirs.named_parameters()},
    )
    for name in exact:
        if name.endswith("key.bias"):  # softmax is blind to it: its gradient is rounding alone
            assert (
                gradients[name].abs().max() < 1e-5 * exact[name.replace("key", "query")].abs().max()
            )
        else:
            assert_close(name, gradients[name], exact[name])


def beside_megatron(config, batch):
    """What the built-in stage and megatron-core's own BertModel with the same weights make of a
    batch: losses and gradients."""
    from megatron.core import parallel_state
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    model, step = config.model, mf.step_fn("bert")
    with contextlib.ExitStack() as leaving:
        pg = leaving.enter_context(
            mf.init_groups(mf.build_groups(config.parallel, mf.world_size()))
        )
        parallel_state.initialize_model_parallel()  # BertModel asks it
        leaving.callback(parallel_state.destroy_model_parallel)
        leaving.enter_context(megatron_context(pg, 1))
        stage = noisy(config, pg, pre_process=True, post_process=True, vp_stage=None)
        theirs = BertModel(
            mf.transformer_config(config, pg),
            model.num_tokentypes,
            bert_layer_local_spec,
            model.vocab_size,
            model.seq_length,
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type=model.position_embedding,
            add_binary_head=model.bert_binary_head,
        )
        theirs.load_state_dict(stage.state_dict())
        (made,) = step.prepare_global_batch([step.batch(batch, config, pg)], pg)
        found = step.loss(step.forward(stage, made), made, pg)
        losses, order = theirs(
            batch["text"],
            batch["padding_mask"],
            batch["types"] if model.num_tokentypes else None,
            lm_labels=batch["labels"],
        )
        expected, count = (losses * batch["loss_mask"]).sum(), batch["loss_mask"].sum()
        if order is not None:
            expected = expected + count * torch.nn.functional.cross_entropy(
                order, batch["is_random"], ignore_index=-1
            )
        found.sum.backward(), expected.backward()
        gradients, theirs = (
            {name: parameter.grad for name, parameter in one.named_parameters()}
            for one in (stage, theirs)
        )
        return found.sum.item(), expected.item(), bool(found.count == count), gradients, theirs


@pytest.mark.parametrize(
    "shape",
    [MASKED, PAIRS, SHAPES["rope"], SHAPES["untied"]],
    ids=["masked", "pairs", "rope", "untied"],
)
def test_loss_and_gradients_are_those_of_megatron_cores_own_model(shape, pool):
    config = step_config(**shape)
    ours, theirs, same_count, gradients, expected = pool(
        1, beside_megatron, config, stack(bert_rows(config, 1))
    )[0]
    assert (
        ours == pytest.approx(theirs, rel=1e-5)
        and same_count
        and gradients.keys() == expected.keys()
    )
    for name, gradient in gradients.items():
        assert_close(name, gradient, expected[name])


# --------------------------------------------------------------------------- logits, steps, batches


def logits_of(config, data, every_stage):
    """Where this rank stands, the logits of a step and of an evaluation on its share, and those
    that `megafn.logits` gives of a row."""
    config = attrs.evolve(config, return_logits="every_stage" if every_stage else "last_stage")
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state, batch = mf.setup(config, pg), share(data(config, 0), config, pg)
        report = mf.evaluate(state, [batch], mf.step_fn("bert"))
        # 27 tokens: padded under sequence and context parallelism
        found = mf.logits(state, bert_rows(config, 0)[0]["text"][None, :27])
        _, metrics = mf.train_step(state, batch, mf.step_fn("bert"))
        return pg.dp_rank, pg.is_last_stage or every_stage, metrics.logits, report.logits, (found,)


@pytest.mark.parametrize(
    "n, layout, every_stage",
    [(4, dict(tp=2, pp=2, **SP), False), (4, dict(pp=2, vpp=2), True), (2, dict(cp=2), False)],
)
@pytest.mark.parametrize(
    "base, data",
    [
        (PAIRS, bert_rows),
        (MASKED, bert_rows),
        (MASKED | dict(num_labels=3, problem_type="multi_label_classification"), labelled_rows),
    ],
    ids=["pairs", "masked", "labels"],
)
def test_logits_are_those_of_the_single_process_and_lie_where_they_are_asked_for(
    base, data, n, layout, every_stage, pool
):
    def flat(outputs):
        return [tensor for one in outputs for tensor in (one if isinstance(one, tuple) else (one,))]

    _, _, whole, _, row = pool(1, logits_of, tiny(**base), data, False)[0]
    shapes = {"pairs": [(2, 32, 97), (2, 2)], "masked": [(2, 32, 97)], "labels": [(2, 3)]}
    assert [tuple(one.shape) for one in flat(whole[:1])] == shapes[
        "labels" if "num_labels" in base else "pairs" if "bert_binary_head" in base else "masked"
    ]
    for dp_rank, here, trained, evaluated, found in pool(
        n, logits_of, tiny(**base, **layout), data, every_stage
    ):
        assert (trained is not None) == (evaluated is not None) == here
        mine = whole if n == 2 or layout.get("tp") else whole[dp_rank::2]
        for ours, exact in [(found, row), *[(one, mine) for one in (trained, evaluated) if here]]:
            assert len(ours) == len(exact)
            for a, b in zip(flat(ours), flat(exact), strict=True):
                assert a.shape == b.shape and torch.allclose(a, b, atol=1e-4)


def focal(output, batch, pg):
    """A loss of one's own, of both heads: likely tokens count less, and nothing is known of the
    whole global batch."""
    logits, order = output
    losses = mf.cross_entropy(logits, batch["labels"], pg) * batch["loss_mask"]
    focused = ((1 - (-losses).exp()) * losses).sum()
    pairs = torch.nn.functional.cross_entropy(
        order, batch["is_random"], ignore_index=-100, reduction="sum"
    ) * (pg.place.cp == 0)
    return mf.Loss(
        sum=focused + pairs, count=batch["loss_mask"].sum(), report={"plain": losses.sum()}
    )


@pytest.mark.parametrize(
    "processes, layout",
    [(4, dict(tp=2, pp=2, **SP)), (4, dict(cp=2, **DIST))],
    ids=["tp2-pp2-sp", "cp2-dp2-dist"],
)
def test_a_loss_of_ones_own_obeys_the_law(processes, layout, pool):
    step = attrs.evolve(mf.step_fn("bert"), loss=focal, prepare_global_batch=None)
    alone = pool(1, run_layout, tiny(**PAIRS), rows_of_two, step)[0]
    assert_equal(alone, pool(processes, run_layout, tiny(**PAIRS, **layout), rows_of_two, step))


def halfway(config, directory, at):
    """As `run_layout`, saved at iteration `at`; or from there on, where a checkpoint is in the
    directory."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state, curve = mf.setup(config, pg), []
        before = local_parts(state)
        if at is None:
            state = mf.load(state, directory)
        for iteration in range(state.iteration, at or config.train_iters):
            state, metrics = mf.train_step(
                state, share(rows_of_two(config, iteration), config, pg), mf.step_fn("bert")
            )
            curve.append((metrics.loss, metrics.grad_norm))
        if at is not None:
            mf.save(state, directory)
        return curve, before, local_parts(state)


def test_a_checkpoint_goes_on_in_another_layout(pool, alone, tmp_path):
    base = PAIRS | dict(tie_word_embeddings=False)
    curve, before, after = alone(tiny(**base), data=bert_rows)
    pool(4, halfway, tiny(**base, tp=2, pp=2, **SP), tmp_path, 4)
    assert_equal((curve[4:], before, after), pool(2, halfway, tiny(**base, **DIST), tmp_path, None))


class Methods:
    """A train step of BERT with accelerate's three methods, as its own BertTrainStep is written;
    the loss by sum and count."""

    def __init__(self, config):
        pass

    def get_batch_func(self, accelerator, megatron_dataset_flag):
        return next

    def get_loss_func(self, accelerator, pretraining_flag=True):
        return lambda losses, mask: (
            (losses * mask).sum(),
            mask.sum(),
            {"lm loss": (losses * mask).sum()},
        )

    def get_forward_step_func(self):
        def forward_step(iterator, model):
            batch = self.get_batch(iterator)
            output = model(
                batch["text"],
                batch["padding_mask"],
                tokentype_ids=batch["types"],
                lm_labels=batch["labels"],
            )
            return output, lambda output: self.loss_func(output[0], batch["loss_mask"])

        return forward_step


def run_methods(config):
    return run_layout(config, rows_of_two, mf.step_of(config))


@pytest.mark.parametrize(
    "shape, processes, layout", [(MASKED, 1, {}), (PAIRS, 2, dict(pp=2))], ids=["single", "pp2"]
)
def test_accelerates_three_methods_train_a_bert(shape, processes, layout, pool):
    base = tiny(steps=3, **MASKED, num_tokentypes=2)
    config = attrs.evolve(
        tiny(steps=3, **shape | dict(num_tokentypes=2), **layout), step_function=Methods
    )
    plain = pool(1, run_layout, base, rows_of_two)[0][0]
    for curve, *_ in pool(processes, run_methods, config):
        assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in plain], abs=1e-5)


def means(config):
    """The mean losses of each data-parallel rank's own micro-batch, their `avg_losses`, and the
    report of one evaluation."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state, step, batch = (
            mf.setup(config, pg),
            mf.step_fn("bert"),
            share(bert_rows(config, 1), config, pg),
        )
        with torch.no_grad(), megatron_context(pg, 1):
            (made,) = step.prepare_global_batch([step.batch(batch[0], config, pg)], pg)
            loss = step.loss(step.forward(state.chunks[0], made), made, pg)
        mine = [loss.report["lm_loss"] / loss.count, loss.report["sop_loss"] / loss.count]
        return mine, mf.avg_losses(mine, pg.dp), mf.evaluate(state, [batch], step)


def test_the_report_has_both_losses_and_they_can_be_averaged_over_ranks(pool):
    first, second = pool(2, means, tiny(**PAIRS, global_batch_size=4))
    for _, averaged, report in (first, second):
        assert averaged.tolist() == pytest.approx(
            [float(x + y) / 2 for x, y in zip(first[0], second[0], strict=True)], rel=1e-5
        )
        assert report.report.keys() == {"lm_loss", "sop_loss"} and report.loss == pytest.approx(
            sum(report.report.values()), rel=1e-5
        )


IDS = torch.zeros(2, 8, dtype=torch.long)
WRONG = {
    "not a mapping": ([1], {}, "batch = list: expected a mapping with 'input_ids', or 'text'"),
    "other keys": (
        {"tokens": IDS},
        {},
        "batch keys = ['tokens']: expected 'input_ids', or 'text', 'labels' and 'loss_mask'",
    ),
    "types without a table": (
        {"input_ids": IDS, "token_type_ids": IDS + 1},
        {},
        "batch['token_type_ids'] from 1 to 1: the table of token types has "
        "model.num_tokentypes = 0 rows",
    ),
    "an order that is none": (
        {"text": IDS, "labels": IDS, "is_random": [0, 2]},
        PAIRS,
        "batch['is_random'] = torch.int64 of shape [2]: expected 0, 1 or -1 (no loss) of shape [2]",
    ),
    "no order": (
        {"input_ids": IDS, "labels": IDS},
        PAIRS,
        "expected 'next_sentence_label' [batch] for the binary head; "
        "give it, or leave model.bert_binary_head out",
    ),
    "a padding mask that is none": (
        {"text": IDS, "labels": IDS, "padding_mask": IDS + 192},
        {},
        "batch['padding_mask'] holds 192: expected zeros and ones",
    ),
    "a token outside": (
        {"input_ids": IDS + 97},
        {},
        "batch['input_ids']: token id 97 is outside the vocabulary",
    ),
    "a label outside": (
        {"input_ids": IDS, "labels": IDS - 1},
        {},
        "batch['labels']: token id -1 is outside the vocabulary",
    ),
    "a class outside": (
        {"input_ids": IDS, "labels": [0, 3]},
        dict(num_labels=3),
        "expected integers 0 to 2, or -100 (no loss), for single_label_classification",
    ),
    "too few flags": (
        {"input_ids": IDS, "labels": [[0.0, 1.0]] * 2},
        dict(num_labels=3),
        "expected 3 for each of 2 rows, for multi_label_classification with 3 labels",
    ),
    "no labels of a step": (
        {"input_ids": IDS},
        dict(num_labels=2),
        "batch['labels'] is missing: labels are what a model with num_labels is trained on",
    ),
    "flags that are none": (
        {"input_ids": IDS, "labels": [[0.0, 2.0]] * 2},
        dict(num_labels=2),
        "expected values from 0 to 1 for multi_label_classification",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_batch_that_cannot_be_is_refused_in_one_sentence(name):
    raw, shape, told = WRONG[name]
    config = tiny(**MASKED | shape)
    with (
        mf.init_groups(mf.build_groups(config.parallel, 1)) as pg,
        pytest.raises(ValueError) as caught,
    ):
        mf.step_fn("bert").prepare_global_batch([mf.step_fn("bert").batch(raw, config, pg)], pg)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_the_operations_of_its_heads_are_counted():
    gpt, bert, tuned = (
        mf.training_flops(tiny(**shape).model, 5)
        for shape in ({}, MASKED, MASKED | dict(num_labels=3))
    )
    assert bert - gpt == 3 * 5 * 32 * 2 * 32 * 32 and gpt - tuned == 3 * 5 * 32 * 2 * 32 * 97


def test_a_row_of_padding_alone_gives_numbers(pool):
    batch = hugging_face_batch()
    batch["attention_mask"][1], batch["labels"][1] = 0, -100
    metrics, *_ = pool(1, one_step, step_config(**MASKED, num_tokentypes=2), halves(batch))[0]
    assert metrics.loss == metrics.loss and metrics.grad_norm == metrics.grad_norm


def test_a_hugging_face_config_trains_as_its_head_says(pool):
    transformers = pytest.importorskip("transformers")
    for head, shape in (
        ("ForMaskedLM", {}),
        ("ForPreTraining", dict(bert_binary_head=True)),
        ("ForSequenceClassification", dict(num_labels=3)),
    ):
        theirs = transformers.MegatronBertConfig(
            num_hidden_layers=4,
            hidden_size=32,
            num_attention_heads=4,
            intermediate_size=128,
            vocab_size=97,
            max_position_embeddings=32,
            num_labels=3,
            architectures=["MegatronBert" + head],
        )
        config = mf.from_plugin(
            model=theirs,
            micro_batch_size=2,
            num_micro_batches=2,
            train_iters=2,
            lr=1e-3,
            eval_iters=1,
            tp_degree=2,
            world_size=2,
        )
        assert config.model == attrs.evolve(
            tiny(**MASKED).model,
            num_tokentypes=2,
            norm_epsilon=1e-12,
            hidden_dropout=0.1,
            attention_dropout=0.1,
            ffn_hidden_size=128,
            max_position_embeddings=32,
            **shape,
        )
        labels = (
            {"labels": torch.tensor([0, 2, 1, -100])}
            if "num_labels" in shape
            else {"next_sentence_label": torch.tensor([0, 1, 1, 0])}
        )
        state = pool(2, trained, config, halves(hugging_face_batch(**labels)) * 2)[0]
        assert state == 2
    assert (
        mf.from_plugin(
            model=theirs,
            micro_batch_size=2,
            train_iters=2,
            lr=1e-3,
            other_megatron_args={"num_labels": 1},
        ).model.num_labels
        == 1
    )


def trained(config, batches):
    return mf.train(
        attrs.evolve(config, log=mf.LogConfig(progress=False), eval_iters=0, eval_interval=None),
        batches=batches,
    ).iteration

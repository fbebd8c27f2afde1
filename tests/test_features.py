"""What a step promises beside equal curves: masks, lengths, counts, dropout, evaluation, logits,
and pieces of the user's own."""

import gc
import os
import time
import warnings
from functools import partial

import attrs
import pytest
import torch
import torch.nn.functional as F

import megafn as mf
from equivalence import assert_equal, local_parts, run_layout, share, short, uneven
from gpt_rows import alone_rows, document_rows, growing_rows, key_rows, padded_rows
from megafn.runtime.model.layers import Attention
from megafn.runtime.parallel.megatron_context import megatron_context
from step_runs import metrics_of, refused

SP, DIST = dict(sequence_parallel=True), dict(use_distributed_optimizer=True)
ROPE = dict(position_embedding="rope")


def obeys(pool, processes, base, layout, data):
    assert_equal(
        pool(1, run_layout, short(**base), data)[0],
        pool(processes, run_layout, short(**base, **layout), data),
    )


# ------------------------------------------------------------------------ masks, positions, lengths


@pytest.mark.parametrize(
    "processes, layout",
    [
        (2, dict(tp=2, **SP)),
        (2, dict(pp=2, vpp=2)),
        (2, dict(cp=2)),
        (8, dict(tp=2, cp=2, pp=2, **SP)),
    ],
    ids=["tp2-sp", "pp2-vpp2", "cp2", "tp2-cp2-pp2-sp"],
)
@pytest.mark.parametrize(
    "kind, base",
    [("padded", {}), ("padded", ROPE), ("documents", {}), ("documents", ROPE), ("keys", {})],
    ids=["padded", "padded-rope", "documents", "documents-rope", "keys"],
)
def test_masks_and_positions_are_cut_as_the_sequence_is(kind, base, processes, layout, pool):
    obeys(
        pool,
        processes,
        base,
        layout,
        {"padded": padded_rows, "documents": document_rows, "keys": key_rows}[kind],
    )


@pytest.mark.parametrize(
    "processes, layout",
    [
        (2, dict(pp=2)),
        (2, dict(pp=2, vpp=2)),
        (4, dict(pp=2, tp=2, **SP)),
        (4, dict(pp=2, cp=2)),
        (4, dict(pp=2, **DIST)),
    ],
    ids=["pp2", "pp2-vpp2", "tp2-pp2-sp", "cp2-pp2", "pp2-dp2-dist"],
)
def test_lengths_may_change_from_micro_batch_to_micro_batch(processes, layout, pool):
    obeys(pool, processes, {}, layout, growing_rows)


@pytest.mark.parametrize(
    "processes, layout",
    [(4, DIST), (4, dict(cp=4)), (4, dict(tp=2, pp=2, **SP))],
    ids=["dp4-dist", "cp4", "tp2-pp2-sp"],
)
def test_one_token_in_the_whole_global_batch_is_enough(processes, layout, pool):
    obeys(pool, processes, {}, layout, alone_rows)


def seen_logits(config, batch):
    """(loss, count, logits [b, s, vocabulary]) of one process's evaluation of a raw micro-batch."""
    seen, step = [], mf.step_fn("gpt")

    def loss(logits, batch, pg):
        seen.append(logits.clone())
        return step.loss(logits, batch, pg)

    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg)
        report = mf.evaluate(state, [[batch]], attrs.evolve(step, loss=loss))
        return report.loss, report.count, seen[0].transpose(0, 1)


@pytest.mark.parametrize("labels", [True, False], ids=["labels given", "labels from input_ids"])
@pytest.mark.parametrize("base", [{}, ROPE], ids=["learned", "rope"])
def test_padding_changes_neither_logits_nor_loss(base, labels, pool):
    config = short(global_batch_size=2, **base)
    ids = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    bare = {"input_ids": ids} | ({"labels": ids} if labels else {})
    loss, count, logits = pool(1, seen_logits, config, bare)[0]
    assert count == 2 * 23
    for left, right in ((8, 0), (0, 8), (5, 3)):
        mask = F.pad(torch.ones_like(ids), (left, right))
        padded = {"input_ids": F.pad(ids, (left, right), value=13), "attention_mask": mask}
        if base == {}:
            # a learned table needs them
            padded["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if labels:
            padded["labels"] = F.pad(ids, (left, right), value=-100)
        loss2, count2, logits2 = pool(1, seen_logits, config, padded)[0]
        assert count2 == count and loss2 == pytest.approx(loss, abs=1e-6)
        assert (logits2[:, left : left + 24] - logits).abs().max() < 1e-5


# ------------------------------------------------------------------------ counts, refusals, records


@pytest.mark.parametrize(
    "processes, layout",
    [(1, {}), (4, dict(tp=2, pp=2)), (2, dict(pp=2, vpp=2)), (4, dict(cp=2, **DIST))],
    ids=["single", "tp2-pp2", "pp2-vpp2", "cp2-dp2-dist"],
)
def test_a_global_batch_in_which_nothing_counts_is_refused_on_every_rank_and_changes_nothing(
    processes, layout, pool
):
    config = short(**layout)
    empty = [row | {"loss_mask": torch.zeros(32)} for row in uneven(config, 0)]
    curve, *_ = pool(processes, run_layout, config)[0]
    for told, moved, good in pool(processes, refused, config, empty, mf.step_fn("gpt")):
        assert (
            told.startswith("loss_mask: 0 tokens count in this whole global batch")
            and not moved
            and good == curve[0]
        )


def half_counts(logits, batch, pg):
    return mf.Loss(
        sum=mf.token_loss(logits, batch, pg).sum, count=batch["loss_mask"].sum() / 2 + 0.25
    )


def no_loss(logits, batch, pg):
    return mf.token_loss(logits, batch, pg).sum


@pytest.mark.parametrize(
    "loss, told",
    [
        (half_counts, "not a whole number; count tokens or samples"),
        (no_loss, "step.loss returned Tensor: return megafn.Loss"),
    ],
)
def test_a_loss_that_is_none_is_refused_on_every_rank_and_changes_nothing(loss, told, pool):
    config = short(tp=2)
    for text, moved, _ in pool(
        2, refused, config, uneven(config, 0), attrs.evolve(mf.step_fn("gpt"), loss=loss)
    ):
        assert told in text and not moved


def ends(config, step):
    """How this rank's run ends: the exception's type, and after how many seconds."""
    start = time.monotonic()
    try:
        run_layout(config, step=step)
    except Exception as error:
        told = type(error).__name__
    gc.collect()  # its frames held the connections, as they do until a process ends
    return told, time.monotonic() - start


def test_a_loss_that_fails_on_the_last_stage_ends_the_stages_before_it(pool):
    first, last = pool(2, ends, short(pp=2), attrs.evolve(mf.step_fn("gpt"), loss=half_counts))
    assert last[0] == "ValueError" and first[1] < 20


def own_batch(raw, config, pg):
    """The task: say the token again; counted from the eighth position on."""
    ids = raw["tokens"]
    return {
        "tokens": ids,
        "labels": ids,
        "loss_mask": (torch.arange(ids.size(1)) >= 8).long().expand_as(ids),
    }


def own_forward(model, batch):
    return model(batch["tokens"])


def own_loss(logits, batch, pg, *, weight):
    losses, right = (
        mf.cross_entropy(logits, batch["labels"], pg),
        mf.argmax(logits, pg) == batch["labels"],
    )
    squares, mask = mf.logsumexp(logits, pg) ** 2, batch["loss_mask"]
    return mf.Loss(
        sum=((losses + weight * squares) * mask).sum(),
        count=mask.sum(),
        report={
            "accuracy": (right * mask).sum(),
            "squares": (squares * mask).sum(),
            "tokens": mask.sum(),
        },
    )


OWN = mf.Step(batch=own_batch, forward=own_forward, loss=partial(own_loss, weight=1e-2))


@pytest.mark.parametrize(
    "processes, layout",
    [(8, dict(tp=2, pp=2, **SP)), (4, dict(cp=2, **DIST)), (2, dict(pp=2, vpp=2))],
    ids=["tp2-pp2-dp2-sp", "cp2-dp2-dist", "pp2-vpp2"],
)
def test_a_step_of_ones_own_obeys_the_law_and_every_rank_is_told_the_same(processes, layout, pool):
    config = short(lr=5e-2, steps=4)
    alone, *_ = pool(1, metrics_of, config, OWN)
    first, *others = pool(processes, metrics_of, short(lr=5e-2, steps=4, **layout), OWN)
    assert all(other == first for other in others)  # bit for bit, on the stages before the last too
    assert all(0.1 < one["report"]["accuracy"] < 0.95 for one in alone)
    for one, many in zip(alone, first, strict=True):
        assert many["count"] == one["count"] == 16 * 24 and many["report"]["tokens"] == 1
        assert many["report"]["accuracy"] == one["report"]["accuracy"]
        for key in ("loss", "grad_norm", "lr", "weight_decay"):
            assert many[key] == pytest.approx(one[key], abs=1e-4)
        assert many["report"]["squares"] == pytest.approx(one["report"]["squares"], rel=1e-5)


def louder(config, pg, **flags):
    """A model function of one's own around the built-in one: another initialisation of what writes
    to the residual stream."""
    stage = mf.build_chunk(config, pg, **flags)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if name.endswith("linear_fc2.weight"):
                parameter *= 5
    return stage


def frozen(config, pg, **flags):
    """Another: word embeddings and all norms stay as they are."""
    stage = louder(config, pg, **flags)
    for name, parameter in stage.named_parameters():
        if "word_embeddings" in name or "output_layer" in name or "norm" in name:
            parameter.requires_grad_(False)
    return stage


def run_model(config, model):
    """As `run_layout`, with a model function: the parameters that moved, and names of those that
    did not."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state, curve = mf.setup(config, pg, model=model), []
        before = local_parts(state)
        for iteration in range(config.train_iters):
            state, metrics = mf.train_step(
                state, share(uneven(config, iteration), config, pg), mf.step_fn("gpt")
            )
            curve.append((metrics.loss, metrics.grad_norm))
        pairs = list(zip(before, local_parts(state), strict=True))
        moved = [(a, b) for a, b in pairs if not torch.equal(a[1], b[1])]
        still = {a[0] for a, b in pairs if torch.equal(a[1], b[1])}
        return (curve, *map(list, zip(*moved, strict=True))), still


@pytest.mark.parametrize("model", [louder, frozen])
@pytest.mark.parametrize(
    "processes, layout",
    [(4, dict(tp=2, pp=2, **SP)), (4, dict(pp=2, **DIST))],
    ids=["tp2-pp2-sp", "pp2-dp2-dist"],
)
def test_a_model_function_of_ones_own_obeys_the_law(model, processes, layout, pool):
    alone, still = pool(1, run_model, short(), model)[0]
    results = pool(processes, run_model, short(**layout), model)
    assert_equal(alone, [result for result, _ in results])
    assert set().union(*(names for _, names in results)) == still and bool(still) == (
        model is frozen
    )
    assert alone[0] != pool(1, run_layout, short())[0][0]  # it was this model indeed


# --------------------------------------------------------------------------------------- evaluation


def evaluated(config):
    """(report before a step, the step's metrics) on one global batch, each step; with and without
    evaluations between."""
    step, found = mf.step_fn("gpt"), []
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state, other = mf.setup(config, pg), mf.setup(config, pg)
        for iteration in range(config.train_iters):
            batch = share(uneven(config, iteration), config, pg)
            report = mf.evaluate(state, [batch], step)
            state, metrics = mf.train_step(state, batch, step)
            other, same = mf.train_step(other, batch, step)
            assert (metrics.loss, metrics.grad_norm) == (same.loss, same.grad_norm), (
                "evaluating changed the run"
            )
            found.append((report.loss, report.count, metrics.loss, metrics.count))
        whole = mf.evaluate(state, [share(uneven(config, i), config, pg) for i in range(3)], step)
        parts = [mf.evaluate(state, [share(uneven(config, i), config, pg)], step) for i in range(3)]
        return found, whole, parts


LAYOUTS = [
    (1, {}),
    (2, dict(tp=2, **SP)),
    (2, dict(pp=2)),
    (2, dict(pp=2, vpp=2)),
    (4, dict(cp=2, **DIST)),
]


@pytest.mark.parametrize(
    "processes, layout", LAYOUTS, ids=["single", "tp2-sp", "pp2", "pp2-vpp2", "cp2-dp2-dist"]
)
def test_an_evaluation_is_the_training_loss_of_the_same_weights_and_leaves_the_run_alone(
    processes, layout, pool
):
    first, *others = pool(processes, evaluated, short(**layout))
    found, whole, parts = first
    assert all(other == first for other in others)
    for loss, count, trained, counted in found:
        assert loss == pytest.approx(trained, abs=1e-6) and count == counted
    assert whole.count == sum(part.count for part in parts)
    assert whole.loss == pytest.approx(
        sum(part.loss * part.count for part in parts) / whole.count, abs=1e-6
    )


def dropped(config):
    """Losses of one batch: evaluated with and without dropout in the config, trained with it."""
    step = mf.step_fn("gpt")
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        batch, dry = (
            share(uneven(config, 0), config, pg),
            attrs.evolve(
                config, model=attrs.evolve(config.model, hidden_dropout=0.0, attention_dropout=0.0)
            ),
        )
        state = mf.setup(config, pg)
        return [
            mf.evaluate(state, [batch], step).loss,
            mf.evaluate(mf.setup(dry, pg), [batch], step).loss,
            mf.train_step(state, batch, step)[1].loss,
        ]


def test_an_evaluation_drops_nothing(pool):
    evaluated, dry, trained = pool(2, dropped, short(tp=2, **DROPOUT))[0]
    assert evaluated == dry and abs(trained - dry) > 1e-3


# ------------------------------------------------------------------------------------------ dropout

# Weights so large that a mask changes the loss.
DROPOUT = dict(hidden_dropout=0.1, attention_dropout=0.1, init_method_std=0.2)
FULL, BLOCK, SELECTIVE = (
    mf.RecomputeConfig(granularity=g, method=m)
    for g, m in (("full", "uniform"), ("full", "block"), ("selective", "uniform"))
)


def largest_difference(left, right):
    """Of loss, grad norm and weights over all ranks of two runs in the same layout."""
    worst = 0.0
    for (curve, _, after), (other, _, last) in zip(left, right, strict=True):
        worst = max(
            [
                worst,
                *(
                    abs(a - b)
                    for x, y in zip(curve, other, strict=True)
                    for a, b in zip(x, y, strict=True)
                ),
            ]
        )
        worst = max(
            [worst, *((a[1] - b[1]).abs().max().item() for a, b in zip(after, last, strict=True))]
        )
    return worst


@pytest.mark.parametrize("recompute", [SELECTIVE, FULL, BLOCK], ids=["selective", "full", "block"])
@pytest.mark.parametrize(
    "processes, layout",
    [(1, {}), (4, dict(tp=2, pp=2, **SP)), (4, dict(tp=2, cp=2))],
    ids=["single", "tp2-pp2-sp", "tp2-cp2"],
)
def test_recomputation_draws_the_same_dropout_again(processes, layout, recompute, pool):
    kept = pool(processes, run_layout, short(**layout, **DROPOUT))
    again = pool(processes, run_layout, short(**layout, **DROPOUT, recompute=recompute))
    assert largest_difference(kept, again) == 0
    assert (
        abs(
            kept[0][0][0][0]
            - pool(processes, run_layout, short(steps=4, **layout, init_method_std=0.2))[0][0][0][0]
        )
        > 1e-3
    )


def test_the_distributed_optimizer_changes_no_dropout(pool):
    for layout in (dict(tp=2), dict(cp=2), dict(pp=2)):
        plain = pool(4, run_layout, short(**layout, **DROPOUT))
        assert (
            largest_difference(plain, pool(4, run_layout, short(**layout, **DROPOUT, **DIST)))
            < 1e-6
        )


@pytest.mark.parametrize(
    "processes, layout",
    [(4, dict(tp=2, pp=2)), (4, dict(tp=2, cp=2, **SP)), (4, dict(tp=2, **SP, **DIST))],
    ids=["tp2-pp2", "tp2-cp2-sp", "tp2-dp2-sp-dist"],
)
def test_what_is_replicated_stays_equal_to_the_bit_under_dropout(processes, layout, pool):
    """Were a mask of the hidden state drawn twice, the copies of a norm's weight would part."""
    held = {}
    for _, _, after in pool(processes, run_layout, short(**layout, **DROPOUT)):
        for name, value, _, dim, _, _, tp_rank in after:
            assert torch.equal(
                value, held.setdefault((name, dim is not None and tp_rank), value)
            ), name


def masks(config):
    """Whether attention drops the same in each head of the heads of all tp ranks, and what the
    default random state drops."""
    with (
        mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg,
        megatron_context(pg, config.seed, "test"),
    ):
        mcore = mf.transformer_config(config, pg)
        attention = Attention(mcore, 1, None, "self", pg_collection=pg.collection)
        query, key = torch.zeros(2, 32, 1, 2, 8)
        value = torch.eye(32)[:, None, None, :8].expand(32, 1, 2, 8).contiguous()
        return (
            attention(query, key, value, None).view(32, 1, 2, 8).unbind(2),
            F.dropout(torch.ones(64), 0.5),
            pg.place,
        )


def test_heads_have_masks_of_their_own_and_the_hidden_state_one_for_all_of_tp(pool):
    drawn = pool(4, masks, short(tp=2, attention_dropout=0.5))
    heads = [head for found, *_ in drawn for head in found]
    # dp ranks differ as well
    assert not any(torch.equal(a, b) for i, a in enumerate(heads) for b in heads[:i])
    for _, hidden, place in drawn:
        for _, other, elsewhere in drawn:
            assert torch.equal(hidden, other) == (place.dp == elsewhere.dp)


def carried_on(config, sample):
    """Losses of the third step of a run, of a fresh state with its weights and position, and of one
    at another position."""
    step = mf.step_fn("gpt")
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg)
        for iteration in range(2):
            state, _ = mf.train_step(state, share(uneven(config, iteration), config, pg), step)
        torch.manual_seed(sample)  # what else draws in the process is of no matter
        losses = []
        for position in (state.consumed_samples, state.consumed_samples + 16, None):
            other = state
            if position is not None:
                other = attrs.evolve(mf.setup(config, pg), consumed_samples=position)
                with torch.no_grad():
                    for mine, theirs in zip(other.chunks, state.chunks, strict=True):
                        mine.load_state_dict(theirs.state_dict())
            losses.append(mf.train_step(other, share(uneven(config, 2), config, pg), step)[1].loss)
        return losses


@pytest.mark.parametrize(
    "processes, layout", [(1, {}), (4, dict(tp=2, pp=2, **SP))], ids=["single", "tp2-pp2-sp"]
)
def test_randomness_is_a_function_of_seed_and_consumed_samples_alone(processes, layout, pool):
    for here, elsewhere, on in (
        pool(processes, carried_on, short(**layout, **DROPOUT), sample)[0] for sample in (1, 2)
    ):
        assert here == on and abs(elsewhere - on) > 1e-4
    assert carried_seed(pool, processes, layout, 1) != carried_seed(pool, processes, layout, 2)


def carried_seed(pool, processes, layout, seed):
    return pool(processes, run_layout, short(**layout, **DROPOUT, seed=seed))[0][0]


# ------------------------------------------------------------------------------------------- logits


def spoken(config, tokens):
    """Logits after two steps."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg)
        for iteration in range(2):
            state, _ = mf.train_step(
                state, share(uneven(config, iteration), config, pg), mf.step_fn("gpt")
            )
        numbers = torch.get_rng_state()
        found = [mf.logits(state, tokens[:, :length]) for length in (1, 13, 32)]
        assert torch.equal(numbers, torch.get_rng_state()) and all(
            chunk.training for chunk in state.chunks
        )
        _, metrics = mf.train_step(state, share(uneven(config, 2), config, pg), mf.step_fn("gpt"))
        return found, metrics.loss


@pytest.mark.parametrize(
    "processes, layout",
    [
        (4, dict(tp=2)),
        (2, dict(pp=2)),
        (2, dict(pp=2, vpp=2)),
        (2, dict(cp=2)),
        (2, dict(tp=2, **SP)),
        (8, dict(tp=2, pp=2, cp=2, **SP)),
    ],
    ids=["tp2-dp2", "pp2", "pp2-vpp2", "cp2", "tp2-sp", "tp2-cp2-pp2-sp"],
)
def test_logits_are_the_single_processs_on_every_rank(processes, layout, pool):
    tokens = torch.randint(0, 97, (3, 32), generator=torch.Generator().manual_seed(9))
    expected, loss = pool(1, spoken, short(init_method_std=0.2), tokens)[0]
    first, *others = pool(processes, spoken, short(init_method_std=0.2, **layout), tokens)
    for found, after in (first, *others):
        assert all(map(torch.equal, found, first[0])) and after == pytest.approx(loss, abs=1e-4)
    for ours, theirs in zip(first[0], expected, strict=True):
        assert (
            ours.shape == theirs.shape
            and ours.shape[-1] == 97
            and (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
        )


# ----------------------------------------------------------------------------- batches of one's own


def agreeing(config, kind):
    """What `train` makes of batches that differ over ranks: the iterations it made, and what it
    raised."""
    from megafn.runtime.data.same_batches import check_same_batches

    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size()), timeout_seconds=20
    ) as pg:
        of_rank = {
            "dp": pg.dp_rank,
            "tp": pg.place.tp,
            "pp": pg.place.pp,
            "last": pg.rank == 3,
            "late": 0,
        }[kind]
        batches = [
            [{"input_ids": torch.full((2, 8), i + (kind != "last" and 10 * of_rank))}]
            for i in range(3 if kind == "last" and of_rank else 5)
        ]
        try:
            return len(list(check_same_batches(iter(batches), pg, count=4))), None
        except ValueError as error:
            return 0, str(error)


def warnings_of_equal_batches(config, kind):
    """What `train` warns of batches that are equal on all ranks, in this form."""
    tokens = torch.arange(16).reshape(2, 8)
    batch = {
        "tensor": {"input_ids": tokens},
        "array": {"input_ids": tokens.numpy()},
        "by position": {"input_ids": tokens + pg_position(config)},
    }[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mf.train(config, batches=[batch] * 40, valid_batches=[batch] * 40)
    return [str(one.message) for one in caught if issubclass(one.category, UserWarning)]


def pg_position(config):
    """The data-parallel position of this rank, before there are process groups."""
    groups = mf.build_groups(config.parallel, mf.world_size())
    return mf.coordinates(groups, int(os.environ["RANK"])).dp


@pytest.mark.parametrize("kind", ["tensor", "array", "by position"])
def test_equal_batches_of_data_parallel_ranks_are_reported_once(kind, pool):
    config = attrs.evolve(short(pp=2), eval_iters=1, log=mf.LogConfig(progress=False))
    first, *others = pool(4, warnings_of_equal_batches, config, kind)
    assert all("read the same first batch" not in text for of_rank in others for text in of_rank)
    reported = [text for text in first if "read the same first batch" in text]
    assert len(reported) == (kind != "by position")
    assert all("ranks 0 and 1 read" in text and "data-parallel" in text for text in reported)


@pytest.mark.parametrize(
    "kind, length, told",
    [
        ("dp", 4, None),
        ("late", 4, None),
        ("last", 3, None),
        ("tp", 0, "read different batches"),
        ("pp", 0, "read different batches"),
    ],
    ids=["dp ranks differ", "all the same", "one ends early", "tp ranks differ", "pp ranks differ"],
)
def test_ranks_of_one_data_parallel_position_must_read_the_same_and_end_together(
    kind, length, told, pool
):
    for found, text in pool(
        4, agreeing, short(**{"tp": dict(tp=2), "pp": dict(pp=2)}.get(kind, dict(tp=2))), kind
    ):
        assert found == length and (told is None) == (text is None) and (told or "") in (text or "")

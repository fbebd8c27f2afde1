"""What the plugin's fields do in real runs: each test fails where its field is merely stored."""

import itertools
import math
import re
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import megafn as mf
from equivalence import assert_equal, run_layout, share, tiny, uneven
from megafn.runtime.families.build import build_chunk
from megafn.runtime.model.weights import whole_parameters
from t5_rows import RELATIVE, T5, pairs

PAGE = Path(__file__).parent.parent / "docs" / "accelerate.md"
MODEL = mf.ModelConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, seq_length=16, vocab_size=64
)


def plugin(**fields):
    return mf.from_plugin(
        **dict(
            model=MODEL,
            micro_batch_size=2,
            lr=1e-2,
            train_iters=3,
            num_micro_batches=2,
            other_megatron_args={"log_interval": 1},
        )
        | fields
    )


def micro_batches(dp_rank=0):
    """Full sequences, as a Hugging Face collator gives them."""
    draw = torch.Generator().manual_seed(7 + dp_rank)
    while True:
        yield {"input_ids": torch.randint(0, 64, (2, 16), generator=draw)}


def run(config, *, valid=False, **arguments):
    """Trains on `micro_batches`: (metrics, whole parameters of this stage)."""
    config = attrs.evolve(config, log=attrs.evolve(config.log, progress=False))
    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size()), timeout_seconds=60
    ) as pg:
        state, step, seen = mf.setup(config, pg, **arguments), mf.step_of(config), []
        mf.fit(
            state,
            step,
            batches=micro_batches(pg.dp_rank),
            valid_batches=[next(micro_batches()) for _ in range(8)] if valid else None,
            on_metrics=[seen.append],
        )
        return seen, whole_parameters(state.chunks, config.model, pg)


# ---- Which parameters decay, and how fast


def late(name, parameter):
    return "layers.2." in name or "layers.3.mlp" in name or name.startswith("embedding.word")


def no_decay(name, parameter):
    # norms elsewhere decay: nothing but this condition decides
    return "layers.3." in name or name.startswith("embedding")


def conditions(**layout):
    return tiny(
        steps=4,
        weight_decay=0.5,
        lr=3e-2,
        no_weight_decay_cond=no_decay,
        lr_scale_cond=late,
        lr_mult=0.25,
        **layout,
    )


@pytest.mark.parametrize(
    "n, layout",
    [
        (4, dict(pp=2, tp=2)),
        (4, dict(pp=2, use_distributed_optimizer=True)),
        (2, dict(pp=2, vpp=2, num_layers=4)),
    ],
)
def test_conditions_name_the_same_parameters_in_every_layout(pool, n, layout):
    assert_equal(pool(1, run_layout, conditions())[0], pool(n, run_layout, conditions(**layout)))


def test_conditions_slow_and_spare_exactly_what_they_name(pool):
    """With gradients clipped to nothing, a step of SGD only decays: by lr * weight_decay."""

    def after(**fields):
        base = plugin(
            optimizer=torch.optim.SGD(
                [torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.0, weight_decay=0.5
            ),
            lr=None,
            gradient_clipping=1e-12,
            train_iters=1,
            lr_decay_style="constant",
            **fields,
        )
        return pool(1, run, base)[0][1]

    start = pool(1, initial, plugin())[0]
    for fields, decays in (
        (dict(no_wd_decay_cond=no_decay, scale_lr_cond=late, lr_mult=0.25), no_decay),
        ({}, lambda name, p: p.dim() == 1),
    ):
        for name, value in after(**fields).items():
            rate = (
                0.0
                if decays(name, value)
                else 0.1 * 0.5 * (0.25 if fields and late(name, value) else 1.0)
            )
            assert torch.allclose(value, start[name] * (1 - rate), rtol=1e-5, atol=1e-8), name


def initial(config):
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        return whole_parameters(mf.setup(config, pg).chunks, config.model, pg)


def test_sgd_subtracts_the_gradient(pool):
    optimizer = torch.optim.SGD(
        [torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.5, weight_decay=0.0
    )
    config = plugin(optimizer=optimizer, lr=None, gradient_clipping=0.0, lr_decay_style="constant")
    for moved, expected in pool(1, sgd_steps, config)[0]:
        assert torch.allclose(moved, expected, rtol=1e-4, atol=1e-7)


def sgd_steps(config):
    found, velocity = [], 0.0
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        state, batches = mf.setup(config, pg), mf.group_batches(micro_batches(), 2)
        parameter = dict(state.chunks[0].named_parameters())[
            "module.decoder.layers.1.mlp.linear_fc1.weight"
        ]
        for _ in range(3):
            before = parameter.detach().clone()
            state, _ = mf.train_step(state, next(batches), mf.step_fn("gpt"))
            velocity = 0.5 * velocity + parameter.main_grad.clone()
            found.append((parameter.detach() - before, -0.1 * velocity))
    return found


# ---- Logits come back


def logits_of(config, every_stage):
    """One step and one evaluation: (dp rank, whether the stage is the last, logits of each)."""
    config = attrs.evolve(config, return_logits="every_stage" if every_stage else "last_stage")
    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size()), timeout_seconds=60
    ) as pg:
        state, batch = mf.setup(config, pg), share(uneven(config, 0), config, pg)
        report = mf.evaluate(state, [batch], mf.step_fn("gpt"))
        state, metrics = mf.train_step(state, batch, mf.step_fn("gpt"))
        return pg.dp_rank, pg.is_last_stage, metrics.logits, report.logits


@pytest.mark.parametrize(
    "n, layout, every_stage",
    [
        (4, dict(tp=2, pp=2, sequence_parallel=True), False),
        (4, dict(pp=2, vpp=2), True),
        (2, dict(cp=2), False),
    ],
)
def test_logits_are_those_of_the_single_process_and_lie_where_they_are_asked_for(
    pool, n, layout, every_stage
):
    whole = pool(1, logits_of, tiny(), False)[0][2]
    assert len(whole) == 8 and whole[0].shape == (2, 32, 97)
    for dp_rank, last, logits, evaluated in pool(n, logits_of, tiny(**layout), every_stage):
        assert (logits is not None) == (evaluated is not None) == (last or every_stage)
        if logits is not None:
            mine = whole if len(logits) == 8 else whole[dp_rank::2]
            assert len(logits) == len(mine) == len(evaluated)
            for a, b, c in zip(logits, mine, evaluated, strict=True):
                assert torch.allclose(a, b, atol=1e-4) and torch.allclose(c, b, atol=1e-4)


def test_the_loss_can_be_computed_from_the_returned_logits(pool):
    seen, _ = pool(1, run, plugin(return_logits=True), valid=True)[0]
    # eval_iters of them would fill the memory
    assert all(metrics.valid is None or metrics.valid.logits is None for metrics in seen)
    batches = mf.group_batches(micro_batches(), 2)
    for metrics in seen:
        losses = [
            F.cross_entropy(logits[:, :-1].flatten(0, 1), raw["input_ids"][:, 1:].flatten())
            for logits, raw in zip(metrics.logits, next(batches), strict=True)
        ]
        assert metrics.loss == pytest.approx(sum(losses).item() / 2, abs=1e-5)
    assert pool(1, run, plugin())[0][0][0].logits is None


# ---- Custom steps and models


class Methods:
    """A train step as accelerate's users write it."""

    def __init__(self, config, scale=1.0, sums=False):
        self.scale, self.sums = scale, sums

    def get_batch_func(self, accelerator, megatron_dataset_flag):
        def from_text(iterator):
            text = next(iterator)["text"]
            return text[:, :-1], text[:, 1:], torch.ones_like(text[:, 1:])

        def from_loader(iterator):
            ids = next(iterator)["input_ids"]
            labels = F.pad(ids[:, 1:], (0, 1))
            mask = torch.ones_like(ids)
            mask[:, -1] = 0
            return ids, labels, mask

        return from_text if megatron_dataset_flag else from_loader

    def get_loss_func(self, accelerator):
        def loss(mask, output):
            total = self.scale * (output.float() * mask).sum()
            if self.sums:
                return total, mask.sum(), {"twice": 2 * total.detach()}
            return total / mask.sum(), {"twice": 2 * total.detach() / mask.sum()}

        return loss

    def get_forward_step_func(self):
        def forward_step(iterator, model):
            tokens, labels, mask = self.get_batch(iterator)
            return model(tokens, None, None, labels=labels), partial(self.loss_func, mask)

        return forward_step


def compared(reference, other, scale=1.0):
    for a, b in zip(reference, other, strict=True):
        assert b.loss == pytest.approx(scale * a.loss, abs=1e-5) and b.grad_norm == pytest.approx(
            scale * a.grad_norm, abs=1e-5
        )


@pytest.mark.parametrize("sums", [False, True])
def test_a_train_step_of_three_methods_trains_as_the_built_in_one(pool, sums):
    reference = pool(1, run, plugin())[0]
    fields = dict(
        custom_train_step_class=Methods, custom_train_step_kwargs={"sums": sums}, return_logits=True
    )
    for seen, parameters in pool(4, run, plugin(**fields, tp_degree=2, pp_degree=2, world_size=4)):
        compared(reference[0], seen)
        assert all(m.report["twice"] == pytest.approx(2 * m.loss, abs=1e-5) for m in seen)
        for name, value in parameters.items():
            assert torch.allclose(value, reference[1][name], atol=2e-4), name
        assert seen[0].logits is None or seen[0].logits[0].shape == (2, 16, 64)


def test_its_keyword_arguments_reach_it(pool):
    reference = pool(1, run, plugin(train_iters=1))[0][0]
    compared(
        reference,
        pool(
            1,
            run,
            plugin(
                train_iters=1,
                custom_train_step_class=Methods,
                custom_train_step_kwargs={"scale": 3.0},
            ),
        )[0][0],
        scale=3.0,
    )


def trained(config, **arguments):
    seen = []
    mf.train(
        attrs.evolve(config, log=attrs.evolve(config.log, progress=False)),
        on_metrics=[seen.append],
        **arguments,
    )
    return seen


def corpus(folder):
    text = folder / "text.txt"
    text.write_text(
        "\f".join(
            f"Document {i} speaks of {'one and the same thing, ' * 9}and ends." for i in range(30)
        )
    )
    return mf.DataConfig(train=str(text), split=(8, 2, 0), cache=str(folder / "cache"))


def test_a_train_step_of_three_methods_reads_indexed_data(pool, tmp_path):
    fields = dict(model=attrs.evolve(MODEL, vocab_size=256), data=corpus(tmp_path), eval_iters=1)
    reference = pool(1, trained, plugin(**fields))[0]
    compared(
        reference,
        pool(
            1,
            trained,
            plugin(**fields, megatron_dataset_flag=True, custom_train_step_class=Methods),
        )[0],
    )


def test_a_thing_that_is_no_step_is_refused_by_name():
    class Half:
        def __init__(self, config): ...
        def get_batch_func(self): ...

    with pytest.raises(
        mf.ConfigError,
        match="a Half without get_loss_func, get_forward_step_func|"
        "a Half without get_forward_step_func, get_loss_func",
    ):
        mf.step_of(plugin(custom_train_step_class=Half))
    with pytest.raises(
        mf.ConfigError, match="parallel.cp = 2: the methods of Methods need whole sequences"
    ):
        mf.step_of(
            plugin(
                custom_train_step_class=Methods,
                other_megatron_args={"context_parallel_size": 2},
                world_size=2,
            )
        )


def weighted(logits, batch, pg, *, weight):
    losses = mf.cross_entropy(logits, batch["labels"], pg) * batch["loss_mask"]
    return mf.Loss(sum=weight * losses.sum(), count=batch["loss_mask"].sum())


def test_a_step_record_with_bound_parameters_is_used(pool):
    step = attrs.evolve(mf.step_fn("gpt"), loss=partial(weighted, weight=2.0))
    compared(
        pool(1, run, plugin(train_iters=1))[0][0],
        pool(1, run, plugin(train_iters=1, custom_train_step_class=step))[0][0],
        scale=2.0,
    )


def zeroed(config, pg, **cut):
    """The built-in stage with every weight of the last layer's MLP zero."""
    stage = build_chunk(config, pg, **cut)
    for name, parameter in stage.named_parameters():
        if "linear_fc2" in name:
            torch.nn.init.zeros_(parameter)
    return stage


def frozen_but_norms(provider):
    stage = provider()
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_("norm" in name or "linear_fc2" in name)
    return stage


def broken(provider):
    return [provider()]


def test_a_model_function_alone_and_a_prepare_function_alone_take_effect(pool):
    before, zero = (
        pool(1, initial, plugin())[0],
        pool(1, initial, plugin(custom_model_provider_function=zeroed))[0],
    )
    for name in before:
        assert (
            torch.equal(zero[name], torch.zeros_like(zero[name]))
            if "linear_fc2" in name
            else torch.equal(zero[name], before[name])
        )
    for fields, start in (
        (dict(custom_prepare_model_function=frozen_but_norms), before),
        (
            dict(
                custom_prepare_model_function=frozen_but_norms,
                custom_model_provider_function=zeroed,
            ),
            zero,
        ),
    ):
        after = pool(2, run, plugin(**fields, pp_degree=2, world_size=2))
        for name, value in {**after[0][1], **after[1][1]}.items():
            assert torch.equal(value, start[name]) != ("norm" in name or "linear_fc2" in name), name
    with pytest.raises(Exception, match="model function or prepare_model: it returned a list"):
        pool(1, initial, plugin(custom_prepare_model_function=broken))


# ---- Where it starts, what it evaluates


def read(config):
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        return [
            [micro["tokens"] for batch in mf.batches(config, pg, split=split) for micro in batch]
            for split in ("train", "valid", "test")
        ]


def test_a_run_begins_behind_the_consumed_samples_of_each_split(pool, tmp_path):
    data = attrs.evolve(corpus(tmp_path), split=(8, 1, 1))
    fields = dict(
        model=attrs.evolve(MODEL, vocab_size=256),
        data=data,
        eval_iters=2,
        train_iters=4,
        eval_interval=1,
    )
    whole, later = (
        pool(1, read, plugin(**fields))[0],
        pool(1, read, plugin(**fields, consumed_samples=[8, 4, 2]))[0],
    )
    skipped_micro_batches = (4, 2, 1)  # of 2 samples
    for all_of_it, rest, skipped in zip(whole, later, skipped_micro_batches, strict=True):
        pairs = zip(all_of_it[skipped:], rest, strict=False)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert not torch.equal(all_of_it[0], rest[0])
    assert len(whole[0]) == 8 and len(later[0]) == 4 and len(later[1]) == len(later[2]) == 4
    seen = pool(1, trained, plugin(**fields, consumed_samples=[8, 4, 2]))[0]
    full = pool(1, trained, plugin(**fields))[0]
    assert [(m.iteration, m.consumed_samples) for m in seen] == [(3, 12), (4, 16)] and [
        m.lr for m in seen
    ] == [m.lr for m in full[2:]]


def test_evaluations_come_at_their_interval_and_are_as_long_as_they_should(pool, tmp_path):
    fields = dict(model=attrs.evolve(MODEL, vocab_size=256), data=corpus(tmp_path), train_iters=5)
    seen = pool(1, trained, plugin(**fields, eval_iters=3, eval_interval=2))[0]
    assert [m.iteration for m in seen if m.valid] == [2, 4, 5]
    assert {m.valid.count for m in seen if m.valid} == {3 * 4 * 16}


def test_recomputation_computes_attention_twice(pool):
    plain, again = (
        pool(1, attentions, plugin(recompute_activations=on))[0] for on in (False, True)
    )
    assert plain == 3 * 2 * 4 and again == 2 * plain


def attentions(config):
    calls, inner = [], F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda *a, **k: calls.append(1) or inner(*a, **k)
    try:
        run(config)
    finally:
        F.scaled_dot_product_attention = inner
    return len(calls)


# ---- Logging


def test_all_that_can_be_logged_is_logged_and_tensorboard_reads_it(pool, tmp_path):
    # with a table of its own, a token that never comes has a row of zeros
    untied = attrs.evolve(MODEL, tie_word_embeddings=False)
    fields = dict(
        model=untied,
        set_all_logging_options=True,
        tensorboard_dir=str(tmp_path / "logs"),
        eval_interval=2,
        eval_iters=1,
    )
    config = plugin(**fields, tp_degree=2, pp_degree=2, world_size=4)
    config = attrs.evolve(config, log=attrs.evolve(config.log, peak_tflops=0.5))
    ranks = pool(4, run, config, valid=True)
    seen = ranks[0][0]
    scalars = EventAccumulator(str(tmp_path / "logs")).Reload()
    told = {
        name: [(event.step, event.value) for event in scalars.Scalars(name)]
        for name in scalars.Tags()["scalars"]
    }
    for name in (
        "loss",
        "lr",
        "loss_scale",
        "grad_norm",
        "batch_size",
        "params_norm",
        "zeros_in_grad",
        "tokens_per_second_per_device",
        "tflops_per_device",
        "mfu",
        "memory_gib",
        "forward_backward_seconds",
        "optimizer_seconds",
        "seconds_left",
        "seconds",
        "weight_decay",
    ):
        values = [getattr(m, name) if hasattr(m, name) else m.details[name] for m in seen]
        assert told[f"train/{name}"] == [
            (m.iteration, pytest.approx(value, rel=1e-6))
            for m, value in zip(seen, values, strict=True)
        ], name
    assert [step for step, _ in told["valid/perplexity"]] == [2, 3]
    for m in seen:
        d = m.details
        assert d["mfu"] == pytest.approx(d["tflops_per_device"] / 0.5) and d[
            "seconds_left"
        ] == pytest.approx(m.seconds * (3 - m.iteration))
        assert (
            d["tflops_per_device"]
            == pytest.approx(mf.training_flops(config.model, 4) / m.seconds / 4 / 1e12)
            and d["batch_size"] == 4
        )
        assert (
            d["optimizer_seconds"] + d["forward_backward_seconds"] == pytest.approx(m.seconds)
            and 0.05 < d["memory_gib"] < 100
        )
    single, parameters = pool(
        1,
        run,
        plugin(
            model=untied, set_all_logging_options=True, tensorboard_dir=str(tmp_path / "single")
        ),
    )[0]
    assert single[-1].details["mfu"] is None and single[-1].details["tflops_per_device"] > 0
    norm = math.sqrt(sum(value.double().square().sum() for value in parameters.values()))
    assert single[-1].details["params_norm"] == pytest.approx(norm, rel=1e-6)
    for rank in ranks:
        assert [m.details["params_norm"] for m in rank[0]] == pytest.approx(
            [m.details["params_norm"] for m in single], rel=1e-4
        )
        # some are zero by rounding
        assert [m.details["zeros_in_grad"] for m in rank[0]] == pytest.approx(
            [m.details["zeros_in_grad"] for m in single], abs=6
        )
        inputs = [raw["input_ids"][:, :-1] for raw in itertools.islice(micro_batches(), 2)]
        rows = 64 - len(torch.cat(inputs).unique())
        assert rows > 0
        # Rows of tokens that never come, and the last position's row.
        zeros = rank[0][0].details["zeros_in_grad"]
        assert zeros == pytest.approx((rows + 1) * 32, abs=6)
    assert pool(1, run, plugin())[0][0][0].details == {}


def test_a_tied_table_counts_once_though_two_stages_hold_it(pool):
    single = [m.details for m in pool(1, run, plugin(set_all_logging_options=True))[0][0]]
    for seen, _ in pool(2, run, plugin(set_all_logging_options=True, pp_degree=2, world_size=2)):
        assert [m.details["params_norm"] for m in seen] == pytest.approx(
            [one["params_norm"] for one in single], rel=1e-5
        )


def test_norms_and_zeros_are_the_whole_models_under_the_distributed_optimizer(pool):
    fields = dict(
        model=attrs.evolve(MODEL, tie_word_embeddings=False),
        set_all_logging_options=True,
        world_size=2,
    )
    plain = [m.details for m in pool(2, run, plugin(**fields))[0][0]]
    for seen, _ in pool(2, run, plugin(**fields, use_distributed_optimizer=True)):
        assert [m.details["zeros_in_grad"] for m in seen] == pytest.approx(
            [one["zeros_in_grad"] for one in plain], abs=6
        )
        assert [m.details["params_norm"] for m in seen] == pytest.approx(
            [one["params_norm"] for one in plain], rel=1e-5
        )


# ---- The page itself


def executed(code):
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=64, vocab_size=64)
    draw = torch.Generator().manual_seed(1)
    loader = torch.utils.data.DataLoader(
        [{"input_ids": torch.randint(0, 64, (64,), generator=draw)} for _ in range(48)],
        batch_size=2,
    )
    names = {
        "model": model,
        "loader": loader,
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3),
    }
    exec(code, names)
    state = names["state"]
    return state.iteration, state.consumed_samples, state.config.precision.dtype


def executed_blocks():
    marked = r"<!-- executed by tests/test_plugin_runs.py -->\n```python\n(.*?)```"
    return re.findall(marked, PAGE.read_text(), re.DOTALL)


def sharded_rows(code, layout):
    """The rows of a data set that this rank's loader gives, by the code of the page."""
    names = {}
    exec(code, names)
    config = plugin(num_micro_batches=1, **layout)
    return [int(row) for batch in names["sharded"](range(24), config) for row in batch]


@pytest.mark.parametrize("layout", [dict(tp_degree=2), dict(pp_degree=2)], ids=["tp", "pp"])
def test_the_loader_of_the_page_is_sharded_by_position(layout, pool):
    _, code = executed_blocks()
    shares = pool(4, sharded_rows, code, layout)
    if "tp_degree" in layout:
        assert shares[0] == shares[1] and shares[2] == shares[3]
    else:
        assert shares[0] == shares[2] and shares[1] == shares[3]
    assert sorted(shares[0] + shares[3]) == list(range(24))


def test_the_five_lines_of_the_page_run(pool):
    code, _ = executed_blocks()
    assert pool(2, executed, code) == [(10, 40, "bf16")] * 2


# ---- Train steps as accelerate calls them


class OtherNames(Methods):
    """The three methods with parameters of other names."""

    def get_batch_func(self, a, b):
        return super().get_batch_func(a, b)

    def get_loss_func(self, a):
        return super().get_loss_func(a)


class AnyNumber(Methods):
    def get_batch_func(self, *arguments):
        return super().get_batch_func(*arguments)


class ThreeNames(Methods):
    def get_batch_func(self, a, b, c): ...


def test_the_three_methods_are_matched_by_position_as_accelerate_calls_them():
    config = plugin(world_size=1)
    for step in (OtherNames(config), AnyNumber(config)):
        mf.step_of(attrs.evolve(config, step_function=lambda config, step=step: step))
        assert step.get_batch.__name__ == "from_loader"
    indexed = attrs.evolve(config, data=mf.DataConfig(train="a"))
    step = OtherNames(config)
    mf.step_of(attrs.evolve(indexed, step_function=lambda config: step))
    assert step.get_batch.__name__ == "from_text"
    with pytest.raises(
        mf.ConfigError,
        match=r"ThreeNames.get_batch_func takes \(a, b, c\); "
        r"let it take \(accelerator, megatron_dataset_flag\)",
    ):
        mf.step_of(attrs.evolve(config, step_function=ThreeNames))


class T5Methods:
    """accelerate's T5TrainStep, without its global arguments; its loss as sum and count."""

    def __init__(self, config): ...

    def get_batch_func(self, accelerator, megatron_dataset_flag):
        def from_index(iterator):
            data = next(iterator)
            masks = [data[name] < 0.5 for name in ("enc_mask", "dec_mask", "enc_dec_mask")]
            return data["text_enc"], data["text_dec"], data["loss_mask"], data["labels"], *masks

        def from_loader(iterator):
            data = next(iterator)
            labels = data["labels"].long()
            decoder_tokens = F.pad(labels[:, :-1], (1, 0)).masked_fill(
                F.pad(labels[:, :-1], (1, 0)) == -100, 0
            )
            real = data["attention_mask"].long()
            length = labels.size(1)
            causal = torch.tril(torch.ones(1, length, length)) < 0.5
            hidden = real.unsqueeze(1) * real.unsqueeze(2) < 0.5
            crossed = torch.ones(real.size(0), length, 1) * real.unsqueeze(1) < 0.5
            mask = (labels != -100).float()
            return data["input_ids"], decoder_tokens, mask, labels, hidden, causal, crossed

        return from_index if megatron_dataset_flag else from_loader

    def get_loss_func(self, accelerator):
        def loss(mask, output):
            total = (output.float().view(-1) * mask.reshape(-1)).sum()
            return total, mask.sum(), {"lm loss": total.detach()}

        return loss

    def get_forward_step_func(self):
        def forward_step(iterator, model):
            tokens_enc, tokens_dec, mask, labels, enc, dec, enc_dec = self.get_batch(iterator)
            output = model(
                tokens_enc, tokens_dec, enc, dec, enc_dec, tokentype_ids=None, lm_labels=labels
            )
            return output, partial(self.loss_func, mask)

        return forward_step


def indexed_pairs(config, iteration):
    """`pairs` with the keys of Megatron-LM's dataset."""
    rows = []
    for row in pairs(config, iteration):
        labels = row["labels"]
        decoder_tokens = F.pad(labels[:-1], (1, 0))
        rows.append(
            {
                "text_enc": row["input_ids"],
                "text_dec": decoder_tokens.clamp(min=0),
                "labels": labels.clamp(min=0),
                "loss_mask": (labels != -100).long(),
                "enc_mask": row["attention_mask"],
                "dec_mask": row["decoder_attention_mask"],
            }
        )
    return rows


def t5_losses(config):
    """Loss and gradient norm of each step on uneven pairs, padded on both sides."""
    data = indexed_pairs if config.data else pairs
    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size(), model=config.model), timeout_seconds=60
    ) as pg:
        state, step, seen = mf.setup(config, pg), mf.step_of(config), []
        for iteration in range(2):
            state, metrics = mf.train_step(state, share(data(config, iteration), config, pg), step)
            seen.append((metrics.loss, metrics.grad_norm))
        return seen


@pytest.mark.parametrize(
    "shape, processes, layout",
    [
        (RELATIVE, 1, {}),
        ({}, 1, dict(data=mf.DataConfig(train="indexed"))),
        (RELATIVE, 4, dict(tp=2, pp=2, sequence_parallel=True)),
    ],
)
def test_a_t5_step_of_accelerates_trains_as_the_built_in_one(pool, shape, processes, layout):
    reference = pool(1, t5_losses, tiny(**T5, **shape))[0]
    config = attrs.evolve(tiny(**T5, **shape, **layout), step_function=T5Methods)
    for seen in pool(processes, t5_losses, config):
        assert torch.tensor(seen).sub(torch.tensor(reference)).abs().max() < 1e-4

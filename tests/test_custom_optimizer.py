"""The optimizer of docs/scripts/custom_optimizer.py: law, schedule, guards and checkpoints."""

import importlib.util
import math
from unittest import mock

import attrs
import pytest
import torch

import megafn as mf
from equivalence import assert_equal, local_parts, share, short, uneven
from pool import ROOT

SCRIPT = ROOT / "docs" / "scripts" / "custom_optimizer.py"


def muon_and_adamw(config, chunks, pg):
    """The script's function, read here: the pool's workers know no module of that name."""
    spec = importlib.util.spec_from_file_location("custom_optimizer", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.muon_and_adamw(config, chunks, pg)


def run(config, optimizer=muon_and_adamw):
    """As `equivalence.run_layout`; and (learning rate, weight decay) of the groups in each step."""
    curve, rates = [], []
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg, optimizer=optimizer)
        before = local_parts(state)
        for iteration in range(config.train_iters):
            batch = share(uneven(config, iteration), config, pg)
            state, metrics = mf.train_step(state, batch, mf.step_fn("gpt"))
            curve.append((metrics.loss, metrics.grad_norm))
            groups = state.optimizer.param_groups
            rates.append({(group["lr"], group["weight_decay"]) for group in groups})
        return (curve, before, local_parts(state)), rates


def run_in_fp32(config):
    """torch's Muon orthogonalizes in bf16, where a gradient's last fp32 bit can count 2^-8."""
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
        return run(config)


@pytest.mark.parametrize("layout", [dict(), dict(pp=2)], ids=["dp2", "pp2"])
def test_the_custom_optimizer_obeys_the_law(layout, pool):
    reference, rates = pool(1, run_in_fp32, short())[0]
    results = pool(2, run_in_fp32, short(**layout))
    assert_equal(reference, [result for result, _ in results])
    schedule = mf.make_schedule(short())
    for i, groups in enumerate(rates):
        now = schedule(16 * i)
        assert groups == {(now.lr, now.weight_decay), (now.lr, 0.0)}
    assert all(other == rates for _, other in results)


@pytest.mark.parametrize(
    "layout, words",
    [
        (dict(tp=2), "parallel.tp = 2.*cuts"),
        (dict(use_distributed_optimizer=True), "use_distributed_optimizer = True"),
        (dict(dtype="bf16"), "precision.dtype = 'bf16'"),
    ],
)
def test_the_custom_optimizer_is_refused_where_it_would_be_wrong(layout, words, pool):
    with pytest.raises(Exception, match=f"ConfigError: .*{words}"):
        pool(2, run, short(**layout))


def poisoned(logits, batch, pg):
    loss = mf.token_loss(logits, batch, pg)
    return attrs.evolve(loss, sum=loss.sum * math.nan)


def guarded(config):
    """A step whose loss is NaN: are the parameters as before it? And that step's metrics."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg, optimizer=muon_and_adamw)
        before = local_parts(state)
        batch = share(uneven(config, 0), config, pg)
        step = attrs.evolve(mf.step_fn("gpt"), loss=poisoned)
        state, metrics = mf.train_step(state, batch, step)
        after = local_parts(state)
        same = all(torch.equal(old[1], new[1]) for old, new in zip(before, after, strict=True))
        return same, metrics.skipped, metrics.grad_norm


def test_the_guards_hold_for_the_custom_optimizer(pool):
    assert pool(2, guarded, short(warmup_iters=0)) == [(True, True, None)] * 2


def not_megatron(config, chunks, pg):
    return torch.optim.SGD([p for chunk in chunks for p in chunk.parameters()], lr=1.0)


def test_an_optimizer_that_is_not_megatron_cores_is_refused():
    config = short()
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        with pytest.raises(mf.ConfigError, match="optimizer: it returned a SGD; return a megatron"):
            mf.setup(config, pg, optimizer=not_megatron)


def steps(state, iterations):
    curve = []
    for iteration in iterations:
        batch = share(uneven(state.config, iteration), state.config, state.pg)
        state, metrics = mf.train_step(state, batch, mf.step_fn("gpt"))
        curve.append((metrics.loss, metrics.grad_norm))
    return state, curve


def saved_and_loaded(config, folder):
    """The curve of a run that is saved in the middle, and of a fresh state that resumes there."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg, optimizer=muon_and_adamw)
        state, _ = steps(state, range(2))
        mf.save(state, folder)
        state, going_on = steps(state, range(2, 4))
        fresh = mf.load(mf.setup(config, pg, optimizer=muon_and_adamw), folder)
        fresh, resumed = steps(fresh, range(2, 4))
        mf.save(fresh, folder)
        return going_on, resumed


def test_the_custom_optimizer_is_saved_and_loaded(pool, tmp_path):
    """Muon keeps a momentum of each matrix, AdamW two moments of the rest: each gets its own."""
    for going_on, resumed in pool(2, saved_and_loaded, short(pp=2), str(tmp_path)):
        assert resumed == going_on

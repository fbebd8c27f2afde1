"""The law: a layout gives the single process's loss and grad norm at every step, and its parameters after the last.

Functions that run in the pool's workers, and the comparison. Weights and data are functions of names and numbers, so
every layout starts alike. The data is uneven on purpose: some micro-batches count one token, some every one.
"""
import attrs
import torch

import megafn as mf
from megafn.pure.sampling import deal
from megafn.runtime.weights import Part, parts

LOSS = GRAD_NORM = 1e-4
BF16 = dict(loss=2**-10, grad_norm=2**-8, parameter=1 / 16, grid=2**-7)      # reasons: test_equivalence.py
PARAMETER = 1e-3                # of the parameter's own largest update; needs eps = 1e-3 (at 1e-8 rounding alone fails it)


def tiny(*, steps=10, **changes):
    """A small GPT on synthetic tokens; `changes` go to whichever config has the field."""
    config = mf.TrainConfig(
        model=mf.ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, seq_length=32, vocab_size=97),
        optimizer=mf.OptimizerConfig(eps=1e-3), schedule=mf.ScheduleConfig(lr=1e-2, warmup_iters=2, weight_decay=0.1),
        micro_batch_size=2, global_batch_size=16, train_iters=steps)
    for section in ("model", "parallel", "optimizer", "schedule", "precision", "recompute"):
        part = getattr(config, section)
        mine = {key: changes.pop(key) for key in list(changes) if key in attrs.fields_dict(type(part))}
        config = attrs.evolve(config, **{section: attrs.evolve(part, **mine)})
    return attrs.evolve(config, **changes)


def uneven(config, iteration):
    """One global batch as raw rows: tokens, labels, loss_mask [s] each; the masks are very uneven."""
    draw = torch.Generator().manual_seed(100 + iteration)
    model, n = config.model, config.global_batch_size
    text = torch.randint(0, model.vocab_size, (n, model.seq_length + 1), generator=draw)
    mask = torch.zeros(n, model.seq_length)
    for row in range(n):
        counted = [1, model.seq_length, 3, model.seq_length // 2][(row // config.micro_batch_size + iteration) % 4]
        mask[row, torch.randperm(model.seq_length, generator=draw)[:counted]] = 1
    return [{"tokens": x[:-1], "labels": x[1:], "loss_mask": m} for x, m in zip(text, mask)]


def stack(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def share(rows, config, pg):
    """This rank's micro-batches of a global batch."""
    return [stack(micro) for micro in deal(rows, micro_batch_size=config.micro_batch_size, dp_rank=pg.dp_rank, dp=pg.dp_size)]


def local_parts(state):
    """[(name, values here, whole shape, dim, stride, tp, tp_rank)] of every parameter that this process holds."""
    return [(part.name, part.parameter.detach().float().clone(), part.shape, part.dim, part.stride, part.tp, part.tp_rank)
            for chunk in state.chunks for part in parts(chunk, state.config.model, state.pg)]


def run_layout(config, data=uneven, step=None):
    """Trains a layout in this process group: curve [(loss, grad norm)], local parameters before and after."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size(), model=config.model), timeout_seconds=60) as pg:
        state = mf.setup(config, pg)
        before, curve = local_parts(state), []
        for iteration in range(config.train_iters):
            state, metrics = mf.train_step(state, share(data(config, iteration), config, pg), step or mf.step_fn(config.model.family))
            curve.append((metrics.loss, metrics.grad_norm))
        return curve, before, local_parts(state)


def differences(reference, result, *, grid=0.0):
    """Largest difference of loss, of grad norm, and of parameters relative to their largest update, over one rank's result.

    grid: a difference up to this part of the parameter's largest value is none (numbers stored in bf16 lie on a grid).
    """
    (curve, before, after), (other, start, end) = reference, result
    whole = {name: (old, new) for (name, old, *_), (_, new, *_) in zip(before, after)}
    worst = {"loss": max(abs(a - b) for (a, _), (b, _) in zip(curve, other, strict=True)),
             "grad_norm": max(abs(a - b) for (_, a), (_, b) in zip(curve, other, strict=True)), "start": 0.0, "parameter": 0.0}
    for (name, first, shape, dim, stride, tp, tp_rank), (_, last, *_) in zip(start, end, strict=True):
        part = Part(name=name, parameter=first, shape=shape, dim=dim, stride=stride, tp=tp, tp_rank=tp_rank)
        old, new = (value[:shape[0]] if dim == 0 else value for value in whole[name])
        update = (new - old).abs().max().item()
        assert update > 0, f"{name} never moved: the comparison would say nothing"
        worst["start"] = max(worst["start"], (part.cut(old) - first).abs().max().item())
        apart = (part.cut(new) - last).abs().max() - grid * new.abs().max()
        worst["parameter"] = max(worst["parameter"], apart.item() / update)
    return worst


def assert_equal(reference, results, *, loss=LOSS, grad_norm=GRAD_NORM, parameter=PARAMETER, grid=0.0):
    """Every rank's result obeys the law."""
    names = {name for name, *_ in reference[1]}
    assert {name for _, start, _ in results for name, *_ in start} == names, "a parameter is missing, or one too many is there"
    for rank, result in enumerate(results):
        worst = differences(reference, result, grid=grid)
        assert worst["start"] == 0, f"rank {rank} starts from other weights: {worst}"
        assert worst["loss"] < loss and worst["grad_norm"] < grad_norm and worst["parameter"] < parameter, f"rank {rank}: {worst}"

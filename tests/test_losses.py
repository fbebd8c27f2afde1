"""The losses equal torch's in double precision, however the vocabulary is cut, without a copy."""

import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import megafn as mf
from megafn.runtime.model import losses

ALONE = SimpleNamespace(
    tp=SimpleNamespace(size=lambda: 1, rank=lambda: 0)
)  # what a group of one process answers


def case(
    sequence=5,
    batch=3,
    vocab=24,
    *,
    seed=0,
    scale=3.0,
    shift=0.0,
    dtype=torch.float32,
    ignored=0.2,
    padded=0,
    empty=None,
):
    """logits [s, b, vocab], labels [b, s] and two weights [b, s].

    The last `padded` columns hold the dtype's minimum, columns `empty` -inf.
    """
    draw = torch.Generator().manual_seed(seed)
    logits = (torch.randn(sequence, batch, vocab, generator=draw) * scale + shift).to(dtype)
    if padded:
        logits[..., -padded:] = torch.finfo(dtype).min
    if empty:
        logits[..., empty] = -math.inf
    allowed = torch.tensor(
        [v for v in range(vocab - padded) if v not in range(vocab)[empty or slice(0, 0)]]
    )
    labels = allowed[torch.randint(0, len(allowed), (batch, sequence), generator=draw)]
    labels[torch.rand(batch, sequence, generator=draw) < ignored] = -100
    weights = torch.rand(2, batch, sequence, generator=draw)
    return logits, labels, weights


def answers(logits, labels, weights, pg):
    """Losses, log-sum-exp, argmax and the gradient of each by itself."""
    logits = logits.clone().requires_grad_()
    found = mf.cross_entropy(logits, labels, pg), mf.logsumexp(logits, pg)
    grads = [
        torch.autograd.grad((value * weight).sum(), logits)[0]
        for value, weight in zip(found, weights, strict=True)
    ]
    return [value.detach() for value in found], grads, mf.argmax(logits, pg)


def reference(logits, labels, weights):
    """The same by torch's own functions on the whole vocabulary in double precision."""
    logits = logits.double().requires_grad_()
    found = (
        F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none", ignore_index=-100),
        logits.logsumexp(-1).t(),
    )
    grads = [
        torch.autograd.grad((value * weight).sum(), logits)[0]
        for value, weight in zip(found, weights, strict=True)
    ]
    return [value.detach() for value in found], grads, logits.argmax(-1).t()


def answers_of_slices(cases, block):
    """In a worker: `answers` to each case where each rank holds its slice of the vocabulary."""
    tp = mf.world_size()
    with (
        mf.init_groups(mf.build_groups(mf.ParallelConfig(tp=tp), tp)) as pg,
        mock.patch.object(losses, "_CPU_BLOCK", block),
    ):
        return [
            answers(logits.chunk(tp, -1)[pg.place.tp], labels, weights, pg)
            for logits, labels, weights in cases
        ]


def check(pool, tp, cases, *, rtol=1e-6, atol=1e-6, grad_rtol=1e-6, grad_atol=1e-6, block=100):
    """Slices joined over ranks equal the reference, and ranks agree to the bit on what they share.

    Returns the gradients.
    """
    ranks, joined = pool(tp, answers_of_slices, cases, block), []
    for ours, inputs in zip(zip(*ranks, strict=True), cases, strict=True):
        values, grads, best = reference(*inputs)
        for found, _, ids in ours:
            assert all(torch.equal(a, b) for a, b in zip(found, ours[0][0], strict=True))
            torch.testing.assert_close([x.double() for x in found], values, rtol=rtol, atol=atol)
            assert ids.dtype == torch.int64 and torch.equal(ids, best)
        joined.append(
            [torch.cat(slices, -1) for slices in zip(*(grad for _, grad, _ in ours), strict=True)]
        )
        assert all(grad.dtype == inputs[0].dtype for grad in joined[-1])
        torch.testing.assert_close(
            [x.double() for x in joined[-1]], grads, rtol=grad_rtol, atol=grad_atol
        )
    return joined


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_losses_and_gradients_equal_torchs_for_every_tp(pool, tp):
    check(
        pool,
        tp,
        [case(), case(1, 1, 4), case(7, 1, 8), case(1, 9, 12), case(vocab=4096, scale=1.0)],
    )


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_extreme_logits_lose_nothing(pool, tp):
    """Logits far from 0 cost no digits of the loss: the largest is subtracted before rounding."""
    cases = [
        case(shift=shift, scale=scale)
        for shift, scale in ((4096.0, 2.0), (-4096.0, 2.0), (0.0, 300.0), (0.0, 1e-3), (-1e9, 0.0))
    ]
    for logits, labels, weights in cases:
        ours, _, _ = answers(logits, labels, weights, ALONE)
        torch.testing.assert_close(
            ours[0].double(), reference(logits, labels, weights)[0][0], rtol=3e-7, atol=1e-6
        )
    check(pool, tp, cases)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_padded_columns_change_nothing_and_get_no_gradient(pool, tp):
    for padded in (1, 7, 13):  # 7 of 24: with tp = 4 the whole last slice and more is padding
        whole = case(padded=padded)
        cut = whole[0][..., :-padded].contiguous(), *whole[1:]
        (grads,) = check(pool, tp, [whole])
        for grad, expected in zip(grads, reference(*cut)[1], strict=True):
            assert torch.equal(grad[..., -padded:], torch.zeros(5, 3, padded))
            torch.testing.assert_close(grad[..., :-padded].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_slice_of_minus_infinity_is_a_slice_without_probability(pool, tp):
    (grads,) = check(pool, tp, [case(empty=slice(6, 12))])
    assert all(torch.equal(grad[..., 6:12], torch.zeros(5, 3, 6)) for grad in grads)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype, exact", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_rounds_only_the_gradient(pool, tp, dtype, exact):
    """Losses are those of the given logits in fp32; the gradient is rounded once.

    Once means by half a unit in the last place.
    """
    check(
        pool,
        tp,
        [case(dtype=dtype), case(dtype=dtype, padded=3)],
        grad_rtol=exact * 1.001,
        grad_atol=1e-7,
    )
    values, _, _ = answers(*case(dtype=dtype), ALONE)
    assert {value.dtype for value in values} == {torch.float32}


@settings(max_examples=25)
@given(
    st.sampled_from([1, 2, 4]),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(1, 600),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 1.0, 10.0, 100.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_shape_and_any_block_size_give_the_same(
    pool, tp, sequence, batch, width, block, seed, scale, ignored
):
    check(
        pool,
        tp,
        [case(sequence, batch, 4 * width, seed=seed, scale=scale, ignored=ignored)],
        block=block,
    )


def test_gradients_pass_gradcheck():
    logits, labels, _ = case(dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mf.cross_entropy(x, labels, ALONE), logits)
    assert torch.autograd.gradcheck(lambda x: mf.logsumexp(x, ALONE), logits)


def test_ignored_labels_cost_nothing_and_teach_nothing():
    logits, labels, weights = case(ignored=0.5)
    (found, _), (grad, _), _ = answers(logits, labels, weights, ALONE)
    ignored = labels == -100
    assert 0 < ignored.sum() < labels.numel()
    assert torch.equal(found[ignored], torch.zeros(int(ignored.sum()))) and torch.equal(
        grad[ignored.t()], torch.zeros(int(ignored.sum()), 24)
    )
    assert (found[~ignored] > 0).all() and (grad[~ignored.t()] != 0).any(-1).all()


def test_logits_in_any_memory_layout_give_the_same():
    logits, labels, weights = case()
    turned = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    assert all(
        map(
            torch.equal,
            answers(logits, labels, weights, ALONE)[1],
            answers(turned, labels, weights, ALONE)[1],
        )
    )


class Allocations(TorchDispatchMode):
    """Bytes of each storage that an operation made while this was active.

    All are kept, so that none is used twice.
    """

    def __init__(self, *known):
        super().__init__()
        self.kept, self.seen, self.sizes = (
            list(known),
            {x.untyped_storage().data_ptr() for x in known},
            [],
        )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.seen:
                self.kept.append(x)
                self.seen.add(x.untyped_storage().data_ptr())
                self.sizes.append(x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, labels: mf.cross_entropy(x, labels, ALONE),
        lambda x, labels: mf.logsumexp(x, ALONE),
    ],
    ids=["cross_entropy", "logsumexp"],
)
def test_nothing_of_the_logits_size_exists_but_logits_and_gradient(monkeypatch, dtype, function):
    block = 4096
    monkeypatch.setattr(losses, "_CPU_BLOCK", block)
    logits, labels, _ = case(32, 4, 1024, dtype=dtype)  # 128 rows of 1024: 32 blocks
    logits.requires_grad_()
    kept, small = [], 8 * labels.numel()

    def keep(x):
        kept.append(x)
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        Allocations(logits) as forward,
    ):
        found = function(logits, labels)
    assert max(forward.sizes) == 4 * block  # equality: the probe sees what there is
    pointer = logits.untyped_storage().data_ptr()
    assert sum(x.untyped_storage().data_ptr() == pointer for x in kept) == 1  # kept by reference
    assert all(
        x.untyped_storage().nbytes() <= small
        for x in kept
        if x.untyped_storage().data_ptr() != pointer
    )
    with Allocations(logits, *kept, *forward.kept) as backward:
        torch.autograd.grad(found.sum(), logits)
    whole = logits.untyped_storage().nbytes()
    assert sorted(backward.sizes)[-2:] == [4 * block, whole]


def test_the_callers_tensors_are_left_alone():
    logits, labels, weights = case()
    before = logits.clone(), labels.clone()
    leaf = logits.requires_grad_()
    version = leaf._version
    (mf.cross_entropy(leaf, labels, ALONE) + mf.logsumexp(leaf, ALONE)).sum().backward()
    mf.argmax(leaf, ALONE)
    assert (
        torch.equal(leaf, before[0]) and torch.equal(labels, before[1]) and leaf._version == version
    )


@pytest.mark.parametrize("bad", [24, -1, -99, 10**9])
def test_a_label_outside_the_vocabulary_is_named(bad):
    logits, labels, _ = case()
    labels[1, 2] = bad
    with pytest.raises(
        ValueError, match=f"label {bad} is outside the vocabulary of 24 ids; use 0 to 23, or -100"
    ):
        mf.cross_entropy(logits, labels, ALONE)


def test_where_labels_cannot_be_looked_at_a_bad_one_makes_its_loss_nan(monkeypatch):
    """As on a GPU: the check, which would wait for it, is not made."""
    monkeypatch.setattr(losses, "_check", lambda *_: None)
    logits, labels, _ = case(ignored=0)
    labels[1, 2] = 24
    found = mf.cross_entropy(logits, labels, ALONE)
    assert found.isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(5, 3, dtype=torch.long), torch.zeros(3, dtype=torch.long), torch.zeros(3, 5)],
)
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(ValueError, match="labels of (shape|dtype)"):
        mf.cross_entropy(case()[0], labels, ALONE)


def ties(logits):
    tp = mf.world_size()
    with mf.init_groups(mf.build_groups(mf.ParallelConfig(tp=tp), tp)) as pg:
        return mf.argmax(logits.chunk(tp, -1)[pg.place.tp], pg)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_gives_ties_to_the_lowest_id_for_every_tp(pool, dtype):
    logits = torch.randint(0, 3, (50, 4, 8), generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0] = -math.inf
    lowest = torch.from_numpy(np.argmax(logits.float().numpy(), axis=-1)).t()
    for tp in (1, 2, 4):
        assert all(torch.equal(found, lowest) for found in pool(tp, ties, logits))


def over_data_ranks(losses_of, tree_of):
    with mf.init_groups(mf.build_groups(mf.ParallelConfig(), mf.world_size())) as pg:
        given = [torch.tensor(x, requires_grad=True) for x in losses_of[pg.rank]]
        return (
            mf.avg_losses(given, pg.dp),
            mf.gather(tree_of[pg.rank], pg.dp),
            [x.item() for x in given],
        )


@pytest.mark.parametrize("n", [1, 3])
def test_avg_losses_and_gather_do_what_accelerates_do(pool, n):
    draw = np.random.default_rng(0)
    given = draw.random((n, 4)).astype(np.float32)
    arrays, ids, flags = (
        draw.random((n, 2, 3)).astype(np.float32),
        draw.integers(0, 9, (n, 5)),
        draw.random((n, 2)) < 0.5,
    )
    trees = [
        {
            "a": [torch.tensor(arrays[r]).t(), torch.tensor(float(r))],
            "b": (torch.tensor(ids[r]), {"c": torch.tensor(flags[r])}),
        }
        for r in range(n)
    ]
    given_losses = [
        [row[0], [row[1]], [[row[2]]], row[3]] for row in given.tolist()
    ]  # scalars and one-element tensors
    for rank, (means, tree, kept) in enumerate(pool(n, over_data_ranks, given_losses, trees)):
        np.testing.assert_allclose(means.numpy(), given.mean(0), rtol=1e-6)
        assert means.shape == (4,) and not means.requires_grad and kept == given[rank].tolist()
        assert isinstance(tree["a"], list) and isinstance(tree["b"], tuple)
        np.testing.assert_array_equal(tree["a"][0].numpy(), np.concatenate([x.T for x in arrays]))
        np.testing.assert_array_equal(tree["a"][1].numpy(), np.arange(n))
        np.testing.assert_array_equal(tree["b"][0].numpy(), ids.reshape(-1))
        np.testing.assert_array_equal(tree["b"][1]["c"].numpy(), flags.reshape(-1))


def gather_unequal():
    with mf.init_groups(mf.build_groups(mf.ParallelConfig(), 2), timeout_seconds=30) as pg:
        for tensor in (
            torch.ones(3 + pg.rank),
            torch.ones(2, dtype=(torch.float32, torch.float64)[pg.rank]),
        ):
            with pytest.raises(ValueError, match="gather: shapes .* differ over the ranks"):
                mf.gather(tensor, pg.dp)


def test_gather_refuses_shapes_that_differ(pool):
    pool(2, gather_unequal)


def test_gather_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match="gather: expected a tensor, .*, got float"):
        mf.gather({"a": 1.0}, ALONE.tp)


def test_token_loss_is_a_sum_over_the_mask_and_its_size():
    logits, labels, _ = case(ignored=0)
    for mask in (
        torch.rand(3, 5) < 0.3,
        (torch.rand(3, 5) < 0.3).long(),
        (torch.rand(3, 5) < 0.3).float(),
    ):
        loss = mf.token_loss(logits, {"labels": labels, "loss_mask": mask}, ALONE)
        each = F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")
        torch.testing.assert_close(loss.sum, (each * mask).sum(), rtol=1e-6, atol=1e-6)
        assert loss.count.dtype == torch.int64 and loss.count == (mask != 0).sum()


@pytest.mark.parametrize(
    "count",
    [
        3,
        3.0,
        np.int64(3),
        torch.tensor(3, dtype=torch.int32),
        torch.tensor([True, True, True]).sum(),
        torch.tensor(3.0),
        torch.tensor([3.0], dtype=torch.bfloat16),
    ],
)
def test_a_whole_count_is_taken(count):
    taken = mf.Loss(sum=torch.tensor(1.0), count=count).count
    assert taken == 3 and taken.shape == () and not taken.is_floating_point()


@pytest.mark.parametrize("count", [2.5, torch.tensor(2.5), math.nan, math.inf, torch.tensor(0.999)])
def test_a_fractional_count_is_refused(count):
    with pytest.raises(ValueError, match=r"Loss.count = .*: not a whole number"):
        mf.Loss(sum=torch.tensor(1.0), count=count)


def test_loss_holds_scalars_and_reports_hold_no_graph():
    x = torch.ones(3, requires_grad=True)
    loss = mf.Loss((x * 2).sum(), 3, {"z": (x**2).sum(), "n": 2})
    assert (
        loss.sum.requires_grad
        and not loss.report["z"].requires_grad
        and loss.report["z"] == 3
        and loss.report["n"] == 2
    )
    for wrong, name in (
        ({"sum": x, "count": 3}, "Loss.sum"),
        ({"sum": x.sum(), "count": x.long()}, "Loss.count"),
        ({"sum": x.sum(), "count": 3, "report": {"z": x}}, r"Loss.report\['z'\]"),
        ({"sum": torch.tensor(3), "count": 3}, "Loss.sum: dtype"),
    ):
        with pytest.raises(ValueError, match=name):
            mf.Loss(**wrong)

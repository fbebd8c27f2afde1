"""What a training step costs beside its mathematics: moves to the host and pickled objects."""

import contextlib
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import attrs
import pytest
import torch
import torch.distributed as dist

import megafn as mf
from equivalence import share, short, uneven
from megafn.runtime.model.losses import FRACTIONAL
from megafn.runtime.model.parts import _HidePadding
from megafn.runtime.training.forward_backward import MicroBatchSums
from megafn.runtime.training.totals import sum_over_ranks

PACKAGE = Path(mf.__file__).parent

# A read of one of these on a GPU waits until the device has done everything before it.
MOVES = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__index__", "__bool__")
OBJECTS = (
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
)

# They look at tensors on a CPU only: raw batches before they are on the device; labels, logits and
# counts where there is no GPU; and megatron-core at the state of the CPU's random numbers.
CPU_ONLY = ("runtime/families/", "runtime/model/losses.py", "core/tensor_parallel/random.py")

# Passes each call on while megatron-core runs on a CPU: who asked it is counted already.
THE_SEAM = "runtime/parallel/cpu.py"


@contextlib.contextmanager
def counted():
    """Counts "file: function" of each move to the host and each object collective, by who asks."""
    counts = Counter()
    with contextlib.ExitStack() as stack:
        for owner, names in ((torch.Tensor, MOVES), (dist, OBJECTS)):
            for name in names:
                wrapped = _counting(getattr(owner, name), name, counts)
                stack.enter_context(mock.patch.object(owner, name, wrapped))
        yield counts


def _counting(function, name, counts):
    def counting(*arguments, **named):
        asker = Path(sys._getframe(1).f_code.co_filename)
        where = asker.relative_to(PACKAGE).as_posix() if asker.is_relative_to(PACKAGE) else None
        if where is None:
            where = "/".join(asker.parts[-3:])
        if not where.startswith(CPU_ONLY) and where != THE_SEAM:
            counts[f"{where}: {name}"] += 1
        return function(*arguments, **named)

    return counting


def counts_of(config, step):
    """The counts of each training step, and those of an evaluation after them."""
    found = []
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg)
        for iteration in range(config.train_iters):
            batch = share(uneven(config, iteration), config, pg)
            with counted() as counts:
                state, metrics = mf.train_step(state, batch, step)
            found.append(dict(counts))
            numbers = (metrics.loss, metrics.grad_norm, *metrics.report.values())
            assert all(type(number) is float for number in numbers)
        with counted() as counts:
            mf.evaluate(state, [share(uneven(config, i), config, pg) for i in range(3)], step)
        return found, dict(counts)


def reporting_loss(logits, batch, pg):
    """The built-in loss, a report, and a count that is int32."""
    loss = mf.token_loss(logits, batch, pg)
    return attrs.evolve(loss, count=loss.count.int(), report={"again": loss.sum, "one": 1})


STEP = attrs.evolve(mf.step_fn("gpt"), loss=reporting_loss)
ONCE = {"runtime/training/totals.py: tolist": 1}
AFTER_UPDATE = {"runtime/training/step.py: tolist": 1}


@pytest.mark.parametrize(
    "processes, layout",
    [
        (1, dict()),
        (2, dict(pp=2)),
        (2, dict(pp=2, vpp=2)),
        (2, dict(tp=2, sequence_parallel=True)),
        (2, dict(use_distributed_optimizer=True)),
        (2, dict(cp=2)),
        (2, dict(use_distributed_optimizer=True, dtype="bf16")),
    ],
    ids=["single", "pp2", "pp2-vpp2", "tp2-sp", "dp2-dist", "cp2", "dp2-dist-bf16"],
)
def test_a_step_moves_numbers_to_the_host_once_and_pickles_nothing(processes, layout, pool):
    """megatron-core's own reads included. The first step pickles once, to agree on the report."""
    config = short(vocab_size=96, **layout)
    for (first, *others), evaluation in pool(processes, counts_of, config, STEP):
        assert {name for name in first if name.endswith(OBJECTS)} == {
            "runtime/parallel/object_collectives.py: all_gather_object"
        }
        assert others == [ONCE] * 3 and evaluation == ONCE


def test_adapters_are_compared_over_tp_until_they_have_gradients_and_then_cost_nothing(pool):
    """A's gradient is zero in the first step; B's is not, and moves in it."""
    adapters = mf.lora(rank=2, alpha=2.0, modules=("linear_qkv", "linear_proj"))
    config = short(vocab_size=96, tp=2, prepare_model=adapters, init_lr=1e-2)
    for (_, second, *others), _ in pool(2, counts_of, config, STEP):
        assert second.pop("runtime/training/model_checks.py: tolist") == 2
        assert [second, *others] == [ONCE] * 3


def test_under_log_everything_a_step_moves_numbers_to_the_host_twice(pool):
    config = short(vocab_size=96, pp=2)
    config = attrs.evolve(config, log=mf.LogConfig(everything=True))
    for (_, *others), _ in pool(2, counts_of, config, mf.step_fn("gpt")):
        assert others == [ONCE | AFTER_UPDATE] * 3


def test_padding_of_the_vocabulary_is_hidden_without_looking_at_values_of_a_device():
    """A meta tensor has no values to look at, as those of a GPU are not there yet."""
    logits = torch.ones(2, 3, 8, device="meta", requires_grad=True)
    hidden = _HidePadding.apply(logits * 1, 3)
    hidden.sum().backward()
    assert logits.grad.shape == (2, 3, 8)


def moody_loss(logits, batch, pg):
    """Reports a name only for micro-batches of which every token counts."""
    loss = mf.token_loss(logits, batch, pg)
    report = {"full": loss.sum} if batch["loss_mask"].all() else {}
    return attrs.evolve(loss, report=report)


def refused(config, loss):
    step = attrs.evolve(mf.step_fn("gpt"), loss=loss)
    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size()), timeout_seconds=60
    ) as pg:
        state = mf.setup(config, pg)
        state, _ = mf.train_step(state, share(uneven(config, 0), config, pg), mf.step_fn("gpt"))
        before = [parameter.clone() for parameter in state.chunks[0].parameters()]
        with pytest.raises(ValueError) as error:
            mf.train_step(state, share(uneven(config, 1), config, pg), step)
        assert all(map(torch.equal, before, state.chunks[0].parameters()))
        state, metrics = mf.train_step(state, share(uneven(config, 1), config, pg), STEP)
        return str(error.value), dict(metrics.report), metrics.loss


@pytest.mark.parametrize(
    "processes, layout", [(1, dict()), (2, dict(pp=2)), (2, dict())], ids=["single", "pp2", "dp2"]
)
def test_a_report_with_other_names_in_some_micro_batches_is_refused_on_every_rank(
    processes, layout, pool
):
    """And a step that reports other names than the one before it is not."""
    for error, report, loss in pool(processes, refused, short(**layout), moody_loss):
        assert error == (
            "step.loss: the report's names differ between micro-batches or ranks: [] and ['full']; "
            "report the same names for each, 0 where there is nothing to report."
        )
        assert report.keys() == {"again", "one"} and report["again"] == loss


def raising(batches):
    yield from batches
    raise KeyError("the loader broke")


def test_an_evaluation_that_raises_leaves_the_mode_as_it_was():
    config = short()
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        state = mf.setup(config, pg)
        batch = share(uneven(config, 0), config, pg)
        for training in (True, False):
            state.chunks[0].train(training)
            with pytest.raises(KeyError, match="the loader broke"):
                mf.evaluate(state, raising([batch]), mf.step_fn("gpt"))
            mf.evaluate(state, [batch], mf.step_fn("gpt"))
            assert state.chunks[0].training == training


def test_a_count_that_is_not_whole_is_refused_after_the_sum_where_looking_at_it_would_wait():
    """On a GPU `Loss` marks such a count; here the mark itself stands for it."""
    with mf.init_groups(mf.build_groups(mf.ParallelConfig(), 1)) as pg:
        values = torch.tensor([3.0, FRACTIONAL], dtype=torch.float64)
        fine = MicroBatchSums(names=(), values=torch.tensor([3.0, 2.0], dtype=torch.float64))
        marked = MicroBatchSums(names=(), values=values)
        assert sum_over_ranks([fine, fine], None, pg).count == 4
        with pytest.raises(ValueError, match="Loss.count: not a whole number"):
            sum_over_ranks([fine, marked], (), pg)

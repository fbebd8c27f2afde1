"""Silent errors of upstream: numbers that were wrong in some layout, each with a test here.

Megatron-LM issue 7452 (2026) numbers such findings; the others are issues and pull requests of the
same tracker. Of each: what was wrong there, and the test here.

- 7452, 1; 737, 7464: labels smoothed over each rank's own part of the vocabulary
  Here: `label_smoothing` below
- 7452, 2: gathered logits taken for a slice of the vocabulary: log(tp) too much
  Here: `test_logits_gathered_over_tp_are_refused` below
- 7452, 3; 7498: a loss divided by each data-parallel rank's own count of tokens
  Here: `uneven_counts_over_dp` below (there: of multi-token prediction)
- 7452, 4 and 7: activations cut and gathered over another layout's tensor-parallel group
  Here: `tp_of_ranks_that_are_not_neighbours` below
- 7452, 8; 7359: a parameter counted wrongly in the norm, so in clipping
  Here: `replicated_parameters_in_the_norm` below (there: attention sinks)
- 7452, 9; 7513: under context parallelism a loss divided by each part's own count
  Here: `uneven_counts_over_cp` below
- 7452, 12: a checkpoint whose layers are numbered within a stage, read by other stages
  Here: test_checkpoint_layouts.py, `pp2-vpp2-to-pp4`
- 7513: a reported sum that shares the loss's memory must not be divided with it
  Here: `test_a_report_that_shares_the_loss_s_memory` below
- 7468: the first step after a resume took another weight decay
  Here: `test_the_first_step_after_a_resume_has_its_own_weight_decay` below
- 7207, 6717: an evaluation's mean of means; one summed over some ranks alone
  Here: test_features.py, `test_an_evaluation_is_the_training_loss_*`
- 6920: shards of a loaded checkpoint that were not gathered
  Here: test_checkpoint_layouts.py, `dp2-dist-to-dp4-dist`
- 5337: a sum over tp that was lost where the tensor lay in strides of memory
  Here: `test_gradients_in_strides_of_memory_are_summed_over_tp` below
- 5243: rotary angles of packed documents under context parallelism
  Here: test_features.py, `test_masks_and_positions_*`, `documents-rope-cp2`
- 2263, 5916: which ranks add to the gradient norm where the optimizer's state is cut
  Here: `norm_over_shards` below
- 1586: chunks in turns on a stage read what was freed
  Here: test_equivalence.py, `pp2-vpp2`
- 1464: gradients of attention under context parallelism
  Here: `attention_over_cp` below
- 1446: the last norm's gradient not summed under sequence parallelism
  Here: test_equivalence.py, `tp2-sp`
- 1256: dropout of sequence parallelism outside its own random states
  Here: test_features.py, `test_randomness_is_a_function_of_*`
- 673, 906: a loss scaled by cp, its gradient by something else
  Here: test_equivalence.py, `cp2`, `cp2-dp2-dist`
- 844, 656: a tied table's two copies: in shards, and no longer alike
  Here: test_equivalence.py, `pp2-dp2-dist`
- 486: a mask that never came to T5's cross-attention
  Here: test_t5.py: losses and gradients are those of transformers
- 290: recomputation of several layers at once from the first one's input
  Here: test_equivalence.py, `full-uniform2-tp2-sp`
- 26: tensor-parallel ranks that dropped the same of other heads
  Here: test_features.py, `test_heads_have_masks_of_their_own_*`

Not possible here: a router's count of masked tokens (7452, 10) and norms of experts (6470), since
`validate` refuses ep > 1; a gated delta net's norm (7452, 11), since there is no linear attention;
multi-token prediction (2417), images (LLaVA in 7452, 7), fully sharded parameters (6660, and 7452,
12 as it was), packed rows without padding, FP8.
"""

from unittest import mock

import attrs
import pytest

import checkpoint_runs
import megafn as mf
from combinations import hold
from equivalence import assert_equal, run_layout, short, uneven
from test_features import metrics_of, refused

CP = dict(position_embedding="rope", num_query_groups=2, data="documents")
QK = dict(qk_layernorm=True, position_embedding="rope", clip_grad=0.05, data="uneven")
APART = dict(
    processes=4, tp=2, sequence_parallel=True, order="pp-dp-cp-ep-tp"
)  # tp of ranks 0 and 2, of 1 and 3
CASES = {
    "label_smoothing_over_tp": dict(processes=2, tp=2, smoothing=True, data="uneven"),
    "label_smoothing_over_tp_of_an_untied_table_and_a_pipeline": dict(
        processes=4, tp=2, pp=2, smoothing=True, tie_word_embeddings=False, data="uneven"
    ),
    "uneven_counts_over_dp": dict(processes=4, data="alone"),
    "uneven_counts_over_dp_of_a_pipeline_with_shards": dict(
        processes=4, pp=2, use_distributed_optimizer=True, data="uneven"
    ),
    "tp_of_ranks_that_are_not_neighbours_and_recomputation": dict(
        granularity="full", data="uneven", **APART
    ),
    "tp_of_ranks_that_are_not_neighbours_of_an_encoder_decoder": dict(data="t5", **APART),
    "uneven_counts_over_cp": dict(processes=2, cp=2, data="lopsided"),
    "uneven_counts_over_cp_and_dp": dict(processes=4, cp=2, data="uneven"),
    "replicated_parameters_in_the_norm_of_tp": dict(processes=2, tp=2, **QK),
    "replicated_parameters_in_the_norm_of_sequence_parallelism": dict(
        processes=4, tp=4, sequence_parallel=True, **QK
    ),
    "attention_over_cp": dict(processes=4, cp=4, **CP),
    "attention_over_cp_and_tp": dict(processes=4, cp=2, tp=2, sequence_parallel=True, **CP),
    "norm_over_shards": dict(processes=4, tp=2, use_distributed_optimizer=True, **QK),
    "norm_over_shards_of_cp": dict(
        processes=4, cp=2, use_distributed_optimizer=True, clip_grad=0.05, data="uneven"
    ),
}


@pytest.fixture(scope="module")
def references():
    return {}


@pytest.mark.parametrize("name", CASES)
def test_what_was_wrong_upstream_is_right_here(name, pool, references):
    hold(CASES[name], pool, references)


def of_gathered_logits(logits, batch, pg):
    """The built-in loss of logits that hold the whole vocabulary on every rank."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    return mf.token_loss(gather_from_tensor_model_parallel_region(logits, group=pg.tp), batch, pg)


def test_logits_gathered_over_tp_are_refused(pool):
    """7452, 2: the loss counted every logit tp times.

    It fits every shape: only that the logits are equal on all ranks gives it away.
    """
    config = short(tp=2)
    for told, moved, _ in pool(
        2,
        refused,
        config,
        uneven(config, 0),
        attrs.evolve(mf.step_fn("gpt"), loss=of_gathered_logits),
    ):
        assert (
            told.startswith("logits of shape (32, 2, 98) are the same on all 2 ranks of tp")
            and not moved
        )


def rows_first(model, batch):
    """Logits [batch, sequence, vocabulary / tp]."""
    return model(batch["tokens"]).transpose(0, 1).contiguous()


def loss_of_rows(logits, batch, pg):
    return mf.token_loss(logits.transpose(0, 1), batch, pg)


def watched(config, step):
    """As `run_layout`; and whether each tensor that megatron-core summed over tp was contiguous."""
    from megatron.core.tensor_parallel import mappings

    whole, reduce = [], mappings._reduce

    def sum_over(tensor, group):
        whole.append(tensor.is_contiguous())
        return reduce(tensor, group)

    with mock.patch.object(mappings, "_reduce", sum_over):
        return run_layout(config, step=step), whole


def test_gradients_in_strides_of_memory_are_summed_over_tp(pool):
    """5337: the sum was made in a copy, and the rank's own part was used.

    Rows first, and one head a rank, give such tensors.

    megatron-core 0.16.1 still has it, so no tensor that comes to its `_reduce` may lie so.
    """
    step, base = (
        attrs.evolve(mf.step_fn("gpt"), forward=rows_first, loss=loss_of_rows),
        dict(num_attention_heads=2),
    )
    results, whole = zip(*pool(2, watched, short(tp=2, **base), step), strict=True)
    assert all(whole) and all(map(all, whole))
    assert_equal(pool(1, run_layout, short(**base))[0], results)


def twice_told(logits, batch, pg):
    """The built-in loss as fp64, so that conversion to fp64 copies nothing; also as a report."""
    loss = mf.token_loss(logits, batch, pg)
    total = loss.sum.double()
    return mf.Loss(sum=total, count=loss.count, report={"again": total})


@pytest.mark.parametrize(
    "processes, layout",
    [(2, dict(pp=2)), (4, dict(cp=2, use_distributed_optimizer=True))],
    ids=["pp2", "cp2-dp2-dist"],
)
def test_a_report_that_shares_the_loss_s_memory(processes, layout, pool):
    """7513: the schedule divides the loss in place, and with it what was reported."""
    plain = pool(1, metrics_of, short(), mf.step_fn("gpt"))[0]
    for seen in pool(
        processes, metrics_of, short(**layout), attrs.evolve(mf.step_fn("gpt"), loss=twice_told)
    ):
        for one, expected in zip(seen, plain, strict=True):
            assert (
                one["report"]["again"] == one["loss"] == pytest.approx(expected["loss"], abs=1e-4)
            )
            assert one["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-4)


def test_the_first_step_after_a_resume_has_its_own_weight_decay(pool, tmp_path):
    """7468: loading set the learning rate but left the new optimizer's initial weight decay.

    On a ramp the next step is wrong.
    """
    config = checkpoint_runs.config_of(
        weight_decay=0.01,  # the default: a ramp does not read it
        weight_decay_incr_style="linear",
        start_weight_decay=0.0,
        end_weight_decay=1.0,
    )
    ((curve, start, end, _),) = pool(
        1, checkpoint_runs.run, config, tmp_path, checkpoint_runs.SAVED
    )
    ((after, _, last, _),) = pool(1, checkpoint_runs.run, config, tmp_path)
    assert_equal((curve[checkpoint_runs.SAVED :], start, end), [(after, start, last)])

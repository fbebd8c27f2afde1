"""Errors of upstream that said nothing: numbers that were wrong in some layout. Each that can be had here has a test of its name.

Megatron-LM issue 7452 (2026) numbers such findings; the others stand beside it in the same tracker.

| upstream | what was wrong | here |
|---|---|---|
| 7452, 1 | labels smoothed over each rank's own part of the vocabulary | `label_smoothing` below |
| 7452, 3 | a loss divided by each data-parallel rank's own count of tokens | `uneven_counts_over_dp` below (that of multi-token prediction, which is not offered) |
| 7452, 8 | a replicated parameter's share of the gradient norm, so of clipping | `replicated_parameters_in_the_norm` below (attention sinks are not offered; norms of queries and keys are alike) |
| 7452, 9 | under context parallelism a loss divided by each part's own count | `uneven_counts_over_cp` below |
| 7452, 10 and 11 | a router's count of masked tokens; the norm of a gated delta net | no mixture of experts, no linear attention |
| 7207 | an evaluation's mean of means | test_features.py, `test_an_evaluation_is_the_training_loss_*` |
| 1256 | dropout of sequence parallelism outside its own random states | test_features.py, `test_randomness_is_a_function_of_*` |
| 1464 | gradients of attention under context parallelism | `attention_over_cp` below |
| 2263, 5916 | which ranks add to the gradient norm where the optimizer's state is cut | `norm_over_shards` below |
"""
import pytest
from combinations import hold

CP = dict(position_embedding="rope", num_query_groups=2, data="documents")
QK = dict(qk_layernorm=True, position_embedding="rope", clip_grad=0.05, data="uneven")
CASES = {
    "label_smoothing_over_tp": dict(processes=2, tp=2, smoothing=True, data="uneven"),
    "label_smoothing_over_tp_of_an_untied_table_and_a_pipeline": dict(processes=4, tp=2, pp=2, smoothing=True, tie_word_embeddings=False, data="uneven"),
    "uneven_counts_over_dp": dict(processes=4, data="alone"),
    "uneven_counts_over_dp_of_a_pipeline_with_shards": dict(processes=4, pp=2, use_distributed_optimizer=True, data="uneven"),
    "uneven_counts_over_cp": dict(processes=2, cp=2, data="lopsided"),
    "uneven_counts_over_cp_and_dp": dict(processes=4, cp=2, data="uneven"),
    "replicated_parameters_in_the_norm_of_tp": dict(processes=2, tp=2, **QK),
    "replicated_parameters_in_the_norm_of_sequence_parallelism": dict(processes=4, tp=4, sequence_parallel=True, **QK),
    "attention_over_cp": dict(processes=4, cp=4, **CP),
    "attention_over_cp_and_tp": dict(processes=4, cp=2, tp=2, sequence_parallel=True, **CP),
    "norm_over_shards": dict(processes=4, tp=2, use_distributed_optimizer=True, **QK),
    "norm_over_shards_of_cp": dict(processes=4, cp=2, use_distributed_optimizer=True, clip_grad=0.05, data="uneven"),
}


@pytest.fixture(scope="module")
def references():
    return {}


@pytest.mark.parametrize("name", CASES)
def test_what_was_wrong_upstream_is_right_here(name, pool, references):
    hold(CASES[name], pool, references)

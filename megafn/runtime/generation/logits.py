"""Logits of whole sequences on every rank, in any layout."""

from __future__ import annotations

import torch

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.sequence_unit import sequence_unit
from megafn.runtime.families.batch_checks import check_ids
from megafn.runtime.families.built_in import family_of
from megafn.runtime.families.step import Batch, Step, cut_sequence
from megafn.runtime.model.eval_mode import eval_mode
from megafn.runtime.model.state import State, check_usable
from megafn.runtime.parallel.megatron_context import megatron_context
from megafn.runtime.training.forward_backward import run_schedule
from megafn.runtime.training.whole_logits import Output, whole_logits


@torch.no_grad()
def logits(state: State, tokens: torch.Tensor) -> Output:
    """Logits [batch, sequence, vocabulary] of tokens [batch, sequence], equal on every rank.

    For GPT those of the next token. For BERT those of each token itself (with the binary head a
    tuple, with logits of the order [batch, 2] second), or those of labels [batch, num_labels].
    Gathered over tensor and context parallel and sent to every pipeline stage. Every rank passes
    the same tokens. The model is evaluated without dropout and keeps its mode.

    Raises ConfigError for T5, whose decoder needs its own input, and ValueError for an id outside
    the vocabulary or a sequence longer than a learned position table; RuntimeError for a state that
    was donated, or whose process groups are closed.
    """
    check_usable(state)
    config = state.config
    parallel = config.parallel
    pg = state.pg
    family = family_of(config.model.family)
    if not family.reads_tokens_only:
        raise ConfigError(
            f"model.family = {family.name!r}: needs more than token ids; set return_logits, and "
            "evaluate gives the logits of a batch"
        )
    check_ids("tokens", tokens, config.model.vocab_size)
    unit = sequence_unit(parallel.tp, parallel.cp, parallel.sequence_parallel)
    micro_batch = family.step.batch(_padded(tokens, unit), config, pg)
    outputs = _outputs(state, family.step, cut_sequence(micro_batch, pg))
    (whole,) = whole_logits(outputs[:1], config, pg, every_stage=True)
    return _without_padding(whole, tokens.size(1))


def _padded(tokens: torch.Tensor, unit: int) -> Batch:
    """A raw micro-batch of the tokens, padded to a multiple of `unit` tokens."""
    length = tokens.size(1)
    padding = -length % unit
    if padding == 0:
        return {"input_ids": tokens}
    input_ids = torch.nn.functional.pad(tokens, (0, padding))
    is_real = torch.arange(length + padding) < length
    return {"input_ids": input_ids, "attention_mask": is_real.long().expand_as(input_ids)}


def _outputs(state: State, step: Step, micro_batch: Batch) -> list[Output]:
    """What the model puts out for a micro-batch, in evaluation mode; [] before the last stage."""
    pg = state.pg
    # megatron-core's interleaved schedule needs a multiple of pp micro-batches
    copies = pg.pp.size() if len(state.chunks) > 1 else 1
    with megatron_context(pg, state.config.seed, "logits"), eval_mode(state.chunks):
        return run_schedule(
            state.chunks,
            [micro_batch] * copies,
            step.forward,
            lambda _, output, non_loss_data: output,
            pg,
            forward_only=True,
            collect=True,
        )


def _without_padding(whole: Output, length: int) -> Output:
    """`whole` with its logits of tokens cut to the given length."""
    if isinstance(whole, tuple):
        of_tokens, *others = whole
        return (of_tokens[:, :length], *others)
    return whole[:, :length] if whole.dim() == 3 else whole

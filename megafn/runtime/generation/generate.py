"""Logits of whole sequences on every rank, in any layout, and text sampled from them."""

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


def generate(
    state: State,
    tokens: torch.Tensor,
    *,
    count: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """tokens [batch, sequence] and `count` sampled tokens more of each sequence, on the CPU.

    The model sees the last `seq_length` tokens. temperature 0 takes the most likely token; top_k
    samples only from that many of the most likely. The samples are a function of (seed, tokens), so
    every rank returns the same.
    Raises ValueError for an empty prompt, a negative temperature, top_k below 1, and a family that
    does not predict the next token.
    """
    _check_arguments(state, tokens, temperature, top_k)
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens.cpu()
    for _ in range(count):
        window = tokens[:, -state.config.model.seq_length :]
        all_logits = logits(state, window)
        # The type leaves room for BERT's tuple; a family that predicts the next token has a tensor.
        assert isinstance(all_logits, torch.Tensor)
        next_logits = all_logits[:, -1].float().cpu()
        next_tokens = _sample(next_logits, temperature, top_k, generator)
        tokens = torch.cat([tokens, next_tokens], dim=1)
    return tokens


def _check_arguments(
    state: State, tokens: torch.Tensor, temperature: float, top_k: int | None
) -> None:
    family = family_of(state.config.model.family)
    if not family.predicts_next_token:
        raise ValueError(
            f"model.family = {family.name!r}: does not predict the next token; "
            "call megafn.logits for what it predicts"
        )
    if tokens.dim() != 2 or tokens.size(1) == 0:
        raise ValueError(
            f"tokens of shape {list(tokens.shape)}: expected [batch, sequence]; "
            "give at least one token of each sequence"
        )
    if temperature < 0:
        raise ValueError(f"temperature = {temperature}: must be at least 0; raise it")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: must be at least 1; raise it, or leave it out")


def _sample(
    next_logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> torch.Tensor:
    """One token [batch, 1] for each row of logits [batch, vocabulary]."""
    if top_k is not None:
        largest = next_logits.topk(min(top_k, next_logits.size(-1))).values
        next_logits = next_logits.masked_fill(next_logits < largest[:, -1:], float("-inf"))
    if temperature == 0:
        return next_logits.argmax(-1, keepdim=True)
    probabilities = (next_logits / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)

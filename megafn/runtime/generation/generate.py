"""Text out of a state: logits of whole sequences on every rank, in any layout, and sampling from them."""

from __future__ import annotations

from typing import Any

import torch

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.sequence_unit import sequence_unit
from megafn.runtime.families.batch_checks import check_ids
from megafn.runtime.families.built_in import family_of
from megafn.runtime.families.step import cut_sequence
from megafn.runtime.model.state import State
from megafn.runtime.parallel.megatron_context import megatron_context
from megafn.runtime.training.forward_backward import run_schedule
from megafn.runtime.training.whole_logits import whole_logits


@torch.no_grad()
def logits(state: State, tokens: torch.Tensor) -> Any:
    """Logits [batch, sequence, vocabulary] of tokens [batch, sequence], the same on every rank, whatever the layout.

    Of the family's model: the next token's for GPT; for BERT each token's own (with the binary head a tuple, logits of the
    order [batch, 2] second), or those of labels [batch, num_labels]. Gathered over tensor and context parallel and sent to
    every pipeline stage. Every rank gives the same tokens.
    Raises ConfigError for T5, whose decoder wants an input of its own, and ValueError where an id lies outside the vocabulary or the sequence is longer than a learned position table.
    """
    config, pg, parallel = state.config, state.pg, state.config.parallel
    family = family_of(config.model.family)
    if not family.reads_tokens_only:
        raise ConfigError(
            f"model.family = {family.name!r}: needs more than token ids; set return_logits, and "
            "evaluate gives the logits of a batch."
        )
    step = family.step
    length = tokens.size(1)
    check_ids("tokens", tokens, config.model.vocab_size)
    unit = sequence_unit(parallel.tp, parallel.cp, parallel.sequence_parallel)
    raw = {"input_ids": torch.nn.functional.pad(tokens, (0, -length % unit))}
    if length % unit:
        raw["attention_mask"] = (
            (torch.arange(raw["input_ids"].size(1)) < length).long().expand_as(raw["input_ids"])
        )
    micro_batch = cut_sequence(step.batch(raw, config, pg), pg)
    micro_batches = [micro_batch] * (
        parallel.pp if parallel.vpp > 1 else 1
    )  # interleaving wants a multiple of pp
    modes = [chunk.training for chunk in state.chunks]
    with megatron_context(pg, config.seed, "logits"):
        for chunk in state.chunks:
            chunk.eval()
        found = run_schedule(
            state.chunks,
            micro_batches,
            step.forward,
            lambda _, output, non_loss_data: output,
            pg,
            forward_only=True,
            collect=True,
        )
        for chunk, mode in zip(state.chunks, modes):
            chunk.train(mode)
    whole = whole_logits(found[:1], config, pg, every_stage=True)[0]
    first, *others = whole if isinstance(whole, tuple) else (whole,)
    first = first[:, :length] if first.dim() == 3 else first
    return (first, *others) if others else first


def generate(
    state: State,
    tokens: torch.Tensor,
    *,
    count: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """tokens [batch, sequence] and `count` more of each, sampled one by one; temperature 0 takes the likeliest.

    The model sees the last `seq_length` tokens. The draw is a function of (seed, tokens), so every rank gets the same.
    Raises ValueError for an empty prompt, a negative temperature, top_k below 1, and a family that predicts no next token.
    """
    family = family_of(state.config.model.family)
    if not family.predicts_next_token:
        raise ValueError(
            f"model.family = {family.name!r}: does not predict the next token; ask megafn.logits "
            "for what it predicts."
        )
    if tokens.dim() != 2 or tokens.size(1) == 0:
        raise ValueError(
            f"tokens of shape {list(tokens.shape)}: at least one token of each sequence is wanted, [batch, sequence]."
        )
    if temperature < 0 or top_k is not None and top_k < 1:
        raise ValueError(
            f"temperature = {temperature}, top_k = {top_k}: a temperature of 0 or more and a top_k of at least 1 (or None) are wanted."
        )
    draw = torch.Generator().manual_seed(seed)
    tokens = tokens.cpu()
    for _ in range(count):
        last = logits(state, tokens[:, -state.config.model.seq_length :])[:, -1].float().cpu()
        if top_k is not None:
            last = last.masked_fill(
                last < last.topk(min(top_k, last.size(-1))).values[:, -1:], float("-inf")
            )
        if temperature == 0:
            following = last.argmax(-1, keepdim=True)
        else:
            following = torch.multinomial((last / temperature).softmax(-1), 1, generator=draw)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens

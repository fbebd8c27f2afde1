"""Text out of a state: logits of whole sequences on every rank, in any layout, and sampling from them."""
from __future__ import annotations

import torch

from megafn.runtime.gathering import whole_logits
from megafn.runtime.groups import megatron
from megafn.runtime.passes import cut_sequence, run_schedule
from megafn.runtime.steps import check_ids, gpt_forward
from megafn.runtime.train import State


@torch.no_grad()
def logits(state: State, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] of tokens [batch, sequence], the same on every rank, whatever the layout.

    Gathered over tensor and context parallel and sent to every pipeline stage. Every rank gives the same tokens.
    Raises ValueError where an id lies outside the vocabulary or the sequence is longer than a learned position table.
    """
    config, pg, parallel = state.config, state.pg, state.config.parallel
    length = tokens.size(1)
    check_ids("tokens", tokens, config.model.vocab_size)
    unit = (2 * parallel.cp if parallel.cp > 1 else 1) * (parallel.tp if parallel.sequence_parallel else 1)
    tokens = torch.nn.functional.pad(tokens.to(pg.device), (0, -length % unit))       # causal: what is behind is not seen
    micro_batch = cut_sequence({"tokens": tokens}, pg)
    micro_batches = [micro_batch] * (parallel.pp if parallel.vpp > 1 else 1)          # interleaving wants a multiple of pp
    modes = [chunk.training for chunk in state.chunks]
    with megatron(pg, config.seed, "logits"):
        for chunk in state.chunks:
            chunk.eval()
        found = run_schedule(state.chunks, micro_batches, gpt_forward, lambda _, output, non_loss_data: output, pg, forward_only=True, collect=True)
        for chunk, mode in zip(state.chunks, modes):
            chunk.train(mode)
    return whole_logits(found[:1], config, pg, every_stage=True)[0][:, :length]


def generate(state: State, tokens: torch.Tensor, *, count: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0) -> torch.Tensor:
    """tokens [batch, sequence] and `count` more of each, sampled one by one; temperature 0 takes the likeliest.

    The model sees the last `seq_length` tokens. The draw is a function of (seed, tokens), so every rank gets the same.
    Raises ValueError for an empty prompt, a negative temperature or top_k below 1.
    """
    if tokens.dim() != 2 or tokens.size(1) == 0:
        raise ValueError(f"tokens of shape {list(tokens.shape)}: at least one token of each sequence is wanted, [batch, sequence].")
    if temperature < 0 or top_k is not None and top_k < 1:
        raise ValueError(f"temperature = {temperature}, top_k = {top_k}: a temperature of 0 or more and a top_k of at least 1 (or None) are wanted.")
    draw = torch.Generator().manual_seed(seed)
    tokens = tokens.cpu()
    for _ in range(count):
        last = logits(state, tokens[:, -state.config.model.seq_length:])[:, -1].float().cpu()
        if top_k is not None:
            last = last.masked_fill(last < last.topk(min(top_k, last.size(-1))).values[:, -1:], float("-inf"))
        if temperature == 0:
            following = last.argmax(-1, keepdim=True)
        else:
            following = torch.multinomial((last / temperature).softmax(-1), 1, generator=draw)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens

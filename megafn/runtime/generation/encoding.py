"""Prompts read by an encoder: once, before the decoder writes its first token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from attrs import frozen

from megafn.pure.config.sequence_unit import sequence_unit
from megafn.runtime.families.batch_checks import padding_mask
from megafn.runtime.families.family import EncoderDecoder
from megafn.runtime.generation.stage_messages import (
    empty_hidden,
    receive_hidden,
    send_hidden,
    unwrapped,
)
from megafn.runtime.model.key_value_cache import EncoderMemory
from megafn.runtime.model.state import State


@frozen(kw_only=True, eq=False)
class EncodedPrompts:
    """What the decoder attends to of a part of the prompts.

    memory: the same on all pipeline stages. mask: bool [batch, 1, 1, sequence], True = hidden;
    None if nothing is.
    """

    memory: EncoderMemory
    mask: torch.Tensor | None


@frozen(kw_only=True, eq=False)
class _PaddedPrompts:
    """Prompts padded at their end: tokens [batch, sequence] and the padding's mask."""

    tokens: torch.Tensor
    mask: torch.Tensor | None


def encode(
    parts: Sequence[Sequence[Sequence[int]]], functions: EncoderDecoder, state: State
) -> list[EncodedPrompts]:
    """Each part's prompts, encoded. The stages of the encoder work on the parts at once.

    Every rank calls it; the last stage of the encoder sends what it computed to the others.
    """
    batches = [_padded(prompts, state) for prompts in parts]
    stages = max(1, functions.first_decoder_stage(state.config.parallel))
    stage = state.pg.place.pp
    sends: list[dist.Work] = []
    outputs = [torch.empty(0)] * len(batches)
    if stage < stages:
        chunk = unwrapped(state.chunks[0])
        for number, batch in enumerate(batches):
            if stage > 0:
                chunk.set_input_tensor(receive_hidden(batch.tokens.shape, state))
            outputs[number] = functions.encode(chunk, batch.tokens, batch.mask)
            if stage < stages - 1:
                send_hidden(outputs[number], state.pg, sends)
    encoded = []
    for batch, output in zip(batches, outputs, strict=True):
        hidden = _from_last_encoder_stage(output, stages - 1, batch.tokens.shape, state)
        encoded.append(EncodedPrompts(memory=EncoderMemory(hidden), mask=batch.mask))
    for send in sends:
        send.wait()
    return encoded


def _padded(prompts: Sequence[Sequence[int]], state: State) -> _PaddedPrompts:
    parallel = state.config.parallel
    unit = sequence_unit(parallel.tp, 1, parallel.sequence_parallel)
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest + -longest % unit, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    is_real = torch.arange(tokens.size(1)) < lengths[:, None]
    mask = padding_mask(is_real)
    device = state.pg.device
    return _PaddedPrompts(tokens=tokens.to(device), mask=None if mask is None else mask.to(device))


def _from_last_encoder_stage(
    output: torch.Tensor, stage: int, shape: tuple[int, ...], state: State
) -> torch.Tensor:
    """What the encoder's last stage computed, on all stages."""
    pg = state.pg
    if pg.pp.size() == 1:
        return output
    if pg.place.pp != stage:
        output = empty_hidden(shape, state)
    output = output.contiguous()
    dist.broadcast(output, dist.get_process_group_ranks(pg.pp)[stage], group=pg.pp)
    return output

"""Text from a model in its training layout: prompts continued token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from attrs import define, field, frozen

from megafn.pure.generation import GenerationConfig, check_generation
from megafn.pure.layout import Coordinates, rank_of
from megafn.runtime.families.built_in import family_of
from megafn.runtime.families.family import EncoderDecoder
from megafn.runtime.generation.decoding import (
    Decoding,
    Pass,
    can_use_a_cache,
    last_logits,
    next_pass,
    run_chunk,
)
from megafn.runtime.generation.encoding import EncodedPrompts, encode
from megafn.runtime.generation.logits import logits as logits_of
from megafn.runtime.generation.prompts import Prompts, as_ids, check_prompts, padded_batch
from megafn.runtime.generation.sampling import next_tokens
from megafn.runtime.model.eval_mode import eval_mode
from megafn.runtime.model.key_value_cache import KeyValueCache
from megafn.runtime.model.state import State, check_usable
from megafn.runtime.parallel import cpu
from megafn.runtime.parallel.megatron_context import derive_seed, megatron_context
from megafn.runtime.parallel.object_collectives import broadcast_from_rank_zero

# (number of the prompt, token id, its log-probability or None), on rank zero as tokens come.
OnToken = Callable[[int, int, float | None], None]


@frozen(kw_only=True)
class Generated:
    """New tokens of each prompt, a stop id included, and their log-probabilities if asked for."""

    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...] | None = None


@torch.no_grad()
def generate(
    state: State,
    prompts: Prompts,
    config: GenerationConfig | None = None,
    on_token: OnToken | None = None,
) -> Generated:
    """Continue prompts with the model of a state, in any layout; with a T5, answer them.

    prompts: the token ids of each, of any lengths; or a tensor [batch, sequence]. Every rank passes
    the same ones and gets the same answer; data- and context-parallel ranks all compute all of it.
    on_token: see `OnToken`; other ranks than zero don't call it.
    Keys and values of the tokens before are kept, unless the model has modules that may look at
    other positions than attention does: then each token costs a pass over all before it. With
    pipeline parallelism the prompts are cut into as many parts as there are stages, which all
    compute at once. A T5's encoder reads the prompts, once; its decoder begins with
    model.decoder_start_token_id, which is not among the new tokens. The model is evaluated without
    dropout, and keeps its mode.

    Raises ValueError, on every rank and before anything is computed, for an empty prompt, an id
    outside the vocabulary, a prompt that with its new tokens is longer than a learned position
    table, prompts that differ between ranks, a family that does not predict the next token, and a
    T5 with modules of a user's; ValueError, on every rank and at the end, for logits that are NaN
    or infinite;
    ConfigError for the fields of `config`; RuntimeError for a state that was donated, or whose
    process groups are closed. What `on_token` raises is raised at the end.
    """
    check_usable(state)
    config = config if config is not None else GenerationConfig()
    ids = _checked_on_all_ranks(state, prompts, config)
    output = _Output(config=config, tokens=[[] for _ in ids], logprobs=[[] for _ in ids])
    if state.pg.is_rank_zero:
        output.on_token = on_token
    with megatron_context(state.pg, state.config.seed, "generate"), eval_mode(state.chunks):
        if can_use_a_cache(state):
            with cpu.device_requests_not_answered():
                _decode(state, ids, output)
        elif family_of(state.config.model.family).encoder_decoder is not None:
            raise ValueError(
                f"model.family = {state.config.model.family!r}: it has modules that may look at "
                "other positions than attention does; generate with a model of megafn's modules"
            )
        else:
            _decode_without_cache(state, ids, output)
    _raise_error_of_on_token(output, state)
    if output.row_without_numbers is not None:
        raise ValueError(
            f"prompts[{output.row_without_numbers}]: the model's logits are not numbers (NaN or "
            "infinity); check its weights"
        )
    return output.generated()


# ---------------------------------------------------------------------------------- what is asked


def _checked_on_all_ranks(
    state: State, prompts: Prompts, config: GenerationConfig
) -> tuple[tuple[int, ...], ...]:
    """The prompts' ids. If they are refused, or differ between ranks, every rank raises."""
    ids: tuple[tuple[int, ...], ...] = ()
    error = None
    try:
        _check_family(state)
        check_generation(config, state.config.model.vocab_size)
        ids = as_ids(prompts)
        is_continued = family_of(state.config.model.family).encoder_decoder is None
        check_prompts(ids, config, state.config.model, is_continued=is_continued)
    except ValueError as refused:
        error = refused
    digest = derive_seed(ids, config, str(error))
    extremes = torch.tensor([digest, -digest], device=state.pg.device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=state.pg.world)
    if error is not None:
        raise error
    largest, smallest = extremes[0].item(), -extremes[1].item()
    if largest != smallest:
        raise ValueError(
            "prompts: differ between ranks, or their GenerationConfig does; pass the same on all"
        )
    return ids


def _check_family(state: State) -> None:
    family = family_of(state.config.model.family)
    if not family.predicts_next_token and family.encoder_decoder is None:
        raise ValueError(
            f"model.family = {family.name!r}: does not predict the next token; "
            "call megafn.logits for what it predicts"
        )


# -------------------------------------------------------------------------------- what is returned


@define(kw_only=True, eq=False)
class _Output:
    """The new tokens until now."""

    config: GenerationConfig
    tokens: list[list[int]]
    logprobs: list[list[float]]
    on_token: OnToken | None = None
    error: Exception | None = None  # of on_token
    row_without_numbers: int | None = None  # a prompt whose logits had a NaN or infinity

    def is_done(self, row: int) -> bool:
        if self.row_without_numbers is not None:
            return True
        tokens = self.tokens[row]
        return len(tokens) == self.config.max_new_tokens or (
            bool(tokens) and tokens[-1] in self.config.stop_token_ids
        )

    def add(self, rows: Sequence[int], drawn: torch.Tensor) -> None:
        """The next token of each row that is not done; drawn: ids and log-probabilities [2, batch].

        If the model's logits were not numbers, every row is done: it is an error, but tokens of
        other parts are on their way, and must be received before it is raised.
        """
        for row, token, logprob in zip(rows, *drawn.tolist(), strict=True):
            if token < 0:
                self.row_without_numbers = row
            if not self.is_done(row):
                self.tokens[row].append(int(token))
                self.logprobs[row].append(logprob)
                self._report(row, int(token), logprob)

    def _report(self, row: int, token: int, logprob: float) -> None:
        if self.on_token is None:
            return
        try:
            self.on_token(row, token, logprob if self.config.logprobs else None)
        except Exception as error:  # the other ranks are told at the end
            self.error = error
            self.on_token = None

    def generated(self) -> Generated:
        return Generated(
            tokens=tuple(map(tuple, self.tokens)),
            logprobs=tuple(map(tuple, self.logprobs)) if self.config.logprobs else None,
        )


def _raise_error_of_on_token(output: _Output, state: State) -> None:
    text = None
    if output.error is not None:
        text = f"on_token raised {type(output.error).__name__} on rank zero: {output.error}"
    text = broadcast_from_rank_zero(text, state.pg)
    if output.error is not None:
        raise output.error
    if text is not None:
        raise RuntimeError(text)


# ------------------------------------------------------------------------------------- with a cache


@frozen(kw_only=True, eq=False)
class _Arrival:
    """Tokens of a part on their way from the rank that drew them to all others.

    drawn: ids and log-probabilities [2, batch]. sending: None on the ranks that receive.
    """

    drawn: torch.Tensor
    sending: dist.Work | None


@frozen(kw_only=True, eq=False)
class _Rounds:
    """Rounds of decoding, in each of which every part of the prompts gets one token."""

    state: State
    parts: Sequence[Decoding]
    output: _Output
    # by the number of the part, both
    passes: dict[int, Pass] = field(factory=dict)  # of this round; none of a part that is done
    arrivals: dict[int, _Arrival] = field(factory=dict)
    sends: list[dist.Work] = field(factory=list)  # of hidden states to the next stage


def _decode(state: State, prompts: Sequence[Sequence[int]], output: _Output) -> None:
    """Add tokens to `output` until every prompt is done.

    In each round the parts go through the chunks of a stage one after the other, so that all stages
    compute at once, and the token that a part got is waited for when its next round begins. All
    ranks do this in the same order.
    """
    parts = _parts(state, prompts, output.config)
    rounds = _Rounds(state=state, parts=parts, output=output)
    for step in range(output.config.max_new_tokens):
        for index in range(len(parts)):
            _begin_round(rounds, index)
            _run_chunk(rounds, step, 0, index)
        for number in range(1, len(state.chunks)):
            for index in range(len(parts)):
                _run_chunk(rounds, step, number, index)
    for index in range(len(parts)):
        _receive_tokens(rounds, index)
    for send in rounds.sends:
        send.wait()


def _begin_round(rounds: _Rounds, index: int) -> None:
    """Receive the token that a part got in the round before, and prepare its next pass."""
    part = rounds.parts[index]
    _receive_tokens(rounds, index)
    rounds.passes.pop(index, None)
    if not all(rounds.output.is_done(row) for row in part.batch.rows):
        rounds.passes[index] = next_pass(part, rounds.state.config)


def _run_chunk(rounds: _Rounds, step: int, number: int, index: int) -> None:
    """A part through one chunk of this stage; after the last one its tokens are drawn and sent."""
    one_pass = rounds.passes.get(index)
    if one_pass is None:
        return
    state = rounds.state
    part = rounds.parts[index]
    hidden = run_chunk(number, part, one_pass, state, rounds.sends)
    if number == len(state.chunks) - 1:
        drawn = _draw(hidden, part, one_pass, state, rounds.output.config, step)
        rounds.arrivals[index] = _send_tokens(drawn, state)


def _parts(
    state: State, prompts: Sequence[Sequence[int]], config: GenerationConfig
) -> list[Decoding]:
    """The prompts cut into one part for each stage of the decoder, as far as there are prompts."""
    functions = family_of(state.config.model.family).encoder_decoder
    if functions is None:
        places = _split(len(prompts), state.pg.pp.size())
        return [_part(rows, prompts, _continue, state, config) for rows in places]
    first_stage = functions.first_decoder_stage(state.config.parallel)
    places = _split(len(prompts), state.pg.pp.size() - first_stage)
    encoded = encode([[prompts[row] for row in rows] for rows in places], functions, state)
    starts = [(state.config.model.decoder_start_token_id,)] * len(prompts)
    parts = []
    for rows, memory in zip(places, encoded, strict=True):
        call = partial(_answer, functions, memory)
        parts.append(_part(rows, starts, call, state, config, first_stage))
    return parts


def _split(count: int, parts: int) -> list[range]:
    """Numbers from 0 to count - 1 in at most so many parts, none of them empty."""
    parts = min(parts, count)
    bounds = [number * count // parts for number in range(parts + 1)]
    return [range(first, end) for first, end in pairwise(bounds)]


def _part(
    rows: Sequence[int],
    prompts: Sequence[Sequence[int]],
    call: Callable[[Any, Pass], torch.Tensor],
    state: State,
    config: GenerationConfig,
    first_stage: int = 0,
) -> Decoding:
    batch = padded_batch(rows, prompts, state.pg.device)
    capacity = batch.tokens.size(1) + config.max_new_tokens
    cache = KeyValueCache(capacity=capacity)
    return Decoding(batch=batch, cache=cache, call=call, first_stage=first_stage)


def _continue(chunk: Any, one_pass: Pass) -> torch.Tensor:
    """A chunk of a decoder that has read the prompt itself."""
    return chunk(one_pass.tokens, one_pass.positions, one_pass.hidden, cache=one_pass.cache)


def _answer(
    functions: EncoderDecoder, encoded: EncodedPrompts, chunk: Any, one_pass: Pass
) -> torch.Tensor:
    """A chunk of a decoder that attends to what an encoder has read."""
    return functions.decode(
        chunk,
        one_pass.tokens,
        one_pass.positions,
        one_pass.hidden,
        one_pass.cache,
        encoded.memory,
        encoded.mask,
    )


def _draw(
    hidden: torch.Tensor,
    part: Decoding,
    one_pass: Pass,
    state: State,
    config: GenerationConfig,
    step: int,
) -> torch.Tensor:
    """Ids and log-probabilities [2, batch] of the next tokens; empty before the last stage."""
    rows = part.batch.rows
    if not state.pg.is_last_stage:
        return torch.empty(2, len(rows), dtype=torch.float64, device=state.pg.device)
    ids, logprobs = next_tokens(last_logits(hidden, one_pass, state), config, rows, step)
    return torch.stack([ids.double(), logprobs.double()])


def _drawing_rank(state: State) -> int:
    """One rank decides for all, because replicas may round differently."""
    groups = state.pg.groups
    return rank_of(groups, Coordinates(pp=groups.pp_size - 1))


def _send_tokens(drawn: torch.Tensor, state: State) -> _Arrival:
    source = _drawing_rank(state)
    sending = None
    if state.pg.rank == source:
        sending = dist.broadcast(drawn, source, group=state.pg.world, async_op=True)
    return _Arrival(drawn=drawn, sending=sending)


def _receive_tokens(rounds: _Rounds, index: int) -> None:
    """Wait for a part's tokens, if some are on their way.

    They are added to the output, and to what the part's next pass reads.
    """
    arrival = rounds.arrivals.pop(index, None)
    if arrival is None:
        return
    if arrival.sending is not None:
        arrival.sending.wait()
    else:
        state = rounds.state
        dist.broadcast(arrival.drawn, _drawing_rank(state), group=state.pg.world)
    part = rounds.parts[index]
    rounds.output.add(part.batch.rows, arrival.drawn)
    part.append(arrival.drawn[0].long())


# ---------------------------------------------------------------------------------- without a cache


def _decode_without_cache(state: State, prompts: Sequence[Sequence[int]], output: _Output) -> None:
    """Add tokens to `output` until every prompt is done; each costs a pass over all before it.

    Rows are padded at their end, where causality hides it.
    """
    rows = range(len(prompts))
    for step in range(output.config.max_new_tokens):
        if all(output.is_done(row) for row in rows):
            return
        sequences = [[*prompts[row], *output.tokens[row]] for row in rows]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row in rows:
            tokens[row, : lengths[row]] = torch.tensor(sequences[row])
        all_logits = logits_of(state, tokens)
        # The type leaves room for BERT's tuple; a family that predicts the next token has a tensor.
        assert isinstance(all_logits, torch.Tensor)
        last = all_logits[torch.arange(len(prompts)), lengths - 1]
        ids, logprobs = next_tokens(last, output.config, rows, step)
        drawn = torch.stack([ids.double(), logprobs.double()])
        dist.broadcast(drawn, _drawing_rank(state), group=state.pg.world)
        output.add(rows, drawn)

"""Starting from weights that are there: `from_pretrained`, and `checkpoint.pretrained` of a run.

Each rank reads the boxes of its own parameters. What one rank finds wrong is an error on every
rank: after each step the ranks compare what they found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import attrs
import torch
from attrs import frozen
from safetensors import SafetensorError

from megafn.pure.checkpoint.boxes import Box, Index
from megafn.pure.config.problems import ConfigError, Problem, config_error
from megafn.pure.config.records import CheckpointConfig, ModelConfig
from megafn.pure.pretrained.compatibility import (
    changed_reach,
    has_another_head,
    is_head,
    model_problems,
)
from megafn.pure.pretrained.natural_order import in_natural_order
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.checkpoint.disk_format import latest
from megafn.runtime.checkpoint.state_boxes import fill_state, held_shapes, kind_and_parameter
from megafn.runtime.metrics.sinks import print_on_rank_zero
from megafn.runtime.model.state import State, check_usable, donate
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.object_collectives import (
    call_on_rank_zero,
    decide_on_rank_zero,
    errors_on_all_ranks,
    gather_from_all_ranks,
)
from megafn.runtime.pretrained.base import open_weights
from megafn.runtime.pretrained.formats import Place, find_weights
from megafn.runtime.pretrained.weight_source import WeightSource

# Errors of the weights' content or place, which every rank raises if one does.
_PROBLEMS = (CheckpointError, ConfigError, OSError, SafetensorError)


def from_pretrained(state: State, path: str | Path) -> State:
    """The state with the weights at a path, in the layout of `state`, whose buffers are donated.

    Every rank calls it, and reads only what it holds of each parameter. path: a Hugging Face
    directory, a checkpoint of megafn in any layout, or one of Megatron-LM (torch_dist, or the
    mp_rank_* files that accelerate writes too); or a directory of checkpoints, of which the newest
    is read. Nothing in the files is executed.
    Weights only: the optimizer is fresh, its fp32 masters are set, and the run is at the position
    of its config, iteration 0 unless consumed_samples is set.

    Parameters match by name and shape. New ones (a head, adapters) keep their value, and are
    listed on rank zero with the stored tensors that are left out: known buffers, and a head that
    the config replaces.
    Raises, on every rank, CheckpointError if files are missing, damaged or hold values that are not
    finite, or stored tensors that nothing reads; ConfigError naming the field if the weights are of
    another model; OSError if a file cannot be read.
    """
    check_usable(state)
    pg = state.pg
    place = call_on_rank_zero(partial(find_weights, path), pg)
    with contextlib.ExitStack() as closing:
        source = _open_everywhere(place, state, closing)
        match = _match_everywhere(source, state)
        _verify_everywhere(source, state)
        record = call_on_rank_zero(source.remember, pg)
        state = donate(state)
        _fill_everywhere(source, state, match)
        changes = changed_reach(source.model, state.config.model)
    print_on_rank_zero(_summary(place, match, changes), state.config, pg)
    consumed = state.config.consumed_samples[0]
    return attrs.evolve(
        state,
        iteration=consumed // state.config.global_batch_size,
        consumed_samples=consumed,
        skipped_samples=0,
        skipped_in_a_row=0,
        grad_norms=(),
        pretrained=record,
    )


# ------------------------------------------------------------------------- for `train` and `replay`


def check_pretrained(settings: CheckpointConfig) -> None:
    """Raises ConfigError if a run is to start from checkpoint.pretrained, and nothing is there."""
    if settings.pretrained is None or _is_resumable(settings):
        return
    try:
        find_weights(settings.pretrained)
    except _PROBLEMS as error:
        raise config_error(
            [Problem("checkpoint.pretrained", settings.pretrained, str(error))]
        ) from None


def start_from_pretrained(state: State) -> State:
    """The state with the weights of checkpoint.pretrained, if a run of it begins anew.

    Unchanged if there is no such path, or a checkpoint to resume from.
    """
    settings = state.config.checkpoint
    if settings.pretrained is None:
        return state
    if call_on_rank_zero(partial(_is_resumable, settings), state.pg):
        return state
    return from_pretrained(state, settings.pretrained)


def _is_resumable(settings: CheckpointConfig) -> bool:
    return settings.directory is not None and latest(settings.directory) is not None


# -------------------------------------------------------------------------------------------- open


def _open_everywhere(place: Place, state: State, closing: contextlib.ExitStack) -> WeightSource:
    source = None
    error: Exception | None = None
    try:
        source = closing.enter_context(open_weights(place, state.config.model))
    except Exception as problem:
        error = problem
    _raise_everywhere(error, state.pg)
    assert source is not None
    return source


def _raise_everywhere(error: Exception | None, pg: ProcessGroups) -> None:
    """Raises the error of the first rank that has one, on every rank, as `errors_on_all_ranks`."""
    for rank, error_of_rank in enumerate(gather_from_all_ranks(error, pg)):
        if error_of_rank is not None:
            if rank != pg.rank:
                error_of_rank.add_note(f"raised on rank {rank}")
            raise error_of_rank


# ------------------------------------------------------------------------------------------- match


@frozen(kw_only=True)
class Match:
    """Which parameters are read, which are new, and which stored tensors are left out."""

    read: Sequence[str]  # names of parameters
    new: Sequence[str]
    left_out: Sequence[str]  # names of stored tensors


@frozen(kw_only=True)
class OwnMatch:
    """The same of one rank's own parameters."""

    read: Sequence[str]
    new: Sequence[str]
    tensors: Sequence[str]  # stored tensors that are read
    problems: Sequence[str]


def _match_everywhere(source: WeightSource, state: State) -> Match:
    """Raises ConfigError or CheckpointError if the weights are not those of the model."""
    model = state.config.model
    if source.model is not None:
        problems = model_problems(source.model, model, str(source.path))
        if problems:
            raise config_error(problems)

    with errors_on_all_ranks(state.pg):
        own = _match_own(source, state)
    return decide_on_rank_zero(own, partial(_match_of_all, source, model), state.pg)


def _match_of_all(source: WeightSource, model: ModelConfig, ranks: Sequence[OwnMatch]) -> Match:
    problems_of_ranks = [problem for rank in ranks for problem in rank.problems]
    if problems_of_ranks:
        raise CheckpointError("; ".join(in_natural_order(problems_of_ranks)))
    is_read = {tensor for rank in ranks for tensor in rank.tensors}
    left_out = [tensor for tensor in source.tensors if tensor not in is_read]
    _refuse_unread(source, model, left_out)
    return Match(
        read=in_natural_order(name for rank in ranks for name in rank.read),
        new=in_natural_order(name for rank in ranks for name in rank.new),
        left_out=in_natural_order(left_out),
    )


def _match_own(source: WeightSource, state: State) -> OwnMatch:
    another_head = has_another_head(source.model, state.config.model)
    read = []
    new = []
    tensors: list[str] = []
    problems = []
    for name, shape in held_shapes(state).items():
        try:
            stored = source.made_of(name, shape)
        except CheckpointError as error:
            if another_head and is_head(name):
                stored = ()  # of the same name, with another number of labels
            else:
                problems.append(str(error))
                continue
        if stored:
            read.append(name)
            tensors.extend(stored)
        else:
            new.append(name)
    return OwnMatch(read=read, new=new, tensors=tensors, problems=problems)


def _refuse_unread(source: WeightSource, model: ModelConfig, left_out: Sequence[str]) -> None:
    another_head = has_another_head(source.model, model)
    unread = [
        tensor
        for tensor in left_out
        if not source.is_known_buffer(tensor) and not (another_head and source.is_head(tensor))
    ]
    if unread:
        remedy = "give the config of the model that they are of"
        if source.adapters_scale is not None:
            remedy += ", with the adapters of its prepare_model, or export it, which merges them"
        shown = _some(in_natural_order(unread))
        raise CheckpointError(
            f"{source.path}: the model has no place for {len(unread)} of the stored tensors "
            f"({shown}); {remedy}"
        )


# -------------------------------------------------------------------------------------------- read


def _verify_everywhere(source: WeightSource, state: State) -> None:
    """Raises CheckpointError if a file is damaged; each is verified by one rank."""
    error: Exception | None = None
    try:
        problems = source.damage(state.pg.rank, state.pg.world_size)
        if problems:
            error = CheckpointError("; ".join(problems))
    except Exception as problem:
        error = problem
    _raise_everywhere(error, state.pg)


def _fill_everywhere(source: WeightSource, state: State, match: Match) -> None:
    error: Exception | None = None
    try:
        fill_state(state, partial(_copy_finite, source), {}, None, unchanged=frozenset(match.new))
    except Exception as problem:
        error = problem
    _raise_everywhere(error, state.pg)


def _copy_finite(
    source: WeightSource, tensor: str, shape: Index, box: Box, target: torch.Tensor
) -> None:
    _, name = kind_and_parameter(tensor)
    source.copy(name, shape, box, target)
    if not torch.isfinite(target).all():
        stored = ", ".join(source.made_of(name, shape))
        raise CheckpointError(
            f"{source.path}: {stored} holds NaN or infinity; give weights that are finite"
        )


# ------------------------------------------------------------------------------------------- report


def _summary(place: Place, match: Match, changes: Sequence[str]) -> str:
    lines = [f"{len(match.read)} parameters are read from {place.path} ({place.format.name})"]
    if match.new:
        lines.append(f"new, with their initial values: {_some(match.new)}")
    if match.left_out:
        lines.append(f"stored and left out: {_some(match.left_out)}")
    lines.extend(changes)
    return "; ".join(lines)


def _some(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"

"""Weights for others: `to_pretrained` of a state, `export` of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from attrs import frozen

from megafn.pure.checkpoint.boxes import Box, Index, slices_of
from megafn.pure.checkpoint.write_plan import Listing, WritePlan, plan_writes
from megafn.pure.config.serialization import from_dict
from megafn.pure.pretrained.natural_order import in_natural_order
from megafn.pure.pretrained.pretrained import pretrained_from_dict
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.checkpoint.disk_format import tensor_key
from megafn.runtime.checkpoint.load import checkpoint_at, read_manifest
from megafn.runtime.checkpoint.state_boxes import (
    PARAMETER,
    StateBox,
    kind_and_parameter,
    state_boxes,
    tensor_name,
)
from megafn.runtime.model.lora import lora_of
from megafn.runtime.model.state import State, check_usable
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.object_collectives import decide_on_rank_zero
from megafn.runtime.pretrained.base import merged, open_weights
from megafn.runtime.pretrained.formats import find_weights
from megafn.runtime.pretrained.model_directory import (
    MAX_SHARD_BYTES,
    plan_directory,
    write_directory,
)
from megafn.runtime.pretrained.parameter_reader import ParameterReader
from megafn.runtime.pretrained.ranks import one_process, ranks_of
from megafn.runtime.pretrained.weight_source import WeightSource


def to_pretrained(
    state: State,
    directory: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the weights of a state as a Hugging Face directory, which transformers loads.

    Every rank calls it, in any layout; the files are the same in all of them. directory: a new one,
    on a disk that all hosts share; it appears whole or not at all. Adapters are merged.
    dtype: "fp32", "bf16" or "fp16"; None: that of the weights that the run started from, or
    precision.dtype if it started from random ones. Values are those of the fp32 masters, rounded.
    tokenizer: a tokenizer.json, or a directory whose tokenizer files are copied.
    max_shard_bytes: of one file of weights; a larger model is written as several, and an index.

    The architecture is that of the weights that the run started from, else the simplest one that
    expresses the model. Returns the directory.
    Raises, on every rank, ConfigError naming the field of the model that no architecture expresses,
    CheckpointError if the directory exists or cannot be written, and RuntimeError for a state that
    was donated.
    """
    check_usable(state)
    lora = lora_of(state.chunks)
    reader = merged(_reader_of_state(state), None if lora is None else lora.scale)
    plan = plan_directory(
        directory,
        reader.shapes,
        state.config,
        state.pretrained,
        dtype=dtype,
        tokenizer=tokenizer,
        max_shard_bytes=max_shard_bytes,
    )
    return write_directory(plan, reader, ranks_of(state.pg))


def export(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the weights of a checkpoint as a Hugging Face directory: `to_pretrained` of its state.

    Runs in one plain process, without process groups, and reads the checkpoint parameter by
    parameter: it needs memory for two of the largest. checkpoint: a checkpoint in any layout, or a
    directory of them, of which the newest is read. The other arguments and the errors are those of
    `to_pretrained`; CheckpointError too if the checkpoint is damaged.
    """
    path = checkpoint_at(Path(checkpoint))
    if path is None:
        raise CheckpointError(
            f"{checkpoint} holds no complete checkpoint: name one, or the folder of a run"
        )
    with open_weights(find_weights(path), None) as source:
        manifest = read_manifest(path)
        reader = merged(_reader_of_source(source), source.adapters_scale)
        plan = plan_directory(
            directory,
            reader.shapes,
            from_dict(manifest["config"]),
            pretrained_from_dict(manifest.get("pretrained")),
            dtype=dtype,
            tokenizer=tokenizer,
            max_shard_bytes=max_shard_bytes,
        )
        problems = source.damage(0, 1)
        if problems:
            raise CheckpointError("; ".join(problems))
        return write_directory(plan, reader, one_process())


# ------------------------------------------------------------------------------- from a checkpoint


def _reader_of_source(source: WeightSource) -> ParameterReader:
    return ParameterReader(
        shapes=_in_order(source.parameters), read=partial(_read_from_source, source)
    )


def _read_from_source(source: WeightSource, name: str, rank: int) -> torch.Tensor:
    shape = source.parameters[name]
    whole = torch.empty(shape)
    source.copy(name, shape, (tuple(0 for _ in shape), shape), whole)
    return whole


# ------------------------------------------------------------------------------------ from a state


@frozen(kw_only=True, eq=False)
class SpreadParameters:
    """The parameters of a model, of which each rank holds boxes."""

    pg: ProcessGroups
    plan: WritePlan  # which rank gives which box
    own: Mapping[str, StateBox]


def _reader_of_state(state: State) -> ParameterReader:
    """The fp32 masters, or the parameters without one, as a checkpoint has them.

    Every rank calls it.
    """
    pg = state.pg
    own = {}
    holdings = []
    for box in state_boxes(state):
        key = tensor_key(box.tensor, box.box[0])
        kind, _ = kind_and_parameter(box.tensor)
        if kind == PARAMETER and key not in own:
            own[key] = box
            size = box.view.numel() * box.view.element_size()
            holdings.append((box.tensor, box.shape, box.box, size))
    listing = Listing(stage=pg.place.pp, holdings=tuple(holdings))
    # Every rank needs the whole plan: it sends its boxes, parameter by parameter.
    plan = decide_on_rank_zero(listing, plan_writes, pg)
    shapes = {kind_and_parameter(tensor)[1]: shape for tensor, (shape, _) in plan.items()}
    spread = SpreadParameters(pg=pg, plan=plan, own=own)
    return ParameterReader(shapes=_in_order(shapes), read=partial(_read_from_ranks, spread))


def _read_from_ranks(spread: SpreadParameters, name: str, rank: int) -> torch.Tensor | None:
    """Each box is sent by the rank that gives it, in fp32, to the rank that reads."""
    pg = spread.pg
    tensor = tensor_name(PARAMETER, name)
    shape, boxes = spread.plan[tensor]
    whole = torch.empty(shape) if pg.rank == rank else None
    for box, holder in boxes:
        if pg.rank not in (rank, holder):
            continue
        part = None
        if pg.rank == holder:
            view = spread.own[tensor_key(tensor, box[0])].view
            part = view.detach().float().contiguous()
        if holder != rank:
            part = _send(part, box, holder, rank, pg)
        if whole is not None and part is not None:
            whole[slices_of(box)] = part.cpu()
    return whole


def _send(
    part: torch.Tensor | None, box: Box, holder: int, rank: int, pg: ProcessGroups
) -> torch.Tensor | None:
    """The part on the rank that receives it."""
    if part is not None:
        dist.send(part, dst=rank, group=pg.world)
        return None
    _, size = box
    received = torch.empty(size, device=pg.device)
    dist.recv(received, src=holder, group=pg.world)
    return received


def _in_order(shapes: Mapping[str, Index]) -> dict[str, Index]:
    """In the order of names, which no layout changes."""
    return {name: shapes[name] for name in in_natural_order(shapes)}

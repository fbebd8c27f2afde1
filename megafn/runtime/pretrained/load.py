"""`load` of a checkpoint, and of the weights beneath its adapters, which may have any format."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megafn.pure.pretrained.pretrained import pretrained_from_dict
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.checkpoint.load import load_checkpoint
from megafn.runtime.model.state import State
from megafn.runtime.parallel.object_collectives import call_on_rank_zero
from megafn.runtime.pretrained.base import base_problem
from megafn.runtime.pretrained.start import from_pretrained


def load(state: State, directory: str | Path, *, data: Mapping[str, Any] | None = None) -> State:
    """The state of a checkpoint, in the layout of `state`, whose buffers are donated.

    Every rank calls it. directory: a checkpoint, or a folder of them, of which the newest complete
    one is read. It may have been written in any layout. Nothing in it is executed. If it holds
    adapters only, the weights beneath them are read from where the run had them from.
    data: what the run reads, see `describe_data`; rank zero's is compared with the checkpoint's.
    Raises CheckpointError naming the file that is missing or altered, before the state is touched,
    OSError naming one that cannot be read, and ConfigError naming the field if the config is of
    another model, other adapters or other data.
    """
    return load_checkpoint(state, directory, read_base, data=data)


def read_base(state: State, manifest: Mapping[str, Any]) -> State:
    """The state with the weights that a checkpoint's adapters were trained on.

    Every rank calls it. Raises CheckpointError, on every rank, if they are missing or others now.
    """
    record = pretrained_from_dict(manifest["pretrained"])
    assert record is not None
    problem = call_on_rank_zero(partial(base_problem, record, state.config.model), state.pg)
    if problem is not None:
        raise CheckpointError(problem)
    return from_pretrained(state, record.source)

"""Where a run stands: the record that `setup` makes and `train_step` hands on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import field, frozen

from megafn.pure.config.records import TrainConfig
from megafn.runtime.parallel.groups import ProcessGroups


@frozen(kw_only=True, eq=False)
class State:
    """Where a run stands. Its tensors are torch's: `train_step` changes them in place and returns a new record."""

    config: TrainConfig
    pg: ProcessGroups = field(repr=False)
    chunks: tuple[torch.nn.Module, ...] = field(
        repr=False
    )  # one, or vpp of them, each in megatron-core's DistributedDataParallel
    optimizer: Any = field(repr=False)
    schedule: Callable = field(repr=False)
    iteration: int = 0
    consumed_samples: int = 0
    skipped_samples: int = 0  # consumed without an update: the schedule did not move
    skipped_in_a_row: int = (
        0  # updates left out up to now, for a loss or gradient that was not finite or a spike
    )
    grad_norms: tuple[float, ...] = ()  # the last ones, see `pure.spikes`

"""Where a run stands: the record that `setup` builds and every `train_step` returns anew."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import field, frozen
from megatron.core.optimizer import MegatronOptimizer

from megafn.pure.config.records import TrainConfig
from megafn.pure.schedule import LrWd
from megafn.runtime.parallel.groups import ProcessGroups


@frozen(kw_only=True, eq=False)
class State:
    """Where a run stands. `train_step` changes its tensors in place and returns a new record.

    `chunks`: one model chunk, or vpp of them, each in megatron-core's DistributedDataParallel.
    `schedule`: samples that were trained on -> learning rate and weight decay.
    `skipped_samples`: consumed without an update; the schedule did not advance for them.
    `skipped_in_a_row`: updates left out until now, for a NaN, an infinity or a spike.
    `grad_norms`: the last gradient norms, see `pure.spikes`.
    `report_names`: what the step reports besides the loss, agreed on by all ranks in the first
    step (see `training.totals`); None before it.
    """

    config: TrainConfig
    pg: ProcessGroups = field(repr=False)
    chunks: tuple[torch.nn.Module, ...] = field(repr=False)
    optimizer: MegatronOptimizer = field(repr=False)
    schedule: Callable[[int], LrWd] = field(repr=False)
    iteration: int = 0
    consumed_samples: int = 0
    skipped_samples: int = 0
    skipped_in_a_row: int = 0
    grad_norms: tuple[float, ...] = ()
    report_names: tuple[str, ...] | None = None

"""The functions and batches that users give to `setup`, `train`, `fit` and `replay`, as types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from megafn.pure.config.records import TrainConfig
from megafn.runtime.metrics.sinks import Sink
from megafn.runtime.model.optimizer import OptimizerFunction
from megafn.runtime.parallel.groups import ProcessGroups

__all__ = [
    "Batches",
    "ModelFunction",
    "MicroBatches",
    "OptimizerFunction",
    "Sinks",
]


class ModelFunction(Protocol):
    """Builds one model chunk, as `build_chunk` does.

    pre_process: the chunk has the embedding; post_process: it has the output layer; vp_stage: its
    number on this pipeline stage, None without interleaving.
    """

    def __call__(
        self,
        config: TrainConfig,
        pg: ProcessGroups,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> torch.nn.Module: ...


# Raw micro-batches of this rank's data-parallel position, as a DataLoader yields them: whatever
# step.batch accepts.
MicroBatches = Iterable[Any]

# The same, or a function (consumed_samples) -> micro-batches from that sample on.
Batches = MicroBatches | Callable[[int], MicroBatches]

# Functions called with the `Metrics` of every iteration, on every rank.
Sinks = Sequence[Sink]

"""Where a run stands: the record that `setup` builds and every `train_step` returns anew."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from attrs import define, field, frozen
from megatron.core.optimizer import MegatronOptimizer

from megafn.pure.config.records import TrainConfig
from megafn.pure.pretrained.pretrained import Pretrained
from megafn.pure.schedule import LrWd
from megafn.runtime.parallel.groups import ProcessGroups


@define(eq=False)
class Ownership:
    """Which state owns the tensors of a model and its optimizer: that of this version."""

    version: int = 0


@frozen(kw_only=True)
class UnprovenReplicas:
    """Parameters that count as replicated over tp, but whose gradients were zero in every step.

    Equal gradients on all tp ranks say nothing while they are zero: see `training.model_checks`.
    The names are those of this process's stage; other stages may have some if it has none.
    """

    names: frozenset[str]
    steps_left: int  # in which they are still compared


@frozen(kw_only=True, eq=False)
class State:
    """Where a run stands. `train_step` changes its tensors in place and returns a new record.

    The record before is out of date then, and using it is a RuntimeError.

    `chunks`: one model chunk, or vpp of them, each in megatron-core's DistributedDataParallel.
    `schedule`: samples that were trained on -> learning rate and weight decay.
    `skipped_samples`: consumed without an update; the schedule did not advance for them.
    `skipped_in_a_row`: updates left out until now, for a NaN, an infinity or a spike.
    `grad_norms`: the last gradient norms, see `pure.spikes`.
    `report_names`: what the step reports besides the loss, agreed on by all ranks in the first
    step (see `training.totals`); None before it.
    `pretrained`: where the first weights came from; None: they were drawn at random.
    `for_training`: as `setup` was asked; if False, all parameters are frozen.
    `unproven`: what the next step compares over tp once more; None: nothing, on any rank.
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
    pretrained: Pretrained | None = None
    for_training: bool = True
    unproven: UnprovenReplicas | None = None
    ownership: Ownership = field(factory=Ownership, repr=False)
    version: int = field(default=0, repr=False)


def check_usable(state: State) -> None:
    """Raises RuntimeError if the state was donated, or its process groups are closed."""
    state.pg.check_open()
    if state.version != state.ownership.version:
        raise RuntimeError(
            f"state of iteration {state.iteration}: its tensors were donated to train_step or "
            "load; use the state that was returned (state, metrics = train_step(state, ...))."
        )


def donate(state: State) -> State:
    """The same state as the only owner of its tensors, which are about to change."""
    state.ownership.version += 1
    return attrs.evolve(state, version=state.ownership.version)

"""One training step of one rank of any world, by the product's own code, without its memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig, num_micro_batches
from megafn.pure.layout import build_groups
from megafn.pure.validation.validate import check
from megafn.runtime.accelerate.train_steps import step_of
from megafn.runtime.dry_run.announced_shapes import announced_shapes
from megafn.runtime.dry_run.count import counting
from megafn.runtime.dry_run.fake_values import fake_values, without_values
from megafn.runtime.dry_run.fake_world import fake_world
from megafn.runtime.dry_run.report import DryRun
from megafn.runtime.families.built_in import family_of
from megafn.runtime.families.step import Batch, Step
from megafn.runtime.model.state import State
from megafn.runtime.parallel.exchanged import exchanged
from megafn.runtime.parallel.groups import ProcessGroups, init_groups
from megafn.runtime.training.arguments import ModelFunction, OptimizerFunction
from megafn.runtime.training.forward_backward import shape_between_stages
from megafn.runtime.training.setup import build_state
from megafn.runtime.training.step import train_step


def dry_run(
    config: TrainConfig,
    world_size: int,
    rank: int = 0,
    *,
    step: Step | None = None,
    model: ModelFunction | None = None,
    optimizer: OptimizerFunction | None = None,
    batch: Iterable[Any] | None = None,
) -> DryRun:
    """What one training step of one rank needs: bytes, FLOP and messages; see `DryRun`.

    Runs `setup` and `train_step` themselves in this process, for a world of any size, on tensors
    that have shapes and no memory. Weights are not read, and nothing is learned: where the program
    asks for a value, numbers are 1 and conditions are False.

    The arguments are those of `train`. batch: this rank's raw micro-batches of one global batch, as
    `train_step` takes them; their values are read as usual, so give real ones if masks or lengths
    matter. If None, whole sequences without padding, under the keys of the family's dataset.

    What this process has (groups, random states, CUDA) is left alone, and no GPU is used: counted
    is what the step does on a CPU. Other threads should not use torch.distributed meanwhile.

    Raises ConfigError, before anything starts, with every problem of the config for this world, for
    a rank outside of it, and if the step cannot read the batch that is made up.
    """
    check(config, world_size)
    groups = build_groups(config.parallel, world_size, model=config.model)
    _check_rank(rank, world_size)
    step = step if step is not None else step_of(config)
    micro_batches = tuple(batch) if batch is not None else _example_batch(config, groups.dp_size)

    with fake_world(world_size, rank), init_groups(groups) as pg:
        _check_readable(micro_batches, step, config, pg, is_example=batch is None)
        with fake_values() as fake, counting() as counter:
            state = build_state(config, pg, model=model, optimizer=optimizer)
            num_parameters = _num_parameters(state)
            counter.start_step(state)
            shapes: list[tuple[int, int]] = []
            with exchanged([announced_shapes(shapes, config, pg)]):
                reading = _with_fake_batches(step, fake, shapes)
                state, _ = train_step(state, micro_batches, reading)
            counter.end_step(state)
        return DryRun(
            config=config,
            world_size=world_size,
            rank=rank,
            place=pg.place,
            num_parameters=num_parameters,
            memory=counter.memory(),
            largest_tensors=counter.largest_tensors(),
            flops=counter.flops,
            matmuls=counter.matmuls,
            messages=counter.messages(pg),
        )


def _check_rank(rank: int, world_size: int) -> None:
    if not isinstance(rank, int) or not 0 <= rank < world_size:
        raise ConfigError(
            f"rank = {rank!r}: must be 0 to {world_size - 1} in a world of {world_size} ranks"
        )


def _example_batch(config: TrainConfig, dp: int) -> tuple[Any, ...]:
    """A rank's share of a global batch, raw, as the family's dataset gives it."""
    micro_batch = family_of(config.model.family).example(config.model, config.micro_batch_size)
    return (micro_batch,) * num_micro_batches(config, dp)


def _check_readable(
    micro_batches: tuple[Any, ...],
    step: Step,
    config: TrainConfig,
    pg: ProcessGroups,
    *,
    is_example: bool,
) -> None:
    """Raise ConfigError if the step cannot read the batch that was made up for it."""
    if not is_example:
        return
    raw = micro_batches[0]
    try:
        step.batch(raw, config, pg)
    except Exception as error:
        raise ConfigError(
            f"batch = None: step.batch cannot read an example with {', '.join(raw)} "
            f"({type(error).__name__}: {error}); give dry_run a batch as train_step takes it"
        ) from error


def _num_parameters(state: State) -> int:
    return sum(parameter.numel() for chunk in state.chunks for parameter in chunk.parameters())


def _with_fake_batches(step: Step, fake: FakeTensorMode, shapes: list[tuple[int, int]]) -> Step:
    """The step, whose micro-batches are read with their values, and lose them afterwards.

    Their shapes are added to `shapes`.
    """

    def read(raw: Any, config: TrainConfig, pg: ProcessGroups) -> Batch:
        with unset_fake_temporarily():
            batch = step.batch(raw, config, pg)
        shapes.append(shape_between_stages(batch))
        return {key: without_values(value, fake) for key, value in batch.items()}

    return attrs.evolve(step, batch=read)

"""One training step of one rank of any world, by the product's own code, without its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import attrs
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig, num_micro_batches
from megafn.pure.layout import Groups, build_groups, coordinates, rank_of
from megafn.pure.validation.validate import check, validate
from megafn.runtime.accelerate.train_steps import step_of
from megafn.runtime.dry_run.announced_shapes import Shapes, announced_shapes
from megafn.runtime.dry_run.count import counting
from megafn.runtime.dry_run.extrapolation import extrapolated, short_steps
from megafn.runtime.dry_run.fake_values import fake_values, without_values
from megafn.runtime.dry_run.fake_world import fake_world
from megafn.runtime.dry_run.report import DryRun
from megafn.runtime.families.built_in import family_of
from megafn.runtime.families.step import Batch, Step
from megafn.runtime.model.losses import token_loss
from megafn.runtime.model.state import State
from megafn.runtime.parallel import cpu
from megafn.runtime.parallel.exchanged import Exchange, exchanged
from megafn.runtime.parallel.groups import ProcessGroups, init_groups
from megafn.runtime.training import totals
from megafn.runtime.training.arguments import ModelFunction, OptimizerFunction
from megafn.runtime.training.forward_backward import shape_between_stages
from megafn.runtime.training.setup import build_state
from megafn.runtime.training.step import evaluate, train_step


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
    matter. If None, whole sequences without padding, under the keys of the family's dataset; and of
    many micro-batches only a few are run, since the rest repeat them: the numbers are the same.

    What this process has (groups, random states, CUDA) is left alone, and no GPU is used: counted
    is what the step does on a CPU. Other threads should not use torch.distributed meanwhile.

    Raises ConfigError, before anything starts, with every problem of the config for this world, for
    a rank outside of it, for a step that is not a Step, and if the step cannot read the batch that
    is made up.
    """
    check(config, world_size)
    _check_rank(rank, world_size)
    _check_step(step)
    groups = build_groups(config.parallel, world_size, model=config.model)
    run = partial(
        _run,
        groups=groups,
        rank=rank,
        step=step if step is not None else step_of(config),
        model=model,
        optimizer=optimizer,
    )
    if batch is not None:
        return run(config, tuple(batch))
    # A custom step may do for the whole global batch what is not linear in its micro-batches.
    is_custom = step is not None or config.step_function is not None
    steps = short_steps(config.parallel, num_micro_batches(config, groups.dp_size))
    if is_custom or steps is None:
        return run(config, None)
    first = _with_micro_batches(config, steps.first, groups.dp_size)
    second = _with_micro_batches(config, steps.second, groups.dp_size)
    if validate(first, world_size) or validate(second, world_size):
        return run(config, None)
    return extrapolated(run(first, None), run(second, None), steps, config)


def _with_micro_batches(config: TrainConfig, count: int, dp: int) -> TrainConfig:
    return attrs.evolve(config, global_batch_size=config.micro_batch_size * dp * count)


def _run(
    config: TrainConfig,
    batch: tuple[Any, ...] | None,
    *,
    groups: Groups,
    rank: int,
    step: Step,
    model: ModelFunction | None,
    optimizer: OptimizerFunction | None,
) -> DryRun:
    """`dry_run` of exactly this config; batch None: one is made up."""
    if batch is None:
        batch = _example_batch(config, groups.dp_size)
        with _rank_of_fake_world(groups, rank) as pg:
            _check_readable(batch[0], step, config, pg)
    names = _names_of_last_stage(
        config, batch, groups=groups, rank=rank, step=step, model=model, optimizer=optimizer
    )
    with (
        _rank_of_fake_world(groups, rank) as pg,
        fake_values() as fake,
        counting() as counter,
    ):
        state = build_state(config, pg, model=model, optimizer=optimizer)
        num_parameters = _num_parameters(state)
        counter.start_step(state)
        shapes: list[tuple[int, int]] = []
        reading = _with_fake_batches(step, fake, shapes)
        with exchanged(_answers_of_other_stages(shapes, names, config, pg)):
            state, _ = train_step(state, batch, reading)
        counter.end_step(state)
        return DryRun(
            config=config,
            world_size=groups.world_size,
            rank=rank,
            place=pg.place,
            num_parameters=num_parameters,
            num_micro_batches=len(batch),
            num_micro_batches_in_timeline=len(batch),
            memory=counter.memory(),
            largest_tensors=counter.largest_tensors(),
            flops=counter.flops,
            matmuls=counter.matmuls,
            messages=counter.messages(pg),
        )


@contextlib.contextmanager
def _rank_of_fake_world(groups: Groups, rank: int) -> Iterator[ProcessGroups]:
    with cpu.without_cuda(), fake_world(groups.world_size, rank), init_groups(groups) as pg:
        yield pg


def _names_of_last_stage(
    config: TrainConfig,
    batch: tuple[Any, ...],
    *,
    groups: Groups,
    rank: int,
    step: Step,
    model: ModelFunction | None,
    optimizer: OptimizerFunction | None,
) -> tuple[str, ...]:
    """What the step reports besides the loss, which only the last pipeline stage knows.

    For a rank of an earlier one, one forward pass of that stage is run. () on the last stage.
    """
    place = coordinates(groups, rank)
    last = rank_of(groups, attrs.evolve(place, pp=groups.pp_size - 1))
    if rank == last or step.loss is token_loss:
        return ()
    # interleaving runs as many micro-batches as stages in turn
    few = batch[: groups.pp_size if config.parallel.vpp > 1 else 1]
    with _rank_of_fake_world(groups, last) as pg, fake_values() as fake:
        state = build_state(config, pg, model=model, optimizer=optimizer)
        shapes: list[tuple[int, int]] = []
        reading = _with_fake_batches(step, fake, shapes)
        with exchanged([announced_shapes(shapes, config, pg)]):
            return tuple(evaluate(state, [few], reading).report)


def _answers_of_other_stages(
    shapes: Shapes, names: tuple[str, ...], config: TrainConfig, pg: ProcessGroups
) -> list[Exchange]:
    """What is known of the pipeline stages that do not exist."""
    answers = [announced_shapes(shapes, config, pg)]
    if not pg.is_last_stage:
        answers.append((totals, "agree_on_names", lambda sums, pg: names))
    return answers


def _check_rank(rank: int, world_size: int) -> None:
    if not isinstance(rank, int) or not 0 <= rank < world_size:
        raise ConfigError(
            f"rank = {rank!r}: must be 0 to {world_size - 1} in a world of {world_size} ranks"
        )


def _check_step(step: object) -> None:
    if step is not None and not isinstance(step, Step):
        raise ConfigError(
            f"step = {step!r}: must be a Step; give mf.step_fn(family), or leave it out for the "
            "step of the config"
        )


def _example_batch(config: TrainConfig, dp: int) -> tuple[Any, ...]:
    """A rank's share of a global batch, raw, as the family's dataset gives it."""
    micro_batch = family_of(config.model.family).example(config.model, config.micro_batch_size)
    return (micro_batch,) * num_micro_batches(config, dp)


def _check_readable(
    raw: Mapping[str, Any], step: Step, config: TrainConfig, pg: ProcessGroups
) -> None:
    """Raise ConfigError if the step cannot read the micro-batch that was made up for it."""
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

"""Seconds of one training step in a layout, by what they are spent on.

A pipeline takes as long as its slowest stage needs for all micro-batches, plus the time in which it
fills and drains: with v chunks a stage, (pp - 1) / v of what a stage needs for one micro-batch
(arXiv 2104.04473, section 2.2). Added to that is what computation does not hide: messages of the
pipeline, sums of gradients, the update.
"""

from __future__ import annotations

from attrs import frozen

from megafn.pure.config.records import TrainConfig
from megafn.pure.planner.implementation import Implementation, implementation_of
from megafn.pure.planner.kernels import (
    LayerSeconds,
    Speeds,
    head_seconds,
    layer_seconds,
    speeds_of,
)
from megafn.pure.planner.machine import Machine
from megafn.pure.planner.model_shape import ModelShape, StackShape, model_shape
from megafn.pure.planner.records import Layout, StepTime
from megafn.pure.planner.stage_kinds import StageKind, kinds_of_stages
from megafn.pure.planner.wires import (
    Bandwidths,
    all_gather_seconds,
    all_reduce_seconds,
    bandwidths,
)

# Of messages under computation: the share of those of tp that products hide, of a backward pass
# that sums of gradients can hide in, and of either sum that stays visible.
_TP_HIDDEN = 0.5
_WINDOW_SHARE = 0.8
_DP_VISIBLE = 0.05
# Of the messages of an interleaved pipeline.
_PP_VISIBLE = 0.25


def step_time(
    config: TrainConfig,
    layout: Layout,
    machine: Machine,
    *,
    implementation: str = "megafn",
) -> StepTime:
    """Seconds of one training step of `config` in `layout` on `machine`.

    What config and layout both say is read from the layout; config stands for the model, the dtype,
    the order of ranks and how layers are divided over stages.
    implementation: "megafn", as it is (nothing overlapped or fused), or "megatron" (both).

    Raises ConfigError if the family does not say which parameters its models have, or for an
    unknown implementation.
    """
    return price(config, layout, machine, implementation_of(implementation))


def price(
    config: TrainConfig, layout: Layout, machine: Machine, implementation: Implementation
) -> StepTime:
    """`step_time` of any implementation."""
    model = model_shape(config.model)
    speeds = speeds_of(machine, config.precision.dtype)
    wires = bandwidths(machine, layout, config.parallel.order)
    head = head_seconds(model, layout, speeds)
    costs = [
        _layer_cost(model, stack, layout, speeds, wires, implementation) for stack in model.stacks
    ]
    kinds = kinds_of_stages(config, layout)
    stages = [_stage_seconds(kind, costs, head) for kind in kinds]
    slowest = max(stages)
    kind = kinds[stages.index(slowest)]
    all_stages = sum(seconds * kind.stages for seconds, kind in zip(stages, kinds, strict=True))
    mean = all_stages / layout.pp

    m = layout.num_micro_batches
    parameters = max(kind.parameters for kind in kinds)
    return StepTime(
        layers=m * _total(kind, [cost.passes for cost in costs]),
        recomputation=m * _total(kind, [cost.recomputation for cost in costs]),
        tp=m * _total(kind, [cost.tp for cost in costs]),
        cp=m * _total(kind, [cost.cp for cost in costs]),
        head=m * head if kind.has_head else 0.0,
        bubble=(layout.pp - 1) * mean / layout.vpp,
        pp=_pipeline_seconds(model, layout, speeds, wires, implementation),
        dp=_gradient_seconds(parameters, slowest, layout, speeds, wires, implementation),
        optimizer=_update_seconds(parameters, layout, speeds, implementation),
    )


# --------------------------------------------------------------------------------------- layers


@frozen(kw_only=True)
class _LayerCost:
    """Seconds of one layer for one micro-batch, all passes."""

    passes: float
    recomputation: float
    # Messages.
    tp: float
    cp: float

    @property
    def total(self) -> float:
        return self.passes + self.recomputation + self.tp + self.cp


def _layer_cost(
    model: ModelShape,
    stack: StackShape,
    layout: Layout,
    speeds: Speeds,
    wires: Bandwidths,
    implementation: Implementation,
) -> _LayerCost:
    computed = layer_seconds(model, stack, layout, speeds, implementation)
    repeated = _repeated_layers(stack, layout)
    if layout.recompute.granularity == "selective":
        recomputation = computed.core
    else:
        recomputation = repeated * computed.forward
    return _LayerCost(
        passes=computed.forward + computed.backward,
        recomputation=recomputation,
        tp=_tp_seconds(model, stack, layout, speeds, wires, implementation, repeated),
        cp=_cp_seconds(model, stack, layout, speeds, wires, implementation, repeated, computed),
    )


def _repeated_layers(stack: StackShape, layout: Layout) -> float:
    """Share of the layers that the backward pass computes again, whole."""
    recompute = layout.recompute
    if recompute.granularity != "full":
        return 0.0
    if recompute.method != "block":
        return 1.0
    in_a_chunk = stack.layers / (layout.pp * layout.vpp)
    return min(1.0, recompute.num_layers / in_a_chunk)


def _tp_seconds(
    model: ModelShape,
    stack: StackShape,
    layout: Layout,
    speeds: Speeds,
    wires: Bandwidths,
    implementation: Implementation,
    repeated: float,
) -> float:
    """An all-reduce behind attention and MLP, and one before each in the backward pass.

    With sequence parallelism each is a gather and a scatter, and the backward pass gathers the two
    inputs again, which every rank holds a part of (arXiv 2205.05198, section 4.2.2).
    """
    tp = layout.tp
    if tp == 1:
        return 0.0
    tokens = stack.length * layout.micro_batch_size / layout.cp
    payload = tokens * model.hidden * speeds.element
    blocks = 3 if stack.context else 2
    reduces = blocks * (2 + repeated)
    seconds = reduces * all_reduce_seconds(payload, tp, wires.tp)
    if layout.sequence_parallel:
        seconds += blocks * all_gather_seconds(payload, tp, wires.tp)
        if implementation.overlap:
            seconds *= 1 - _TP_HIDDEN
    return seconds


def _cp_seconds(
    model: ModelShape,
    stack: StackShape,
    layout: Layout,
    speeds: Speeds,
    wires: Bandwidths,
    implementation: Implementation,
    repeated: float,
    computed: LayerSeconds,
) -> float:
    """Keys and values gathered for each forward pass, their gradients scattered once."""
    cp = layout.cp
    if cp == 1:
        return 0.0
    tokens = stack.length * layout.micro_batch_size
    payload = tokens * model.key_value / layout.tp * speeds.element
    once = all_gather_seconds(payload, cp, wires.cp)
    if implementation.overlap:
        # parts travel on while attention to the last one is computed (arXiv 2310.01889)
        once = max(0.0, once - computed.core)
    # the backward pass of attention needs keys and values too, which autograd has kept
    return (2 + repeated) * once


# --------------------------------------------------------------------------------------- stages


def _stage_seconds(kind: StageKind, costs: list[_LayerCost], head: float) -> float:
    """One micro-batch on one stage."""
    seconds = _total(kind, [cost.total for cost in costs])
    return seconds + head if kind.has_head else seconds


def _total(kind: StageKind, of_a_layer: list[float]) -> float:
    return sum(count * each for count, each in zip(kind.layers, of_a_layer, strict=True))


# ------------------------------------------------------------------- once for a micro-batch, a step


def _pipeline_seconds(
    model: ModelShape,
    layout: Layout,
    speeds: Speeds,
    wires: Bandwidths,
    implementation: Implementation,
) -> float:
    """Hidden states to the next stage and their gradients back, for each chunk of each stage."""
    if layout.pp == 1:
        return 0.0
    length = sum(stack.length for stack in model.stacks)
    tokens = length * layout.micro_batch_size / layout.cp
    message = tokens * model.hidden * speeds.element
    if layout.sequence_parallel or implementation.scatter_gather:
        message /= layout.tp
    seconds = 2 * layout.num_micro_batches * layout.vpp * message / wires.pp
    if implementation.overlap and layout.vpp > 1:
        seconds *= _PP_VISIBLE
    return seconds


def _gradient_seconds(
    parameters: float,
    slowest: float,
    layout: Layout,
    speeds: Speeds,
    wires: Bandwidths,
    implementation: Implementation,
) -> float:
    """Gradients summed over ranks that hold the same parameters; if sharded, weights gathered."""
    ranks = layout.dp * layout.cp
    if ranks == 1:
        return 0.0
    gradients = parameters * implementation.gradient_bytes
    if layout.use_distributed_optimizer:
        payload = gradients + parameters * speeds.element
        seconds = all_gather_seconds(payload, ranks, wires.dp)
    else:
        seconds = all_reduce_seconds(gradients, ranks, wires.dp)
    if not implementation.overlap:
        return seconds
    # in the last micro-batch's backward pass, and the first one's forward pass
    window = slowest
    if layout.vpp > 1 and layout.pp > 1:
        # gradients of a chunk are whole while other chunks still compute
        micro_batches = layout.pp * (layout.vpp - 1) / layout.vpp
        window *= min(micro_batches, layout.num_micro_batches)
    return max(0.0, seconds - _WINDOW_SHARE * window) + _DP_VISIBLE * seconds


def _update_seconds(
    parameters: float, layout: Layout, speeds: Speeds, implementation: Implementation
) -> float:
    """Adam, and the passes over gradients before it."""
    ranks = layout.dp * layout.cp if layout.use_distributed_optimizer else 1
    return parameters / ranks * implementation.update_bytes / speeds.memory

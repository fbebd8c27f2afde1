"""Seconds of one training step in a layout, by what they are spent on.

A pipeline takes as long as its slowest stage needs for all micro-batches, plus the time in which it
fills and drains: with v chunks a stage, (pp - 1) / v of what a stage needs for one micro-batch
(arXiv 2104.04473, section 2.2). Added to that is what computation does not hide: messages of the
pipeline, sums of gradients, the update.
"""

from __future__ import annotations

from operator import attrgetter

import attrs
from attrs import frozen

from megafn.pure.config.records import TrainConfig, padded_vocab_size
from megafn.pure.planner.implementation import Implementation, implementation_of
from megafn.pure.planner.machine import Machine
from megafn.pure.planner.records import Layout, StepTime
from megafn.pure.planner.time.bandwidth import (
    Bandwidths,
    all_gather_seconds,
    all_reduce_seconds,
    bandwidths,
)
from megafn.pure.planner.time.distinct_stages import DistinctStage, distinct_stages
from megafn.pure.planner.time.kernels import (
    Speeds,
    head_seconds,
    layer_seconds,
    speeds_of,
)
from megafn.pure.planner.time.model_dimensions import (
    ModelDimensions,
    StackDimensions,
    model_dimensions,
)

# ---- What overlap hides
# The share of tp messages that run while matrix products are computed.
_TP_HIDDEN = 0.5
# The share of a backward pass during which gradients can be summed, and the share of the messages
# that shows even if all of them fit into that time.
_WINDOW_SHARE = 0.8
_DP_VISIBLE = 0.05
# The share of an interleaved pipeline's messages that shows.
_PP_VISIBLE = 0.25


def step_time(
    config: TrainConfig,
    layout: Layout,
    machine: Machine,
    *,
    implementation: str = "megafn",
) -> StepTime:
    """Seconds of one training step of `config` in `layout` on `machine`.

    What config and layout both have is read from the layout. Of `config` count the model, the
    dtype, the order of ranks and T5's split.
    implementation: "megafn", as it is (nothing overlapped or fused), or "megatron" (both).

    Raises ConfigError if the family does not say which parameters its models have, or for an
    unknown implementation.
    """
    return price(config, layout, machine, implementation_of(implementation))


def host_seconds(
    config: TrainConfig,
    layout: Layout,
    machine: Machine,
    time: StepTime,
    *,
    implementation: str = "megafn",
) -> float:
    """Seconds of a step in which devices wait for the host to launch kernels.

    time: what `step_time` says of the same arguments.
    """
    prompt = attrs.evolve(machine, launch_seconds=0.0)
    return time.total - step_time(config, layout, prompt, implementation=implementation).total


def price(
    config: TrainConfig, layout: Layout, machine: Machine, implementation: Implementation
) -> StepTime:
    """`step_time` for an implementation that may have no name."""
    run = _Run(
        model=model_dimensions(config.model),
        layout=layout,
        speeds=speeds_of(machine, config.precision.dtype),
        bandwidths=bandwidths(machine, layout, config.parallel.order),
        implementation=implementation,
    )
    head = head_seconds(run.model, layout, run.speeds, implementation)
    layers = [_layer_cost(run, stack, machine.launch_seconds) for stack in run.model.stacks]
    stages = distinct_stages(config, layout)
    costs = [_stage_cost(run, stage, layers, head) for stage in stages]
    slowest = max(costs, key=attrgetter("total"))
    all_stages = sum(stage.count * cost.total for stage, cost in zip(stages, costs, strict=True))
    mean = all_stages / layout.pp
    parameters = max(stage.parameters for stage in stages)

    m = layout.num_micro_batches
    return StepTime(
        layers=m * slowest.passes,
        recomputation=m * slowest.recomputation,
        head=m * slowest.head,
        tp=m * slowest.tp,
        cp=m * slowest.cp,
        pp=_pipeline_seconds(run) + _shared_table_seconds(run),
        dp=_gradient_seconds(run, parameters, slowest.total),
        bubble=(layout.pp - 1) * mean / layout.vpp,
        optimizer=_update_seconds(run, parameters),
    )


@frozen(kw_only=True)
class _Run:
    """What is priced: a model in a layout, and what computes and connects."""

    model: ModelDimensions
    layout: Layout
    speeds: Speeds
    bandwidths: Bandwidths
    implementation: Implementation

    def hidden_bytes(self, length: int) -> float:
        """Of a micro-batch's hidden states, for sequences of this length, on one rank of cp."""
        layout = self.layout
        tokens = length * layout.micro_batch_size / layout.cp
        return tokens * self.model.hidden * self.speeds.element


# --------------------------------------------------------------------------------------- layers


@frozen(kw_only=True)
class _Cost:
    """Seconds of a layer or a stage for one micro-batch, all passes."""

    passes: float
    recomputation: float
    # Messages.
    tp: float
    cp: float
    # The output layer and the loss.
    head: float = 0.0

    @property
    def total(self) -> float:
        return self.passes + self.recomputation + self.tp + self.cp + self.head


def _layer_cost(run: _Run, stack: StackDimensions, launch_seconds: float) -> _Cost:
    layout = run.layout
    computed = layer_seconds(run.model, stack, layout, run.speeds, run.implementation)
    repeated = _repeated_layers(stack, layout)
    if layout.recompute.granularity == "selective":
        recomputation = computed.core
    else:
        recomputation = repeated * computed.forward
    passes = computed.forward + computed.backward
    tp = _tp_seconds(run, stack, repeated)
    cp = _cp_seconds(run, stack, repeated, computed.core)
    # the device waits for the host if launching kernels takes longer than they do; a repeated
    # forward pass has half as many launches as forward and backward together
    launched = launch_seconds * (1 + repeated / 2)
    waiting = max(0.0, launched - (passes + recomputation + tp + cp))
    return _Cost(passes=passes + waiting, recomputation=recomputation, tp=tp, cp=cp)


def _repeated_layers(stack: StackDimensions, layout: Layout) -> float:
    """Share of the layers that the backward pass computes again, whole."""
    recompute = layout.recompute
    if recompute.granularity != "full":
        return 0.0
    if recompute.method != "block":
        return 1.0
    in_a_chunk = stack.layers / (layout.pp * layout.vpp)
    return min(1.0, recompute.num_layers / in_a_chunk)


def _tp_seconds(run: _Run, stack: StackDimensions, repeated: float) -> float:
    """An all-reduce after attention and after the MLP; in the backward pass, one before each.

    With sequence parallelism each is a gather and a scatter, and the backward pass gathers the two
    inputs again, which every rank holds a part of (arXiv 2205.05198, section 4.2.2).
    """
    blocks = 3 if stack.context else 2
    gathered_again = blocks
    return _tp_messages(run, stack.length, blocks * (2 + repeated), gathered_again)


def _tp_messages(run: _Run, length: int, reduces: float, gathers: float) -> float:
    """Seconds of all-reduces of hidden states; under sequence parallelism of `gathers` too."""
    tp = run.layout.tp
    if tp == 1:
        return 0.0
    payload = run.hidden_bytes(length)
    seconds = reduces * all_reduce_seconds(payload, tp, run.bandwidths.tp)
    if not run.layout.sequence_parallel:
        return seconds
    seconds += gathers * all_gather_seconds(payload, tp, run.bandwidths.tp)
    return seconds * (1 - _TP_HIDDEN) if run.implementation.overlap else seconds


def _cp_seconds(run: _Run, stack: StackDimensions, repeated: float, attention: float) -> float:
    """Keys and values gathered for each forward pass, their gradients scattered once.

    attention: seconds of its forward pass, under which messages may travel.
    """
    layout = run.layout
    if layout.cp == 1:
        return 0.0
    tokens = stack.length * layout.micro_batch_size
    payload = tokens * run.model.key_value / layout.tp * run.speeds.element
    once = all_gather_seconds(payload, layout.cp, run.bandwidths.cp)
    if run.implementation.overlap:
        # parts travel on while attention to the last one is computed (arXiv 2310.01889); under the
        # last of cp parts nothing travels
        once = max(0.0, once - attention * (layout.cp - 1) / layout.cp)
    # the backward pass of attention needs keys and values too, which autograd has kept
    return (2 + repeated) * once


# --------------------------------------------------------------------------------------- stages


def _stage_cost(run: _Run, stage: DistinctStage, costs: list[_Cost], head: float) -> _Cost:
    """One micro-batch on one stage. costs: of one layer of each stack."""
    # its gradients added to those of earlier micro-batches
    passes = stage.parameters * run.implementation.accumulation_bytes / run.speeds.memory
    recomputation = 0.0
    tp = _tp_seconds_of_ends(run, stage)
    cp = 0.0
    for layers, cost in zip(stage.layers, costs, strict=True):
        passes += layers * cost.passes
        recomputation += layers * cost.recomputation
        tp += layers * cost.tp
        cp += layers * cost.cp
    return _Cost(
        passes=passes,
        recomputation=recomputation,
        tp=tp,
        cp=cp,
        head=head if stage.has_head else 0.0,
    )


def _tp_seconds_of_ends(run: _Run, stage: DistinctStage) -> float:
    """The word table's rows are summed, and the gradient of what the output layer reads."""
    model = run.model
    seconds = 0.0
    if stage.embeds:
        seconds += _tp_messages(run, model.stacks[0].length, reduces=1, gathers=0)
    if stage.has_head and model.head_length:
        seconds += _tp_messages(run, model.head_length, reduces=1, gathers=1)
    return seconds


# ------------------------------------------------------------------- once for a micro-batch, a step


def _pipeline_seconds(run: _Run) -> float:
    """Hidden states to the next stage and their gradients back, for each chunk of each stage."""
    layout = run.layout
    if layout.pp == 1:
        return 0.0
    message = run.hidden_bytes(sum(stack.length for stack in run.model.stacks))
    if layout.sequence_parallel or run.implementation.scatter_gather:
        message /= layout.tp
    seconds = 2 * layout.num_micro_batches * layout.vpp * message / run.bandwidths.pp
    if run.implementation.overlap and layout.vpp > 1:
        seconds *= _PP_VISIBLE
    return seconds


def _shared_table_seconds(run: _Run) -> float:
    """Gradients of the word table, summed over the stages that hold a copy of it."""
    model = run.model
    tp = run.layout.tp
    if run.layout.pp == 1 or model.word_tables == 1:
        return 0.0
    table = padded_vocab_size(model.vocab, tp) / tp * model.hidden
    payload = table * run.implementation.gradient_bytes
    return all_reduce_seconds(payload, model.word_tables, run.bandwidths.pp)


def _gradient_seconds(run: _Run, parameters: int, slowest: float) -> float:
    """Gradients summed over ranks that hold the same parameters; if sharded, weights gathered.

    slowest: seconds of a micro-batch on the slowest stage.
    """
    layout = run.layout
    ranks = layout.dp * layout.cp
    if ranks == 1:
        return 0.0
    gradients = parameters * run.implementation.gradient_bytes
    if layout.use_distributed_optimizer:
        payload = gradients + parameters * run.speeds.element
        seconds = all_gather_seconds(payload, ranks, run.bandwidths.dp)
    else:
        seconds = all_reduce_seconds(gradients, ranks, run.bandwidths.dp)
    if not run.implementation.overlap:
        return seconds
    # in the last micro-batch's backward pass, and the first one's forward pass
    window = slowest
    if layout.vpp > 1 and layout.pp > 1:
        # gradients of a chunk are whole while other chunks still compute
        micro_batches = layout.pp * (layout.vpp - 1) / layout.vpp
        window *= min(micro_batches, layout.num_micro_batches)
    return max(0.0, seconds - _WINDOW_SHARE * window) + _DP_VISIBLE * seconds


def _update_seconds(run: _Run, parameters: int) -> float:
    """Passes over all gradients; norm, clipping and Adam over a rank's share."""
    layout = run.layout
    ranks = layout.dp * layout.cp if layout.use_distributed_optimizer else 1
    moved = run.implementation.gradient_pass_bytes + run.implementation.update_bytes / ranks
    return parameters * moved / run.speeds.memory

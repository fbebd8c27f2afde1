"""What a plan is made of: plain numbers, in bytes, seconds, FLOP and devices."""

from __future__ import annotations

from attrs import frozen

from megafn.pure.config.records import RecomputeConfig


@frozen(kw_only=True)
class Memory:
    """Bytes of one rank by what they hold."""

    parameters: float = 0
    gradients: float = 0
    # Adam's two moments, and fp32 weights if the parameters are not in fp32.
    optimizer_state: float = 0
    # What forward passes keep for backward passes, and what a pass needs while it runs.
    activations: float = 0
    other: float = 0

    @property
    def total(self) -> float:
        return (
            self.parameters + self.gradients + self.optimizer_state + self.activations + self.other
        )


@frozen(kw_only=True)
class Layout:
    """How a step is cut: all that `rank_plans` chooses. `layout_of` reads it from a config."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    micro_batch_size: int = 1
    num_micro_batches: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    recompute: RecomputeConfig = RecomputeConfig()
    # Layers of the outer stages, as in `ParallelConfig`. None: as many as each of the others.
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


@frozen(kw_only=True)
class StepTime:
    """Seconds of one training step by what they are spent on; their sum is the step."""

    # Forward and backward passes of the layers, and waiting for the host, on the slowest stage.
    layers: float = 0
    recomputation: float = 0
    # The output layer and the loss.
    head: float = 0
    # Messages that computation does not hide.
    tp: float = 0
    cp: float = 0
    pp: float = 0
    dp: float = 0
    # Waiting for other stages.
    bubble: float = 0
    optimizer: float = 0

    @property
    def total(self) -> float:
        return (
            self.layers
            + self.recomputation
            + self.head
            + self.tp
            + self.cp
            + self.pp
            + self.dp
            + self.bubble
            + self.optimizer
        )


@frozen(kw_only=True)
class Band:
    """The planner's errors on the published results nearest to a plan."""

    # The smallest and the largest: computed over measured seconds, less 1. -0.05: 5% too short.
    low: float
    high: float
    # Which rows, in words: "table 1 of arXiv 2104.04473, A100, 18B to 76B".
    source: str
    # How many rows.
    num_results: int
    # Why the figure should not be trusted; None: it may be.
    not_trusted: str | None = None

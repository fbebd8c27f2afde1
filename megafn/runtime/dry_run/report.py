"""What a dry run returns."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen

from megafn.pure.config.records import TrainConfig
from megafn.pure.layout import Coordinates
from megafn.pure.planner.layout import layout_of
from megafn.runtime.dry_run.records import DryRunMemory, LargeTensor, Messages
from megafn.runtime.dry_run.table import dry_run_text


@frozen(kw_only=True)
class DryRun:
    """One training step of one rank, run on tensors that hold no memory."""

    config: TrainConfig = field(repr=False)
    world_size: int
    rank: int
    place: Coordinates
    num_parameters: int
    # Of one data-parallel rank in one step.
    num_micro_batches: int = 1
    # Those of them that `memory.timeline` has: if there are many alike, the first few.
    num_micro_batches_in_timeline: int = 1
    memory: DryRunMemory
    largest_tensors: tuple[LargeTensor, ...] = field(default=(), repr=False)
    # By torch's formulas (torch.utils.flop_counter), recomputation included.
    flops: float = 0
    matmuls: int = 0
    # By kind of group: "tp", "pp", "cp", "dp" and the other fields of `Groups`.
    messages: Mapping[str, Messages] = field(factory=dict)

    def __str__(self) -> str:
        parallel = self.config.parallel
        dp = layout_of(self.config, self.world_size).dp
        return dry_run_text(
            rank=self.rank,
            world_size=self.world_size,
            place=self.place,
            sizes=Coordinates(
                tp=parallel.tp, pp=parallel.pp, cp=parallel.cp, dp=dp, ep=parallel.ep
            ),
            micro_batches=(self.num_micro_batches, self.config.micro_batch_size),
            num_parameters=self.num_parameters,
            memory=self.memory,
            largest_tensors=self.largest_tensors,
            flops=self.flops,
            matmuls=self.matmuls,
            messages=self.messages,
        )

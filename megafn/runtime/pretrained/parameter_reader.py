"""The parameters of a whole model, read one at a time: what export writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from attrs import frozen

from megafn.pure.checkpoint.boxes import Index

# (name in the whole model, rank) -> the whole parameter on the CPU of that rank, None on others.
ReadParameter = Callable[[str, int], torch.Tensor | None]


@frozen(kw_only=True, eq=False)
class ParameterReader:
    """The parameters of a whole model: in a checkpoint, or spread over the ranks of a run.

    shapes: of each parameter, by its name in the whole model.
    read: every rank calls it, for the same names in the same order. A reader of merged weights
        reads several parameters of another reader for one of its own.
    """

    shapes: Mapping[str, Index]
    read: ReadParameter

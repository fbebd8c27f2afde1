"""`make demo`, `make demo FAMILY=bert` and so on: which demo is run."""

from __future__ import annotations

import megafn as mf
from megafn.demo import finetuning, pretraining

NAMES = (*pretraining.DEMOS, "finetune")


def demo(*, folder: str | None = None, iterations: int | None = None, family: str = "gpt") -> None:
    """Train, then print a table and two samples, and draw the curves. Run it under torchrun.

    family: one of NAMES. iterations: of the run; None: as many as take a few minutes.
    """
    if family not in NAMES:
        raise mf.ConfigError(f"family = {family!r}: choose one of {', '.join(NAMES)}")
    folder = folder or f"runs/demo-{family}"
    world_size = mf.world_size()
    if family == "finetune":
        finetuning.finetuning_demo(folder, iterations, world_size)
    else:
        pretraining.pretraining_demo(family, folder, iterations, world_size)

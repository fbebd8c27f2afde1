"""A model in evaluation mode for the length of a `with`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


@contextlib.contextmanager
def eval_mode(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Put all modules of the chunks into evaluation mode; afterwards, each returns to its own mode.

    They return if the body raises, too.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    modes = [module.training for module in modules]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training

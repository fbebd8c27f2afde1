"""Tensors in the arguments and results of operations."""

from __future__ import annotations

from collections.abc import Iterator, ValuesView
from typing import Any

import torch


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(value.values())
    elif isinstance(value, list | tuple | ValuesView):
        for part in value:
            yield from tensors_in(part)

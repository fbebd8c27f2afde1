"""Floating-point operations by torch's own formulas, and the number of matrix products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

aten = torch.ops.aten

_MATRIX_PRODUCTS = frozenset({aten.mm, aten.bmm, aten.addmm, aten.baddbmm})
_ATTENTION_ON_A_CPU = aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_ON_A_CPU_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
# Attention of all tokens in one kernel, which holds two matrix products (five when backward).
_ATTENTION = frozenset(
    {
        _ATTENTION_ON_A_CPU,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    }
)


def _flops_of_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _flops_of_attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch has formulas for the attention kernels of GPUs only.
_FORMULAS_FOR_CPUS: Mapping[Any, Callable[..., int]] = {
    _ATTENTION_ON_A_CPU: _flops_of_attention,
    _ATTENTION_ON_A_CPU_BACKWARD: _flops_of_attention_backward,
}


@define(eq=False)
class Operations:
    """Sums over the operations of a step."""

    flops: int = 0
    matmuls: int = 0
    attention_calls: int = 0

    def see(
        self, operation: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any
    ) -> None:
        """Add an operation that was run."""
        packet = operation._overloadpacket
        if packet in _MATRIX_PRODUCTS:
            self.matmuls += 1
        elif packet in _ATTENTION:
            self.attention_calls += 1
        formula = flop_registry.get(packet)
        if formula is not None:
            self.flops += formula(*arguments, **named, out_val=result)
            return
        formula = _FORMULAS_FOR_CPUS.get(packet)
        if formula is not None:
            self.flops += formula(*arguments, **named)

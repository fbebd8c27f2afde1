"""What a CPU keeps for the backward pass and a GPU does not.

Where torch has one fused kernel for a GPU, it may compute the same on a CPU by several operations,
each of which keeps what its own backward pass needs:

- RMSNorm keeps its normalized input, and in bf16 an fp32 copy of the input (and both in fp32). The
  fused kernel keeps the input, and one number a row.
- Dropout keeps a mask in the dtype of its input, not in bytes.
- Attention with dropout keeps its scores, and causality that ends at the last key is a mask.

`KERNELS` lists what each fused kernel keeps. What a call on the CPU has made and kept beyond that
is the CPU's only.

One thing more: on a GPU megatron-core frees the output of a pipeline stage once it is sent. gloo
would then read freed memory, so on a CPU it is kept until its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode


@frozen(kw_only=True)
class Kept:
    """What a fused kernel keeps for its backward pass besides its weights and its output."""

    inputs: tuple[Tensor, ...] = ()
    # Of what it computes in addition: statistics, masks.
    bytes: int = 0


def _kept_by_rms_norm(input: Tensor, *_: Any, **__: Any) -> Kept:
    rows = input.numel() // max(1, input.shape[-1])
    return Kept(inputs=(input,), bytes=4 * rows)


def _kept_by_dropout(input: Tensor, *_: Any, **__: Any) -> Kept:
    return Kept(bytes=input.numel())


def _kept_by_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Kept:
    kept = 4 * query.numel() // query.shape[-1]
    # A bool mask becomes one of the query's dtype. A causal bias is no mask on a GPU.
    if attn_mask is not None and not isinstance(attn_mask, CausalBias):
        if attn_mask.dtype == torch.bool:
            kept += attn_mask.numel() * query.element_size()
    return Kept(inputs=(query, key, value), bytes=kept)


KERNELS: Mapping[Callable[..., Any], Callable[..., Kept]] = {
    F.rms_norm: _kept_by_rms_norm,
    torch.rms_norm: _kept_by_rms_norm,
    F.dropout: _kept_by_dropout,
    torch.dropout: _kept_by_dropout,
    F.scaled_dot_product_attention: _kept_by_attention,
}


class EveryKernel(TorchFunctionMode):
    """Shows every call of a function in `KERNELS` to a function, which runs it."""

    def __init__(self, see: Callable[[Kept, Callable[[], Any]], Any]):
        super().__init__()
        self.see = see

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        named = named or {}
        kept_by = KERNELS.get(function)
        if kept_by is None:
            return function(*arguments, **named)
        return self.see(kept_by(*arguments, **named), lambda: function(*arguments, **named))

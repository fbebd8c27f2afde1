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

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from megafn.runtime.parallel.exchanged import exchanged


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
# Where programs find them.
_PLACES = (
    (F, "rms_norm"),
    (torch, "rms_norm"),
    (F, "dropout"),
    (torch, "dropout"),
    (F, "scaled_dot_product_attention"),
)


@contextlib.contextmanager
def every_kernel(see: Callable[[Kept, Callable[[], Any]], Any]) -> Iterator[None]:
    """Show every call of a function in `KERNELS` to a function, which runs it.

    The functions are exchanged, for torch enters no TorchFunctionMode in a backward pass, in which
    recomputed layers call them. Calls of other threads pass unseen.
    """
    thread = threading.get_ident()
    originals = [(owner, name, getattr(owner, name)) for owner, name in _PLACES]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if threading.get_ident() != thread:
                return function(*arguments, **named)
            # what it calls itself is a part of it, and torch compares functions by identity
            with exchanged(originals):
                kept = KERNELS[function](*arguments, **named)
                return see(kept, lambda: function(*arguments, **named))

        return call

    with exchanged([(owner, name, watched(value)) for owner, name, value in originals]):
        yield

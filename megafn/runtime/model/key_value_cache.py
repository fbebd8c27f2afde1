"""Keys and values of the tokens before, so that generation computes each token once.

The cache is passed through megatron-core's layers as `packed_seq_params`, the one argument that
reaches core attention unchanged. No module keeps it.
"""

from __future__ import annotations

import torch
from attrs import define, field, frozen

from megafn.runtime.model.rotary import Rotation


@define(eq=False)
class _Buffers:
    """Keys and values [batch, groups / tp, capacity, d] of one attention."""

    keys: torch.Tensor
    values: torch.Tensor


@frozen(kw_only=True, eq=False)
class KeyValueCache:
    """The keys and values of a batch in all attentions of this process, and a pass over it.

    capacity: tokens that there is room for.
    start: tokens that are there already.
    new: tokens of this pass. It may be given more, which fill up a multiple of tp for sequence
        parallelism, at the end; their keys are not kept.
    buffers: by attention module, shared by the caches of all passes.
    rotation: turns this pass's queries and keys; None: they have been turned, or are not to be.
    """

    capacity: int
    start: int = 0
    new: int = 0
    buffers: dict[torch.nn.Module, _Buffers] = field(factory=dict)
    rotation: Rotation | None = None

    # What megatron-core asks of `packed_seq_params`: the usual layout of tensors.
    qkv_format: str = "sbhd"

    def extend(
        self, attention: torch.nn.Module, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add this pass's key and value [batch, groups / tp, sequence, d]; return all until now."""
        if attention not in self.buffers:
            rows, groups, _, width = key.shape
            shape = (rows, groups, self.capacity, width)
            self.buffers[attention] = _Buffers(key.new_empty(shape), value.new_empty(shape))
        kept = self.buffers[attention]
        end = self.start + self.new
        kept.keys[:, :, self.start : end] = key[:, :, : self.new]
        kept.values[:, :, self.start : end] = value[:, :, : self.new]
        return kept.keys[:, :, :end], kept.values[:, :, :end]


@frozen(eq=False)
class EncoderMemory:
    """What an encoder read, for the cross-attentions of a decoder, in place of the tensor.

    hidden: the encoder's output [sequence (/ tp), batch, hidden].
    keys_and_values: by attention module, computed once for all tokens that the decoder writes.
    """

    hidden: torch.Tensor
    keys_and_values: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = field(factory=dict)

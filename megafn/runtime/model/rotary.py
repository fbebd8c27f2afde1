"""Rotary positions (arXiv 2104.09864): by which angles queries and keys are turned.

In training megatron-core's layers turn them. In generation `Rotation` does, because they would
compute the same cosines and sines for one token in each layer, and for queries and keys.
"""

from __future__ import annotations

import math

import torch
from attrs import frozen

from megafn.pure.config.records import ModelConfig, RopeScaling


def rotary_frequencies(model: ModelConfig, device: torch.device | str = "cpu") -> torch.Tensor:
    """Angles per position, fp32 [width / 2], of the channels of a head that are rotated.

    Those of megatron-core's `RotaryEmbedding`, and with `model.rope_scaling` those of transformers'
    rope_type "llama3".
    """
    width = int(model.head_size * model.rotary_percent)
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequencies = 1.0 / model.rotary_base**exponents
    if model.rope_scaling is None:
        return frequencies
    return _scaled(frequencies, model.rope_scaling)


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1's: low frequencies divided by the factor, high ones kept, a ramp between them."""
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotary_angles_at(positions: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Angles of positions [sequence] or [batch, sequence], as megatron-core's layers take them.

    fp32 [sequence, batch or 1, 1, width]: the first half of the channels is paired with the second.
    """
    by_sequence = positions.t() if positions.dim() == 2 else positions[:, None]
    angles = by_sequence[..., None] * rotary_frequencies(model, positions.device)
    return torch.cat((angles, angles), dim=-1)[:, :, None]


@frozen(eq=False)
class Rotation:
    """Cosines and sines of the tokens of a pass, [batch or 1, 1, sequence, width] both.

    The first half of the sines is negated.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """Queries or keys [batch, heads, sequence, d] with their first `width` channels turned.

        The same products and sums as megatron-core's `apply_rotary_pos_emb`.
        """
        width = self.cos.size(-1)
        turned = heads[..., :width]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * self.cos + torch.cat((second, first), dim=-1) * self.sin
        return turned if width == heads.size(-1) else torch.cat((turned, heads[..., width:]), -1)


def rotation_by(angles: torch.Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation by the angles of `rotary_angles_at`, for queries and keys of a dtype."""
    angles = angles.permute(1, 2, 0, 3)
    cos = angles.cos().to(dtype)
    first, second = angles.sin().to(dtype).chunk(2, dim=-1)
    return Rotation(cos=cos, sin=torch.cat((-first, second), dim=-1))

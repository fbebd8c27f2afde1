"""Rotary positions (arXiv 2104.09864): by which angles queries and keys are turned."""

from __future__ import annotations

import math

import torch

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

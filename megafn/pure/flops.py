"""Floating point operations of a model: the unit of a device's TFLOP/s and MFU."""

from __future__ import annotations

from megafn.pure.config.records import ModelConfig
from megafn.pure.families.built_in import find_spec


def training_flops(model: ModelConfig, sequences: int) -> float | None:
    """Operations of a forward and backward pass over `sequences` sequences of full length.

    Those of matrix products, two for each multiply and add, a backward pass twice a forward one,
    recomputation not counted; attention is counted in full, causal or not, as in arXiv 2104.04473
    (appendix), or with a sliding window as if every token attended to a whole window; products of
    one position a sequence are not counted. None if the family does not know.

    >>> model = ModelConfig(
    ...     num_layers=1, hidden_size=8, num_attention_heads=2, seq_length=4, vocab_size=10
    ... )
    >>> layer = 2 * (4 * 8 * 8) + 4 * 4 * 8 + 2 * (2 * 8 * 32)
    >>> training_flops(model, 1) == 3 * 4 * (layer + 2 * 8 * 10)
    True
    """
    spec = find_spec(model.family)
    return None if spec is None else spec.training_flops(model, sequences)

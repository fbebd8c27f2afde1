"""Floating point operations of a model: what a device's TFLOP/s are counted in."""

from __future__ import annotations

from megafn.pure.config.records import ModelConfig


def training_flops(model: ModelConfig, sequences: int) -> float | None:
    """Operations of one forward and backward pass over `sequences` sequences of full length, recomputation not counted.

    Those of matrix products, two for each multiply and add, a backward pass twice a forward one; attention is counted
    in full, causal or not, as in arXiv 2104.04473 (appendix); products of one position a sequence are not. None for a family whose layers are not of this shape.

    >>> model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, seq_length=4, vocab_size=10)
    >>> training_flops(model, 1) == 3 * 4 * (2 * (4 * 8 * 8) + 4 * 4 * 8 + 2 * (2 * 8 * 32) + 2 * 8 * 10)
    True
    """
    if model.family not in ("gpt", "bert", "t5"):
        return None
    hidden, inner, s = (
        model.hidden_size,
        model.num_attention_heads * model.head_size,
        model.seq_length,
    )
    mlp = 2 * hidden * model.ffn_size * (3 if model.gated else 2)

    def layer(length: int) -> float:
        """A token's, in a layer that attends to `length` tokens."""
        return (
            2 * hidden * (2 * inner + 2 * model.query_groups * model.head_size)
            + 4 * length * inner
            + mlp
        )

    if model.family != "t5":
        head = (
            2 * hidden * (model.vocab_size + (hidden if model.family == "bert" else 0))
            if model.num_labels is None
            else 0
        )
        return 3.0 * sequences * s * (model.num_layers * layer(s) + head)
    t = model.decoder_length
    cross = (
        t * (2 * hidden * 2 * inner + 4 * s * inner) + s * 2 * hidden * 2 * inner
    )  # queries and output; keys and values
    decoder = model.decoder_layers * (t * layer(t) + cross) + t * 2 * hidden * model.vocab_size
    return 3.0 * sequences * (s * model.num_layers * layer(s) + decoder)

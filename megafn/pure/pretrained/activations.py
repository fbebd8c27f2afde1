"""Activations: the names of transformers, and those of `ModelConfig.activation`."""

from __future__ import annotations

from collections.abc import Mapping

PLAIN = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# Of an MLP that multiplies two projections.
GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_new": "geglu_tanh",
    "gelu_pytorch_tanh": "geglu_tanh",
}
# T5's `feed_forward_proj`. By "gated-gelu" transformers mean gelu_new.
OF_T5 = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gated-gelu": "geglu_tanh",
    "gated-gelu_new": "geglu_tanh",
    "gated-silu": "swiglu",
}


def name_in_transformers(activation: str, table: Mapping[str, str]) -> str:
    """The first name that means this activation, or the activation itself if there is none.

    >>> name_in_transformers("gelu_tanh", PLAIN)
    'gelu_new'
    """
    for name, meaning in table.items():
        if meaning == activation:
            return name
    return activation

"""How a program runs a step: what it overlaps and what it fuses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import attrs
from attrs import frozen

from megafn.pure.config.problems import choice_problem, config_error


@frozen(kw_only=True)
class Implementation:
    """What of a step one program does differently from another."""

    # Bias, activation, dropout, residual and rotation each in one pass over memory.
    fused: bool
    # Attention without its scores in memory (arXiv 2205.14135).
    flash_attention: bool = True
    # Products within layers run so many times faster than in bf16.
    product_speed: float = 1.0
    # Messages under computation: of tp (with sequence parallelism), cp, pp (interleaved) and dp.
    overlap: bool
    # Gradients are summed in this many bytes an element.
    gradient_bytes: int = 4
    # Ranks of tp send a part each to the next stage (arXiv 2104.04473, section 4.1).
    scatter_gather: bool = False
    # Bytes that an update moves for each parameter, see `optimizer_seconds`.
    update_bytes: int


# Read: gradient 4, weights 4, two moments 8. Written: weights 4, moments 8, bf16 copy 2. Before:
# the gradient's norm 4, its zeroing 4; and the fp32 weights for the bf16 copy 4.
_FUSED_UPDATE_BYTES = 42
# And the passes that divide the gradient by the token count, and that clip it.
_UPDATE_BYTES = _FUSED_UPDATE_BYTES + 16

IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "megafn": Implementation(fused=False, overlap=False, update_bytes=_UPDATE_BYTES),
        "megatron": Implementation(fused=True, overlap=True, update_bytes=_FUSED_UPDATE_BYTES),
    }
)

# What published rows ran, and megafn does not. Megatron-LM at the time of arXiv 2104.04473 and
# 2205.05198: gradients in fp16, summed after the last backward pass.
MEGATRON_2021 = attrs.evolve(
    IMPLEMENTATIONS["megatron"],
    flash_attention=False,
    overlap=False,
    gradient_bytes=2,
    scatter_gather=True,
)
# Transformer Engine's fp8: tensor cores are twice as fast; attention and output layer stay in bf16.
MEGATRON_FP8 = attrs.evolve(IMPLEMENTATIONS["megatron"], product_speed=2.0)


def implementation_of(name: str) -> Implementation:
    """By its name. Raises ConfigError for another one.

    >>> implementation_of("deepspeed")
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: implementation = 'deepspeed': choose one of megafn,
    megatron
    """
    if not isinstance(name, str) or name not in IMPLEMENTATIONS:
        raise config_error([choice_problem("implementation", name, IMPLEMENTATIONS)])
    return IMPLEMENTATIONS[name]

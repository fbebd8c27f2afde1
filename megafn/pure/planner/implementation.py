"""What megafn and Megatron-LM each overlap and fuse in a step: `implementation=` of `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import attrs
from attrs import frozen

from megafn.pure.config.problems import choice_problem, config_error


@frozen(kw_only=True)
class Implementation:
    """How a program runs a training step, as far as that decides its time and memory."""

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
    # Bytes for each logit that the loss reads and writes, forward and backward.
    loss_bytes: int
    # Bytes for each parameter of a rank: to add the gradient of a micro-batch to the sum; in the
    # passes of a step over the whole sum; and in those over a rank's share of the update.
    accumulation_bytes: int
    gradient_pass_bytes: int
    update_bytes: int


IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "megafn": Implementation(
            fused=False,
            overlap=False,
            # in fp32, operation by operation: the largest 2; difference and exponential 14; their
            # sum 4; backward, again 14, scaled 8, and written as bf16 6
            loss_bytes=48,
            # bf16 read, fp32 read and written
            accumulation_bytes=10,
            # zeroed 4, divided by the token count 8
            gradient_pass_bytes=12,
            # norm 4; clipped in two operations 16; Adam reads 16 and writes 12; bf16 copy 6
            update_bytes=54,
        ),
        "megatron": Implementation(
            fused=True,
            overlap=True,
            loss_bytes=24,
            # by the product itself, under which it is hidden
            accumulation_bytes=0,
            gradient_pass_bytes=4,
            # clipped in one operation
            update_bytes=46,
        ),
    }
)

# What published rows ran, and megafn does not. Megatron-LM at the time of arXiv 2104.04473 and
# 2205.05198: gradients in fp16, summed after the last backward pass.
MEGATRON_2021 = attrs.evolve(
    IMPLEMENTATIONS["megatron"],
    flash_attention=False,
    overlap=False,
    gradient_bytes=2,
    # two read, one written
    accumulation_bytes=6,
    scatter_gather=True,
)
# Transformer Engine's fp8: tensor cores are twice as fast; attention and output layer stay in bf16.
MEGATRON_FP8 = attrs.evolve(IMPLEMENTATIONS["megatron"], product_speed=2.0)


def implementation_of(name: str) -> Implementation:
    """The implementation of this name. Raises ConfigError if there is none.

    >>> implementation_of("deepspeed")
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: implementation = 'deepspeed': choose one of megafn,
    megatron
    """
    if not isinstance(name, str) or name not in IMPLEMENTATIONS:
        raise config_error([choice_problem("implementation", name, IMPLEMENTATIONS)])
    return IMPLEMENTATIONS[name]

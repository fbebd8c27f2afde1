"""Seconds that one rank computes: matrix products, attention, passes over memory.

A product of [rows, inner] and [inner, columns] takes 2 rows inner columns / FLOP/s and, on top, the
time in which its three matrices pass through memory. Their sum, not the larger of the two, gives
the decline of small products that measurements show (arXiv 2104.04473, figure 7).
"""

from __future__ import annotations

import attrs
from attrs import frozen

from megafn.pure.config.records import padded_vocab_size
from megafn.pure.planner.activations import ELEMENT_BYTES
from megafn.pure.planner.implementation import Implementation
from megafn.pure.planner.machine import Machine
from megafn.pure.planner.model_shape import ModelShape, StackShape
from megafn.pure.planner.records import Layout

# Flash attention reaches this share of what large products do. Its backward pass computes the
# scores again: five products where the forward pass has two.
_FLASH_SHARE = 0.7
_FLASH_BACKWARD = 2.5


@frozen(kw_only=True)
class Speeds:
    """What a machine does for one dtype, shares applied: FLOP/s, bytes/s, and bytes an element."""

    matmul: float
    memory: float
    element: int


def speeds_of(machine: Machine, dtype: str) -> Speeds:
    peak = machine.fp32_flops if dtype == "fp32" else machine.best_matmul_flops
    return Speeds(
        matmul=peak * machine.matmul_efficiency,
        memory=machine.memory_bandwidth * machine.memory_efficiency,
        element=ELEMENT_BYTES[dtype],
    )


@frozen(kw_only=True)
class LayerSeconds:
    """One layer, one micro-batch. `core`: of the forward pass, what is between the projections."""

    forward: float
    backward: float
    core: float


def layer_seconds(
    model: ModelShape,
    stack: StackShape,
    layout: Layout,
    speeds: Speeds,
    implementation: Implementation,
) -> LayerSeconds:
    """Forward and backward pass of one layer over one micro-batch, on one rank."""
    tokens = stack.length * layout.micro_batch_size / layout.cp
    products = _product_speeds(speeds, implementation)
    linear = _linear_seconds(model, tokens, layout.tp, products)
    core, core_backward = _attention_seconds(
        model, tokens, stack.attended, stack.keys, layout.tp, speeds, implementation
    )
    forward_bytes, backward_bytes = _elementwise_bytes(
        model, tokens, layout, speeds.element, implementation
    )
    if stack.context:
        memory_tokens = stack.context * layout.micro_batch_size / layout.cp
        cross = _attention_seconds(
            model, tokens, stack.context, stack.context, layout.tp, speeds, implementation
        )
        core += cross[0]
        core_backward += cross[1]
        linear += _cross_linear_seconds(model, tokens, memory_tokens, layout.tp, products)
        # a norm and a residual more, as around self-attention
        forward_bytes *= 1.5
        backward_bytes *= 1.5
    return LayerSeconds(
        forward=linear + core + forward_bytes / speeds.memory,
        backward=2 * linear + core_backward + backward_bytes / speeds.memory,
        core=core,
    )


def _product_speeds(speeds: Speeds, implementation: Implementation) -> Speeds:
    """Of products within layers, which some implementations run in fp8."""
    if implementation.product_speed == 1:
        return speeds
    return attrs.evolve(speeds, matmul=speeds.matmul * implementation.product_speed)


def matmul_seconds(rows: float, inner: float, columns: float, speeds: Speeds) -> float:
    """[rows, inner] times [inner, columns]."""
    moved = rows * inner + inner * columns + rows * columns
    return 2 * rows * inner * columns / speeds.matmul + speeds.element * moved / speeds.memory


def _linear_seconds(model: ModelShape, tokens: float, tp: int, speeds: Speeds) -> float:
    """The four projections of a layer."""
    hidden = model.hidden
    return (
        matmul_seconds(tokens, hidden, (model.query + model.key_value) / tp, speeds)
        + matmul_seconds(tokens, model.query / tp, hidden, speeds)
        + matmul_seconds(tokens, hidden, model.up / tp, speeds)
        + matmul_seconds(tokens, model.ffn / tp, hidden, speeds)
    )


def _cross_linear_seconds(
    model: ModelShape, tokens: float, memory_tokens: float, tp: int, speeds: Speeds
) -> float:
    """Queries and output of cross-attention, and keys and values of what it reads."""
    hidden = model.hidden
    return (
        matmul_seconds(tokens, hidden, model.query / tp, speeds)
        + matmul_seconds(tokens, model.query / tp, hidden, speeds)
        + matmul_seconds(memory_tokens, hidden, 2 * model.query / tp, speeds)
    )


def _attention_seconds(
    model: ModelShape,
    tokens: float,
    attended: float,
    keys: float,
    tp: int,
    speeds: Speeds,
    implementation: Implementation,
) -> tuple[float, float]:
    """Forward and backward pass of what is between the projections."""
    if implementation.flash_attention:
        forward = 4 * tokens * attended * model.query / tp / (speeds.matmul * _FLASH_SHARE)
        return forward, _FLASH_BACKWARD * forward
    # All scores are computed and stand in memory: written, read by the softmax, its result and
    # its dropout's written and read again; 2 and 9 bytes of a score, and in the backward pass 11.
    scores = tokens * keys * model.heads / tp
    products = 4 * tokens * keys * model.query / tp / speeds.matmul
    products += 2 * speeds.element * scores / speeds.memory
    forward = products + 9 * scores / speeds.memory
    return forward, 2 * products + 11 * scores / speeds.memory


def _elementwise_bytes(
    model: ModelShape, tokens: float, layout: Layout, element: int, implementation: Implementation
) -> tuple[float, float]:
    """Bytes that norms, residuals and activations of a layer move, forward and backward."""
    tp = layout.tp
    whole = model.hidden / (tp if layout.sequence_parallel else 1)
    # two norms (read, written) and two residuals (bias, dropout and sum: two read, one written)
    forward = 11 * whole
    backward = 18 * whole
    # queries, keys, values and what they attend to, rearranged
    forward += 6 * model.query / tp
    backward += 6 * model.query / tp
    # the activation: read and written
    activation = (model.up + model.ffn) / tp
    forward += activation
    backward += 1.5 * activation
    if not implementation.fused:
        extra = _unfused_elements(model, layout, whole)
        forward += extra
        backward += 1.5 * extra
    return tokens * element * forward, tokens * element * backward


def _unfused_elements(model: ModelShape, layout: Layout, whole: float) -> float:
    """Elements for each token that fused kernels need not move: a pass for each operation."""
    tp = layout.tp
    extra = 0.0
    if model.bias and tp > 1:  # else biases are part of the products
        extra += 2 * (model.query + model.key_value + model.up) / tp
        extra += 4 * whole
    if model.dropout:
        extra += 4 * whole
    if model.gated:
        extra += 4 * model.ffn / tp
    if model.rope:
        extra += 10 * (model.query + model.key_value / 2) / tp
    return extra


# What the loss moves for each logit: bf16 read and fp32 written, the largest, the exponentials and
# their sum; backward, the gradient.
_LOSS_BYTES = 24


def head_seconds(model: ModelShape, layout: Layout, speeds: Speeds) -> float:
    """Output layer and loss of one micro-batch, forward and backward."""
    if not model.head_length:
        return 0.0
    tokens = model.head_length * layout.micro_batch_size / layout.cp
    columns = padded_vocab_size(model.vocab, layout.tp) / layout.tp
    products = 3 * matmul_seconds(tokens, model.hidden, columns, speeds)
    if model.head_inner:
        products += 3 * matmul_seconds(tokens, model.hidden, model.head_inner, speeds)
    return products + _LOSS_BYTES * tokens * columns / speeds.memory

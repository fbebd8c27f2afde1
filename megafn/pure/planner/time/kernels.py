"""Seconds of computation on one rank: matrix products, attention, passes over memory.

A product of [rows, inner] and [inner, columns] takes 2 rows inner columns / FLOP/s and, on top, the
time in which its three matrices pass through memory. Their sum, not the larger of the two, gives
the decline of small products that measurements show (arXiv 2104.04473, figure 7).
"""

from __future__ import annotations

import attrs
from attrs import frozen

from megafn.pure.config.records import padded_vocab_size
from megafn.pure.planner.implementation import Implementation
from megafn.pure.planner.machine import Machine
from megafn.pure.planner.memory.activations import ELEMENT_BYTES
from megafn.pure.planner.records import Layout
from megafn.pure.planner.time.model_dimensions import ModelDimensions, StackDimensions

# Flash attention reaches this share of what large products do. Its backward pass computes the
# scores again: five products where the forward pass has two.
_FLASH_SHARE = 0.7
_FLASH_BACKWARD = 2.5


@frozen(kw_only=True)
class Speeds:
    """What a machine reaches in one dtype."""

    # FLOP/s of large matrix products.
    matmul: float
    # Bytes/s.
    memory: float
    # Bytes.
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
    """Seconds of one layer for one micro-batch."""

    forward: float
    backward: float
    # The part of `forward` between the projections: attention itself.
    core: float


def layer_seconds(
    model: ModelDimensions,
    stack: StackDimensions,
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
    forward_elements, backward_elements = elementwise_elements(model, layout, implementation)
    if stack.context:
        memory_tokens = stack.context * layout.micro_batch_size / layout.cp
        cross = _attention_seconds(
            model, tokens, stack.context, stack.context, layout.tp, speeds, implementation
        )
        core += cross[0]
        core_backward += cross[1]
        linear += _cross_linear_seconds(model, tokens, memory_tokens, layout.tp, products)
        cross_elements = cross_attention_elements(model, layout)
        forward_elements += cross_elements[0]
        backward_elements += cross_elements[1]
    passes = tokens * speeds.element / speeds.memory
    return LayerSeconds(
        forward=linear + core + forward_elements * passes,
        backward=2 * linear + core_backward + backward_elements * passes,
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


def _linear_seconds(model: ModelDimensions, tokens: float, tp: int, speeds: Speeds) -> float:
    """The four projections of a layer."""
    hidden = model.hidden
    return (
        matmul_seconds(tokens, hidden, (model.query + model.key_value) / tp, speeds)
        + matmul_seconds(tokens, model.query / tp, hidden, speeds)
        + matmul_seconds(tokens, hidden, model.up / tp, speeds)
        + matmul_seconds(tokens, model.ffn / tp, hidden, speeds)
    )


def _cross_linear_seconds(
    model: ModelDimensions, tokens: float, memory_tokens: float, tp: int, speeds: Speeds
) -> float:
    """Queries and output of cross-attention, and keys and values of what it reads."""
    hidden = model.hidden
    return (
        matmul_seconds(tokens, hidden, model.query / tp, speeds)
        + matmul_seconds(tokens, model.query / tp, hidden, speeds)
        + matmul_seconds(memory_tokens, hidden, 2 * model.query / tp, speeds)
    )


def _attention_seconds(
    model: ModelDimensions,
    tokens: float,
    attended: float,
    keys: float,
    tp: int,
    speeds: Speeds,
    implementation: Implementation,
) -> tuple[float, float]:
    """Forward and backward pass of attention itself, without its projections."""
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


def elementwise_elements(
    model: ModelDimensions, layout: Layout, implementation: Implementation
) -> tuple[float, float]:
    """Elements for each token that norms, residuals, activations and the like read and write.

    In a layer, forward and backward. Unfused they are those of the operations that torch
    dispatches, which a test counts.
    """
    tp = layout.tp
    fused = implementation.fused
    whole = model.hidden / (tp if layout.sequence_parallel else 1)
    ffn = model.ffn / tp
    projected = (model.query + model.key_value) / tp
    # two norms and two residuals; of their gradients one more pass reads what the norm read
    forward = 10 * whole
    backward = 12 * whole
    if model.gated:
        forward += (3 if fused else 7) * ffn
        backward += (5 if fused else 13) * ffn
    else:
        forward += 2 * ffn
        backward += 3 * ffn
    if model.bias:
        # gradients of biases read the gradients of what they were added to
        backward += projected + model.up / tp + 2 * whole
    rotated = model.rotated * (model.query + model.key_value / 2) / tp
    forward += (2 if fused else 12) * rotated
    backward += (2 if fused else 17) * rotated
    if not implementation.flash_attention:
        # queries, keys, values and what they attend to, rearranged for the products
        forward += 6 * model.query / tp
        backward += 6 * model.query / tp
    if fused:
        return forward, backward
    # gradients of queries, keys and values are joined
    backward += 2 * projected
    if model.dropout:
        forward += 5 * whole
        backward += 5 * whole
    if model.bias and tp > 1:
        # else biases are part of the products
        forward += 2 * (projected + model.up / tp) + 4 * whole
    return forward, backward


def cross_attention_elements(model: ModelDimensions, layout: Layout) -> tuple[float, float]:
    """What `elementwise_elements` gives, of the cross-attention of a layer beside it."""
    tp = layout.tp
    whole = model.hidden / (tp if layout.sequence_parallel else 1)
    # a norm and a residual; gradients of keys and values joined, those of biases, and that of what
    # it reads, which is summed over layers
    return 5 * whole, 10 * whole + 7 * model.query / tp


def head_seconds(
    model: ModelDimensions, layout: Layout, speeds: Speeds, implementation: Implementation
) -> float:
    """Output layer and loss of one micro-batch, forward and backward."""
    if not model.head_length:
        return 0.0
    tokens = model.head_length * layout.micro_batch_size / layout.cp
    columns = padded_vocab_size(model.vocab, layout.tp) / layout.tp
    products = 3 * matmul_seconds(tokens, model.hidden, columns, speeds)
    if model.head_inner:
        products += 3 * matmul_seconds(tokens, model.hidden, model.head_inner, speeds)
    return products + implementation.loss_bytes * tokens * columns / speeds.memory

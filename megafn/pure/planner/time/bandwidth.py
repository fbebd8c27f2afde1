"""Bandwidth between the ranks of a group, and the seconds of a collective."""

from __future__ import annotations

from functools import cache

from attrs import frozen

from megafn.pure.planner.machine import Machine
from megafn.pure.planner.records import Layout


@frozen(kw_only=True)
class Bandwidths:
    """Bytes/s, one way, that a rank has to others of its group."""

    tp: float
    cp: float
    # Neighbours of the pipeline.
    pp: float
    # Ranks that hold the same parameters: dp and cp together.
    dp: float


def bandwidths(machine: Machine, layout: Layout, order: str) -> Bandwidths:
    """Bandwidths of the groups of a layout whose axes are placed in this order, innermost first."""
    tp = layout.tp
    cp = layout.cp
    dp = layout.dp
    pp = layout.pp
    strides = _strides(order, tp, cp, dp, pp)
    inner_of_dp = strides[2] if cp == 1 else min(strides[1], strides[2])
    return Bandwidths(
        tp=_bandwidth(machine, tp, strides[0]),
        cp=_bandwidth(machine, cp, strides[1]),
        pp=_neighbour_bandwidth(machine, pp, strides[3]),
        dp=_bandwidth(machine, dp * cp, inner_of_dp),
    )


@cache
def _axes(order: str) -> tuple[int, ...]:
    """Axes of an order as numbers of tp, cp, dp and pp."""
    numbers = {"tp": 0, "cp": 1, "dp": 2, "pp": 3}
    return tuple(numbers[axis] for axis in order.split("-") if axis in numbers)


def _strides(order: str, *sizes: int) -> list[int]:
    """How far apart neighbours along tp, cp, dp and pp are, in ranks."""
    strides = [1, 1, 1, 1]
    stride = 1
    for axis in _axes(order):
        strides[axis] = stride
        stride *= sizes[axis]
    return strides


def _bandwidth(machine: Machine, ranks: int, stride: int) -> float:
    """Bytes/s of a ring over `ranks` that are `stride` apart.

    Within a node it is the links'. Beyond it, the members of a ring in a node share their network
    cards: with 8 members there, a ring has 8 times the network of one device.
    """
    if ranks * stride <= machine.devices_per_node:
        return machine.link_bandwidth * machine.link_efficiency
    members = max(1, machine.devices_per_node // stride)
    network = members * machine.network_bandwidth
    return min(machine.link_bandwidth, network) * machine.link_efficiency


def _neighbour_bandwidth(machine: Machine, ranks: int, stride: int) -> float:
    """Between two neighbours of a pipeline; the slowest pair of it, which all others wait for."""
    if ranks * stride <= machine.devices_per_node:
        return machine.link_bandwidth * machine.link_efficiency
    network = min(machine.link_bandwidth, machine.network_bandwidth)
    return network * machine.link_efficiency


def all_gather_seconds(payload: float, ranks: int, bandwidth: float) -> float:
    """Seconds to gather `payload` bytes in all; a reduce-scatter takes as long."""
    return payload * (ranks - 1) / ranks / bandwidth


def all_reduce_seconds(payload: float, ranks: int, bandwidth: float) -> float:
    """A reduce-scatter and an all-gather."""
    return 2 * all_gather_seconds(payload, ranks, bandwidth)

"""Devices and what connects them: what a plan needs to know of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from attrs import frozen


@frozen(kw_only=True)
class Machine:
    """One kind of device, eight (or so) of them in a node, and nodes on a network.

    FLOP/s, bytes and bytes/s of one device. Bandwidths are those of one direction.
    """

    name: str
    # Dense bf16 matrix products: what the maker says, and the most that a large one was seen to do.
    peak_flops: float
    best_matmul_flops: float
    memory_bytes: float
    memory_bandwidth: float
    # Between the devices of a node.
    link_bandwidth: float
    # Between nodes, for each device.
    network_bandwidth: float
    devices_per_node: int = 8
    # What the CUDA context, NCCL's buffers and workspaces of kernels take of `memory_bytes`: 1 to
    # 2 GB where it was measured.
    reserved_bytes: float = 2e9


MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        machine.name: machine
        for machine in (
            Machine(
                name="a100",
                peak_flops=312e12,
                best_matmul_flops=271.2e12,
                memory_bytes=80e9,
                memory_bandwidth=2.039e12,
                link_bandwidth=300e9,
                network_bandwidth=25e9,
            ),
            Machine(
                name="h100",
                peak_flops=989e12,
                best_matmul_flops=794.5e12,
                memory_bytes=80e9,
                memory_bandwidth=3.35e12,
                link_bandwidth=450e9,
                network_bandwidth=50e9,
            ),
            Machine(
                name="h200",
                peak_flops=989e12,
                best_matmul_flops=794.5e12,
                memory_bytes=141e9,
                memory_bandwidth=4.8e12,
                link_bandwidth=450e9,
                network_bandwidth=50e9,
            ),
            Machine(
                name="b200",
                peak_flops=2250e12,
                best_matmul_flops=1745e12,
                memory_bytes=180e9,
                memory_bandwidth=8.0e12,
                link_bandwidth=900e9,
                network_bandwidth=50e9,
            ),
        )
    }
)

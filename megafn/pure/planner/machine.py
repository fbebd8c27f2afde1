"""Devices and what connects them: what a plan needs to know of a cluster."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeGuard

import attrs
from attrs import Attribute, Factory, field, frozen

from megafn.pure.config.problems import ConfigError, Problem, config_error, did_you_mean
from megafn.pure.config.serialization import from_dict, read_toml

# Of the products of half precision that a device without a figure of its own does: H100's.
_BEST_MATMUL_SHARE = 0.8
# Products of fp32 on A100 and H100: 19.5 of 312 and 67 of 989 TFLOP/s.
_FP32_SHARE = 1 / 16

# Of a machine that nobody fitted: H100's share of products; of memory and links, A100's.
MATMUL_EFFICIENCY = 0.744
MEMORY_EFFICIENCY = 0.818
LINK_EFFICIENCY = 0.724

# Fitted to tiny models on the hosts of Megatron-LM's CI.
LAUNCH_SECONDS = 5.0e-3


def _check_positive(machine: Machine, attribute: Attribute[float], value: object) -> None:
    if _is_number(value) and math.isfinite(value) and value > 0:
        return
    remedy = f"must be a finite number above 0; give {_MEANINGS[attribute.name]}"
    raise config_error([Problem(f"machine.{attribute.name}", value, remedy)])


def _check_not_negative(machine: Machine, attribute: Attribute[float], value: object) -> None:
    if _is_number(value) and math.isfinite(value) and value >= 0:
        return
    remedy = f"must be a finite number of at least 0; give {_MEANINGS[attribute.name]}"
    raise config_error([Problem(f"machine.{attribute.name}", value, remedy)])


def _check_share(machine: Machine, attribute: Attribute[float], value: object) -> None:
    if _is_number(value) and 0 < value <= 1:
        return
    remedy = f"must be above 0 and at most 1; give {_MEANINGS[attribute.name]}"
    raise config_error([Problem(f"machine.{attribute.name}", value, remedy)])


def _check_count(machine: Machine, attribute: Attribute[int], value: object) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return
    remedy = "must be a whole number of at least 1; give the devices of one node"
    raise config_error([Problem(f"machine.{attribute.name}", value, remedy)])


def _check_units(machine: Machine) -> None:
    """Refuse figures in tera or giga, which would plan nonsense: all of them at once."""
    problems = []
    for name, unit in _UNITS.items():
        value = getattr(machine, name)
        if 0 < value < unit.least and value != _derived(machine, name):
            problems.append(Problem(f"machine.{name}", value, unit.remedy(value, name)))
    if problems:
        raise config_error(problems)


def _derived(machine: Machine, name: str) -> float | None:
    """What a figure that is left out is computed as."""
    share = {"best_matmul_flops": _BEST_MATMUL_SHARE, "fp32_flops": _FP32_SHARE}.get(name)
    return None if share is None else share * machine.peak_flops


def _check_usable(machine: Machine) -> None:
    if machine.usable_bytes > 0:
        return
    remedy = f"must be less than memory_bytes = {machine.memory_bytes}"
    raise config_error([Problem("machine.reserved_bytes", machine.reserved_bytes, remedy)])


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


_MEANINGS = {
    "peak_flops": "the dense bf16 FLOP/s of one device, for example 989e12",
    "best_matmul_flops": "the FLOP/s of a large bf16 matrix product, or leave it out",
    "fp32_flops": "the FLOP/s of fp32 matrix products, or leave it out",
    "memory_bytes": "the memory of one device in bytes, for example 80e9",
    "memory_bandwidth": "the bytes/s of one device's memory, for example 3.35e12",
    "link_bandwidth": "the bytes/s between devices of a node, one way, for example 450e9",
    "network_bandwidth": (
        "the bytes/s of the network for each device, one way, for example 50e9 (of a single node "
        "it is not read)"
    ),
    "reserved_bytes": "the bytes of one device that CUDA and NCCL take, or leave it out",
    "matmul_efficiency": "the share of best_matmul_flops that a model's products reach",
    "memory_efficiency": "the share of memory_bandwidth that a model's kernels reach",
    "launch_seconds": "the seconds in which the host launches a layer's kernels, or leave it out",
    "link_efficiency": "the share of link and network bandwidth that messages reach",
}

# Figures above this are not in tera or giga either: no device has so many of them.
_MOST_PREFIXED = 1e4


@frozen
class _Unit:
    """In what a figure is given, and what people give it in by mistake."""

    name: str
    # Far below any device: less is in another unit.
    least: float
    mistaken_for: str
    exponent: int

    def remedy(self, value: float, field: str) -> str:
        if value > _MOST_PREFIXED:
            return f"too small to be in {self.name}; give {_MEANINGS[field]}"
        meant = f"{value:.10g}e{self.exponent}"
        return f"in {self.name}; did you mean {meant} ({value:.10g} {self.mistaken_for})?"


_UNITS = {
    "peak_flops": _Unit("FLOP/s", 1e9, "TFLOP/s", 12),
    "best_matmul_flops": _Unit("FLOP/s", 1e9, "TFLOP/s", 12),
    "fp32_flops": _Unit("FLOP/s", 1e9, "TFLOP/s", 12),
    "memory_bytes": _Unit("bytes", 1e5, "GB", 9),
    "memory_bandwidth": _Unit("bytes/s", 1e6, "GB/s", 9),
    "link_bandwidth": _Unit("bytes/s", 1e6, "GB/s", 9),
    "network_bandwidth": _Unit("bytes/s", 1e6, "GB/s", 9),
    "reserved_bytes": _Unit("bytes", 1e3, "GB", 9),
}


@frozen(kw_only=True)
class Machine:
    """One kind of device, eight (or so) of them in a node, and nodes on a network.

    FLOP/s, bytes and bytes/s of one device. Bandwidths are those of one direction. To plan for
    another machine, give its figures, or change one that is close:
    `attrs.evolve(MACHINES["h100"], name="ours", network_bandwidth=25e9)`.

    The shares (`*_efficiency`) are the only numbers that are fitted and not looked up: see
    docs/planner-accuracy.md. Left out, they are H100's.

    Raises ConfigError if a figure is not a number above 0, or so small that its unit is wrong.

    >>> Machine(
    ...     name="ours", peak_flops=400e12, memory_bytes=0, memory_bandwidth=2e12,
    ...     link_bandwidth=300e9, network_bandwidth=25e9,
    ... )
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: machine.memory_bytes = 0: must be a finite number
    above 0; give the memory of one device in bytes, for example 80e9
    """

    name: str
    # Dense bf16 (or fp16) matrix products, as the maker says.
    peak_flops: float = field(validator=_check_positive)
    # The most that a large one was measured to do. Left out: 80% of the peak.
    best_matmul_flops: float = field(
        default=Factory(lambda self: _BEST_MATMUL_SHARE * self.peak_flops, takes_self=True),
        validator=_check_positive,
    )
    # fp32 products, as the maker says. Left out: a sixteenth of the peak.
    fp32_flops: float = field(
        default=Factory(lambda self: _FP32_SHARE * self.peak_flops, takes_self=True),
        validator=_check_positive,
    )
    memory_bytes: float = field(validator=_check_positive)
    memory_bandwidth: float = field(validator=_check_positive)
    # Between the devices of a node.
    link_bandwidth: float = field(validator=_check_positive)
    # Between nodes, for each device.
    network_bandwidth: float = field(validator=_check_positive)
    devices_per_node: int = field(default=8, validator=_check_count)
    # What the CUDA context, NCCL's buffers and workspaces of kernels take of `memory_bytes`: 1 to
    # 2 GB where it was measured.
    reserved_bytes: float = field(default=2e9, validator=_check_not_negative)

    # ---- Shares of these peaks that training reaches
    matmul_efficiency: float = field(default=MATMUL_EFFICIENCY, validator=_check_share)
    memory_efficiency: float = field(default=MEMORY_EFFICIENCY, validator=_check_share)
    link_efficiency: float = field(default=LINK_EFFICIENCY, validator=_check_share)
    # In which the host launches the kernels of one layer, forward and backward, for one
    # micro-batch. A layer that computes less does not get faster.
    launch_seconds: float = field(default=LAUNCH_SECONDS, validator=_check_not_negative)
    # The results that the shares were fitted on. None: on none, and times are not to be trusted.
    fitted_on: str | None = None

    def __attrs_post_init__(self) -> None:
        _check_units(self)
        _check_usable(self)

    @property
    def usable_bytes(self) -> float:
        """Bytes that a training step may fill."""
        return self.memory_bytes - self.reserved_bytes


def load_machine(path: str | os.PathLike[str]) -> Machine:
    """The Machine in a TOML file, which holds its fields, in bytes, bytes/s and FLOP/s.

    Raises ConfigError naming the file, with every problem in it.

    >>> load_machine("nowhere.toml")
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: nowhere.toml: cannot be read \
(No such file or directory); give the path of a TOML file
    """
    mapping = read_toml(path)
    names = [attribute.name for attribute in attrs.fields(Machine)]
    problems = []
    for key in mapping.keys() - set(names):
        hint = did_you_mean(key, names) or f"; choose one of {', '.join(names)}"
        problems.append(Problem(key, mapping[key], f"there is no such field{hint}"))
    try:
        if problems:
            raise config_error(problems)
        return from_dict(mapping, Machine)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        machine.name: machine
        for machine in (
            Machine(
                name="a100",
                peak_flops=312e12,
                best_matmul_flops=271.2e12,
                fp32_flops=19.5e12,
                memory_bytes=80e9,
                memory_bandwidth=2.039e12,
                link_bandwidth=300e9,
                network_bandwidth=25e9,
                matmul_efficiency=0.893,
                memory_efficiency=MEMORY_EFFICIENCY,
                link_efficiency=LINK_EFFICIENCY,
                fitted_on="table 1 of arXiv 2104.04473",
            ),
            Machine(
                name="h100",
                peak_flops=989e12,
                best_matmul_flops=794.5e12,
                fp32_flops=67e12,
                memory_bytes=80e9,
                memory_bandwidth=3.35e12,
                link_bandwidth=450e9,
                network_bandwidth=50e9,
                matmul_efficiency=MATMUL_EFFICIENCY,
                fitted_on="Megatron-LM's H100 table",
            ),
            Machine(
                name="h200",
                peak_flops=989e12,
                best_matmul_flops=794.5e12,
                fp32_flops=67e12,
                memory_bytes=141e9,
                memory_bandwidth=4.8e12,
                link_bandwidth=450e9,
                network_bandwidth=50e9,
            ),
            Machine(
                name="b200",
                peak_flops=2250e12,
                best_matmul_flops=1745e12,
                fp32_flops=80e12,
                memory_bytes=180e9,
                memory_bandwidth=8.0e12,
                link_bandwidth=900e9,
                network_bandwidth=50e9,
            ),
        )
    }
)

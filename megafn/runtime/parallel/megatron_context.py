"""The few objects that megatron-core keeps at module level, set for one call and put back."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as mcore_random

from megafn.runtime.parallel import cpu
from megafn.runtime.parallel.groups import ProcessGroups

# (module, the name of its global)
_MODULE_LEVEL_OBJECTS = (
    (mcore_random, "_CUDA_RNG_STATE_TRACKER"),
    (mcore_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED"),
    (parallel_state, "_GLOBAL_MEMORY_BUFFER"),
)


def derive_seed(*parts: object) -> int:
    """A seed from anything printable: the same in every process and on every day.

    >>> name = "decoder.layers.0.mlp.linear_fc1.weight"
    >>> derive_seed(1234, name) == derive_seed(1234, name)
    True
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "big")


@contextlib.contextmanager
def megatron_context(pg: ProcessGroups, *seed: object) -> Iterator[None]:
    """megatron-core's module-level objects for one call: this layout's, then as they were.

    These are the CPU seam, the memory buffer and the random states. The random states are a
    function of `seed` (the run's seed and the position in the run) and of the place in the grid:
    equal over tp in the default state, different in the tensor-parallel one, different for each
    pp, dp and cp. So none of them has to be kept between calls, two open layouts cannot disturb
    each other, and a resumed run draws what it would have drawn.
    """
    pg.check_open()
    devices = [pg.device] if pg.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        warnings.catch_warnings(),
        cpu.megatron_on_cpu(),
        _module_level_objects_restored(),
    ):
        # megatron-core calls functions of torch.distributed by their older names.
        warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)
        parallel_state._GLOBAL_MEMORY_BUFFER = pg.memory_buffer
        mcore_random._CUDA_RNG_STATE_TRACKER = None
        mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
        _seed_random_states(pg, derive_seed(*seed, pg.place.pp, pg.place.dp, pg.place.cp))
        yield


@contextlib.contextmanager
def _module_level_objects_restored() -> Iterator[None]:
    before = [getattr(module, name) for module, name in _MODULE_LEVEL_OBJECTS]
    try:
        yield
    finally:
        for (module, name), value in zip(_MODULE_LEVEL_OBJECTS, before, strict=True):
            setattr(module, name, value)


def _seed_random_states(pg: ProcessGroups, seed: int) -> None:
    torch.manual_seed(seed)
    mcore_random.model_parallel_cuda_manual_seed(
        seed, tp_rank=pg.place.tp, ep_rank=0, etp_rank=pg.place.tp
    )

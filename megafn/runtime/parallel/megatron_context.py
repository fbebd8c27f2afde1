"""The few objects that megatron-core keeps at module level, set for one call and put back."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator

import torch

from megafn.runtime.parallel import cpu
from megafn.runtime.parallel.groups import ProcessGroups


def derive_seed(*parts: object) -> int:
    """A seed from anything printable: the same in every process and on every day.

    >>> derive_seed(1234, "decoder.layers.0.mlp.linear_fc1.weight") == derive_seed(1234, "decoder.layers.0.mlp.linear_fc1.weight")
    True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


@contextlib.contextmanager
def megatron_context(pg: ProcessGroups, *seed: object) -> Iterator[None]:
    """megatron-core's surroundings for one call: its few module-level objects are this layout's, then as they were.

    These are the CPU seam, the memory buffer and the random states. The random states are a function of `seed`
    (the run's seed and the position in the run) and of the place in the grid: equal over tp in the default state,
    different in the tensor-parallel one, different for each pp, dp and cp. So nothing of them has to be kept
    between calls, two open layouts cannot disturb each other, and a resumed run draws what it would have drawn.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as mcore_random

    kept = (
        ("_CUDA_RNG_STATE_TRACKER", mcore_random),
        ("_CUDA_RNG_STATE_TRACKER_INITIALIZED", mcore_random),
        ("_GLOBAL_MEMORY_BUFFER", parallel_state),
    )
    before = [getattr(owner, name) for name, owner in kept]
    devices = [pg.device] if pg.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings(), cpu.megatron_on_cpu():
        warnings.filterwarnings(
            "ignore", "`torch.distributed.", FutureWarning
        )  # megatron-core calls older names
        try:
            parallel_state._GLOBAL_MEMORY_BUFFER = pg.memory_buffer
            mcore_random._CUDA_RNG_STATE_TRACKER = None
            mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
            number = derive_seed(*seed, pg.place.pp, pg.place.dp, pg.place.cp)
            torch.manual_seed(number)
            mcore_random.model_parallel_cuda_manual_seed(
                number, tp_rank=pg.place.tp, ep_rank=0, etp_rank=pg.place.tp
            )
            yield
        finally:
            for (name, owner), value in zip(kept, before):
                setattr(owner, name, value)

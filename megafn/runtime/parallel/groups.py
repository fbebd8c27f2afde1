"""Process groups from a layout, as a value that is passed; and the objects that megatron-core keeps at module level, lent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from attrs import field, frozen

from megafn.pure.config.problems import ConfigError
from megafn.pure.layout import Coordinates, Groups, coordinates
from megafn.runtime.parallel import cpu

_AXES = ("tp", "pp", "cp", "dp", "ep", "mp", "dp_cp", "tp_cp", "tp_dp_cp", "embd", "pos_embd")


@frozen(kw_only=True)
class ProcessGroups:
    """The process groups of one layout, from this process's place in it. Made by `init_groups`.

    `tp`, `pp`, `cp`, `dp`, `ep`, `mp` (tp x pp), `dp_cp`, `tp_cp`, `tp_dp_cp`, `world` are torch process groups;
    `embd` and `pos_embd` (the stages that hold a copy of a table) are None where this process is in none; `half` is the
    stages of T5's encoder or decoder, whichever this one belongs to, elsewhere `pp`.
    """

    groups: Groups
    rank: int
    place: Coordinates
    device: torch.device
    timeout_seconds: float  # that every one of them carries
    tp: Any
    pp: Any
    cp: Any
    dp: Any
    ep: Any
    mp: Any
    dp_cp: Any
    tp_cp: Any
    tp_dp_cp: Any
    embd: Any
    pos_embd: Any
    half: Any
    world: Any
    collection: Any = field(repr=False)  # the same groups as megatron-core's ProcessGroupCollection
    memory_buffer: Any = field(
        repr=False
    )  # megatron-core gathers sequence-parallel activations into it

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def world_size(self) -> int:
        return self.groups.world_size

    @property
    def dp_rank(self) -> int:
        return self.place.dp

    @property
    def dp_size(self) -> int:
        return self.groups.dp_size

    @property
    def is_first_stage(self) -> bool:
        return self.place.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.place.pp == self.groups.parallel.pp - 1


def world_size() -> int:
    """Number of processes of this run: the process group's, else WORLD_SIZE as torchrun sets it, else 1."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


@lru_cache(maxsize=1)
def _store(*_: str | None) -> tuple[Any, int, int]:
    """Where the processes of this run meet, rank and world size, as torchrun's environment says.

    Kept, for it belongs to the run and not to a layout: opened anew at once, the others would find the one that closes.
    """
    return next(dist.rendezvous("env://"))


@contextlib.contextmanager
def _default_group(timeout: timedelta) -> Iterator[None]:
    """torch's default process group: the one that is there, or one of our own for the length of the `with`."""
    if dist.is_initialized():
        yield
        return
    if cpu.device().type == "cuda":
        torch.cuda.set_device(cpu.device())
    if world_size() == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(
            cpu.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        store, rank, size = _store(
            *(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
        )
        store.set_timeout(timeout)
        turn = store.add(
            f"megafn/{rank}", 1
        )  # a second use must not read the addresses of the first
        dist.init_process_group(
            cpu.backend(),
            store=dist.PrefixStore(f"megafn/{turn}", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    try:
        yield
        dist.barrier()  # nobody closes a connection that another still reads from
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def init_groups(groups: Groups, *, timeout_seconds: float = 600.0) -> Iterator[ProcessGroups]:
    """Make the process groups of a layout; leaving the `with` takes them away again.

    Joins the processes that torchrun started (gloo on CPU, NCCL on GPUs), or makes a group of one process where
    nothing was started. Nesting and repetition are fine: two layouts can be open at once. Every group carries
    the timeout, so that a dead or hung peer ends a collective instead of holding it for ever.
    Raises ConfigError where the layout is for another number of processes.
    """
    if groups.world_size != world_size():
        raise ConfigError(
            f"world_size = {world_size()}: these groups are for {groups.world_size} processes; "
            f"start {groups.world_size} (torchrun --nproc-per-node {groups.world_size}) or build_groups for {world_size()}."
        )
    from megatron.core.parallel_state import GlobalMemoryBuffer
    from megatron.core.process_groups_config import ProcessGroupCollection

    timeout = timedelta(seconds=timeout_seconds)
    with _default_group(timeout):
        rank, made = dist.get_rank(), {}
        try:

            def mine(lists):
                found = None
                for ranks in lists:  # every process makes every group, in one order
                    if ranks not in made:  # equal groups are one
                        made[ranks] = dist.new_group(ranks, timeout=timeout)
                    if rank in ranks:
                        found = made[ranks]
                return found

            pg = {axis: mine(getattr(groups, axis)) for axis in _AXES}
            half = mine(groups.half)  # none of megatron-core's
            pg["world"] = mine((tuple(range(groups.world_size)),))
            cpu.hold_gloo_back()
            collection = ProcessGroupCollection()
            same = dict(
                expt_tp="tp",
                tp_ep="tp",
                tp_ep_pp="mp",
                expt_dp="dp_cp",
                intra_dp_cp="dp_cp",
                intra_expt_dp="dp_cp",
                intra_dist_opt="world",
            )  # ep = 1: experts lie as the rest does
            for name in (*_AXES, *same):
                setattr(collection, name, pg[same.get(name, name)])
            collection.hcp, collection.inter_dist_opt = [], None
            yield ProcessGroups(
                groups=groups,
                rank=rank,
                place=coordinates(groups, rank),
                device=cpu.device(),
                timeout_seconds=timeout_seconds,
                collection=collection,
                memory_buffer=GlobalMemoryBuffer(),
                half=half,
                **pg,
            )
        finally:
            for ranks, group in made.items():
                if rank in ranks and dist.is_initialized():
                    dist.destroy_process_group(group)

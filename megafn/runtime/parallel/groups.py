"""Process groups from a layout, as a value that is passed: nothing is registered anywhere."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from attrs import define, field, frozen
from megatron.core.parallel_state import GlobalMemoryBuffer
from megatron.core.process_groups_config import ProcessGroupCollection

from megafn.pure.config.problems import ConfigError
from megafn.pure.layout import GROUP_KINDS, Coordinates, Groups, coordinates, group_of
from megafn.runtime.parallel import cpu


@define(eq=False)
class Lifetime:
    """Whether process groups are still open: the `with` of `init_groups` ends their life."""

    is_over: bool = False


@frozen(kw_only=True)
class ProcessGroups:
    """The process groups of one layout, as this process sees it. Made by `init_groups`.

    The fields from `tp` to `world` are the kinds of `megafn.pure.layout.GROUP_KINDS`: each is the
    torch process group that this process belongs to. `embd` and `pos_embd` (the stages that hold a
    copy of a table) are None if this process is in none; `half` is the stages of T5's encoder or
    decoder, whichever this one belongs to, and equals `pp` for other families.
    """

    groups: Groups
    rank: int
    place: Coordinates
    device: torch.device
    timeout_seconds: float  # every process group below carries it
    launcher: int | None  # process id of the torchrun that started this process; None: another did
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    ep: dist.ProcessGroup
    mp: dist.ProcessGroup  # tp x pp
    dp_cp: dist.ProcessGroup
    tp_cp: dist.ProcessGroup
    tp_dp_cp: dist.ProcessGroup
    embd: dist.ProcessGroup | None
    pos_embd: dist.ProcessGroup | None
    half: dist.ProcessGroup
    world: dist.ProcessGroup
    # the same groups under megatron-core's names
    collection: ProcessGroupCollection = field(repr=False)
    # megatron-core gathers sequence-parallel activations into it
    memory_buffer: GlobalMemoryBuffer = field(repr=False)
    lifetime: Lifetime = field(factory=Lifetime, repr=False)

    def check_open(self) -> None:
        """Raises RuntimeError once the `with` of `init_groups` has been left."""
        if self.lifetime.is_over:
            raise RuntimeError(
                "pg: these process groups are closed, as those of train are when it returns; open "
                "new ones with init_groups, and in them setup and load a checkpoint of the run, or "
                "train with setup and fit there and use the state before you leave them."
            )

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def is_dry_run(self) -> bool:
        """Whether the other ranks do not exist (`megafn.dry_run`): what they hold is not known."""
        return _is_dry_run(self.world)

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
        return self.place.pp == self.groups.pp_size - 1


def _is_dry_run(group: dist.ProcessGroup | None = None) -> bool:
    """Whether a group (None: torch's default one) is on torch's "fake" backend."""
    return dist.get_backend(group) == "fake"


def world_size() -> int:
    """Number of processes of this run.

    That of torch's default process group, else WORLD_SIZE as torchrun sets it, else 1. Warns if
    this process is one of several tasks of Slurm without ranks: each of them would run alone.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    if "WORLD_SIZE" not in os.environ:
        _warn_of_tasks_without_ranks()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank_zero() -> bool:
    """Whether this process is rank 0 of the run, also outside of process groups.

    By torch's default process group, else by RANK as torchrun sets it; True without either.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def _warn_of_tasks_without_ranks() -> None:
    # A step of one task may run in an allocation for several.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    if tasks.isdigit() and int(tasks) > 1:
        warnings.warn(
            f"SLURM_NTASKS = {tasks}, and WORLD_SIZE is not set: each task runs a copy of its own; "
            "set RANK=$SLURM_PROCID, LOCAL_RANK=$SLURM_LOCALID, WORLD_SIZE=$SLURM_NTASKS, "
            "MASTER_ADDR and MASTER_PORT in each task (see docs/cluster.md)",
            stacklevel=1,
        )


@contextlib.contextmanager
def init_groups(groups: Groups, *, timeout_seconds: float = 600.0) -> Iterator[ProcessGroups]:
    """Create the process groups of a layout; leaving the `with` destroys them.

    Joins the processes that torchrun started (gloo on CPU, NCCL on GPUs), or makes a group of one
    process if nothing was started. Nesting and repetition are fine: two layouts can be open at
    once. Every group carries the timeout, so that a dead or hung peer ends a collective instead of
    blocking it for ever. sys.excepthook, which torch replaces, is put back at the end. Raises
    ConfigError if the layout is for another number of processes.
    """
    _check_world_size(groups)
    timeout = timedelta(seconds=timeout_seconds)
    launcher = _launcher()
    with _default_group(timeout), _every_group(groups, timeout) as group_of_ranks:
        cpu.hold_gloo_back()
        rank = dist.get_rank()
        # None for embd and pos_embd on the stages between; this rank is in one group of the rest.
        own_groups: dict[str, Any] = {
            kind.name: group_of_ranks.get(group_of(groups, kind.name, rank)) for kind in GROUP_KINDS
        }
        lifetime = Lifetime()
        pg = ProcessGroups(
            groups=groups,
            rank=rank,
            place=coordinates(groups, rank),
            device=cpu.device(),
            timeout_seconds=timeout_seconds,
            launcher=launcher,
            collection=_megatron_collection(own_groups),
            memory_buffer=GlobalMemoryBuffer(),
            lifetime=lifetime,
            **own_groups,
        )
        try:
            yield pg
        finally:
            lifetime.is_over = True


def _launcher() -> int | None:
    """The parent process, if it is torchrun, which waits for the processes that it starts.

    Any other parent may leave before them: a shell may after `nohup python -m megafn ... &`.
    """
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def _check_world_size(groups: Groups) -> None:
    started = world_size()
    if groups.world_size != started:
        raise ConfigError(
            f"world_size = {started}: these groups are for {groups.world_size} processes; "
            f"start {groups.world_size} (torchrun --nproc-per-node {groups.world_size}) "
            f"or call build_groups for {started}."
        )


@contextlib.contextmanager
def _every_group(
    groups: Groups, timeout: timedelta
) -> Iterator[dict[tuple[int, ...], dist.ProcessGroup]]:
    """Each distinct group of the layout, by its ranks.

    Every process creates every group, those without it too, and all in the same order: torch pairs
    the calls of `new_group` by their order. Groups of the same ranks are one. In a dry run there is
    no other process to pair calls with, so this rank's groups are enough.
    """
    created: dict[tuple[int, ...], dist.ProcessGroup] = {}
    only_own = _is_dry_run()
    rank = dist.get_rank()
    try:
        for kind in GROUP_KINDS:
            for ranks in getattr(groups, kind.name):
                if ranks in created or (only_own and rank not in ranks):
                    continue
                created[ranks] = dist.new_group(ranks, timeout=timeout)
        yield created
    finally:
        for ranks, group in created.items():
            if dist.is_initialized() and dist.get_rank() in ranks:
                dist.destroy_process_group(group)


def _megatron_collection(
    own_groups: Mapping[str, dist.ProcessGroup | None],
) -> ProcessGroupCollection:
    """The same groups under the names that megatron-core reads."""
    collection = ProcessGroupCollection()
    for kind in GROUP_KINDS:
        for name in kind.megatron_names:
            setattr(collection, name, own_groups[kind.name])
    # Neither hierarchical context parallelism nor several instances of the distributed optimizer.
    collection.hcp = []
    collection.inter_dist_opt = None
    return collection


@contextlib.contextmanager
def _default_group(timeout: timedelta) -> Iterator[None]:
    """torch's default process group: the existing one, or our own until the `with` is left."""
    if dist.is_initialized():
        yield
        return
    if cpu.device().type == "cuda":
        torch.cuda.set_device(cpu.device())
    hook = sys.excepthook
    if world_size() == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(
            cpu.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        _join_started_processes(timeout)
    hook_of_torch = sys.excepthook
    try:
        yield
        # No process may close a connection from which another still reads.
        dist.barrier()
    except Exception:
        # The traceback of one process among several keeps the "[rank1]:" that torch's hook adds.
        if dist.get_world_size() > 1:
            hook = sys.excepthook
        raise
    finally:
        dist.destroy_process_group()
        if sys.excepthook is hook_of_torch:  # else the user has set another
            sys.excepthook = hook


def _join_started_processes(timeout: timedelta) -> None:
    place = MeetingPlace(
        address=os.environ.get("MASTER_ADDR"),
        port=os.environ.get("MASTER_PORT"),
        rank=os.environ.get("RANK"),
        world_size=os.environ.get("WORLD_SIZE"),
        timeout=timeout,
    )
    try:
        store, rank, size = _rendezvous(place)
        store.set_timeout(timeout)
        # A prefix for each use: the second must not read the addresses that the first has left.
        use = store.add(f"megafn/{rank}", 1)
        dist.init_process_group(
            cpu.backend(),
            store=dist.PrefixStore(f"megafn/{use}", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    except dist.DistError as error:
        raise RuntimeError(_failed_meeting(place, error)) from None


@frozen(kw_only=True)
class MeetingPlace:
    """Where the processes of this run meet, as torchrun's environment names it."""

    address: str | None
    port: str | None
    rank: str | None
    world_size: str | None
    # How long to wait there does not make it another place.
    timeout: timedelta = field(eq=False)


@lru_cache(maxsize=1)
def _rendezvous(place: MeetingPlace) -> tuple[dist.Store, int, int]:
    """The store where the processes of this run meet, this process's rank and the world size.

    Cached because the store belongs to the run and not to a layout: if it were opened again at
    once, the other processes could find the one that is just closing.
    """
    # torch reads the same environment
    return next(dist.rendezvous("env://", timeout=place.timeout))


def _failed_meeting(place: MeetingPlace, error: Exception) -> str:
    reason = str(error).partition("\n")[0].rstrip(". ")
    return (
        f"MASTER_ADDR:MASTER_PORT = {place.address}:{place.port}: rank {place.rank} of "
        f"{place.world_size} did not meet the other processes there within timeout_seconds = "
        f"{place.timeout.total_seconds():g}; the launcher (torchrun) or a process of this run has "
        f"died or was never started: start all of them again ({reason})"
    )

"""A world of which one rank exists: torch.distributed on its "fake" backend, for one call.

torch refuses a second default group, and keeps what it knows of groups in variables of one module.
Here they are exchanged for fresh ones, so that a dry run works in a process that has groups of its
own, which find everything as it was afterwards.
"""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from megafn.runtime.parallel.exchanged import Exchange, exchanged

# Groups are registered in C++ too, by names that torch counts. Those of the fake ones begin here,
# so that no group outside has the same.
_FIRST_NAME = 10**9


@contextlib.contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """Be one rank of any world until the `with` is left, without another process.

    Collectives return at once and leave tensors as they are. Objects that other ranks would send
    are taken to equal this rank's. Process groups, random states, warning filters and
    `sys.excepthook` are restored at the end. No other thread should use torch.distributed
    meanwhile.
    """
    with (
        _random_states_restored(),
        warnings.catch_warnings(),
        _registry_exchanged(),
        exchanged(_object_collectives()),
        exchanged([(sys, "excepthook", sys.excepthook)]),
    ):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield
        finally:
            _forget_groups()


@contextlib.contextmanager
def _registry_exchanged() -> Iterator[None]:
    """Give torch.distributed what it knows of groups in a process that has none."""
    default_group = c10d._world.default_pg
    fresh: dict[str, Any] = {
        "_world": c10d._World(),
        "_pg_map": {},
        "_pg_names": {},
        "_pg_group_ranks": {},
        "_pg_backend_config": {},
        "_group_count": _FIRST_NAME,
        "_tags_to_pg": {},
        "_pg_to_tag": {},
        "_backend": None,
        "_default_pg_init_method": None,
    }
    try:
        with exchanged([(c10d, name, value) for name, value in fresh.items()]):
            yield
    finally:
        # torch keeps this process's rank in C++ as well
        c10d._update_default_pg(default_group)


def _forget_groups() -> None:
    """Take the fake groups out of C++'s register; the one in Python is about to be dropped.

    Not by destroy_process_group: for the default group it clears the register, which also holds
    the groups outside.
    """
    for name in c10d._world.pg_names.values():
        c10d._unregister_process_group(name)


def _object_collectives() -> list[Exchange]:
    """Collectives of Python objects, answered: every rank has what this one has."""

    def all_gather_object(object_list: list[Any], obj: Any, *_: Any, **__: Any) -> None:
        object_list[:] = [obj] * len(object_list)

    def gather_object(
        obj: Any, object_gather_list: list[Any] | None = None, *_: Any, **__: Any
    ) -> None:
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def scatter_object_list(
        outputs: list[Any], inputs: list[Any] | None = None, *_: Any, **__: Any
    ) -> None:
        outputs[0] = inputs[dist.get_rank()] if inputs else None

    def nothing(*_: Any, **__: Any) -> None:
        """The objects stay, and nobody is waited for."""

    answers = {
        "all_gather_object": all_gather_object,
        "gather_object": gather_object,
        "scatter_object_list": scatter_object_list,
        "broadcast_object_list": nothing,
        "barrier": nothing,
        "monitored_barrier": nothing,
    }
    return [(module, name, value) for module in (dist, c10d) for name, value in answers.items()]


@contextlib.contextmanager
def _random_states_restored() -> Iterator[None]:
    states_of_python = random.getstate()
    states_of_numpy = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states_of_python)
        np.random.set_state(states_of_numpy)

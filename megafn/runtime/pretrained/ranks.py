"""Who takes part in writing weights: the ranks of a run, or one plain process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from attrs import frozen

from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.object_collectives import (
    broadcast_from_rank_zero,
    gather_from_all_ranks,
)


@frozen(kw_only=True, eq=False)
class Ranks:
    """This process's rank, and how objects go from rank to rank.

    gather(value): the values of all ranks. broadcast(value): rank zero's.
    """

    rank: int
    world_size: int
    gather: Callable[[Any], list[Any]]
    broadcast: Callable[[Any], Any]


def ranks_of(pg: ProcessGroups) -> Ranks:
    """The ranks of a run, inside its process groups."""
    return Ranks(
        rank=pg.rank,
        world_size=pg.world_size,
        gather=partial(gather_from_all_ranks, pg=pg),
        broadcast=partial(broadcast_from_rank_zero, pg=pg),
    )


def one_process() -> Ranks:
    """This process alone, without process groups."""
    return Ranks(rank=0, world_size=1, gather=_list_of_one, broadcast=_itself)


def _list_of_one(value: Any) -> list[Any]:
    return [value]


def _itself(value: Any) -> Any:
    return value

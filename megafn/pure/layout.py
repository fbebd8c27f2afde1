"""The rank grid as data: which rank stands where, and which ranks form a group along each axis."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from attrs import field, frozen

from megafn.pure.config.records import ModelConfig, ParallelConfig
from megafn.pure.families.built_in import stage_layout

AXES = ("tp", "cp", "ep", "dp", "pp")
RankGroups = tuple[tuple[int, ...], ...]


@frozen(kw_only=True)
class Coordinates:
    """Where a rank stands on each axis, counted from 0."""

    tp: int = 0
    pp: int = 0
    cp: int = 0
    dp: int = 0
    ep: int = 0


@frozen(kw_only=True)
class Groups:
    """Every group of a layout. Per field a tuple of groups, each a tuple of ascending ranks; made by `build_groups`.

    Each field but `embd` and `pos_embd` partitions the ranks. Where the decoder of a T5 begins on a stage of its own,
    that stage holds both tables too. The names and the order of the groups are those of
    megatron-core's `ProcessGroupCollection` and `RankGenerator.get_ranks`. As long as ep is 1, experts live on this
    same grid, so their groups are no fields.
    """

    parallel: ParallelConfig
    world_size: int
    tp: RankGroups = field(repr=False)
    pp: RankGroups = field(repr=False)
    cp: RankGroups = field(repr=False)
    dp: RankGroups = field(repr=False)
    ep: RankGroups = field(repr=False)
    mp: RankGroups = field(repr=False)  # tp x pp: one whole copy of the model's parameters
    dp_cp: RankGroups = field(repr=False)  # the ranks over which gradients are reduced
    tp_cp: RankGroups = field(repr=False)
    tp_dp_cp: RankGroups = field(repr=False)  # all ranks of one pipeline stage
    embd: RankGroups = field(
        repr=False
    )  # first and last stage of each pipeline: they share a tied word table
    pos_embd: RankGroups = field(
        repr=False
    )  # first stage of each pipeline: it holds the position table
    half: RankGroups = field(
        repr=False
    )  # the stages of T5's encoder, and those of its decoder; elsewhere the pipelines

    @property
    def tp_size(self) -> int:
        return self.parallel.tp

    @property
    def pp_size(self) -> int:
        return self.parallel.pp

    @property
    def cp_size(self) -> int:
        return self.parallel.cp

    @property
    def ep_size(self) -> int:
        return self.parallel.ep

    @property
    def dp_size(self) -> int:
        return self.world_size // (self.parallel.tp * self.parallel.pp * self.parallel.cp)


def build_groups(
    parallel: ParallelConfig, world_size: int, *, model: ModelConfig | None = None
) -> Groups:
    """The groups of `world_size` ranks cut by `parallel`; what is left over tp, pp and cp is data parallel.

    `model` is wanted for a T5 over a pipeline: it decides at which stage the decoder begins and which stages hold a
    copy of which table. `parallel.order` names the axes, the one that changes fastest with the rank first; an axis of size 1 may be
    left out. Follows megatron-core's `RankGenerator` and the groups of its `initialize_model_parallel`.

    Raises:
        ValueError: a size below 1, a world size that tp * pp * cp does not divide, an order that does not name each
            axis once, or ep > 1, which is not built.

    >>> groups = build_groups(ParallelConfig(tp=2, pp=2), world_size=8)
    >>> groups.dp_size, groups.tp[0], groups.pp[0], groups.dp[0]
    (2, (0, 1), (0, 4), (0, 2))
    >>> t5 = ModelConfig(family="t5", num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> groups = build_groups(ParallelConfig(pp=4), world_size=4, model=t5)
    >>> groups.half, groups.embd, groups.pos_embd
    (((0, 1), (2, 3)), ((0, 2, 3),), ((0, 2),))
    >>> build_groups(ParallelConfig(tp=3), world_size=8)        # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: world_size = 8 is not divisible by tp * pp * cp = 3 * 1 * 1 = 3: start a multiple of 3 processes ...
    """
    for name, size in (
        ("world_size", world_size),
        *((a, getattr(parallel, a)) for a in ("tp", "pp", "cp", "ep")),
    ):
        if size < 1:
            raise ValueError(f"{name} = {size} is no size: set it to 1 or more")
    if parallel.ep > 1:
        raise ValueError(
            f"ep = {parallel.ep} asks for expert parallelism, which is not built: set ep to 1"
        )
    tp, pp, cp = parallel.tp, parallel.pp, parallel.cp
    if world_size % (tp * pp * cp):
        raise ValueError(
            f"world_size = {world_size} is not divisible by tp * pp * cp = {tp} * {pp} * {cp} = {tp * pp * cp}: "
            f"start a multiple of {tp * pp * cp} processes or change tp, pp or cp"
        )
    sizes = _sizes(parallel, world_size)
    places = [_place(sizes, rank) for rank in range(world_size)]

    def along(*axes: str) -> RankGroups:
        """Ranks that differ on these axes alone. Rising ranks give megatron-core's order, between groups and in them."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(places):
            groups.setdefault(
                tuple(at for axis, at in place.items() if axis not in axes), []
            ).append(rank)
        return tuple(map(tuple, groups.values()))

    pipelines = along("pp")
    stages = stage_layout(parallel, model)

    def at_stages(*stacks: Iterable[int]) -> RankGroups:
        """Of each pipeline, the ranks at each of these tuples of stages."""
        return tuple(
            tuple(pipeline[stage] for stage in stack) for pipeline in pipelines for stack in stacks
        )

    return Groups(
        parallel=parallel,
        world_size=world_size,
        tp=along("tp"),
        pp=pipelines,
        cp=along("cp"),
        dp=along("dp"),
        ep=along("ep"),
        mp=along("tp", "pp"),
        dp_cp=along("dp", "cp"),
        tp_cp=along("tp", "cp"),
        tp_dp_cp=along("tp", "dp", "cp"),
        embd=at_stages(stages.word_tables),
        pos_embd=at_stages(stages.position_tables),
        half=at_stages(*stages.stacks),
    )


def coordinates(groups: Groups, rank: int) -> Coordinates:
    """Where `rank` stands. Raises ValueError if there is no such rank.

    >>> coordinates(build_groups(ParallelConfig(tp=2, pp=2), world_size=8), 6)
    Coordinates(tp=0, pp=1, cp=0, dp=1, ep=0)
    """
    return Coordinates(**_place(_sizes(groups.parallel, groups.world_size), _known(groups, rank)))


def rank_of(groups: Groups, coordinates: Coordinates) -> int:
    """The rank that stands at `coordinates`, the inverse of `coordinates(groups, rank)`.

    Raises ValueError if a coordinate lies outside its axis.

    >>> rank_of(build_groups(ParallelConfig(tp=2, pp=2), world_size=8), Coordinates(pp=1, dp=1))
    6
    """
    rank, stride = 0, 1
    for axis, size in _sizes(groups.parallel, groups.world_size).items():
        at = getattr(coordinates, axis)
        if not 0 <= at < size:
            raise ValueError(
                f"{axis} = {at} lies outside the axis: give a coordinate from 0 to {size - 1}"
            )
        rank, stride = rank + at * stride, stride * size
    return rank


def group_of(groups: Groups, axis: str, rank: int) -> tuple[int, ...]:
    """The ranks of the group that `rank` belongs to; `axis` is any of the fields ("tp", "dp_cp", "embd", ...).

    () where the rank is in none: `embd` and `pos_embd` of stages that hold no such table. Raises ValueError if there
    is no such rank or field.

    >>> group_of(build_groups(ParallelConfig(tp=2, pp=2), world_size=8), "mp", 3)
    (2, 3, 6, 7)
    """
    names = [name for name in Groups.__annotations__ if name not in ("parallel", "world_size")]
    if axis not in names:
        raise ValueError(
            f"axis = {axis!r} is no axis of a layout: choose one of {', '.join(names)}"
        )
    return next((group for group in getattr(groups, axis) if _known(groups, rank) in group), ())


def _sizes(parallel: ParallelConfig, world_size: int) -> dict[str, int]:
    """Ranks along each axis, fastest axis first: an order is the dict's own."""
    size = {"tp": parallel.tp, "pp": parallel.pp, "cp": parallel.cp, "ep": parallel.ep}
    size["dp"] = world_size // prod(size.values())
    order = parallel.order.lower().split("-")
    left_out = [axis for axis in AXES if axis not in order]
    remedy = f"name each of {', '.join(AXES)} once, the fastest first, as in {'-'.join(AXES)!r}"
    if len(set(order)) < len(order) or set(order) - set(AXES):
        raise ValueError(
            f"order = {parallel.order!r} repeats an axis or has an unknown one: {remedy}"
        )
    if missing := [axis for axis in left_out if size[axis] > 1]:
        raise ValueError(
            f"order = {parallel.order!r} leaves out {missing[0]}, of size {size[missing[0]]}: {remedy}"
        )
    return {axis: size[axis] for axis in (*order, *left_out)}


def _place(sizes: dict[str, int], rank: int) -> dict[str, int]:
    place = {}
    for axis, size in sizes.items():
        rank, place[axis] = divmod(rank, size)
    return place


def _known(groups: Groups, rank: int) -> int:
    if not 0 <= rank < groups.world_size:
        raise ValueError(
            f"rank = {rank} is not in this layout: give a rank from 0 to {groups.world_size - 1}"
        )
    return rank

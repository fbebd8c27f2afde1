"""The rank grid as data: which rank stands where, and which ranks form a group along each axis.

`AXES` names the axes and `GROUP_KINDS` is the one table of groups. The fields of `Groups` and of
`ProcessGroups`, the groups that `init_groups` creates and their names in megatron-core's
`ProcessGroupCollection` all follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod

from attrs import field, frozen

from megafn.pure.config.records import ModelConfig, ParallelConfig
from megafn.pure.families.built_in import stage_layout
from megafn.pure.families.family_spec import StageLayout

# In the default order: the axis that changes fastest with the rank comes first.
AXES = ("tp", "cp", "ep", "dp", "pp")

RankGroups = tuple[tuple[int, ...], ...]
Stages = Sequence[int]


@frozen(kw_only=True)
class GroupKind:
    """One kind of process group: a row of the table."""

    # the field of `Groups` and of `ProcessGroups`
    name: str
    # the ranks of a group differ on these axes only
    axes: tuple[str, ...]
    # its fields in megatron-core's ProcessGroupCollection
    megatron_names: tuple[str, ...]
    # for groups along pp that hold only some stages: those of each group in one pipeline
    stages: Callable[[StageLayout], tuple[Stages, ...]] | None = None


# As long as ep is 1, experts are placed as the rest of the model is: their groups, which
# megatron-core names expt_* and tp_ep*, equal those of the dense layers.
GROUP_KINDS = (
    GroupKind(name="tp", axes=("tp",), megatron_names=("tp", "expt_tp", "tp_ep")),
    GroupKind(name="pp", axes=("pp",), megatron_names=("pp",)),
    GroupKind(name="cp", axes=("cp",), megatron_names=("cp",)),
    GroupKind(name="dp", axes=("dp",), megatron_names=("dp",)),
    GroupKind(name="ep", axes=("ep",), megatron_names=("ep",)),
    GroupKind(name="mp", axes=("tp", "pp"), megatron_names=("mp", "tp_ep_pp")),
    GroupKind(
        name="dp_cp",
        axes=("dp", "cp"),
        megatron_names=("dp_cp", "intra_dp_cp", "expt_dp", "intra_expt_dp"),
    ),
    GroupKind(name="tp_cp", axes=("tp", "cp"), megatron_names=("tp_cp",)),
    GroupKind(name="tp_dp_cp", axes=("tp", "dp", "cp"), megatron_names=("tp_dp_cp",)),
    GroupKind(
        name="embd",
        axes=("pp",),
        megatron_names=("embd",),
        stages=lambda layout: (layout.word_tables,),
    ),
    GroupKind(
        name="pos_embd",
        axes=("pp",),
        megatron_names=("pos_embd",),
        stages=lambda layout: (layout.position_tables,),
    ),
    GroupKind(
        name="half",
        axes=("pp",),
        megatron_names=(),
        stages=lambda layout: layout.stacks,
    ),
    GroupKind(name="world", axes=AXES, megatron_names=("intra_dist_opt",)),
)


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
    """Every group of a layout, made by `build_groups`.

    Each field below `world_size` is a tuple of groups, each a tuple of ascending ranks. Each of
    them partitions the ranks, except `embd` and `pos_embd`. The names and the order of the groups
    are those of megatron-core's `ProcessGroupCollection` and `RankGenerator.get_ranks`.
    """

    parallel: ParallelConfig
    world_size: int
    tp: RankGroups = field(repr=False)
    pp: RankGroups = field(repr=False)
    cp: RankGroups = field(repr=False)
    dp: RankGroups = field(repr=False)
    ep: RankGroups = field(repr=False)
    # tp x pp: one whole copy of the model's parameters
    mp: RankGroups = field(repr=False)
    # the ranks over which gradients are reduced
    dp_cp: RankGroups = field(repr=False)
    tp_cp: RankGroups = field(repr=False)
    # all ranks of one pipeline stage
    tp_dp_cp: RankGroups = field(repr=False)
    # the stages that share the word table: the first and the last, see `stage_layout`
    embd: RankGroups = field(repr=False)
    # the stages that share the table of learned positions
    pos_embd: RankGroups = field(repr=False)
    # the stages of T5's encoder, and those of its decoder; for other families the pipelines
    half: RankGroups = field(repr=False)
    # one group of all ranks
    world: RankGroups = field(repr=False)

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
        return _axis_sizes(self.parallel, self.world_size)["dp"]


def build_groups(
    parallel: ParallelConfig, world_size: int, *, model: ModelConfig | None = None
) -> Groups:
    """The groups of `world_size` ranks cut by `parallel`; what remains is data parallel.

    Pass `model=config.model` if there is a config. A T5 over a pipeline needs it: its split
    rank decides on which stage the decoder begins and which stages hold a copy of which table, and
    `setup` refuses groups that were built without it. For every other model and layout
    `build_groups(parallel, world_size)` gives the same groups.

    `parallel.order` names the axes, the one that changes fastest with the rank first; an axis of
    size 1 may be left out. Follows megatron-core's `RankGenerator` and the groups of its
    `initialize_model_parallel`.

    Raises:
        ValueError: a size is below 1, tp * pp * cp does not divide the world size, the order does
            not name each axis once, the split rank leaves T5's encoder or decoder without a stage,
            or ep > 1, which is not built.

    >>> groups = build_groups(ParallelConfig(tp=2, pp=2), world_size=8)
    >>> groups.dp_size, groups.tp[0], groups.pp[0], groups.dp[0]
    (2, (0, 1), (0, 4), (0, 2))
    >>> t5 = ModelConfig(
    ...     family="t5", num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> groups = build_groups(ParallelConfig(pp=4), world_size=4, model=t5)
    >>> groups.half, groups.embd, groups.pos_embd
    (((0, 1), (2, 3)), ((0, 2, 3),), ((0, 2),))
    >>> build_groups(ParallelConfig(tp=3), world_size=8)        # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: world_size = 8: tp * pp * cp = 3 must divide it; start a multiple of 3 ...
    """
    _check_sizes(parallel, world_size)
    stages = stage_layout(parallel, model)
    sizes = _axis_sizes(parallel, world_size)
    _check_order(parallel, sizes)

    groups = {}
    along_axes = {}
    for kind in GROUP_KINDS:
        # Axes of size 1 add no rank: kinds that differ only in these share one tuple of groups.
        axes = frozenset(axis for axis in kind.axes if sizes[axis] > 1)
        if axes not in along_axes:
            along_axes[axes] = _groups_along(axes, sizes)
        groups[kind.name] = along_axes[axes]
        if kind.stages is not None:
            groups[kind.name] = _stages_of_each(along_axes[axes], kind.stages(stages))
    return Groups(parallel=parallel, world_size=world_size, **groups)


def coordinates(groups: Groups, rank: int) -> Coordinates:
    """Where `rank` stands. Raises ValueError if there is no such rank.

    >>> coordinates(build_groups(ParallelConfig(tp=2, pp=2), world_size=8), 6)
    Coordinates(tp=0, pp=1, cp=0, dp=1, ep=0)
    """
    _check_rank(groups, rank)
    return Coordinates(**_place(_axis_sizes(groups.parallel, groups.world_size), rank))


def rank_of(groups: Groups, coordinates: Coordinates) -> int:
    """The rank that stands at `coordinates`, the inverse of `coordinates(groups, rank)`.

    Raises ValueError if a coordinate lies outside its axis.

    >>> rank_of(build_groups(ParallelConfig(tp=2, pp=2), world_size=8), Coordinates(pp=1, dp=1))
    6
    """
    rank = 0
    stride = 1
    for axis, size in _axis_sizes(groups.parallel, groups.world_size).items():
        coordinate = getattr(coordinates, axis)
        if not 0 <= coordinate < size:
            raise ValueError(f"{axis} = {coordinate}: must be 0 to {size - 1} in this layout")
        rank += coordinate * stride
        stride *= size
    return rank


def group_of(groups: Groups, axis: str, rank: int) -> tuple[int, ...]:
    """The ranks of the group that `rank` belongs to.

    `axis` is any name of the table of groups ("tp", "dp_cp", "embd", ...). Returns () if the rank
    is in no such group: a stage that does not hold the table of `embd` or `pos_embd`. Found from
    the rank's coordinates, without a search through all groups. Raises ValueError if there is no
    such rank or axis.

    >>> group_of(build_groups(ParallelConfig(tp=2, pp=2), world_size=8), "mp", 3)
    (2, 3, 6, 7)
    """
    kinds = {kind.name: kind for kind in GROUP_KINDS}
    if axis not in kinds:
        raise ValueError(f"axis = {axis!r}: must be one of {', '.join(kinds)}")
    _check_rank(groups, rank)

    kind = kinds[axis]
    groups_of_kind = getattr(groups, axis)
    sizes = _axis_sizes(groups.parallel, groups.world_size)
    place = _place(sizes, rank)
    # Groups are in the order of their first ranks: the slowest of the other axes counts most.
    number = 0
    count = 1
    for other, size in sizes.items():
        if other not in kind.axes:
            number += place[other] * count
            count *= size
    if kind.stages is None:
        return groups_of_kind[number]

    parts = len(groups_of_kind) // count
    for group in groups_of_kind[number * parts : (number + 1) * parts]:
        if rank in group:
            return group
    return ()


def world_size_problem(world_size: int, tp: int, pp: int, cp: int) -> str | None:
    """Why a layout cannot have so many ranks; None if it can.

    >>> world_size_problem(8, tp=3, pp=1, cp=1)
    'tp * pp * cp = 3 must divide it; start a multiple of 3 processes or change tp, pp or cp'
    """
    size = tp * pp * cp
    if world_size % size == 0:
        return None
    return (
        f"tp * pp * cp = {size} must divide it; "
        f"start a multiple of {size} processes or change tp, pp or cp"
    )


def order_problem(order: str, sizes: Mapping[str, int]) -> str | None:
    """What is wrong with `ParallelConfig.order` for axes of these sizes, or None.

    >>> order_problem("tp-pp", {"tp": 2, "cp": 1, "ep": 1, "dp": 4, "pp": 2})
    'leaves out dp, of size 4; name each of tp, cp, ep, dp, pp once, as in tp-cp-ep-dp-pp'
    """
    remedy = f"name each of {', '.join(AXES)} once, as in {'-'.join(AXES)}"
    named = _axes_in(order)
    unknown = [axis for axis in named if axis not in AXES]
    if unknown:
        return f"has an unknown axis {unknown[0]!r}; {remedy}"
    if len(set(named)) < len(named):
        return f"repeats an axis; {remedy}"
    for axis in AXES:
        if axis not in named and sizes[axis] > 1:
            return f"leaves out {axis}, of size {sizes[axis]}; {remedy}"
    return None


def _axes_in(order: str) -> list[str]:
    return order.lower().split("-")


def _axis_sizes(parallel: ParallelConfig, world_size: int) -> dict[str, int]:
    """Ranks along each axis, the fastest axis first. Axes that the order leaves out come last."""
    sizes = {axis: getattr(parallel, axis) for axis in AXES if axis != "dp"}
    sizes["dp"] = world_size // prod(sizes.values())
    named = [axis for axis in _axes_in(parallel.order) if axis in sizes]
    left_out = [axis for axis in AXES if axis not in named]
    return {axis: sizes[axis] for axis in (*named, *left_out)}


def _place(sizes: Mapping[str, int], rank: int) -> dict[str, int]:
    """The coordinate of a rank on each axis."""
    place = {}
    for axis, size in sizes.items():
        rank, place[axis] = divmod(rank, size)
    return place


def _groups_along(axes: Collection[str], sizes: Mapping[str, int]) -> RankGroups:
    """Ranks that differ only on these axes.

    Both the groups and the ranks in a group ascend, which is megatron-core's order.
    """
    others = [axis for axis in sizes if axis not in axes]
    starts = _ranks_over(others, sizes)
    offsets = _ranks_over(axes, sizes)
    return tuple(tuple([start + offset for offset in offsets]) for start in starts)


def _ranks_over(axes: Collection[str], sizes: Mapping[str, int]) -> list[int]:
    """Ranks whose coordinate is 0 on all axes but these, ascending."""
    ranks = [0]
    stride = 1
    for axis, size in sizes.items():
        if axis in axes:
            steps = range(0, size * stride, stride)
            ranks = [step + rank for step in steps for rank in ranks]
        stride *= size
    return ranks


def _stages_of_each(pipelines: RankGroups, stage_groups: tuple[Sequence[int], ...]) -> RankGroups:
    """The ranks of the given stages, for each pipeline in turn."""
    return tuple(
        tuple(pipeline[stage] for stage in stages)
        for pipeline in pipelines
        for stages in stage_groups
    )


def _check_sizes(parallel: ParallelConfig, world_size: int) -> None:
    sizes = {f"parallel.{axis}": getattr(parallel, axis) for axis in AXES if axis != "dp"}
    for name, size in {"world_size": world_size, **sizes}.items():
        if size < 1:
            raise ValueError(f"{name} = {size}: must be at least 1")
    if parallel.ep > 1:
        raise ValueError(
            f"parallel.ep = {parallel.ep}: expert parallelism is not built; set ep to 1"
        )

    problem = world_size_problem(world_size, parallel.tp, parallel.pp, parallel.cp)
    if problem is not None:
        raise ValueError(f"world_size = {world_size}: {problem}")


def _check_order(parallel: ParallelConfig, sizes: Mapping[str, int]) -> None:
    problem = order_problem(parallel.order, sizes)
    if problem is not None:
        raise ValueError(f"parallel.order = {parallel.order!r}: {problem}")


def _check_rank(groups: Groups, rank: int) -> None:
    if not 0 <= rank < groups.world_size:
        raise ValueError(f"rank = {rank}: must be 0 to {groups.world_size - 1} in this layout")

"""The rank grid: equal to megatron-core's, and the laws that make it a grid."""

from itertools import combinations

import attrs
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megafn.pure.config.records import ModelConfig, ParallelConfig
from megafn.pure.layout import (
    AXES,
    GROUP_KINDS,
    Coordinates,
    Groups,
    build_groups,
    coordinates,
    group_of,
    rank_of,
)

# field: megatron-core's token
TOKENS = {
    "mp": "tp-pp",
    "dp_cp": "dp-cp",
    "tp_cp": "tp-cp",
    "tp_dp_cp": "tp-dp-cp",
}
PARTITIONS = (*AXES, *TOKENS)
sizes = st.integers(1, 4)


@st.composite
def orders(draw):
    return "-".join(draw(st.permutations(AXES)))


@st.composite
def layouts(draw):
    tp, cp, dp, pp = (draw(sizes) for _ in range(4))
    return build_groups(
        ParallelConfig(tp=tp, cp=cp, pp=pp, order=draw(orders())), tp * cp * dp * pp
    )


@given(tp=sizes, cp=sizes, dp=sizes, pp=sizes, order=orders())
def test_groups_equal_megatron_cores_rank_generator_in_content_and_order(tp, cp, dp, pp, order):
    from megatron.core import parallel_state as mcore

    groups = build_groups(ParallelConfig(tp=tp, cp=cp, pp=pp, order=order), tp * cp * dp * pp)
    generator = mcore.RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    for name in PARTITIONS:
        assert getattr(groups, name) == tuple(
            map(tuple, generator.get_ranks(TOKENS.get(name, name)))
        ), name
    pipelines = generator.get_ranks("pp")
    assert groups.embd == tuple(tuple(mcore.default_embedding_ranks(ranks)) for ranks in pipelines)
    assert groups.pos_embd == tuple(
        tuple(mcore.default_position_embedding_ranks(ranks)) for ranks in pipelines
    )


@given(tp=sizes, dp=sizes, pp=sizes, cp=sizes)
def test_the_experts_generator_gives_the_same_groups_while_ep_is_1(tp, dp, pp, cp):
    """In the default order experts' data-parallel groups are dp x cp.

    So megatron-core may be given the same groups under two names.
    """
    from megatron.core.parallel_state import RankGenerator

    groups = build_groups(ParallelConfig(tp=tp, cp=cp, pp=pp), tp * cp * dp * pp)
    experts = RankGenerator(tp=tp, ep=1, dp=dp * cp, pp=pp, cp=1, order=groups.parallel.order)
    for name, token in {
        "tp": "tp",
        "ep": "ep",
        "mp": "tp-ep-pp",
        "dp_cp": "dp",
        "pp": "pp",
    }.items():
        assert getattr(groups, name) == tuple(map(tuple, experts.get_ranks(token))), name


@given(layouts())
def test_groups_of_each_axis_partition_the_ranks_into_equal_parts(groups):
    for name in PARTITIONS:
        parts = getattr(groups, name)
        assert sorted(rank for part in parts for rank in part) == list(range(groups.world_size))
        assert len({len(part) for part in parts}) == 1
    for axis in AXES:
        assert len(getattr(groups, axis)[0]) == getattr(groups, f"{axis}_size")


@given(layouts(), st.data())
def test_coordinates_round_trip(groups, data):
    rank = data.draw(st.integers(0, groups.world_size - 1))
    assert rank_of(groups, coordinates(groups, rank)) == rank
    assert len({coordinates(groups, r) for r in range(groups.world_size)}) == groups.world_size


@given(layouts(), st.data())
def test_a_ranks_group_holds_it_at_the_place_of_its_coordinate(groups, data):
    rank = data.draw(st.integers(0, groups.world_size - 1))
    for axis in AXES:
        assert group_of(groups, axis, rank).index(rank) == getattr(coordinates(groups, rank), axis)
    for name in TOKENS:
        assert rank in group_of(groups, name, rank)


@given(layouts(), st.data())
def test_groups_of_two_axes_meet_in_exactly_one_rank(groups, data):
    rank = data.draw(st.integers(0, groups.world_size - 1))
    for one, other in combinations(AXES, 2):
        assert set(group_of(groups, one, rank)) & set(group_of(groups, other, rank)) == {rank}
        assert all(
            len(set(a) & set(b)) <= 1 for a in getattr(groups, one) for b in getattr(groups, other)
        )


@given(layouts())
def test_embedding_groups_hold_exactly_the_first_and_the_last_stages(groups):
    for rank in range(groups.world_size):
        stage = coordinates(groups, rank).pp
        assert (rank in group_of(groups, "embd", rank)) == (stage in (0, groups.pp_size - 1))
        assert (rank in group_of(groups, "pos_embd", rank)) == (stage == 0)
    assert group_of(build_groups(ParallelConfig(pp=3), 3), "embd", 1) == ()


@given(
    tp=sizes,
    dp=sizes,
    pp=sizes,
    order=st.sampled_from(["tp-dp-pp", "TP-DP-PP", "pp-dp-tp", "dp-tp-pp"]),
)
def test_an_axis_of_size_1_may_be_left_out_of_the_order(tp, dp, pp, order):
    from megatron.core.parallel_state import RankGenerator

    groups = build_groups(ParallelConfig(tp=tp, pp=pp, order=order), tp * dp * pp)
    generator = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order=order)
    for name in PARTITIONS:
        assert getattr(groups, name) == tuple(
            map(tuple, generator.get_ranks(TOKENS.get(name, name)))
        ), name


@given(layouts(), st.data())
def test_group_of_finds_what_a_search_through_all_groups_finds(groups, data):
    rank = data.draw(st.integers(0, groups.world_size - 1))
    for kind in GROUP_KINDS:
        holding = [group for group in getattr(groups, kind.name) if rank in group]
        assert group_of(groups, kind.name, rank) == (holding[0] if holding else ())
        assert len(holding) <= 1


def test_a_layout_is_a_value():
    parallel = ParallelConfig(tp=2, pp=2)
    assert build_groups(parallel, 8) == build_groups(parallel, 8)
    assert hash(build_groups(parallel, 8)) == hash(build_groups(parallel, 8))
    assert build_groups(parallel, 8) != build_groups(
        attrs.evolve(parallel, order="pp-tp-cp-ep-dp"), 8
    )
    assert isinstance(build_groups(parallel, 8), Groups)


@given(tp=sizes, pp=sizes, cp=sizes, world_size=st.integers(1, 64))
def test_a_world_size_is_refused_exactly_when_the_model_does_not_divide_it(tp, pp, cp, world_size):
    assume(world_size % (tp * pp * cp))
    sentence = (
        rf"^world_size = {world_size}: tp \* pp \* cp = {tp * pp * cp} must divide it; start "
    )
    with pytest.raises(ValueError, match=sentence):
        build_groups(ParallelConfig(tp=tp, pp=pp, cp=cp), world_size)


@pytest.mark.parametrize(
    ("parallel", "world_size", "says"),
    [
        (ParallelConfig(tp=0), 1, "parallel.tp = 0: must be at least 1"),
        (ParallelConfig(), 0, "world_size = 0: must be at least 1"),
        (
            ParallelConfig(ep=2),
            2,
            "parallel.ep = 2: expert parallelism is not built; set ep to 1",
        ),
        (
            ParallelConfig(order="tp-tp-cp-ep-dp-pp"),
            1,
            "parallel.order = 'tp-tp-cp-ep-dp-pp': repeats an axis; "
            "name each of tp, cp, ep, dp, pp once, as in tp-cp-ep-dp-pp",
        ),
        (
            ParallelConfig(order="tp-xp-cp-ep-dp-pp"),
            1,
            "has an unknown axis 'xp'; name each of tp, cp, ep, dp, pp once",
        ),
        (
            ParallelConfig(tp=2, order="cp-ep-dp-pp"),
            2,
            "parallel.order = 'cp-ep-dp-pp': leaves out tp, of size 2; name each",
        ),
        (
            ParallelConfig(order="tp-pp"),
            2,
            "parallel.order = 'tp-pp': leaves out dp, of size 2; name each",
        ),
    ],
)
def test_a_layout_that_can_not_be_is_refused_by_field_value_and_remedy(parallel, world_size, says):
    with pytest.raises(ValueError) as error:
        build_groups(parallel, world_size)
    assert says in str(error.value)


def test_questions_about_ranks_and_axes_that_do_not_exist_are_refused():
    groups = build_groups(ParallelConfig(tp=2), 4)
    for rank in (-1, 4):
        says = rf"^rank = {rank}: must be 0 to 3 in this layout$"
        with pytest.raises(ValueError, match=says):
            coordinates(groups, rank)
        with pytest.raises(ValueError, match=says):
            group_of(groups, "tp", rank)
    for coordinate in (-1, 2):
        with pytest.raises(
            ValueError, match=rf"^tp = {coordinate}: must be 0 to 1 in this layout$"
        ):
            rank_of(groups, Coordinates(tp=coordinate))
    for axis in ("world_size", "zz"):
        with pytest.raises(ValueError, match=rf"^axis = '{axis}': must be one of tp, pp, "):
            group_of(groups, axis, 0)


@given(
    tp=sizes,
    dp=sizes,
    pp=st.integers(2, 4),
    order=orders(),
    tied=st.booleans(),
    positions=st.sampled_from(["learned_absolute", "rope"]),
    data=st.data(),
)
def test_a_split_adds_its_stage_to_the_tables_and_halves_each_pipeline_and_changes_nothing_else(
    tp, dp, pp, order, tied, positions, data
):
    split = data.draw(st.integers(1, pp - 1))
    parallel = ParallelConfig(tp=tp, pp=pp, order=order, pipeline_model_parallel_split_rank=split)
    model = ModelConfig(
        family="t5",
        num_layers=2,
        hidden_size=8,
        num_attention_heads=4,
        seq_length=8,
        tie_word_embeddings=tied,
        position_embedding=positions,
    )
    world_size = tp * pp * dp
    plain = build_groups(parallel, world_size)
    groups = build_groups(parallel, world_size, model=model)
    for name in (*PARTITIONS, "world"):
        assert getattr(plain, name) == getattr(groups, name), name
    assert plain.half == plain.pp
    assert plain == build_groups(parallel, world_size, model=attrs.evolve(model, family="gpt"))

    tables = {0, split, pp - 1} if tied else {0, split}
    with_positions = {0, split} if positions == "learned_absolute" else {0}
    for stages in groups.pp:
        assert stages[:split] in groups.half and stages[split:] in groups.half
        assert group_of(groups, "embd", stages[0]) == tuple(stages[i] for i in sorted(tables))
        assert group_of(groups, "pos_embd", stages[0]) == tuple(
            stages[i] for i in sorted(with_positions)
        )
        for stage, rank in enumerate(stages):
            assert (rank in group_of(groups, "embd", rank)) == (stage in tables)
            assert (rank in group_of(groups, "pos_embd", rank)) == (stage in with_positions)
            assert group_of(groups, "half", rank) == (
                stages[:split] if stage < split else stages[split:]
            )
    assert len(groups.half) == 2 * len(groups.pp)
    assert len(groups.embd) == len(groups.pos_embd) == len(groups.pp)


def test_a_split_that_leaves_a_half_without_a_stage_is_refused():
    model = ModelConfig(
        family="t5", num_layers=2, hidden_size=8, num_attention_heads=4, seq_length=8
    )
    for split in (0, 2, -1):
        with pytest.raises(
            ValueError,
            match=f"pipeline_model_parallel_split_rank = {split}.* 1 to 1",
        ):
            build_groups(
                ParallelConfig(pp=2, pipeline_model_parallel_split_rank=split), 2, model=model
            )


def fields_of(record):
    return [attribute.name for attribute in attrs.fields(record)]


def test_the_records_have_the_fields_that_the_table_of_groups_names():
    from megafn.runtime.parallel.groups import ProcessGroups

    names = [kind.name for kind in GROUP_KINDS]
    assert len(set(names)) == len(names)
    assert fields_of(Groups) == ["parallel", "world_size", *names]

    place = ["groups", "rank", "place", "device", "timeout_seconds", "launcher"]
    assert fields_of(ProcessGroups) == [*place, *names, "collection", "memory_buffer", "lifetime"]


def test_the_records_have_the_axes_that_the_table_names():
    assert sorted(fields_of(Coordinates)) == sorted(AXES)
    assert ParallelConfig().order == "-".join(AXES)
    for axis in AXES:
        assert hasattr(Groups, f"{axis}_size")
        # The data-parallel size follows from the world size.
        assert hasattr(ParallelConfig(), axis) == (axis != "dp")
    for kind in GROUP_KINDS:
        assert set(kind.axes) <= set(AXES) and len(set(kind.axes)) == len(kind.axes)


def test_the_table_gives_megatron_cores_collection_each_of_its_groups_once():
    from dataclasses import fields

    from megatron.core.process_groups_config import ProcessGroupCollection

    given = [name for kind in GROUP_KINDS for name in kind.megatron_names]
    # Several instances of the distributed optimizer, and hierarchical context parallelism.
    left_out = ["inter_dist_opt", "hcp"]
    assert sorted(given + left_out) == sorted(
        attribute.name for attribute in fields(ProcessGroupCollection)
    )


@pytest.mark.parametrize(
    "sizes", [{}, dict(tp=8, pp=16), dict(tp=2, pp=2, cp=2, order="pp-dp-cp-tp-ep")]
)
def test_groups_of_131072_ranks_take_less_than_200_mb(sizes):
    import tracemalloc

    tracemalloc.start()
    groups = build_groups(ParallelConfig(**sizes), 131_072)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6
    assert groups.world == (tuple(range(131_072)),)
    assert group_of(groups, "world", 131_071) is groups.world[0]

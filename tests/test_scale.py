"""What a save costs as the world grows: counted, on a few processes and for a cluster of them."""

import pickle
import tracemalloc
from collections import Counter
from contextlib import ExitStack
from itertools import pairwise
from math import prod
from unittest import mock

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import megafn as mf
from checkpoint_runs import DIST, config_of
from cluster_listings import Cluster, listing_of
from megafn.pure.checkpoint.boxes import overlap
from megafn.pure.checkpoint.write_plan import Listing, boxes_by_rank, plan_writes

# ------------------------------------------------------------------------------ who writes what

ROWS = 4


@st.composite
def listings(draw):
    """Of a few ranks on two stages, each of which holds all rows of a tensor or one half."""
    ranks = []
    for _ in range(draw(st.integers(1, 6))):
        holdings = []
        for tensor in draw(st.sets(st.sampled_from("abc"))):
            start = draw(st.sampled_from([0, ROWS // 2]))
            for half in (start, ROWS // 2 - start):
                box = ((half, 0), (ROWS // 2, 3))
                holdings.append((tensor, (ROWS, 3), box, draw(st.sampled_from([24, 48]))))
        ranks.append(Listing(stage=draw(st.integers(0, 1)), holdings=tuple(holdings)))
    return ranks * draw(st.integers(1, 3))


def plan_rank_by_rank(ranks):
    """(box, writer) of each tensor, without a thought of replicas."""
    first = {}
    for listing in ranks:
        for tensor, *_ in listing.holdings:
            first[tensor] = min(first.get(tensor, listing.stage), listing.stage)
    holders = {}
    for rank, listing in enumerate(ranks):
        for holding in listing.holdings:
            if listing.stage == first[holding[0]]:
                holders.setdefault(holding, []).append(rank)
    load = Counter()
    plan = {}
    for (tensor, _, box, size), found in holders.items():
        writer = min(found, key=lambda rank: load[rank])
        load[writer] += size
        plan.setdefault(tensor, []).append((box, writer))
    return plan


@given(listings())
def test_replicas_that_are_planned_together_write_what_each_alone_would(ranks):
    expected = plan_rank_by_rank(ranks)
    with mock.patch("megafn.pure.checkpoint.write_plan._check_coverage"):
        plan = plan_writes(ranks)
    assert {tensor: writes for tensor, (_, writes) in plan.items()} == expected
    keys = boxes_by_rank(plan, len(ranks))
    assert sum(map(len, keys)) == sum(map(len, expected.values()))
    for writes in expected.values():
        assert all(offset in [key for _, key in keys[rank]] for (offset, _), rank in writes)


def test_a_405b_model_on_16384_ranks_is_planned_from_what_is_distinct():
    """A rank reports 1.4 kB with the distributed optimizer, and rank zero reads 12 MB of them."""
    cluster = Cluster(dp=128, is_distributed=True)
    ranks = [listing_of(cluster, rank) for rank in range(cluster.world_size)]
    sizes = [len(pickle.dumps(listing)) for listing in ranks]
    assert len(ranks) == 16_384 and max(sizes) < 2_000 and sum(sizes) < 20e6

    tracemalloc.start()
    plan = plan_writes(ranks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6

    load = [0] * len(ranks)
    for shape, writes in plan.values():
        for (_, size), writer in writes:
            load[writer] += prod(size)
        boxes = sorted(box for box, _ in writes)
        assert not any(overlap(one, other) for one, other in pairwise(boxes))
        assert sum(prod(size) for _, size in boxes) == prod(shape)
    assert sum(load) == 3 * 405_853_388_800
    assert max(load) < 1.1 * min(load)


def test_replicas_without_the_distributed_optimizer_add_nothing_to_what_is_planned():
    cluster = Cluster(dp=128, is_distributed=False)
    of_place = {}
    for stage in range(cluster.pp):
        for tp_rank in range(cluster.tp):
            rank = stage * cluster.tp * cluster.dp + tp_rank
            of_place[stage, tp_rank] = listing_of(cluster, rank)
    ranks = []
    for rank in range(cluster.world_size):
        stage = rank // (cluster.tp * cluster.dp)
        ranks.append(of_place[stage, rank % cluster.tp])
    tracemalloc.start()
    plan = plan_writes(ranks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    writers = {writer for _, writes in plan.values() for _, writer in writes}
    assert len(writers) > cluster.world_size / 2


# -------------------------------------------------------------------------- what the ranks send


def bytes_of(tensors):
    given = tensors if isinstance(tensors, list) else [tensors]
    return sum(tensor.nbytes for tensor in given if tensor is not None)


# The argument that holds what a rank sends or receives.
COLLECTIVES = {
    "all_reduce": lambda tensor, *rest, **named: bytes_of(tensor),
    "broadcast": lambda tensor, *rest, **named: bytes_of(tensor),
    "all_gather": lambda received, sent, **named: bytes_of(received),
    "gather": lambda sent, received=None, **named: bytes_of(sent) + bytes_of(received),
    "scatter": lambda received, sent=None, **named: bytes_of(received) + bytes_of(sent),
}


def save_counted(config, directory):
    """Calls by name, and bytes of a save, on this rank; `save` alone, before the first step."""
    counts = Counter()

    def counting(name, function, size_of):
        def count(*arguments, **named):
            counts[name] += 1
            counts["bytes"] += size_of(*arguments, **named)
            return function(*arguments, **named)

        return count

    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg)
        with ExitStack() as stack:
            for name, size_of in COLLECTIVES.items():
                function = getattr(dist, name)
                for owner in (dist, dist.distributed_c10d):
                    patch = mock.patch.object(owner, name, counting(name, function, size_of))
                    stack.enter_context(patch)
            mf.save(state, directory)
        return dict(counts)


@pytest.mark.parametrize("optimizer", [{}, DIST], ids=["plain", "distributed"])
def test_what_a_rank_other_than_zero_sends_and_receives_in_a_save_does_not_grow_with_the_world(
    optimizer, pool, tmp_path
):
    """Ranks 0 and 1 are the first of their replicas here, and gather what these hold."""

    def saved(n, **layout):
        config = config_of(tp=2, **layout, **optimizer)
        return pool(n, save_counted, config, tmp_path / f"{n}-{len(layout)}")

    two_replicas = saved(4)
    four_replicas = saved(8)
    two_stages = saved(8, pp=2)

    first = Counter(all_reduce=4, gather=4, scatter=4, broadcast=4)
    other = Counter(all_reduce=2, gather=2, scatter=2, broadcast=3)
    for ranks, firsts in ((two_replicas, 2), (four_replicas, 2)):
        calls = [Counter(rank) - Counter(bytes=rank["bytes"]) for rank in ranks]
        assert calls == [first] * firsts + [other] * (len(ranks) - firsts)

    assert max(rank["bytes"] for rank in four_replicas[2:]) <= two_replicas[2]["bytes"]
    assert two_stages[1]["bytes"] <= two_replicas[1]["bytes"]
    assert four_replicas[1]["bytes"] <= 2 * two_replicas[1]["bytes"]

"""A dry run needs what the real run of the same rank needs, counted by the same instruments.

Messages, FLOP and matrix products agree exactly, and so do bytes if gloo lets go of tensors in time
(1% is allowed for it).
"""

import math

import attrs
import pytest

import megafn as mf
import test_equivalence
from counted_steps import real_and_dry
from equivalence import recomputation, tiny

SP = dict(sequence_parallel=True)
DIST = dict(use_distributed_optimizer=True)
BYTES = 0.01


def brief(processes, base, layout):
    """A config of few micro-batches: as many as stages, or two."""
    layout = dict(layout)
    config = tiny(**{"micro_batch_size": 2} | base | layout | recomputation(layout))
    parallel = config.parallel
    dp = processes // (parallel.tp * parallel.pp * parallel.cp)
    micro_batches = dp * max(2, parallel.pp)
    return attrs.evolve(config, global_batch_size=config.micro_batch_size * micro_batches)


def case(processes, base, layout, data="uneven", **arguments):
    config = brief(processes, base, layout)
    arguments.setdefault("step", mf.step_fn(config.model.family))
    return processes, dict(config=config, data=data, **arguments)


def of_the_law():
    """{name: (processes, arguments of the comparison)}: the law's list."""
    cases = {}
    for name, (processes, layout, *base) in test_equivalence.LAYOUTS.items():
        cases[f"gpt {name}"] = case(processes, *(base or [{}]), layout)
    return cases


CASES = of_the_law()


@pytest.fixture(scope="module")
def results(pool):
    """For each case what its ranks counted. One call of the pool for each number of processes."""
    results = {}
    for processes in sorted({processes for processes, _ in CASES.values()}):
        names = [name for name in CASES if CASES[name][0] == processes]
        ranks = pool(processes, real_and_dry, [CASES[name][1] for name in names], timeout=600)
        for name, of_ranks in zip(names, zip(*ranks, strict=True), strict=True):
            results[name] = [of_rank for of_rank in of_ranks if of_rank is not None]
    return results


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_needs_what_the_real_run_needs(name, results):
    assert results[name]
    for real, dry in results[name]:
        assert_equal(real, dry)


def assert_equal(real, dry):
    memory, *counts = real
    dry_memory, *dry_counts = dry
    assert counts == dry_counts
    for moment in ("setup", "peak"):
        expected = getattr(memory, moment)
        found = getattr(dry_memory, moment)
        assert math.isclose(expected.total, found.total, rel_tol=BYTES), (moment, expected, found)

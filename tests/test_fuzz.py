"""Random products of layout, model and features obey the law, and show planted bugs."""

import json
from itertools import count

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from combinations import cases, hold
from counted_cases import of_random
from counted_steps import assert_counted_alike, real_and_dry
from planted import NAMES

KNOWN = {  # for each planted bug a small case that shows it
    "tied table not summed over stages": dict(processes=2, pp=2, data="uneven"),
    "norms not summed over tp": dict(processes=2, tp=2, sequence_parallel=True, data="uneven"),
    "gradients times dp": dict(processes=2, data="uneven"),
    "gradients not summed over dp": dict(processes=2, data="lopsided"),
    "updated shards not gathered": dict(processes=2, use_distributed_optimizer=True, data="uneven"),
    "norm of the local gradients": dict(processes=2, pp=2, clip_grad=0.1, data="uneven"),
    "copies over tp count in the norm": dict(processes=2, tp=2, data="uneven"),
    "loss over the local vocabulary": dict(processes=2, tp=2, data="uneven"),
    "smoothing over the local vocabulary": dict(processes=2, tp=2, smoothing=True, data="uneven"),
    "mean of means": dict(processes=2, data="uneven"),
    "padded vocabulary takes part": dict(processes=2, tp=2, data="uneven"),
    "bias of each tp rank counts": dict(processes=2, tp=2, data="uneven"),
    "mask cut elsewhere than queries": dict(processes=2, cp=2, data="documents"),
    "keys in the order of ranks": dict(processes=2, cp=2, data="uneven"),
    "angles of local positions": dict(processes=2, cp=2, position_embedding="rope", data="uneven"),
    # with masks too
    "window of local positions": dict(
        processes=4, tp=2, cp=2, sequence_parallel=True, sliding_window=11, data="padded"
    ),
    "layers without rotary positions counted in each stage": dict(
        processes=2,
        pp=2,
        position_embedding="rope",
        rope_scaling=8.0,
        layers_without_rope=[1],
        parallel_residual=True,
        granularity="full",
        data="uneven",
    ),
    "recomputation draws other dropout": dict(
        processes=1, granularity="full", hidden_dropout=0.1, data="uneven"
    ),
}


@pytest.fixture(scope="module")
def references():
    """Runs of the single process, by their case: many layouts are held to one."""
    return {}


# many runs in one test: seconds each, more where other work shares the cores
@pytest.mark.timeout(3600)
def test_random_products_obey_the_law(pool, references, pytestconfig):
    @settings(max_examples=pytestconfig.getoption("cases"), suppress_health_check=list(HealthCheck))
    @given(cases())
    def obey(case):
        hold(case, pool, references)

    obey()


@pytest.mark.timeout(3600)
def test_a_dry_run_of_random_products_needs_what_their_real_run_needs(pool, pytestconfig):
    @settings(
        max_examples=pytestconfig.getoption("cases") // 6, suppress_health_check=list(HealthCheck)
    )
    @given(cases())
    def alike(product):
        for (pair,) in pool(product["processes"], real_and_dry, [of_random(product)]):
            if pair is not None:
                assert_counted_alike(*pair)

    alike()


def test_the_given_case_obeys_the_law(pool, references, pytestconfig):
    if not (case := pytestconfig.getoption("case")):
        pytest.skip("no --case is given")
    hold(json.loads(case), pool, references)


ARCHITECTURES = dict(
    position_embedding="rope",
    rope_scaling=8.0,
    layers_without_rope=[1, 2],
    sliding_window=11,
    parallel_residual=True,
    softmax_scale=0.7,
)


@pytest.mark.parametrize(
    "layout",
    [
        dict(processes=2, pp=2, vpp=2, granularity="full", data="documents"),
        dict(processes=4, cp=4, granularity="selective", data="padded"),
        dict(
            processes=4,
            tp=2,
            cp=2,
            sequence_parallel=True,
            granularity="full",
            hidden_dropout=0.1,
            attention_dropout=0.1,
            data="uneven",
        ),
    ],
    ids=["pp2-vpp2-full", "cp4-selective", "tp2-cp2-sp-full-dropout"],
)
def test_fields_of_architectures_obey_the_law_together(layout, pool, references):
    """Those that Llama 3.1, Mistral, SmolLM3 and GPT-NeoX brought, with masks and recomputation."""
    hold(ARCHITECTURES | layout, pool, references)


@pytest.mark.parametrize("bug", NAMES)
def test_a_planted_bug_is_seen_in_a_case_known_to_show_it(bug, pool, references):
    with pytest.raises(AssertionError):
        hold(KNOWN[bug], pool, references, bug)
    hold(KNOWN[bug], pool, references)


@pytest.mark.parametrize("bug", NAMES)
def test_a_planted_bug_is_found_within_200_cases(bug, pool, references, pytestconfig, capsys):
    if not pytestconfig.getoption("planted"):
        pytest.skip("a search of minutes: --planted")
    tried, found = count(1), []

    @settings(
        max_examples=200,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    @given(cases(processes=(2, 4)))
    def obey(case):
        number = next(tried)
        try:
            hold(case, pool, references, bug)
        except AssertionError:
            found.append((number, case))  # hypothesis runs the case that failed once more
            raise

    with pytest.raises(AssertionError):
        obey()
    (number, case), *_ = found
    with capsys.disabled():
        print(f"\n{bug!r}: case {number}: {json.dumps(case)}")

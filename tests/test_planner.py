"""Plans and rankings: what is searched is what can run, what comes first fits and is fastest."""

import re
import subprocess
import sys
from itertools import islice, product
from pathlib import Path

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megafn as mf
from megafn.__main__ import main
from megafn.pictures.plan_drawing import draw_plan
from megafn.pure.config.problems import ConfigError, Problem
from megafn.pure.config.records import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    TrainConfig,
)
from megafn.pure.config.rule import rule
from megafn.pure.families.gpt import GPT_SPEC
from megafn.pure.planner.layout import layout_of, with_layout
from megafn.pure.planner.machine import MACHINES
from megafn.pure.planner.memory.stage_memory import memory_by_stage
from megafn.pure.planner.plans.plan import apply_plan, plan
from megafn.pure.planner.plans.ranking import rank_plans
from megafn.pure.planner.plans.records import Plan
from megafn.pure.planner.records import Band, Layout, Memory, StepTime
from megafn.pure.planner.search.cost_model import CostModel
from megafn.pure.planner.search.layout_search import SEARCHED, divisors, search_layouts
from megafn.pure.validation.validate import problems_in_any_layout, validate

RECOMPUTATIONS = (
    RecomputeConfig(),
    RecomputeConfig(granularity="selective"),
    RecomputeConfig(granularity="full"),
)


def small(batch=4, **fields):
    """A config of a small model."""
    sizes = dict(num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32)
    return TrainConfig(
        model=ModelConfig(**sizes | fields),
        micro_batch_size=1,
        global_batch_size=batch,
        train_iters=9,
    )


# ---------------------------------------------------------------------------- what is searched


@rule("parallel.tp", "parallel.sequence_parallel", "recompute.granularity")
def sequences_are_cut_or_recomputed(tp, sequence_parallel, granularity):
    if tp > 1 and not sequence_parallel and granularity is None:
        return "a rule of a custom family"
    return None


CUSTOM = attrs.evolve(
    GPT_SPEC, name="custom", rules=(*GPT_SPEC.rules, sequences_are_cut_or_recomputed)
)


@st.composite
def searches(draw):
    """A config, a number of devices and the most devices over which tensors are cut."""
    family = draw(st.sampled_from(["gpt", "bert", "t5", CUSTOM]))
    fields = dict(
        family=family,
        num_layers=draw(st.integers(1, 4)),
        num_attention_heads=draw(st.sampled_from([2, 3, 4])),
        hidden_size=24,
        ffn_hidden_size=draw(st.sampled_from([None, 60])),
        seq_length=draw(st.sampled_from([30, 32, 48])),
    )
    if family == "t5":
        fields["num_decoder_layers"] = draw(st.sampled_from([None, 2, 3]))
    else:
        fields["num_query_groups"] = draw(st.sampled_from([None, 1]))
    config = small(draw(st.sampled_from([1, 2, 4, 6])), **fields)
    optimizer = OptimizerConfig(name=draw(st.sampled_from(["adam", "sgd"])))
    return (
        attrs.evolve(config, optimizer=optimizer),
        draw(st.sampled_from([1, 2, 3, 4, 6])),
        draw(st.sampled_from([1, 2, 8])),
    )


def accepted_one_by_one(config, world_size, largest_tp):
    """All layouts with equal stages that `validate` accepts, found by asking it for each."""
    degrees = divisors(world_size)
    accepted = set()
    for tp, pp, cp in product(degrees, repeat=3):
        if world_size % (tp * pp * cp) or tp > largest_tp:
            continue
        for vpp, micro, *switches in product(
            range(1, config.model.num_layers + 2),
            divisors(config.global_batch_size),
            [False, True],
            [False, True],
            RECOMPUTATIONS,
        ):
            sequence_parallel, distributed, recompute = switches
            candidate = with_layout(
                config,
                Layout(
                    tp=tp,
                    pp=pp,
                    vpp=vpp,
                    cp=cp,
                    micro_batch_size=micro,
                    sequence_parallel=sequence_parallel,
                    use_distributed_optimizer=distributed,
                    recompute=recompute,
                ),
            )
            if validate(candidate, world_size) == ():
                accepted.add(layout_of(candidate, world_size))
    return accepted


def has_equal_stages(layout):
    return (
        layout.num_layers_in_first_pipeline_stage is None
        and layout.num_layers_in_last_pipeline_stage is None
    )


@settings(max_examples=6, deadline=None)
@given(searches())
def test_the_layouts_of_a_search_are_those_that_validate_accepts(search):
    config, world_size, largest_tp = search
    found = search_layouts(config, world_size, largest_tp=largest_tp, largest_cp=world_size)
    assert len(set(found.accepted)) == len(found.accepted)
    equal = set(filter(has_equal_stages, found.accepted))
    assert equal == accepted_one_by_one(config, world_size, largest_tp)
    for layout in found.accepted:
        ready = with_layout(config, layout)
        assert validate(ready, world_size) == ()
        assert layout_of(ready, world_size) == layout
    for choice in found.refused:
        assert layout_of(with_layout(config, choice.layout), world_size) not in found.accepted
        assert choice.problem in validate(with_layout(config, choice.layout), world_size)


def test_stages_that_cannot_be_equal_hold_fewer_layers_at_the_ends():
    """Llama 3 405B has 126 layers, and 16 stages: 8 layers each, 7 in the first and the last."""
    config = small(batch=16, num_layers=126, tie_word_embeddings=False)
    found = search_layouts(config, 16, largest_tp=1, largest_cp=1)
    ends = {
        (
            layout.vpp,
            layout.num_layers_in_first_pipeline_stage,
            layout.num_layers_in_last_pipeline_stage,
        )
        for layout in found.accepted
        if layout.pp == 16
    }
    assert ends == {(1, 7, 7), (2, None, 6)}


def test_only_cuts_that_leave_a_stage_count_without_a_layout_are_refused():
    found = search_layouts(small(batch=16, num_layers=7), 16, largest_tp=1, largest_cp=1)
    assert {layout.pp for layout in found.accepted} == {1, 2, 4}
    assert [choice.layout.pp for choice in found.refused] == [8, 16]


def test_halves_of_a_t5_need_no_multiple_of_all_stages():
    config = small(batch=4, family="t5", num_layers=6, num_decoder_layers=2)
    found = search_layouts(config, 4, largest_tp=1, largest_cp=1)
    assert {layout.pp for layout in found.accepted} == {1, 2, 4}


def test_outer_stages_that_a_config_gives_are_searched_with_its_own_pp():
    parallel = ParallelConfig(pp=2, num_layers_in_first_pipeline_stage=1)
    config = attrs.evolve(small(), parallel=parallel)
    found = search_layouts(config, 2, largest_tp=1, largest_cp=1)
    assert layout_of(config, 2) in found.accepted
    assert {layout.num_layers_in_first_pipeline_stage for layout in found.accepted} == {None, 1}


def test_a_search_names_the_problems_that_no_layout_changes():
    config = attrs.evolve(small(hidden_size=62), parallel=ParallelConfig(tp=3), micro_batch_size=3)
    fields = [problem.field for problem in problems_in_any_layout(config, 4, SEARCHED)]
    assert fields == ["model.hidden_size"]
    with pytest.raises(ConfigError, match="model.hidden_size = 62"):
        search_layouts(config, 4, largest_tp=8, largest_cp=8)


# ---------------------------------------------------------------------- what a ranking promises


def llama(layers, hidden, heads, ffn, batch, **fields):
    """A model of the Llama 3 family."""
    return TrainConfig(
        model=ModelConfig(
            num_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=8,
            ffn_hidden_size=ffn,
            seq_length=8192,
            vocab_size=128256,
            position_embedding="rope",
            activation="swiglu",
            normalization="RMSNorm",
            add_bias_linear=False,
            tie_word_embeddings=False,
        ),
        precision=PrecisionConfig(dtype="bf16"),
        micro_batch_size=1,
        global_batch_size=batch,
        train_iters=1000,
        **fields,
    )


LLAMA_8B = llama(32, 4096, 32, 14336, batch=64)
LLAMA_405B = llama(126, 16384, 128, 53248, batch=2048)
H100 = MACHINES["h100"]


def with_memory(number, **fields):
    """A machine with so many bytes, none of them reserved."""
    return attrs.evolve(H100, memory_bytes=number, reserved_bytes=0, **fields)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(
        [
            small(num_query_groups=2),
            small(family="bert"),
            small(family="t5", num_decoder_layers=2),
            small(family=CUSTOM),
            small(num_layers=7),
        ]
    ),
    st.sampled_from([1, 2, 4, 8]),
    st.floats(1e5, 6e6),
    st.sampled_from(["megafn", "megatron"]),
)
def test_plans_fit_the_fastest_first_and_refused_layouts_say_why(
    config, world_size, memory, implementation
):
    machine = with_memory(memory)
    ranking = rank_plans(config, machine, world_size, implementation=implementation)
    seconds = []
    for ranked in ranking.plans:
        assert ranked.fits and max(stage.total for stage in ranked.memory) <= memory
        assert len(ranked.memory) == ranked.layout.pp
        seconds.append(ranked.time.total)
    rounded = [float(f"{number:.3e}") for number in seconds]
    assert rounded == sorted(rounded)
    for refusal in ranking.refused:
        assert refusal.problems and str(refusal.problems[0])
    assert (ranking.advice is None) == bool(ranking.plans)

    for ranked in islice(ranking.plans, 3):
        ready = apply_plan(config, ranked)
        assert validate(ready, world_size) == ()
        assert layout_of(ready, world_size) == ranked.layout
        assert plan(ready, machine, world_size, implementation=implementation) == ranked
    heavy = [refusal for refusal in ranking.refused if "GB of" in str(refusal.problems[0])]
    for refusal in heavy[:3]:
        refused = plan(
            with_layout(config, refusal.layout), machine, world_size, implementation=implementation
        )
        assert not refused.fits and refused.layout == refusal.layout


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([small(), small(family="bert"), small(family="t5"), small(num_layers=3)]),
    st.lists(st.floats(1e5, 6e6), min_size=2, max_size=2),
)
def test_more_memory_refuses_nothing_that_less_memory_holds(config, memories):
    less, more = (
        {ranked.layout for ranked in rank_plans(config, with_memory(memory), 8).plans}
        for memory in sorted(memories)
    )
    assert less <= more


def test_a_plan_of_unequal_stages_is_the_plan_of_its_config():
    """14 layers on 4 stages; the config itself has equal stages, or other unequal ones."""
    equal = small(num_layers=14)
    other = attrs.evolve(equal, parallel=ParallelConfig(pp=4, num_layers_in_first_pipeline_stage=5))
    for config in (equal, other):
        ranking = rank_plans(config, H100, 4)
        unequal = [
            ranked
            for ranked in ranking.plans
            if ranked.layout.num_layers_in_last_pipeline_stage is not None
        ]
        assert 4 in {ranked.layout.pp for ranked in unequal}
        for ranked in unequal[::10]:
            planned = plan(apply_plan(config, ranked), H100, 4)
            assert (planned.memory, planned.time) == (ranked.memory, ranked.time)
            moved = attrs.evolve(ranked.layout, num_layers_in_last_pipeline_stage=1)
            assert memory_by_stage(config, moved) != ranked.memory


def test_the_fullest_stage_is_among_those_that_are_weighed():
    for config, world_size in ((LLAMA_405B, 64), (small(family="t5", num_layers=8), 8)):
        costs = CostModel(config=config, machine=H100, implementation="megafn")
        found = search_layouts(config, world_size, largest_tp=8, largest_cp=2)
        for layout in found.accepted[::7]:
            fullest = max(stage.total for stage in costs.memory(layout))
            assert costs.needed(layout) == fullest


def test_all_layouts_of_a_405b_model_on_16384_devices_are_priced():
    ranking = rank_plans(LLAMA_405B, H100, world_size=16384)
    assert len(ranking.plans) > 500
    assert len(ranking.plans) + len(ranking.refused) > 10_000
    best = ranking.plans[0]
    assert best.layout.pp > 1 and best.layout.tp > 1
    assert best.layout.num_layers_in_last_pipeline_stage is not None


def test_what_a_plan_counts():
    config = attrs.evolve(LLAMA_8B, parallel=ParallelConfig(tp=8, sequence_parallel=True))
    priced = plan(config, H100, world_size=16)
    tokens = 64 * 8192
    assert priced.tokens_per_second == tokens / priced.time.total / 16
    flops = mf.training_flops(config.model, 64)
    assert priced.mfu == pytest.approx(flops / priced.time.total / 16 / 989e12)
    assert priced.layout == layout_of(config, 16) and priced.world_size == 16
    assert priced.num_parameters == 8_030_261_248 and priced.step_flops == flops
    assert priced.run_seconds == 1000 * priced.time.total
    assert priced.device_hours == pytest.approx(16 * 1000 * priced.time.total / 3600)


def test_mfu_of_fp32_is_a_share_of_the_fp32_peak():
    config = attrs.evolve(small(), precision=PrecisionConfig(dtype="fp32"))
    priced = plan(config, H100, 4)
    assert priced.mfu == pytest.approx(priced.step_flops / priced.time.total / 4 / 67e12)
    assert "a share of 67 TFLOP/s, the peak in fp32" in " ".join(str(priced).split())


def test_a_small_model_waits_for_the_host():
    waiting = plan(small(), H100, 4)
    prompt = plan(small(), attrs.evolve(H100, launch_seconds=0.0), 4)
    assert waiting.host_seconds == pytest.approx(waiting.time.total - prompt.time.total)
    assert prompt.host_seconds == 0 < waiting.host_seconds


def test_of_equally_fast_layouts_the_one_with_less_context_parallelism_comes_first():
    ranking = rank_plans(LLAMA_8B, H100, 64, implementation="megatron")
    degrees = [
        (float(f"{ranked.time.total:.3e}"), ranked.layout.cp, ranked.layout.pp, ranked.layout.tp)
        for ranked in islice(ranking.plans, 300)
    ]
    assert degrees == sorted(degrees)
    assert len({seconds for seconds, *_ in degrees}) < len(degrees)


def test_a_ranking_keeps_to_a_node_while_anything_fits_there():
    config = small(batch=16, num_attention_heads=8)
    machine = with_memory(1e9, devices_per_node=2)
    assert {ranked.layout.tp for ranked in rank_plans(config, machine, 8).plans} == {1, 2}
    least = min(
        max(stage.total for stage in ranked.memory)
        for ranked in rank_plans(config, machine, 8).plans
    )
    tight = with_memory(0.95 * least, devices_per_node=2)
    assert {ranked.layout.tp for ranked in rank_plans(config, tight, 8).plans} <= {4, 8}


# ------------------------------------------------------------------- what does not fit, and why


@pytest.mark.parametrize(
    "config, world_size, parts",
    [
        (LLAMA_8B, 8, ["stage 0 needs ", " GB of 78 GB usable (80 GB less 2 GB reserved); raise "]),
        (LLAMA_8B, 1, ["no layout on 1 x h100 fits", "a stage needs at least", "use "]),
        (
            attrs.evolve(LLAMA_8B, parallel=ParallelConfig(tp=4), micro_batch_size=8),
            8,
            ["lower micro_batch_size to "],
        ),
    ],
)
def test_a_problem_says_by_how_much_and_what_would_help(config, world_size, parts):
    refused = plan(config, H100, world_size)
    (problem,) = refused.problems
    assert not refused.fits
    assert problem.field == "parallel.pp" and problem.value == 1
    for part in parts:
        assert part in str(problem), problem


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_each_change_that_is_proposed_makes_the_layout_fit(world_size):
    ranking = rank_plans(LLAMA_8B, H100, world_size)
    fitting = [ranked.layout for ranked in ranking.plans]
    heavy = [
        refusal
        for refusal in islice(ranking.refused, 0, None, 50)
        if "GB of" in str(refusal.problems[0])
        and "no single change" not in str(refusal.problems[0])
    ]
    assert heavy or not fitting
    for refusal in heavy:
        for name in ("pp", "tp", "micro_batch_size"):
            words = str(refusal.problems[0]).replace(",", "").split()
            if name not in words:
                continue
            value = int(words[words.index(name) + 2])
            assert any(
                getattr(layout, name) == value and differ(layout, refusal.layout) == {name}
                for layout in fitting
            ), refusal


def differ(layout, other):
    """The fields of a search in which two layouts differ."""
    names = {field.name for field in attrs.fields(Layout)} - {"dp", "num_micro_batches"}
    return {name for name in names if getattr(layout, name) != getattr(other, name)}


def test_a_model_that_fits_nowhere_says_so_when_a_plan_is_read():
    ranking = rank_plans(LLAMA_8B, H100, world_size=1)
    assert len(ranking.plans) == 0 and ranking.refused
    with pytest.raises(
        IndexError, match=r"no layout on 1 x h100 fits: .* 78 GB usable .*; use \d+ devices"
    ):
        ranking.plans[0]
    assert ranking.advice in " ".join(str(ranking).split())


def test_more_devices_are_proposed_only_if_they_help():
    heavy = attrs.evolve(H100, memory_bytes=3e9)
    assert "choose a machine with more memory, or a smaller model" in str(
        plan(small(hidden_size=16384, num_layers=1), heavy, 1).problems[0]
    )


BAD = [
    (dict(machine="h100"), "machine = 'h100': give a Machine"),
    (dict(implementation="megatorn"), "choose one of megafn, megatron"),
    (dict(config=None), "config = None: give a TrainConfig"),
    (dict(world_size=0), "world_size = 0: must be at least 1"),
    (dict(world_size=2.0), "world_size = 2.0: give an integer"),
    (dict(world_size=11), "11"),
    (dict(config=small(hidden_size=-1)), "model.hidden_size = -1"),
]


@pytest.mark.parametrize("price", [plan, rank_plans])
@pytest.mark.parametrize("changes, message", BAD)
def test_bad_input_is_one_clear_sentence(price, changes, message):
    given = dict(config=small(), machine=H100, world_size=2, implementation="megafn") | changes
    with pytest.raises(ConfigError) as caught:
        price(**given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_number_of_devices_that_no_layout_divides_comes_with_others():
    with pytest.raises(ConfigError, match="choose another number, such as 8 or 16"):
        rank_plans(small(batch=16, num_layers=4), H100, world_size=11)


def test_a_plan_of_another_config_is_not_applied():
    best = rank_plans(small(batch=4), H100, 4).plans[0]
    with pytest.raises(ConfigError, match="global_batch_size = 8: the plan is for one of"):
        apply_plan(small(batch=8), best)
    with pytest.raises(ConfigError, match="plan = None: give a Plan"):
        apply_plan(small(), None)


def test_a_ranking_is_not_taken_for_a_plan(tmp_path):
    ranking = rank_plans(small(batch=4), H100, 4)
    message = r"plan is a Ranking: give one of its plans, as in ranking.plans\[0\]"
    for use in (
        draw_plan,
        lambda plan: apply_plan(small(batch=4), plan),
        lambda plan: mf.plot_plan(plan, tmp_path / "plan.png"),
    ):
        with pytest.raises(TypeError, match=message):
            use(ranking)


# ------------------------------------------------------------------------------------- printing


def a_plan(**fields):
    """A plan with round numbers."""
    stages = [Memory(parameters=10e9, gradients=20e9, activations=30e9 - n * 1e9) for n in range(2)]
    usual = dict(
        machine=H100,
        world_size=16,
        layout=Layout(tp=2, pp=2, dp=4, num_micro_batches=8, sequence_parallel=True),
        implementation="megatron",
        memory=tuple(stages),
        time=StepTime(layers=6, tp=1.5, bubble=0.5),
        tokens_per_second=1234.5,
        mfu=0.4,
        host_seconds=0.0,
        num_parameters=5_000_000_000,
        step_flops=3.2e16,
        iterations=900,
        band=Band(low=-0.05, high=0.1, source="some rows", num_results=8),
        assumptions=("every sample is full",),
    )
    return Plan(**usual | fields)


def test_a_plan_prints_as_a_table():
    assert (
        str(a_plan())
        == """\
16 x h100 of 80 GB, as Megatron-LM runs it, with overlap and fused kernels
tp 2 x pp 2 x cp 1 x dp 4, 8 micro-batches of 1, sequence parallel
5.00 billion parameters, 32.0 PFLOP a step

GB       parameters  gradients  optimizer state  activations  other  total
stage 0        10.0       20.0              0.0         30.0    0.0   60.0
stage 1        10.0       20.0              0.0         29.0    0.0   59.0
78 GB usable (80 GB less 2 GB reserved): 18 GB free on the fullest stage

time             seconds  share
layers             6.000  75.0%
tp messages        1.500  18.8%
pipeline bubble    0.500   6.2%
whole step         8.000

1,234 tokens/s per device
900 steps at this speed: 2.00 hours, 32.0 device-hours
MFU 40.0% as computed; shifted by this planner's errors on the 8 published results most like
this plan, 38.0% to 44.0% (some rows)

assumed
- every sample is full"""
    )


def test_a_plan_that_does_not_fit_prints_why():
    text = str(
        a_plan(
            memory=(Memory(parameters=91e9),),
            problems=(Problem("parallel.pp", 1, "stage 0 needs 93 GB of 80; raise pp"),),
            band=Band(low=0, high=0, source="some rows", num_results=8),
        )
    )
    assert "13 GB too much on the fullest stage" in text
    heading, reason, *_ = text.split("\n\n")
    assert heading.splitlines()[0].endswith(": does not fit")
    assert reason == "does not fit\n- parallel.pp = 1: stage 0 needs 93 GB of 80; raise pp"
    for word in ("tokens/s", "MFU", "hours", "seconds"):
        assert word not in text


def test_a_plan_says_what_it_waits_for_and_what_to_distrust():
    band = Band(low=0, high=0, source="rows", num_results=8, not_trusted="it was not measured")
    text = str(a_plan(host_seconds=2.0, band=band))
    assert "host-bound: 25.0% of the step waits for the host to launch kernels" in text
    assert "not trusted: it was not measured" in text


def test_what_does_not_fit_is_the_same_number_in_the_sentence_and_in_the_table():
    text = str(plan(LLAMA_8B, H100, 8))
    (needed,) = re.findall(r"stage 0 needs ([\d.,]+) GB of", text)
    (row,) = re.findall(r"^stage 0 .*$", text, flags=re.MULTILINE)
    assert row.split()[-1] == needed


def test_a_plan_is_drawn_against_the_line_of_its_device():
    assert (
        draw_plan(a_plan())
        == """\
GB by stage, of 78 GB usable (80 GB less 2 GB reserved)
stage 0 60.0 PPPPPPPPGGGGGGGGGGGGGGGGGAAAAAAAAAAAAAAAAAAAAAAAA               |
stage 1 59.0 PPPPPPPPGGGGGGGGGGGGGGGGGAAAAAAAAAAAAAAAAAAAAAAA                |
P parameters, G gradients, A activations, | 78 GB

seconds of a step, 8.000 in all
layers          6.000  75.0% ################################################################
tp messages     1.500  18.8% ################
pipeline bubble 0.500   6.2% #####"""
    )


def test_tables_and_drawings_are_narrower_than_100_columns():
    ranking = rank_plans(LLAMA_405B, H100, 16384)
    best = ranking.plans[0]
    big = plan(llama(126, 16384, 128, 53248, batch=16384), H100, 16384)
    for text in map(str, (ranking, best, draw_plan(best), big, draw_plan(big))):
        assert max(map(len, text.splitlines())) < 100


def test_a_printed_ranking_shows_the_best_and_counts_the_others():
    ranking = rank_plans(LLAMA_8B, H100, 8)
    text = str(ranking)
    rows = [line.split() for line in text.splitlines() if line[:1].isdigit()]
    shown = [row for row in rows if row[-1].endswith("%*")]
    assert len(shown) == 10 and len(ranking.table(top=3).splitlines()) < len(text.splitlines())
    first = ranking.plans[0].layout
    assert shown[0][:4] == ["0", str(first.tp), str(first.pp), str(first.vpp)]
    for row in shown:
        layout = ranking.plans[int(row[0])].layout
        assert row[1:7] == [
            str(number)
            for number in (
                layout.tp,
                layout.pp,
                layout.vpp,
                layout.cp,
                layout.dp,
                layout.micro_batch_size,
            )
        ]
    assert f"{len(ranking.plans):,} layouts fit." in text
    assert "* not trusted: " in text
    assert re.search(r"Refused: [\d,]+ need more than 78 GB \(the least of them [\d.]+ GB\)", text)


# --------------------------------------------------------------------- pictures, files, command


def test_planning_and_drawing_bring_no_torch(tmp_path):
    code = """
import sys
import megafn as mf
model = mf.ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32)
config = mf.TrainConfig(model=model, micro_batch_size=1, global_batch_size=8, train_iters=9)
ranking = mf.rank_plans(config, mf.MACHINES["a100"], 8)
best = ranking.plans[0]
print(ranking, best, mf.draw_plan(best), mf.plan(config, mf.MACHINES["b200"], 8))
mf.apply_plan(config, best)
mf.plot_plan(best, sys.argv[1])
assert "torch" not in sys.modules
"""
    picture = tmp_path / "plan.png"
    root = Path(mf.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code, picture], cwd=root, check=True, timeout=60)
    assert picture.read_bytes().startswith(b"\x89PNG")


MACHINE = """
name = "ours"
peak_flops = 400e12
memory_bytes = 40e9
memory_bandwidth = 2e12
link_bandwidth = 200e9
network_bandwidth = 25e9
devices_per_node = 4
"""


def test_a_machine_is_read_from_a_file(tmp_path):
    path = tmp_path / "ours.toml"
    path.write_text(MACHINE)
    machine = mf.load_machine(path)
    assert machine.name == "ours" and machine.devices_per_node == 4
    for wrong, message in (
        (MACHINE.replace("40e9", "0.0"), "machine.memory_bytes = 0.0: must be"),
        (
            MACHINE + "reserved_bytes = 50e9\n",
            "machine.reserved_bytes = 50000000000.0: must be less",
        ),
        (
            MACHINE.replace("name", "nam"),
            "nam = 'ours': there is no such field; did you mean \"name\"",
        ),
        (MACHINE.replace("400e12", '"fast"'), "peak_flops = 'fast': give a number"),
        (
            MACHINE + "volts = 3",
            "volts = 3: there is no such field; choose one of name, peak_flops",
        ),
        (MACHINE.replace("peak_flops = 400e12", ""), "peak_flops is missing: give a number"),
    ):
        path.write_text(wrong)
        with pytest.raises(ConfigError) as caught:
            mf.load_machine(path)
        assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mf.dump_config(LLAMA_8B, "config.toml")
    Path("ours.toml").write_text(MACHINE)
    return "config.toml"


def test_the_command_prints_the_plan_and_the_ranking_and_writes_the_best_config(
    config_file, capsys
):
    command = ["plan", config_file, "--machine", "h100", "--world-size", "8", "--top", "3"]
    assert main([*command, "--output", "best.toml", "--picture", "best.png"]) == 0
    out = capsys.readouterr().out
    assert "config.toml as it stands:" in out and "stage 0 needs " in out
    assert "layouts fit." in out
    best = rank_plans(LLAMA_8B, H100, 8).plans[0]
    assert mf.load_config("best.toml") == apply_plan(LLAMA_8B, best)
    assert Path("best.png").stat().st_size > 1000


def test_the_command_ends_with_1_if_nothing_fits(config_file, capsys):
    assert main(["plan", config_file, "--machine", "ours.toml", "--world-size", "2"]) == 1
    assert "no layout on 2 x ours fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--machine", "h1000"], "--machine = 'h1000': choose one of a100, h100"),
        (["--machine", "none.toml"], "none.toml: cannot be read"),
        (["--machine", "h100", "--top", "0"], "--top = 0: must be at least 1"),
        (["--machine", "h100", "--implementation", "x"], "implementation = 'x': choose one of"),
    ],
)
def test_the_command_refuses_bad_arguments_in_a_sentence(config_file, arguments, message, capsys):
    assert main(["plan", config_file, "--world-size", "8", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("megafn: ") and message in err


def test_a_config_whose_layout_cannot_run_is_ranked_all_the_same(config_file, capsys):
    mf.dump_config(attrs.evolve(LLAMA_8B, parallel=ParallelConfig(tp=3)), config_file)
    assert main(["plan", config_file, "--machine", "h100", "--world-size", "8"]) == 0
    out = capsys.readouterr().out
    assert "cannot run in the layout that it has:" in out and "layouts fit." in out

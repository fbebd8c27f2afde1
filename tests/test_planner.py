"""Plans and rankings: what is searched is what can run, what comes first fits and is fastest."""

from itertools import product

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RecomputeConfig,
    TrainConfig,
)
from megafn.pure.config.rule import rule
from megafn.pure.families.gpt import GPT_SPEC
from megafn.pure.planner.layout import layout_of, with_layout
from megafn.pure.planner.layout_search import SEARCHED, divisors, search_layouts
from megafn.pure.planner.records import Layout
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

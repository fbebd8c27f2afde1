"""A family is a value: a config takes it wherever it takes a name, and nothing has to be
registered."""

import pickle
from functools import partial

import attrs
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

import megafn as mf
from equivalence import assert_equal, run_layout, short
from megafn.pure.checkpoint.compatibility import resume_problems
from megafn.pure.config.serialization import without_functions
from megafn.pure.families.built_in import BUILT_IN_SPECS, find_spec, spec_of


@mf.rule("model.num_layers", "parallel.pp")
def few_layers(layers, pp):
    if layers > 4 * pp:
        return f"must be at most 4 * pp = {4 * pp}"


def twice_the_words(name, shape, model):
    """GPT's initial values, with a word table of twice the std."""
    gpt = BUILT_IN_SPECS["gpt"].initial_distribution(name, shape, model)
    if name.endswith("word_embeddings.weight"):
        return mf.Normal(2 * gpt.std)
    return gpt


def unknown_flops(model, sequences):
    return None


GPT = mf.family_of("gpt")
SPEC = attrs.evolve(
    GPT.spec,
    name="ours",
    fields=("model.num_tokentypes",),
    rules=(*GPT.spec.rules, few_layers),
    initial_distribution=twice_the_words,
    training_flops=unknown_flops,
)
OURS = attrs.evolve(
    GPT,
    spec=SPEC,
    chunk=attrs.evolve(GPT.chunk, modules=partial(GPT.chunk.modules, mask=AttnMaskType.padding)),
    data=None,
    predicts_next_token=False,
)
CONFIG = short(family=OURS)


# ------------------------------------------------------------------------------------- as a value


@pytest.mark.parametrize("family", [*map(mf.family_of, BUILT_IN_SPECS), OURS], ids=lambda f: f.name)
def test_a_family_can_be_sent_to_another_process(family):
    again = pickle.loads(pickle.dumps(family))
    assert again.spec == family.spec and again.step == family.step and again.data == family.data


@pytest.mark.parametrize("family", [SPEC, OURS], ids=["spec", "family"])
def test_a_config_takes_a_record_where_it_takes_a_name(family):
    config = short(family=family)
    assert mf.validate(config, 1) == ()
    assert spec_of(config.model) is SPEC
    assert mf.to_dict(config)["model"]["family"] == "ours"
    assert without_functions(config).model.family == "ours"


@pytest.mark.parametrize("family", [GPT, GPT.spec])
def test_a_built_in_family_is_the_same_as_its_name(family):
    by_name, by_record = short(), short(family=family)
    assert mf.validate(by_record, 1) == () and resume_problems(by_name, by_record, 1) == ()
    assert mf.step_fn(GPT) is mf.step_fn("gpt")
    assert mf.training_flops(by_record.model, 3) == mf.training_flops(by_name.model, 3)


def test_a_run_is_compared_by_the_names_of_families():
    saved = mf.from_dict(mf.to_dict(CONFIG))
    assert saved.model.family == "ours" and resume_problems(saved, CONFIG, 1) == ()
    (problem,) = resume_problems(saved, short(), 1)
    assert problem.field == "model.family" and "'ours'" in problem.remedy


def test_rules_and_fields_of_a_family_are_validated():
    deep = attrs.evolve(CONFIG, model=attrs.evolve(CONFIG.model, num_layers=8))
    assert [str(problem) for problem in mf.validate(deep, 1)] == [
        "model.num_layers = 8: must be at most 4 * pp = 4"
    ]
    typed = attrs.evolve(CONFIG, model=attrs.evolve(CONFIG.model, num_tokentypes=2))
    assert mf.validate(typed, 1) == ()
    labelled = attrs.evolve(CONFIG, model=attrs.evolve(CONFIG.model, num_labels=2))
    assert [str(problem) for problem in mf.validate(labelled, 1)] == [
        "model.num_labels = 2: has no effect with model.family = 'ours'; "
        "leave it out or set model.family to bert"
    ]


@attrs.frozen
class Pretender:
    name: str = "gpt"
    spec: object = None


class Explosive:
    def __getattr__(self, name):
        raise RuntimeError(name)


@pytest.mark.parametrize(
    "family, told",
    [
        ("ours", "choose one of gpt, bert, t5, or give a megafn.Family"),
        (Pretender(), "choose one of gpt, bert, t5, or give a megafn.Family"),
        (Explosive(), "give a string or a Family record, in code"),
        (3, "give a string or a Family record, in code"),
        (mf.Family, "choose one of gpt, bert, t5, or give a megafn.Family"),
    ],
    ids=["name", "pretender", "explosive", "number", "class"],
)
def test_what_is_no_family_is_refused_with_what_may_stand_there(family, told):
    assert [problem.remedy for problem in mf.validate(short(family=family), 1)] == [told]
    assert find_spec(family if isinstance(family, str) else None) is None
    with pytest.raises(mf.ConfigError, match="^model.family = .*choose one of 'gpt', 'bert', 't5'"):
        mf.family_of("ours")


def test_a_spec_alone_can_be_planned_with_but_not_run():
    with pytest.raises(mf.ConfigError, match="or give a megafn.Family"):
        mf.step_fn(SPEC)


# ----------------------------------------------------------------------------------------- as a run


def first_values(config):
    """Of the word table and of a matrix, by name."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        whole = mf.whole_parameters(mf.setup(config, pg).chunks, config.model, pg)
    words = "embedding.word_embeddings.weight"
    return whole[words], whole["decoder.layers.0.mlp.linear_fc1.weight"]


def test_initial_values_are_those_of_the_spec(pool):
    words, matrix = pool(1, first_values, CONFIG)[0]
    gpt_words, gpt_matrix = pool(1, first_values, short())[0]
    assert torch.equal(words, 2 * gpt_words) and torch.equal(matrix, gpt_matrix)


@pytest.mark.parametrize(
    "processes, layout",
    [(2, dict(tp=2, sequence_parallel=True)), (2, dict(pp=2)), (2, dict(cp=2))],
    ids=["tp2-sp", "pp2", "cp2"],
)
def test_a_family_of_a_users_obeys_the_law(processes, layout, pool):
    (single,) = pool(1, run_layout, CONFIG)
    assert_equal(*[single], pool(processes, run_layout, short(family=OURS, **layout)))


def saved_and_resumed(folder):
    """Iterations of a run that saves, and of one that resumes from it."""
    iterations = []
    rows = [{"input_ids": torch.arange(64).reshape(2, 32)}] * 16
    for length in (2, 4):
        config = attrs.evolve(
            short(steps=length, family=OURS, global_batch_size=4),
            checkpoint=mf.CheckpointConfig(directory=folder),
            schedule=mf.ScheduleConfig(decay="constant"),
            log=mf.LogConfig(progress=False),
        )
        mf.train(config, batches=rows, on_metrics=[lambda m: iterations.append(m.iteration)])
    return iterations


def test_a_run_of_a_users_family_resumes(pool, tmp_path):
    assert pool(1, saved_and_resumed, str(tmp_path))[0] == [1, 2, 3, 4]


def without_data(config):
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg)
        logits = mf.logits(state, torch.zeros(1, 8, dtype=torch.long))
        with pytest.raises(ValueError, match="^model.family = 'ours': does not predict the next"):
            mf.generate(state, torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(mf.ConfigError, match="^model.family = 'ours': has no data of its own"):
        mf.train(attrs.evolve(config, data=mf.DataConfig(train=mf.demo_text())))
    return tuple(logits.shape)


def test_what_a_family_has_not_is_refused(pool):
    assert pool(1, without_data, CONFIG)[0] == (1, 8, 97)

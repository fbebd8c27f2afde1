"""What users add to a model, or freeze in it: the same in every layout, or refused at once."""

import warnings

import attrs
import pytest
import torch

import megafn as mf
from bert_rows import PAIRS, bert_rows
from equivalence import assert_equal, run_layout, share, short, uneven
from megafn.runtime.model.weights import initial_value
from t5_rows import RELATIVE, T5, pairs

UNTIED = dict(tie_word_embeddings=False)


# ------------------------------------------------------------------------------ frozen parts


def frozen_front(provider):
    """Embedding and first layer are frozen, by their names in the whole model."""
    chunk = provider()
    if chunk.pre_process:
        chunk.embedding.requires_grad_(False)
    blocks = (getattr(chunk, "encoder", None), getattr(chunk, "decoder", None))
    for block in blocks:
        for layer in block.layers if block is not None else ():
            if layer.layer_number == 1:
                layer.requires_grad_(False)
    return chunk


def run_trained(config, data=uneven):
    """`run_layout` without the parameters that `frozen_front` freezes, which must not move."""
    curve, before, after = run_layout(config, data)
    for (name, first, *_), (_, last, *_) in zip(before, after, strict=True):
        assert torch.equal(first, last) or not is_frozen(name), name
    return (
        curve,
        [part for part in before if not is_frozen(part[0])],
        [part for part in after if not is_frozen(part[0])],
    )


def is_frozen(name):
    return name.startswith("embedding.") or ".layers.0." in name


def all_frozen(provider):
    return provider().requires_grad_(False)


RECOMPUTED = [
    dict(granularity="full", method="uniform"),
    dict(granularity="full", method="block"),
]


@pytest.mark.parametrize("recompute", RECOMPUTED, ids=["uniform", "block"])
@pytest.mark.parametrize(
    "model, data",
    [(UNTIED, uneven), (PAIRS, bert_rows), (T5 | RELATIVE | dict(steps=4), pairs)],
    ids=["gpt", "bert", "t5"],
)
def test_layers_after_a_frozen_front_are_trained_under_recomputation(model, data, recompute):
    plain = short(prepare_model=frozen_front, **model)
    recomputed = attrs.evolve(plain, recompute=mf.RecomputeConfig(**recompute))
    assert_equal(run_trained(plain, data), [run_trained(recomputed, data)])


@pytest.mark.parametrize(
    "processes, layout",
    [
        (2, dict(pp=2)),
        (2, dict(pp=2, **RECOMPUTED[0])),
        (2, dict(tp=2, sequence_parallel=True, **RECOMPUTED[1])),
    ],
    ids=["pp2", "pp2-uniform", "tp2-sp-block"],
)
def test_a_frozen_front_obeys_the_law(processes, layout, pool):
    """Among them a first stage on which nothing is trained."""
    (single,) = pool(1, run_trained, short(prepare_model=frozen_front, **UNTIED))
    config = short(prepare_model=frozen_front, **UNTIED, **layout)
    assert_equal(single, pool(processes, run_trained, config))


def test_a_model_with_nothing_to_train_is_refused():
    config = short(prepare_model=all_frozen)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        with pytest.raises(mf.ConfigError, match="no parameter of the model is trainable"):
            mf.setup(config, pg)


def one_copy_frozen(provider):
    chunk = provider()
    if chunk.pre_process:
        chunk.embedding.requires_grad_(False)
    return chunk


def refusal(config):
    """What `setup` or the first step refuses."""
    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size()), timeout_seconds=20
    ) as pg:
        with pytest.raises(mf.ConfigError) as error:
            state = mf.setup(config, pg)
            mf.train_step(state, share(uneven(config, 0), config, pg), mf.step_fn("gpt"))
        return str(error.value)


def test_freezing_one_copy_of_a_table_is_refused_on_every_rank(pool):
    for error in pool(2, refusal, short(pp=2, prepare_model=one_copy_frozen)):
        assert "embedding.word_embeddings.weight is frozen on pipeline stages [0]" in error
        assert "trainable on stages [1]" in error


# ------------------------------------------------------------------------------ added modules


class Scaled(torch.nn.Module):
    """A module times a gain that draws its own first values."""

    def __init__(self, module, **attributes):
        super().__init__()
        self.module = module
        self.gain = torch.nn.Parameter(torch.rand(module.weight.shape[0]))
        for name, value in attributes.items():
            setattr(self.gain, name, value)

    def forward(self, hidden, *rest):
        output = self.module(hidden, *rest)
        if isinstance(output, tuple):
            return output[0] * self.gain, *output[1:]
        return output * self.gain


def with_a_gain(provider):
    chunk = provider()
    if chunk.post_process:
        marks = {"sequence_parallel": chunk.plan.mcore.sequence_parallel}
        chunk.decoder.final_layernorm = Scaled(chunk.decoder.final_layernorm, **marks)
    return chunk


def with_an_unmarked_gain(provider):
    """On the columns of a layer that is cut over tp."""
    chunk = provider()
    for layer in chunk.decoder.layers:
        layer.mlp.linear_fc1 = Scaled(layer.mlp.linear_fc1)
    return chunk


def gains(config):
    """The gain's values on this rank, before and after training."""
    _, *parts = run_layout(config)
    return [
        next(values for name, values, *_ in held if name.endswith("gain")).clone() for held in parts
    ]


@pytest.mark.parametrize(
    "layout",
    [
        dict(),
        dict(use_distributed_optimizer=True),
        dict(cp=2),
        dict(tp=2),
        dict(tp=2, sequence_parallel=True),
    ],
    ids=["dp2", "dp2-dist", "cp2", "tp2", "tp2-sp"],
)
def test_replicas_of_an_added_module_start_alike_and_stay_alike(layout, pool):
    first, second = pool(2, gains, short(prepare_model=with_a_gain, **layout))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(*first)


@pytest.mark.parametrize(
    "layout", [dict(tp=2), dict(tp=2, sequence_parallel=True)], ids=["tp2", "tp2-sp"]
)
def test_a_parameter_that_is_cut_without_a_mark_is_refused_in_the_first_step(layout, pool):
    for error in pool(2, refusal, short(prepare_model=with_an_unmarked_gain, **layout)):
        assert "mlp.linear_fc1.gain" in error and "tensor_model_parallel = True" in error


def test_an_added_parameter_keeps_its_value_unless_it_asks_for_one_by_name():
    config = short(prepare_model=with_a_gain)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        chunk = mf.setup(config, pg).chunks[0].module
        gain = chunk.decoder.final_layernorm.gain
        before = gain.detach().clone()
        mf.initialize_weights(chunk, config.model, pg, config.seed)
        assert torch.equal(gain, before)
        gain.initialize_by_name = True
        mf.initialize_weights(chunk, config.model, pg, config.seed)
        name = "decoder.final_layernorm.gain"
        expected = initial_value(name, tuple(gain.shape), config.model, config.seed)
        assert torch.equal(gain, expected)


def with_an_unused_module(provider):
    chunk = provider()
    chunk.unused = torch.nn.Linear(3, 3)
    return chunk


def test_a_parameter_without_a_gradient_is_reported_once():
    config = short(prepare_model=with_an_unused_module)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        state = mf.setup(config, pg)
        batch = share(uneven(config, 0), config, pg)
        with pytest.warns(UserWarning, match="2 trainable .* no gradient .*: unused.bias, unused"):
            state, _ = mf.train_step(state, batch, mf.step_fn("gpt"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mf.train_step(state, batch, mf.step_fn("gpt"))


def test_a_run_with_frozen_parts_is_saved_and_loaded(tmp_path):
    config = short(prepare_model=frozen_front, **UNTIED)
    step = mf.step_fn("gpt")
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        batches = [share(uneven(config, i), config, pg) for i in range(2)]
        state, _ = mf.train_step(mf.setup(config, pg), batches[0], step)
        path = mf.save(state, tmp_path)
        state, metrics = mf.train_step(state, batches[1], step)
        _, again = mf.train_step(mf.load(mf.setup(config, pg), path), batches[1], step)
        assert (again.loss, again.grad_norm) == (metrics.loss, metrics.grad_norm)

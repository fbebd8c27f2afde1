"""What users add to a model, or freeze in it: the same in every layout, or refused at once."""

import warnings
from functools import partial

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


@pytest.mark.parametrize(
    "model, data",
    [(UNTIED, uneven), (PAIRS, bert_rows), (T5 | RELATIVE | dict(steps=4), pairs)],
    ids=["gpt", "bert", "t5"],
)
def test_layers_after_a_frozen_front_are_trained_under_recomputation(model, data):
    plain = short(prepare_model=frozen_front, **model)
    single = run_trained(plain, data)
    for recompute in RECOMPUTED:
        recomputed = attrs.evolve(plain, recompute=mf.RecomputeConfig(**recompute))
        assert_equal(single, [run_trained(recomputed, data)])


UNIFORM, BLOCK = RECOMPUTED
SP = dict(tp=2, sequence_parallel=True)
T5_MODEL = T5 | RELATIVE | dict(steps=4)
FROZEN_FRONTS = {
    "gpt": (UNTIED, uneven, [dict(pp=2), dict(pp=2) | UNIFORM, SP | BLOCK, dict(pp=2, vpp=2)]),
    "bert": (
        PAIRS | UNTIED,
        bert_rows,
        [SP | UNIFORM, dict(pp=2) | BLOCK, dict(pp=2, vpp=2) | UNIFORM],
    ),
    "t5": (T5_MODEL | UNTIED, pairs, [dict(tp=2) | UNIFORM, SP | BLOCK, dict(pp=2) | BLOCK]),
}


def run_many_trained(configs, data):
    """`run_trained` of several layouts of one number of processes, one after the other."""
    return [run_trained(config, data) for config in configs]


@pytest.mark.parametrize("name", FROZEN_FRONTS)
def test_a_frozen_front_obeys_the_law(name, pool):
    """Among them a first stage on which nothing is trained."""
    model, data, layouts = FROZEN_FRONTS[name]
    single = run_trained(short(prepare_model=frozen_front, **model), data)
    configs = [short(prepare_model=frozen_front, **model, **layout) for layout in layouts]
    for results in zip(*pool(2, run_many_trained, configs, data), strict=True):
        assert_equal(single, results)


def frozen_tables(provider):
    """Every table, in all its copies: words, positions, distances, and the tied output layer."""
    chunk = provider()
    for name, parameter in chunk.named_parameters():
        if name.startswith("embedding.") or "relative_attention_bias" in name:
            parameter.requires_grad_(False)
        if name == "output_layer.weight":
            parameter.requires_grad_(False)
    return chunk


def run_without_tables(configs, data):
    """The results of several layouts without the tables, which must not move."""
    results = []
    for config in configs:
        curve, before, after = run_layout(config, data)
        for (name, first, *_), (_, last, *_) in zip(before, after, strict=True):
            assert not is_table(name) or torch.equal(first, last), name
        results.append(
            (curve, *([p for p in end if not is_table(p[0])] for end in (before, after)))
        )
    return results


def is_table(name):
    return name.startswith("embedding.") or "relative_attention_bias" in name


@pytest.mark.parametrize(
    "model, data, layouts",
    [
        (dict(), uneven, [dict(pp=2), SP | UNIFORM]),
        (T5_MODEL, pairs, [dict(pp=2) | UNIFORM, dict(tp=2)]),
    ],
    ids=["gpt", "t5"],
)
def test_tables_that_are_frozen_in_all_their_copies_obey_the_law(model, data, layouts, pool):
    (single,) = run_without_tables([short(prepare_model=frozen_tables, **model)], data)
    configs = [short(prepare_model=frozen_tables, **model, **layout) for layout in layouts]
    for results in zip(*pool(2, run_without_tables, configs, data), strict=True):
        assert_equal(single, results)


def only_biases(provider):
    """What is trained are the biases of frozen weights, and norms."""
    chunk = provider()
    for parameter in chunk.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    return chunk


def run_biases(configs, data):
    results = []
    for config in configs:
        curve, *ends = run_layout(config, data)
        results.append((curve, *([p for p in end if p[1].dim() == 1] for end in ends)))
    return results


def test_biases_of_frozen_weights_obey_the_law(pool):
    """megatron-core gives them no gradient, in a column-parallel layer."""
    (single,) = run_biases([short(prepare_model=only_biases, **PAIRS)], bert_rows)
    layouts = [dict(tp=2), SP | UNIFORM, dict(pp=2) | BLOCK]
    configs = [short(prepare_model=only_biases, **PAIRS, **layout) for layout in layouts]
    for results in zip(*pool(2, run_biases, configs, bert_rows), strict=True):
        assert_equal(single, results)


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


class Gated(torch.nn.Module):
    """A column-parallel layer times 1 + gate * gain. The gate starts at zero, so that the gain has
    no gradient until the gate was updated; nothing says that the gain is cut."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        columns = module.weight.shape[0]
        self.gate = torch.nn.Parameter(torch.zeros(columns))
        self.gate.tensor_model_parallel = True
        self.gate.partition_dim = 0
        self.gain = torch.nn.Parameter(torch.ones(columns))

    def forward(self, hidden):
        output, bias = self.module(hidden)
        return output * (1 + self.gate * self.gain), bias


def with_a_gate(provider):
    chunk = provider()
    for layer in chunk.decoder.layers:
        layer.mlp.linear_fc1 = Gated(layer.mlp.linear_fc1)
    return chunk


def late_refusal(config):
    """What is left to compare after each step, until one is refused, and the error."""
    unproven = []
    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size()), timeout_seconds=20
    ) as pg:
        state = mf.setup(config, pg)
        with pytest.raises(mf.ConfigError) as error:
            for i in range(4):
                batch = share(uneven(config, i), config, pg)
                state, _ = mf.train_step(state, batch, mf.step_fn("gpt"))
                unproven.append(sorted(state.unproven.names))
        return unproven, str(error.value)


def test_a_parameter_whose_first_gradients_are_zero_is_compared_once_they_are_not(pool):
    """The second step's warm-up leaves the gate at zero for one more step."""
    config = short(prepare_model=with_a_gate, tp=2, warmup_iters=2)
    for unproven, error in pool(2, late_refusal, config):
        assert unproven and all(
            len(names) == 4 and "linear_fc1.gain" in names[0] for names in unproven
        )
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


def third_step(config, folder, *, written):
    """Loss and gradient norm of the third step: before it the run is saved, or loaded."""
    groups = mf.build_groups(config.parallel, mf.world_size())
    step = mf.step_fn("gpt")
    with mf.init_groups(groups, timeout_seconds=60) as pg:
        state = mf.setup(config, pg)
        batches = [share(uneven(config, i), config, pg) for i in range(3)]
        if written:
            state = mf.load(state, folder)
        else:
            for batch in batches[:2]:
                state, _ = mf.train_step(state, batch, step)
            mf.save(state, folder)
        _, metrics = mf.train_step(state, batches[2], step)
        return metrics.loss, metrics.grad_norm


def third_steps(configs, folder):
    return [third_step(config, folder, written=True) for config in configs]


@pytest.mark.parametrize(
    "layout",
    [dict(use_distributed_optimizer=True), SP | dict(dtype="bf16")],
    ids=["dp2-dist", "tp2-sp-bf16"],
)
def test_a_frozen_run_of_one_layout_is_loaded_in_others(layout, pool, tmp_path):
    """Among them stages on which nothing is trained."""
    model = UNTIED | {key: layout[key] for key in layout if key == "dtype"}
    config = short(prepare_model=frozen_front, **UNTIED, **layout)
    expected, _ = pool(2, partial(third_step, written=False), config, tmp_path)
    layouts = [dict(pp=2), dict(tp=2)]
    configs = [short(prepare_model=frozen_front, **model, **changes) for changes in layouts]
    results = [third_step(short(prepare_model=frozen_front, **model), tmp_path, written=True)]
    for of_rank in pool(2, third_steps, configs, tmp_path):
        results.extend(of_rank)
    tolerance = 2e-2 if "dtype" in layout else 1e-4
    for result in results:
        assert result == pytest.approx(expected, rel=tolerance)

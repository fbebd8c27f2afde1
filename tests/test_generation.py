"""Text out of a model: every layout continues prompts as the whole sequence, computed anew for
each token, says."""

import math
import re

import attrs
import pytest
import torch

import megafn as mf
from equivalence import short
from megafn.pure.generation import uniform
from megafn.runtime.generation.sampling import next_tokens

PROMPTS = ((5, 6, 7), (1, 2, 3, 4, 5, 6, 7, 8, 9), (11,), (3, 1, 4, 1, 5), (90, 2))
GREEDY = mf.GenerationConfig(max_new_tokens=7, temperature=0.0, logprobs=True)
DRAWN = mf.GenerationConfig(
    max_new_tokens=7, temperature=0.8, top_k=40, top_p=0.95, seed=3, logprobs=True
)
SP = dict(sequence_parallel=True)
# initial values so large that the next token is a matter of all tokens before it
GPT_2 = dict(init_method_std=0.3, tie_word_embeddings=False)
LLAMA = GPT_2 | dict(
    position_embedding="rope",
    normalization="RMSNorm",
    activation="swiglu",
    add_bias_linear=False,
    num_query_groups=2,
)
WINDOW = LLAMA | dict(sliding_window=4, layers_without_rope=(1, 2), parallel_residual=True)
MODELS = {"gpt2": GPT_2, "llama": LLAMA, "window": WINDOW}


def made(config):
    return mf.build_groups(config.parallel, mf.world_size())


def continued(cases, prompts=PROMPTS):
    """What each (config, generation config) makes of the prompts."""
    results = []
    for config, generation in cases:
        with mf.init_groups(made(config)) as pg:
            state = mf.setup(config, pg)
            numbers = torch.get_rng_state()
            results.append(mf.generate(state, prompts, generation))
            assert torch.equal(numbers, torch.get_rng_state())
            assert all(chunk.training for chunk in state.chunks)
    return results


def computed_anew(config, generation, prompts):
    """The same from `logits` of each prompt alone, without padding or a cache."""
    with mf.init_groups(made(config)) as pg:
        state = mf.setup(config, pg)
        tokens = []
        logprobs = []
        for row, prompt in enumerate(prompts):
            ids = list(prompt)
            sums = []
            for step in range(generation.max_new_tokens):
                last = mf.logits(state, torch.tensor([ids]))[:, -1]
                token, logprob = next_tokens(last, generation, [row], step)
                ids.append(int(token))
                sums.append(float(logprob))
            tokens.append(tuple(ids[len(prompt) :]))
            logprobs.append(tuple(sums))
    return mf.Generated(tokens=tuple(tokens), logprobs=tuple(logprobs))


@pytest.fixture(scope="module")
def expected(pool):
    """What one process computes anew: {(model, generation config): Generated}."""
    return {
        (name, generation): pool(1, computed_anew, short(**model), generation, PROMPTS)[0]
        for name, model in MODELS.items()
        for generation in (GREEDY, DRAWN)
    }


def assert_same(found, expected):
    assert found.tokens == expected.tokens
    for row, of_expected in zip(found.logprobs, expected.logprobs, strict=True):
        assert row == pytest.approx(of_expected, abs=1e-4)


@pytest.mark.parametrize(
    "processes, layouts",
    [
        (1, [{}]),
        (2, [dict(tp=2), dict(tp=2, **SP), dict(pp=2), dict(pp=2, vpp=2), dict(cp=2), {}]),
        (4, [dict(tp=2, pp=2), dict(tp=2, pp=2, **SP), dict(pp=4)]),
    ],
)
def test_every_layout_continues_alike(processes, layouts, expected, pool):
    cases = [
        (name, generation, layout)
        for layout in layouts
        for name in MODELS
        for generation in (GREEDY, DRAWN)
    ]
    configs = [(short(**MODELS[name] | layout), generation) for name, generation, layout in cases]
    for of_rank in pool(processes, continued, configs, timeout=300):
        for (name, generation, _), found in zip(cases, of_rank, strict=True):
            assert_same(found, expected[name, generation])


def test_texts_differ_from_step_to_step(expected):
    for generated in expected.values():
        assert len({token for tokens in generated.tokens for token in tokens}) > 10
    greedy, drawn = (expected["gpt2", generation] for generation in (GREEDY, DRAWN))
    assert greedy.tokens != drawn.tokens


def neighbours_and_stops(config):
    """Continuations of all prompts, of the first alone, with stop ids, and what came as it came."""
    with mf.init_groups(made(config)) as pg:
        state = mf.setup(config, pg)
        everything = mf.generate(state, PROMPTS, DRAWN)
        first = mf.generate(state, PROMPTS[:1], DRAWN)
        stop = everything.tokens[1][2]
        stopping = attrs.evolve(DRAWN, stop_token_ids=(stop, 96))
        heard = []
        stopped = mf.generate(state, PROMPTS, stopping, on_token=lambda *token: heard.append(token))
        tensor = mf.generate(state, torch.tensor([PROMPTS[0], PROMPTS[0]]), GREEDY)
        return everything, first, stop, stopped, heard, tensor


def test_rows_are_independent_and_stop_at_their_stop_tokens(pool):
    for rank, (everything, first, stop, stopped, heard, tensor) in enumerate(
        pool(2, neighbours_and_stops, short(**GPT_2, pp=2))
    ):
        assert first.tokens[0] == everything.tokens[0]
        for full, cut in zip(everything.tokens, stopped.tokens, strict=True):
            ends = [i for i, token in enumerate(full) if token in (stop, 96)]
            assert cut == (full[: ends[0] + 1] if ends else full)
        assert len(stopped.tokens[1]) <= 3
        assert tensor.tokens[0] == tensor.tokens[1]
        if rank > 0:
            assert heard == []
            continue
        for row, tokens in enumerate(stopped.tokens):
            of_row = [(token, logprob) for number, token, logprob in heard if number == row]
            assert of_row == list(zip(tokens, stopped.logprobs[row], strict=True))


def without_training(config, path):
    """The text of a saved model whose state has weights only, and what it refuses."""
    groups = mf.build_groups(config.parallel, mf.world_size())
    with mf.init_groups(groups, timeout_seconds=60) as pg:
        state = mf.setup(config, pg)
        whole = mf.generate(state, PROMPTS, GREEDY).tokens
        mf.save(state, path)
        state = mf.from_pretrained(mf.setup(config, pg, for_training=False), path)
        parameters = [p for chunk in state.chunks for p in chunk.parameters()]
        assert not any(p.requires_grad or hasattr(p, "main_grad") for p in parameters)
        assert not list(state.optimizer.param_groups)
        with pytest.raises(ValueError, match=r"setup\(for_training=False\) made it"):
            mf.train_step(state, [], mf.step_fn("gpt"))
        with pytest.raises(ValueError, match="could not resume from its checkpoint"):
            mf.save(state, path)
        return whole, mf.generate(state, PROMPTS, GREEDY).tokens


def test_a_state_that_is_not_for_training_has_weights_only_and_the_same_text(pool, tmp_path):
    config = short(**LLAMA, dtype="bf16", pp=2, use_distributed_optimizer=True)
    for whole, frozen in pool(2, without_training, config, tmp_path):
        assert whole == frozen


def own_model(config, pg, **place):
    """A model whose layers have a module of a user's, which looks one position back."""
    chunk = mf.build_chunk(config, pg, **place)
    for layer in chunk.decoder.layers:
        layer.input_layernorm = Shift(layer.input_layernorm)
    return chunk


class Shift(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden):
        hidden = self.norm(hidden)
        before = torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]])
        return hidden + before


def with_own_model(config):
    with mf.init_groups(made(config)) as pg:
        state = mf.setup(config, pg, model=own_model)
        return mf.generate(state, PROMPTS, GREEDY), computed_anew_in(state)


def computed_anew_in(state):
    ids = list(PROMPTS[1])
    for _ in range(GREEDY.max_new_tokens):
        ids.append(int(mf.logits(state, torch.tensor([ids]))[0, -1].argmax()))
    return tuple(ids[len(PROMPTS[1]) :])


def test_a_model_with_modules_of_a_users_is_computed_anew(pool):
    for generated, anew in pool(2, with_own_model, short(**LLAMA, pp=2)):
        assert generated.tokens[1] == anew


BAD = [
    ([], GREEDY, r"prompts = \[\]: give at least one"),
    ([(1,), ()], GREEDY, r"prompts\[1\] is empty"),
    ([(1, 97)], GREEDY, r"prompts\[0\] has the id 97: must be from 0 to 96"),
    ([(1,) * 27], GREEDY, "27 tokens, with 7 new ones 34: the position table has 32 rows"),
    (["text"], GREEDY, r"prompts\[0\] = 'text': expected a sequence of token ids"),
    ([(1.5,)], GREEDY, "expected a sequence of token ids"),
    (PROMPTS, attrs.evolve(GREEDY, max_new_tokens=0), "max_new_tokens = 0: must be at least 1"),
    (PROMPTS, attrs.evolve(GREEDY, temperature=-1.0), "temperature = -1.0: must be at least 0"),
    (PROMPTS, attrs.evolve(GREEDY, top_k=0), "top_k = 0: must be at least 1"),
    (PROMPTS, attrs.evolve(GREEDY, temperature="hot"), "temperature = 'hot': must be a number"),
    (None, GREEDY, "prompts = 'None': expected a list with the token ids of each prompt"),
    (PROMPTS, attrs.evolve(GREEDY, top_p=0.0), "top_p = 0.0: must be above 0"),
    (PROMPTS, attrs.evolve(GREEDY, stop_token_ids=(97,)), "97 is outside the vocabulary"),
]


def refused(config):
    """What each bad input, prompts that differ and a failing `on_token` raise on this rank."""
    with mf.init_groups(made(config), timeout_seconds=60) as pg:
        state = mf.setup(config, pg)
        calls = [lambda p=p, g=g: mf.generate(state, p, g) for p, g, _ in BAD]
        calls.append(lambda: mf.generate(state, PROMPTS[pg.rank :], GREEDY))
        calls.append(lambda: mf.generate(state, PROMPTS, GREEDY, on_token=lambda *_: 1 / 0))
        calls.append(lambda: with_nan_weights(state))
        # nothing of the failed call is still on its way
        calls.append(lambda: mf.generate(state, PROMPTS[pg.rank :], GREEDY))
        messages = []
        for call in calls:
            with pytest.raises(Exception) as caught:
                call()
            messages.append((type(caught.value).__name__, str(caught.value)))
        return messages


def with_nan_weights(state):
    for chunk in state.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    mf.generate(state, PROMPTS, GREEDY)


def test_bad_input_is_one_sentence_on_every_rank(pool):
    for rank, messages in enumerate(pool(2, refused, short(**GPT_2, pp=2))):
        *bad, differ, on_token, nan, afterwards = messages
        for (_, text), (_, _, pattern) in zip(bad, BAD, strict=True):
            assert re.search(pattern, text) and "\n" not in text, text
        assert differ[1].startswith("prompts: differ between ranks")
        kind = "ZeroDivisionError" if rank == 0 else "RuntimeError"
        assert on_token[0] == kind and "division by zero" in on_token[1]
        assert "logits are not numbers" in nan[1]
        assert afterwards == differ


# -------------------------------------------------------------------------------------- drawing


def test_filters_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.generation import logits_process

    from megafn.runtime.generation.sampling import _keep_top_k, _keep_top_p

    assert transformers
    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(0)) * 3
    for mass in (0.1, 0.5, 0.95, 0.999):
        theirs = logits_process.TopPLogitsWarper(mass)(None, logits)
        assert torch.equal(_keep_top_p(logits, mass), theirs)
    for count in (1, 5, 200):
        theirs = logits_process.TopKLogitsWarper(count)(None, logits)
        assert torch.equal(_keep_top_k(logits, count), theirs)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(4000, -1)
    generation = mf.GenerationConfig(temperature=0.7)
    ids, _ = next_tokens(logits, generation, range(4000), step=5)
    shares = torch.bincount(ids, minlength=4) / 4000
    assert torch.allclose(shares, (logits[0] / 0.7).softmax(-1), atol=0.03)
    assert 0 <= min(uniform(1, row, 0) for row in range(1000)) < 0.01


@pytest.mark.parametrize("temperature", [1e-3, 1e-39, 1e-50, 1e-300])
def test_the_lower_the_temperature_the_likelier_the_token(temperature):
    generation = mf.GenerationConfig(temperature=temperature, top_k=3, top_p=0.9)
    ids, _ = next_tokens(torch.tensor([[1.0, 90.0, 3.0, 2.0]]), generation, [0], step=0)
    assert ids.tolist() == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_give_no_token(bad, temperature):
    logits = torch.tensor([[0.0, bad, 2.0], [0.0, -math.inf, 2.0]])
    generation = mf.GenerationConfig(temperature=temperature)
    ids, logprobs = next_tokens(logits, generation, range(2), step=0)
    assert ids[0] == -1 and ids[1] in (0, 2) and logprobs[1].isfinite()

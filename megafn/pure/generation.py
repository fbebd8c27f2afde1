"""How text is generated: a config of its own, and the random number of each token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from operator import index

from attrs import field, frozen

from megafn.pure.config.problems import Problem, config_error


def _as_tuple(ids: Iterable[int]) -> tuple[int, ...]:
    """Raises ConfigError if they are not integers, of Python or numpy."""
    try:
        return tuple(index(token) for token in ids)
    except TypeError:
        remedy = "must be a sequence of integers; for one token give (id,)"
        raise config_error([Problem("stop_token_ids", ids, remedy)]) from None


@frozen(kw_only=True)
class GenerationConfig:
    """How `generate` continues prompts.

    max_new_tokens: of each prompt, at most.
    temperature: logits are divided by it before sampling; 0 takes the most likely token.
    top_k: sample from that many of the most likely tokens only. None: from all.
    top_p: sample from the fewest of the most likely tokens whose probabilities sum up to this
        (nucleus sampling, arXiv 1904.09751). 1: from all. Applied after temperature and top_k.
    seed: with it, the number of the prompt and the number of the token decide what is drawn.
    stop_token_ids: a prompt is done after one of them, which is kept. (): only max_new_tokens ends.
    logprobs: also return log-probabilities of the new tokens: the model's own, in nats, before
        temperature, top_k and top_p.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = field(default=(), converter=_as_tuple)
    logprobs: bool = False


def check_generation(config: GenerationConfig, vocab_size: int) -> None:
    """Raises ConfigError with every problem of a config for a vocabulary of this size."""
    problems = list(_type_problems(config)) or list(_problems(config, vocab_size))
    if problems:
        raise config_error(problems)


def _type_problems(config: GenerationConfig) -> Iterator[Problem]:
    for name in ("max_new_tokens", "seed", "top_k"):
        value = getattr(config, name)
        if type(value) is not int and not (name == "top_k" and value is None):
            yield Problem(name, value, "must be an integer")
    for name in ("temperature", "top_p"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield Problem(name, value, "must be a number")


def _problems(config: GenerationConfig, vocab_size: int) -> Iterator[Problem]:
    if config.max_new_tokens < 1:
        yield Problem(
            "max_new_tokens", config.max_new_tokens, "must be at least 1; raise it, or don't call"
        )
    if not config.temperature >= 0:
        yield Problem("temperature", config.temperature, "must be at least 0; raise it")
    if config.top_k is not None and config.top_k < 1:
        yield Problem("top_k", config.top_k, "must be at least 1; raise it, or leave it out")
    if not 0 < config.top_p <= 1:
        yield Problem("top_p", config.top_p, "must be above 0 and at most 1; 1 samples from all")
    for token in config.stop_token_ids:
        if not 0 <= token < vocab_size:
            yield Problem(
                "stop_token_ids",
                config.stop_token_ids,
                f"{token} is outside the vocabulary of {vocab_size} ids; leave it out",
            )


def uniform(seed: int, row: int, step: int) -> float:
    """A number in [0, 1) for the token number `step` of the prompt number `row`.

    It is a hash of the three, so it depends neither on the other prompts nor on the layout.

    >>> uniform(0, 3, 5) == uniform(0, 3, 5), uniform(0, 3, 5) == uniform(0, 3, 6)
    (True, False)
    """
    digest = hashlib.sha256(f"generate {seed} {row} {step}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48

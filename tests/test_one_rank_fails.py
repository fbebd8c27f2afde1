"""What fails on one rank is raised on every rank: none waits for that rank until the timeout."""

import contextlib
import os
from functools import partial
from pathlib import Path
from unittest import mock

import attrs
import torch

import megafn as mf
from checkpoint_runs import text_config, train, with_checkpoint
from megafn.runtime.checkpoint import load, resume, save
from megafn.runtime.pretrained import megafn_checkpoint, start
from megafn.runtime.pretrained.load import read_base
from megafn.runtime.training import fit, replay

RANK_ZERO = 0
RANK_ONE = 1


@contextlib.contextmanager
def failing(rank, owner, name):
    """On that rank the function raises OSError."""
    if int(os.environ["RANK"]) != rank:
        yield
        return
    error = OSError(5, "Input/output error", name)
    with mock.patch.object(owner, name, side_effect=error):
        yield


def raised(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def loop(config, use):
    """use(state) in process groups of its own."""
    groups = mf.build_groups(config.parallel, mf.world_size(), model=config.model)
    with mf.init_groups(groups, timeout_seconds=60) as pg:
        use(mf.setup(config, pg))


def fit_it(state):
    mf.fit(state, mf.step_fn("gpt"))


def adds_a_buffer(provider):
    """The last stage has a buffer, which checkpoints cannot hold."""
    chunk = provider()
    if chunk.post_process:
        chunk.register_buffer("seen", torch.zeros(1))
    return chunk


def expects_an_embedding(provider):
    """Only the first stage has one."""
    chunk = provider()
    chunk.embedding.requires_grad_(False)
    return chunk


class Unpicklable(Exception):
    def __init__(self, word, number):
        super().__init__(f"{word} {number}")


def raises_what_cannot_be_pickled(provider):
    chunk = provider()
    if chunk.pre_process:
        raise Unpicklable("word", 7)
    return chunk


def resumed(state):
    return resume.resume(state, None, read_base)


def errors(folder):
    """What each call raises on this rank, by name."""
    rank = int(os.environ["RANK"])
    config = text_config(folder / "runs", steps=3, pp=2)
    fresh = text_config(folder / "fresh", steps=3, pp=2)
    train(config)
    shorter = attrs.evolve(config, train_iters=4)
    here = folder / f"host{rank}.txt"
    if rank == 0:
        here.write_text(Path(config.data.train).read_text()[:20_000])
    elsewhere = attrs.evolve(config.data, train=str(here), cache=str(folder / "cache"))
    log = attrs.evolve(config.log, jsonl=f"{mf.demo_text()}/log.jsonl")
    with_buffer = attrs.evolve(fresh, prepare_model=adds_a_buffer)

    found = {}
    with failing(RANK_ZERO, resume, "describe_data"):
        found["describe_data"] = raised(partial(mf.train, shorter))
    with failing(RANK_ZERO, resume, "first_sample"):
        found["first_sample"] = raised(partial(mf.train, shorter))
    with failing(RANK_ZERO, resume, "checkpoints"):
        found["checkpoints"] = raised(partial(loop, config, resumed))
    with failing(RANK_ZERO, load, "latest"):
        found["latest"] = raised(partial(loop, config, lambda state: mf.load(state, folder)))
    with failing(RANK_ZERO, replay, "checkpoints"):
        found["replay"] = raised(partial(mf.replay, config, 3))
    with failing(RANK_ZERO, fit, "describe_data"):
        found["description"] = raised(partial(loop, fresh, fit_it))
    with failing(RANK_ONE, fit, "identify"):
        found["identify"] = raised(partial(loop, fresh, fit_it))
    with failing(RANK_ONE, fit, "build_dataset"):
        found["build_dataset"] = raised(partial(loop, fresh, fit_it))
    with failing(RANK_ONE, save, "adam_step"):
        found["save"] = raised(partial(loop, fresh, lambda state: mf.save(state, folder / "new")))
    with_weights = with_checkpoint(fresh, pretrained=str(folder / "runs"))
    start_anew = partial(
        loop,
        fresh,
        lambda state: start.start_from_pretrained(attrs.evolve(state, config=with_weights)),
    )
    for name in ("latest", "find_weights"):
        with failing(RANK_ZERO, start, name):
            found[f"start, {name}"] = raised(start_anew)
    with failing(RANK_ZERO, megafn_checkpoint, "fingerprint_of"):
        found["start, fingerprint"] = raised(start_anew)
    found["corpora"] = raised(partial(loop, attrs.evolve(fresh, data=elsewhere), fit_it))
    found["jsonl"] = raised(partial(mf.train, attrs.evolve(fresh, log=log)))
    found["buffer, train"] = raised(partial(mf.train, with_buffer))
    found["buffer, save"] = raised(
        partial(loop, with_buffer, lambda state: mf.save(state, folder / "new"))
    )
    for name, prepare in (
        ("prepare_model", expects_an_embedding),
        ("cannot be pickled", raises_what_cannot_be_pickled),
    ):
        prepared = attrs.evolve(fresh, prepare_model=prepare)
        found[name] = raised(partial(mf.train, prepared))

    damaged = mf.latest(folder / "runs")
    if rank == 0:
        (damaged / "rank-00000.safetensors").write_bytes(b"damaged")
    elder = with_checkpoint(config, on_damage="previous")
    with failing(RANK_ZERO, Path, "rename"):
        found["set aside"] = raised(partial(mf.train, elder))
    return found


def test_an_error_of_one_rank_is_raised_on_every_rank(pool, tmp_path):
    first, second = pool(2, errors, tmp_path)
    own = first.pop("cannot be pickled")
    assert own == "Unpicklable: word 7"
    assert second.pop("cannot be pickled") == "RuntimeError: Unpicklable: word 7"
    assert first == second
    for name in ("corpora", "jsonl", "buffer, train", "buffer, save"):
        assert first.pop(name).startswith("ConfigError: ")
    assert first.pop("prepare_model").startswith("AttributeError: ")
    assert len(first) == 13
    for name, error in first.items():
        assert error.startswith("OSError: [Errno 5] Input/output error"), (name, error)

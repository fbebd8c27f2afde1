"""Configs, data and runs of the checkpoint tests; the functions run in the pool's workers."""

import os
import warnings
from typing import NamedTuple

import attrs
import torch

import megafn as mf
import t5_rows
from bert_rows import bert_rows
from equivalence import as_of_two, local_parts, share, stack, tiny, uneven

SP = dict(sequence_parallel=True)
DIST = dict(use_distributed_optimizer=True)
UNTIED = dict(tie_word_embeddings=False)
T5 = t5_rows.T5 | dict(num_query_groups=None)
BERT = dict(family="bert", num_tokentypes=2, bert_binary_head=True)

SAVED = 3  # the iteration of the checkpoint that `run` writes, of 6


# ----------------------------------------------------------------------- a loop of train steps


def config_of(**changes):
    return tiny(**dict(steps=6, num_query_groups=2, warmup_iters=1) | changes)


def rows_of(config, iteration):
    """One global batch for the config's family, however the config cuts it."""
    data = {"gpt": uneven, "bert": bert_rows, "t5": t5_rows.pairs}[config.model.family]
    return as_of_two(config, iteration, data)


def probe(state):
    """Logits of a fixed input."""
    if state.config.model.family == "t5":
        return probe_t5(state)
    tokens = torch.arange(40).reshape(2, 20) % state.config.model.vocab_size
    logits = mf.logits(state, tokens)
    # BERT's are a pair: those of the tokens, and those of the order of sentences
    return logits[0] if isinstance(logits, tuple) else logits


def probe_t5(state):
    """Logits of a batch: T5's decoder needs an input of its own."""
    asking = attrs.evolve(state, config=attrs.evolve(state.config, return_logits="every_stage"))
    rows = t5_rows.pairs(state.config, 0)[: state.config.micro_batch_size]
    batch = stack([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
    (logits,) = mf.evaluate(asking, [[batch]], mf.step_fn("t5")).logits
    return logits[0]


def run(config, directory=None, at=None, stop=None):
    """Trains to the end, or to iteration `stop`, and saves in `directory` at iteration `at`.

    Without `at` it resumes from the checkpoint in `directory`.
    Returns (curve, parameters at first, at last, the logits where it loaded or saved).
    """
    groups = mf.build_groups(config.parallel, mf.world_size(), model=config.model)
    with mf.init_groups(groups, timeout_seconds=60) as pg:
        state = mf.setup(config, pg)
        step = mf.step_fn(config.model.family)
        start = local_parts(state)
        logits = None
        curve = []
        if directory is not None and at is None:
            state = mf.load(state, directory)
            logits = probe(state)
        for iteration in range(state.iteration, stop or config.train_iters):
            batch = share(rows_of(config, iteration), config, pg)
            state, metrics = mf.train_step(state, batch, step)
            curve.append((metrics.loss, metrics.grad_norm))
            if state.iteration == at:
                mf.save(state, directory)
                logits = probe(state)
        return curve, start, local_parts(state), logits


# ------------------------------------------------------------------------------------- `train`


class Trained(NamedTuple):
    """What one rank saw of `train`."""

    curve: list  # (iteration, loss, grad norm)
    parameters: list | None  # None: it did not come to its end
    exit_code: int | None  # None: it did not leave with SystemExit
    warnings: list


class Stopped(Exception):
    pass


def train(config, *, stop=None, at=None, act=None, rank=None, data=None, **arguments):
    """`train` of one rank, which is stopped hard at iteration `stop`.

    At iteration `at` it calls act() on `rank` (None: on all). data(config): its batches.
    """
    curve = []
    parameters = None
    exit_code = None
    if data is not None:
        arguments["batches"] = data(config)

    def watch(metrics):
        curve.append((metrics.iteration, metrics.loss, metrics.grad_norm))
        if metrics.iteration == at and rank in (None, int(os.environ.get("RANK", "0"))):
            act()
        if metrics.iteration == stop:
            raise Stopped

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            parameters = local_parts(mf.train(config, on_metrics=[watch], **arguments))
        except Stopped:
            pass
        except SystemExit as leaving:
            exit_code = leaving.code
    texts = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    return Trained(curve, parameters, exit_code, texts)


def text_config(directory=None, **changes):
    """Dropout, real text; saves every other iteration if there is a directory."""
    defaults = dict(
        steps=7,
        vocab_size=256,
        hidden_dropout=0.1,
        global_batch_size=8,
        warmup_iters=1,
        eval_iters=0,
    )
    checkpoint = mf.CheckpointConfig()
    if directory is not None:
        checkpoint = mf.CheckpointConfig(directory=str(directory), interval=2, keep_last=0)
    return attrs.evolve(
        tiny(**defaults | changes),
        data=mf.DataConfig(train=mf.demo_text(), sampler="cyclic"),
        log=mf.LogConfig(progress=False),
        checkpoint=checkpoint,
    )


def without_checkpoints(config):
    return attrs.evolve(config, checkpoint=mf.CheckpointConfig())


def with_checkpoint(config, **changes):
    """The config with other checkpoint settings."""
    return attrs.evolve(config, checkpoint=attrs.evolve(config.checkpoint, **changes))


def loader(config, start=0, draw=0):
    """Micro-batches of one data-parallel rank, as a user's loader gives them.

    They are the same each time it is iterated.
    """
    size = config.micro_batch_size
    for iteration in range(start, config.train_iters):
        rows = rows_of(config, iteration + draw)
        for i in range(0, len(rows), size):
            yield stack(rows[i : i + size])


def same(one, other):
    """Whether two ranks hold equal parameters, bit for bit."""
    return all(torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))


def assert_resumed(whole, rest, after):
    """Every rank's run `rest` continues the uninterrupted run `whole` after an iteration."""
    for uninterrupted, resumed in zip(whole, rest, strict=True):
        assert resumed.curve == uninterrupted.curve[after:]
        assert same(uninterrupted.parameters, resumed.parameters)

"""What a checkpoint costs: seconds of save and load, and how an asynchronous save delays a step.

Prints; never asserts speed.
"""

import statistics
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import megafn as mf
from megafn.runtime.checkpoint.save import begin_save, finish_save
from rivals import BATCH, SEQUENCE, VOCABULARY, train_config
from turns import threads

CONFIG = train_config("fp32")
ROUNDS = 5

STEP = "step"
SYNCHRONOUS = "synchronous: the step waits"
ASYNCHRONOUS = "asynchronous: the step waits"
BESIDE = "the step beside the thread"
LOAD = "load"


def timed(seconds, function, *args, **kwargs):
    """The function's result; the seconds that it took are appended."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    seconds.append(time.perf_counter() - start)
    return result


@pytest.mark.timeout(300)
def test_checkpoints(table, tmp_path):
    batch = ({"text": torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1))},)
    seconds = {name: [] for name in (STEP, SYNCHRONOUS, ASYNCHRONOUS, BESIDE, LOAD)}
    train_step = partial(mf.train_step, step=mf.step_fn("gpt"))
    with threads(1), mf.init_groups(mf.build_groups(mf.ParallelConfig(), world_size=1)) as pg:
        state = mf.setup(CONFIG, pg)
        for _ in range(2):
            state, _ = train_step(state, batch)
        for number in range(ROUNDS):
            state, _ = timed(seconds[STEP], train_step, state, batch)
            timed(seconds[SYNCHRONOUS], mf.save, state, tmp_path / f"s{number}")
            directory = tmp_path / f"a{number}"
            saving = timed(seconds[ASYNCHRONOUS], begin_save, state, directory, asynchronous=True)
            state, _ = timed(seconds[BESIDE], train_step, state, batch)
            path = finish_save(saving)
            timed(seconds[LOAD], mf.load, state, path)
        size = sum(file.stat().st_size for file in Path(path).iterdir())
        again = mf.load(mf.setup(CONFIG, pg), path)
        assert again.iteration == state.iteration - 1
    median = {name: statistics.median(each) for name, each in seconds.items()}
    table(
        f"checkpoints: {size / 2**20:.0f} MiB, one process, one thread, {ROUNDS} rounds, "
        "median and worst seconds",
        *(f"{name:34}{median[name]:8.3f}{max(seconds[name]):8.3f}" for name in median),
        f"an asynchronous save delays the run by {median[ASYNCHRONOUS]:.3f} s at once and "
        f"{max(0.0, median[BESIDE] - median[STEP]):.3f} s in the step beside it; a synchronous one "
        f"by {median[SYNCHRONOUS]:.3f} s",
    )

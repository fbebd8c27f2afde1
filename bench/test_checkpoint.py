"""What a checkpoint costs: seconds of save and load, and what a step is delayed by an asynchronous save. Prints; never asserts speed."""

import statistics
import time
from pathlib import Path

import pytest
import torch

import megafn as mf
from megafn.runtime.checkpoint.checkpoint import begin_save, finish_save
from rivals import BATCH, SEQUENCE, VOCABULARY, train_config
from turns import threads

CONFIG = train_config("fp32")
ROUNDS = 5


@pytest.mark.timeout(300)
def test_checkpoints(table, tmp_path):
    batch = ({"text": torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1))},)
    with threads(1), mf.init_groups(mf.build_groups(mf.ParallelConfig(), world_size=1)) as pg:
        state, step = mf.setup(CONFIG, pg), mf.step_fn("gpt")
        seconds = {
            name: []
            for name in (
                "step",
                "synchronous: the step waits",
                "asynchronous: the step waits",
                "the step beside the thread",
                "load",
            )
        }

        def timed(name, function):
            start = time.perf_counter()
            result = function()
            seconds[name].append(time.perf_counter() - start)
            return result

        for _ in range(2):
            state, _ = mf.train_step(state, batch, step)
        for number in range(ROUNDS):
            state, _ = timed("step", lambda: mf.train_step(state, batch, step))
            timed("synchronous: the step waits", lambda: mf.save(state, tmp_path / f"s{number}"))
            saving = timed(
                "asynchronous: the step waits",
                lambda: begin_save(state, tmp_path / f"a{number}", asynchronous=True),
            )
            state, _ = timed(
                "the step beside the thread", lambda: mf.train_step(state, batch, step)
            )
            path = finish_save(saving)
            timed("load", lambda: mf.load(state, path))
        size = sum(file.stat().st_size for file in Path(path).iterdir())
        again = mf.load(mf.setup(CONFIG, pg), path)
        assert again.iteration == state.iteration - 1
    median = {name: statistics.median(each) for name, each in seconds.items()}
    table(
        f"checkpoints: {size / 2**20:.0f} MiB, one process, one thread, {ROUNDS} rounds, median and worst seconds",
        *(f"{name:34}{median[name]:8.3f}{max(seconds[name]):8.3f}" for name in median),
        f"an asynchronous save delays the run by {median['asynchronous: the step waits']:.3f} s at once and "
        f"{max(0.0, median['the step beside the thread'] - median['step']):.3f} s in the step beside it; a synchronous one by "
        f"{median['synchronous: the step waits']:.3f} s",
    )

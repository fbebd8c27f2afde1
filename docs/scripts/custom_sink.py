"""A custom sink: Weights & Biases, offline. Run: torchrun --nproc-per-node 2 custom_sink.py"""

import contextlib
import importlib.util
import os
import tempfile

import megafn as mf


class StandIn:
    """The calls of wandb that this script makes, for machines without it: pip install wandb."""

    def init(self, **settings):
        print(f"wandb is not installed: a stand-in gets {', '.join(settings)}")
        return self

    def log(self, numbers, step):
        print(f"{step:4d}  " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))

    def finish(self):
        print("finished")


def load_wandb():
    if importlib.util.find_spec("wandb") is None:
        return StandIn()
    import wandb

    return wandb


@contextlib.contextmanager
def wandb_sink(config, folder):
    """A function that logs a Metrics record; on rank zero, elsewhere it does nothing.

    folder: where the run is written. Later, `wandb sync` uploads it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield lambda metrics: None
        return
    run = load_wandb().init(project="megafn", mode="offline", dir=folder, config=mf.to_dict(config))

    def sink(metrics):
        run.log(numbers_of(metrics), step=metrics.iteration)

    try:
        yield sink
    finally:
        run.finish()


def numbers_of(metrics):
    """What is logged of an iteration: loss, learning rate, gradient norm and speed."""
    numbers = {
        "train/loss": metrics.loss,
        "train/lr": metrics.lr,
        "train/tokens_per_second": metrics.tokens_per_second,
    }
    if metrics.grad_norm is not None:  # None if it was not finite
        numbers["train/grad_norm"] = metrics.grad_norm
    numbers |= {f"train/{name}": value for name, value in metrics.report.items()}
    if metrics.valid is not None:  # an evaluation after this iteration
        numbers["valid/loss"] = metrics.valid.loss
    return numbers


config = mf.TrainConfig(
    model=mf.ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=64),
    parallel=mf.ParallelConfig(tp=2),
    schedule=mf.ScheduleConfig(lr=2e-3),
    data=mf.DataConfig(train=mf.demo_text()),
    micro_batch_size=4,
    global_batch_size=16,
    train_iters=10,
    eval_interval=5,
    eval_iters=2,
    log=mf.LogConfig(progress=False),
)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, wandb_sink(config, folder) as sink:
        state = mf.train(config, on_metrics=[sink])
    assert state.iteration == 10

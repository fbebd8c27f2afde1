"""Adapters on a frozen model, merged on the way out.

Run: torchrun --nproc-per-node 2 lora.py SOURCE CORPUS TARGET
"""

import sys

import attrs
import megafn as mf

source, corpus, target = sys.argv[1:]

config = mf.TrainConfig(
    model=attrs.evolve(mf.pretrained_model(source), seq_length=64),
    parallel=mf.ParallelConfig(tp=2, sequence_parallel=True),
    prepare_model=mf.lora(
        rank=4, alpha=8.0, modules=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    ),
    recompute=mf.RecomputeConfig(granularity="full"),
    schedule=mf.ScheduleConfig(lr=1e-2, warmup_iters=2),
    data=mf.DataConfig(train=corpus, tokenizer=f"{source}/tokenizer.json"),
    # `train` starts from the weights of `pretrained`, unless the directory holds a checkpoint
    checkpoint=mf.CheckpointConfig(directory=f"{target}-checkpoints", pretrained=source),
    micro_batch_size=4,
    global_batch_size=8,
    train_iters=20,
    eval_iters=0,
)

if __name__ == "__main__":
    losses = []
    mf.train(config, on_metrics=[lambda metrics: losses.append(metrics.loss)])
    assert losses[-1] < losses[0]  # `on_metrics` is called on every rank
    if mf.is_rank_zero():  # one process, no process groups: adapters are merged
        mf.export(f"{target}-checkpoints", target, tokenizer=source)

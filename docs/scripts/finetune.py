"""From a Hugging Face model to a Hugging Face model.

Run: torchrun --nproc-per-node 4 finetune.py SOURCE CORPUS TARGET
"""

import sys

import attrs
import megafn as mf

source, corpus, target = sys.argv[1:]

model = mf.pretrained_model(source)  # config.json alone; no weight is read

config = mf.TrainConfig(
    model=attrs.evolve(model, seq_length=64),
    parallel=mf.ParallelConfig(tp=2, pp=2, sequence_parallel=True),
    schedule=mf.ScheduleConfig(lr=5e-4, warmup_iters=4),
    data=mf.DataConfig(train=corpus, tokenizer=f"{source}/tokenizer.json"),
    micro_batch_size=4,
    global_batch_size=16,
    train_iters=20,
    eval_iters=2,
)

if __name__ == "__main__":
    groups = mf.build_groups(config.parallel, mf.world_size(), model=config.model)
    with mf.init_groups(groups) as pg:
        step = mf.step_fn(config.model.family)
        state = mf.from_pretrained(mf.setup(config, pg), source)  # each rank reads its own slices
        before = mf.evaluate(state, mf.batches(config, pg, split="valid", count=2), step)
        state = mf.fit(state, step)
        after = mf.evaluate(state, mf.batches(config, pg, split="valid", count=2), step)
        mf.to_pretrained(state, target, tokenizer=source)  # transformers loads it
        assert after.loss < before.loss

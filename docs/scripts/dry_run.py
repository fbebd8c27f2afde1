"""A step of one rank of 1,024, by the code of train, without its memory. Run: python dry_run.py"""

import megafn as mf

config = mf.TrainConfig(
    model=mf.ModelConfig(
        num_layers=96, hidden_size=12288, num_attention_heads=96, seq_length=2048, vocab_size=51200
    ),  # GPT-3
    parallel=mf.ParallelConfig(tp=8, pp=8, sequence_parallel=True),
    optimizer=mf.OptimizerConfig(use_distributed_optimizer=True),
    precision=mf.PrecisionConfig(dtype="bf16"),
    micro_batch_size=1,
    global_batch_size=256,
    train_iters=1000,
)

report = mf.dry_run(config, world_size=1024, rank=0)
print(report)  # bytes by kind and at the peak, FLOP, messages and bytes over each group
assert 2.5e9 < report.num_parameters < 3.0e9
assert (
    report.memory.peak.total < 60e9
)  # bytes: this rank's parameters, gradients, optimizer, activations, all at the worst moment
assert report.messages["tp"].bytes > report.messages["pp"].bytes > 0

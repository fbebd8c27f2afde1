"""A custom optimizer: Muon for matrices, AdamW for the rest.

Run: torchrun --nproc-per-node 2 custom_optimizer.py
"""

import megafn as mf
import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer.optimizer import FP32Optimizer


def muon_and_adamw(config, chunks, pg):
    """Muon (kellerjordan.github.io/posts/muon) for the matrices of the layers, AdamW for the rest.

    (config, chunks, pg) -> a megatron-core optimizer, as `setup` and `train` want it. Learning rate
    and weight decay come from the schedule, times a group's lr_mult and wd_mult where it has them.
    """
    check(config)
    matrices, tables, vectors = [], [], []
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.dim() < 2:
                vectors.append(parameter)
            elif "embedding" in name or "output_layer" in name:
                tables.append(parameter)
            else:
                matrices.append(parameter)

    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": tables}, {"params": vectors, "wd_mult": 0.0}]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
    )
    mcore = McoreOptimizerConfig(clip_grad=config.optimizer.clip_grad)
    return ChainedOptimizer(
        [FP32Optimizer(inner, mcore, lambda *_: None) for inner in (muon, adamw)]
    )


def check(config):
    """Raises ConfigError in layouts where this optimizer would be wrong, and without Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise mf.ConfigError(
            f"torch {torch.__version__} has no torch.optim.Muon; install 2.9 or newer"
        )
    if config.parallel.tp > 1:
        raise mf.ConfigError(
            f"parallel.tp = {config.parallel.tp}: Muon orthogonalizes whole matrices, and tensor "
            "parallelism cuts them; set it to 1"
        )
    if config.optimizer.use_distributed_optimizer:
        raise mf.ConfigError(
            "optimizer.use_distributed_optimizer = True: it cuts matrices into flat ranges, and "
            "Muon orthogonalizes whole ones; leave it out"
        )
    if config.precision.dtype != "fp32":
        raise mf.ConfigError(
            f"precision.dtype = {config.precision.dtype!r}: this optimizer keeps no fp32 copies of "
            "the weights; set it to fp32"
        )


config = mf.TrainConfig(
    model=mf.ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=64),
    parallel=mf.ParallelConfig(pp=2),
    schedule=mf.ScheduleConfig(lr=5e-3, warmup_iters=4, weight_decay=0.1),
    data=mf.DataConfig(train=mf.demo_text()),
    micro_batch_size=4,
    global_batch_size=16,
    train_iters=30,
    eval_iters=0,
)

if __name__ == "__main__":
    seen = []
    mf.train(config, optimizer=muon_and_adamw, on_metrics=[seen.append])
    assert seen[-1].loss < seen[0].loss - 1.5

"""A custom module in every layer: adapters, and nothing else is trained.

Run: torchrun --nproc-per-node 2 custom_module.py
"""

import attrs
import megafn as mf
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class Adapter(torch.nn.Module):
    """A narrow MLP parallel to a layer's own (arXiv 2110.04366), times a gain for each channel.

    Input and output [sequence, batch, hidden]; under sequence parallelism a tp rank has its share
    of the sequence. `down` and `up` are cut over tp: megatron-core's layers set the attributes that
    say how. `gain` is not cut: every tp rank holds all of it.
    """

    def __init__(self, plan, width):
        super().__init__()
        hidden = plan.config.model.hidden_size
        options = {
            "config": plan.mcore,
            "init_method": plan.mcore.init_method,
            "bias": False,
            "tp_group": plan.pg.tp,
        }
        self.down = ColumnParallelLinear(hidden, width, gather_output=False, **options)
        self.up = RowParallelLinear(
            width, hidden, input_is_parallel=True, skip_bias_add=False, **options
        )
        self.gain = torch.nn.Parameter(torch.zeros(hidden, dtype=plan.mcore.params_dtype))
        # each tp rank sees its share of the sequence only: the gradient is to be summed over tp
        self.gain.sequence_parallel = plan.mcore.sequence_parallel

    def forward(self, hidden):
        narrow, _ = self.down(hidden)
        wide, _ = self.up(F.gelu(narrow))
        return wide * self.gain


def with_adapters(provider):
    """Builds a chunk, freezes it, and gives each of its layers an adapter that is trained."""
    chunk = provider()
    chunk.requires_grad_(False)
    plan = chunk.plan
    for layer in chunk.decoder.layers:
        # a submodule of the MLP: its parameters are decoder.layers.N.mlp.adapter.*
        layer.mlp.adapter = Adapter(plan, width=16).to(plan.pg.device)
        layer.mlp.register_forward_hook(add_adapter)
    # values that follow from (seed, name), so that every layout starts alike; gain is zero
    mf.initialize_weights(chunk, plan.config.model, plan.pg, plan.config.seed)
    return chunk


def add_adapter(mlp, inputs, output):
    """The hook: an MLP of megatron-core returns (output, bias or None)."""
    hidden, bias = output
    return hidden + mlp.adapter(inputs[0]), bias


config = mf.TrainConfig(
    model=mf.ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=64),
    schedule=mf.ScheduleConfig(lr=2e-2),
    data=mf.DataConfig(train=mf.demo_text()),
    prepare_model=with_adapters,
    micro_batch_size=4,
    global_batch_size=16,
    train_iters=20,
    eval_iters=0,
)


def run(parallel):
    """The loss of each iteration, and which parameters of the last stage are trained."""
    seen = []
    state = mf.train(attrs.evolve(config, parallel=parallel), on_metrics=[seen.append])
    trained = [name for name, p in state.chunks[0].named_parameters() if p.requires_grad]
    assert trained and all("adapter" in name for name in trained)
    return torch.tensor([metrics.loss for metrics in seen])


if __name__ == "__main__":
    over_tensors = run(mf.ParallelConfig(tp=2, sequence_parallel=True))
    over_layers = run(mf.ParallelConfig(pp=2))
    torch.testing.assert_close(over_tensors, over_layers, rtol=1e-4, atol=0)
    assert over_layers[-1] < over_layers[0] - 0.15

"""A GPT with another core attention. Run: torchrun --nproc-per-node 2 custom_attention.py"""

from functools import partial

import attrs
import megafn as mf
import torch


class CappedAttention(torch.nn.Module):
    """Attention to the last `window` tokens, scores under a soft cap (Gemma 2, arXiv 2408.00118).

    Built with the arguments of megafn's own `Attention`. Each tp rank has its share of the heads.
    """

    def __init__(self, *, window, cap, **arguments):
        super().__init__()
        self.window = window
        self.cap = cap

    def forward(self, query, key, value, attention_mask, **options):
        """query, key, value [sequence, batch, heads, d] -> [sequence, batch, heads * d]."""
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / query.size(-1) ** 0.5
        scores = self.cap * torch.tanh(scores / self.cap)
        positions = torch.arange(query.size(0), device=query.device)
        distance = positions[:, None] - positions
        hidden = (distance < 0) | (distance >= self.window)
        if attention_mask is not None:
            hidden = hidden | attention_mask
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1)
        return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


@mf.rule("parallel.cp")
def whole_sequences(cp):
    if cp > 1:
        return "this attention needs whole sequences; set it to 1"


@mf.rule("model.num_query_groups")
def a_key_for_each_query(groups):
    if groups is not None:
        return "this attention has no grouped queries; leave it out"


gpt = mf.family_of("gpt")
capped_gpt = attrs.evolve(
    gpt,
    spec=attrs.evolve(
        gpt.spec,
        name="capped-gpt",
        rules=(*gpt.spec.rules, whole_sequences, a_key_for_each_query),
    ),
    chunk=attrs.evolve(
        gpt.chunk,
        modules=partial(gpt.chunk.modules, attention=partial(CappedAttention, window=16, cap=30.0)),
    ),
)

config = mf.TrainConfig(
    model=mf.ModelConfig(
        family=capped_gpt, num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=64
    ),
    schedule=mf.ScheduleConfig(lr=2e-3),
    data=mf.DataConfig(train=mf.demo_text()),
    micro_batch_size=4,
    global_batch_size=16,
    train_iters=10,
    eval_iters=0,
)


def losses(parallel):
    seen = []
    mf.train(attrs.evolve(config, parallel=parallel), on_metrics=[seen.append])
    return torch.tensor([metrics.loss for metrics in seen])


if __name__ == "__main__":
    cut_sequences = attrs.evolve(config, parallel=mf.ParallelConfig(cp=2))
    assert [problem.field for problem in mf.validate(cut_sequences, 2)] == ["parallel.cp"]

    over_heads = losses(mf.ParallelConfig(tp=2))
    over_layers = losses(mf.ParallelConfig(pp=2))
    torch.testing.assert_close(over_heads, over_layers, rtol=1e-4, atol=0)
    assert over_heads[-1] < over_heads[0] - 0.5

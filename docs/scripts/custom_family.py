"""A custom family: masked diffusion. Run: torchrun --nproc-per-node 2 custom_family.py"""

from functools import partial

import attrs
import megafn as mf
import torch
from megatron.core.transformer.enums import AttnMaskType

MASK = mf.byte_tokenizer().mask
gpt = mf.family_of("gpt")


def batch(raw, config, pg):
    """Hides a random share of each sequence, which is to be predicted (LLaDA, arXiv 2502.09992).

    raw: a micro-batch as GPT's data gives it. The draw follows from the tokens, so that all ranks
    that read a micro-batch hide the same ones.
    """
    tokens = gpt.step.batch(raw, config, pg)["tokens"]  # [batch, sequence], checked
    draw = torch.Generator().manual_seed(int(tokens.sum()))
    share = 0.1 + 0.9 * torch.rand(tokens.size(0), 1, generator=draw)
    hidden = torch.rand(tokens.shape, generator=draw) < share
    weights = hidden / share
    return {
        "tokens": tokens.masked_fill(hidden.to(tokens.device), MASK),
        "labels": tokens,
        "weights": weights.to(tokens.device),
    }


def loss(logits, batch, pg):
    """A bound of the negative log-likelihood: hidden tokens' losses over the share hidden."""
    losses = mf.cross_entropy(logits, batch["labels"], pg)  # [batch, sequence]
    hidden = batch["weights"] > 0
    right = (mf.argmax(logits, pg) == batch["labels"]) & hidden
    return mf.Loss(
        sum=(losses * batch["weights"]).sum(),
        count=batch["labels"].numel(),
        report={"hidden": hidden.sum(), "right": right.sum()},
    )


diffusion = attrs.evolve(
    gpt,
    spec=attrs.evolve(
        gpt.spec,
        name="diffusion",
        fields=(),  # of those that only some families read: where documents end makes no difference
    ),
    step=mf.Step(batch=batch, forward=gpt.step.forward, loss=loss),
    chunk=attrs.evolve(  # GPT's parts, with layers that attend in both directions
        gpt.chunk, modules=partial(gpt.chunk.modules, mask=AttnMaskType.padding)
    ),
    reads_tokens_only=False,
    predicts_next_token=False,
)

config = mf.TrainConfig(
    model=mf.ModelConfig(
        family=diffusion, num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=64
    ),
    parallel=mf.ParallelConfig(tp=2, sequence_parallel=True),
    schedule=mf.ScheduleConfig(lr=5e-3, warmup_fraction=0.1),
    data=mf.DataConfig(train=mf.demo_text()),
    micro_batch_size=8,
    global_batch_size=32,
    train_iters=30,
    eval_iters=0,
)

if __name__ == "__main__":
    resets = attrs.evolve(config, data=attrs.evolve(config.data, reset_attention_mask=True))
    print(*mf.validate(resets, 2))  # has no effect with model.family = 'diffusion'

    seen = []
    mf.train(config, on_metrics=[seen.append])
    assert seen[-1].loss < 0.75 * seen[0].loss

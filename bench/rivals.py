"""One optimizer step of the same GPT by megafn and by its peers.

Each maker returns a function text [batch, sequence + 1] -> loss, and the number of parameters. All
clip the gradient's norm at 1 and update with AdamW, fused. bf16 means: megafn and megatron-core
keep bf16 weights, fp32 masters and fp32 gradient sums; transformers and plain torch run fp32
weights under bf16 autocast, as users do.
"""

from __future__ import annotations

import contextlib

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func

import megafn as mf
from megafn.runtime.families.build import build_chunk
from megafn.runtime.model.layers import transformer_config
from megafn.runtime.model.losses import token_loss
from megafn.runtime.model.optimizer import build_optimizer
from megafn.runtime.parallel.megatron_context import megatron_context
from plain_gpt import PlainGPT

LAYERS = 6
HIDDEN = 384
HEADS = 6
SEQUENCE = 256
BATCH = 8
VOCABULARY = 8192


def train_config(dtype):
    return mf.TrainConfig(
        model=mf.ModelConfig(
            num_layers=LAYERS,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            seq_length=SEQUENCE,
            vocab_size=VOCABULARY,
        ),
        precision=mf.PrecisionConfig(dtype=dtype),
        schedule=mf.ScheduleConfig(lr=1e-4, decay="constant"),
        micro_batch_size=BATCH,
        global_batch_size=BATCH,
        train_iters=10_000,
    )


def megafn_step(pg, dtype):
    config = train_config(dtype)
    state = mf.setup(config, pg)
    step = mf.step_fn("gpt")

    def run(text):
        nonlocal state
        state, metrics = mf.train_step(state, [{"text": text}], step)
        return metrics.loss

    return run, count(state.chunks[0])


def megatron_step(pg, dtype, build, forward_step):
    """megatron-core's DDP, optimizer and schedule, with nothing of megafn's between them."""
    config = train_config(dtype)
    with megatron_context(pg, 0):
        model = build(config)
        mcore = model.config
        model = DistributedDataParallel(
            mcore,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True),
            model,
            pg_collection=pg.collection,
        )
        optimizer = build_optimizer(config, [model], pg)
        mcore.finalize_model_grads_func = finalize_model_grads
        mcore.grad_scale_func = optimizer.scale_loss
    forward_backward = get_forward_backward_func(pp_size=1)

    def run(text):
        with megatron_context(pg, 0):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            losses = forward_backward(
                forward_step_func=forward_step,
                model=model,
                data_iterator=iter([text]),
                num_microbatches=1,
                seq_length=SEQUENCE,
                micro_batch_size=BATCH,
                forward_only=False,
                pg_collection=pg.collection,
            )
            optimizer.step()
        return float(losses[0]["loss"])

    return run, count(model)


def bare_step(pg, dtype):
    """(a) a bare megatron-core loop around megafn's own stage and loss."""

    def forward_step(iterator, model):
        text = next(iterator)
        batch = {"labels": text[:, 1:].contiguous(), "loss_mask": torch.ones(BATCH, SEQUENCE)}

        def loss_func(output):
            loss = token_loss(output, batch, pg)
            return loss.sum, loss.count.int(), {"loss": loss.sum.detach() / loss.count}

        return model(text[:, :-1].contiguous()), loss_func

    return megatron_step(
        pg,
        dtype,
        lambda config: build_chunk(config, pg, pre_process=True, post_process=True, vp_stage=None),
        forward_step,
    )


def local_spec_step(pg, dtype):
    """(b) megatron-core's GPTModel with its local spec and its own loss.

    The loss needs megatron-core's global groups.
    """
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).tril() < 0.5
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)

    def build(config):
        mcore = transformer_config(config, pg)
        model = GPTModel(
            mcore,
            get_gpt_layer_local_spec(),
            VOCABULARY,
            SEQUENCE,
            pg_collection=pg.collection,
            share_embeddings_and_output_weights=True,
        )
        return model.to(mcore.params_dtype)

    def forward_step(iterator, model):
        text = next(iterator)

        def loss_func(losses):
            total = losses.float().sum()
            tokens = torch.tensor(losses.numel(), dtype=torch.int)
            return total, tokens, {"loss": total.detach() / losses.numel()}

        tokens = text[:, :-1].contiguous()
        labels = text[:, 1:].contiguous()
        return model(tokens, positions, mask, labels=labels), loss_func

    return megatron_step(pg, dtype, build, forward_step)


def torch_step(model, loss_of, dtype):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=0.01), dict(params=rest, weight_decay=0.0)],
        lr=1e-4,
        betas=(0.9, 0.95),
        fused=True,
    )

    def run(text):
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext():
            loss = loss_of(text)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run, count(model)


def transformers_step(pg, dtype):
    """(c) transformers' GPT-2 with SDPA.

    It shifts the labels itself, so it scores one token less in each sequence.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=LAYERS,
            n_embd=HIDDEN,
            n_head=HEADS,
            n_positions=SEQUENCE,
            vocab_size=VOCABULARY,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
    )
    return torch_step(
        model.train(), lambda text: model(input_ids=text[:, :-1], labels=text[:, :-1]).loss, dtype
    )


def plain_step(pg, dtype, compiled=False):
    """(d) plain torch, eager or compiled."""
    model = PlainGPT(LAYERS, HIDDEN, HEADS, SEQUENCE, VOCABULARY)
    call = torch.compile(model) if compiled else model
    return torch_step(
        model, lambda text: call(text[:, :-1].contiguous(), text[:, 1:].contiguous()), dtype
    )


def compiled_step(pg, dtype):
    return plain_step(pg, dtype, compiled=True)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def megatron_globals():
    """megatron-core's global groups, for the peer that needs them.

    megafn, in the same process, uses none.
    """
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()

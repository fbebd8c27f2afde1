"""Silent errors of the kind that parallel training has had, planted on purpose: what `test_fuzz.py`
must find."""

import contextlib
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import attrs
import torch

NAMES = (
    "tied table not summed over stages",
    "norms not summed over tp",
    "gradients times dp",
    "loss over the local vocabulary",
    "padded vocabulary takes part",
    "bias of each tp rank counts",
    "norm of the local gradients",
    "mean of means",
    "mask cut elsewhere than queries",
    "keys in the order of ranks",
    "angles of local positions",
    "gradients not summed over dp",
    "updated shards not gathered",
    "recomputation draws other dropout",
    "smoothing over the local vocabulary",
    "copies over tp count in the norm",
    "window of local positions",
    "layers without rotary positions counted in each stage",
)


def nothing(*_, **__):
    """In place of a reduction."""


@contextlib.contextmanager
def planted(name):
    """The bug of that name for the length of a `with`; None: none."""
    with contextlib.ExitStack() as stack:
        for owner, attribute, value in () if name is None else patches(name):
            stack.enter_context(mock.patch.object(owner, attribute, value))
        yield


def patches(name):
    """(owner, attribute, what stands there instead) of a bug."""
    from megatron.core import tensor_parallel
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.attention import SelfAttention

    import combinations
    from megafn.runtime.model import layers, losses, parts
    from megafn.runtime.training import forward_backward as passes
    from megafn.runtime.training import setup, step

    # not `from ... import`: the package has a function of that name
    finalize = import_module("megatron.core.distributed.finalize_model_grads")
    return {
        "tied table not summed over stages": lambda: [
            (finalize, "_allreduce_word_embedding_grads", nothing)
        ],
        "norms not summed over tp": lambda: [
            (finalize, "_allreduce_non_tensor_model_parallel_grads", nothing),
            # the first step compares such gradients itself; here the law is to find them
            (step, "check_first_gradients", nothing),
        ],
        "gradients times dp": lambda: [(setup, "finalize_grads", times_dp(setup.finalize_grads))],
        "gradients not summed over dp": lambda: [
            (DistributedDataParallel, "finish_grad_sync", nothing)
        ],
        "updated shards not gathered": lambda: [
            (DistributedDataParallel, "start_param_sync", nothing)
        ],
        "norm of the local gradients": lambda: [(step, "squared_norm_share", local_share)],
        "copies over tp count in the norm": lambda: [
            (tensor_parallel, "param_is_not_tensor_parallel_duplicate", lambda *_, **__: True)
        ],
        "loss over the local vocabulary": lambda: [(losses, "_reduce", of_one(losses._reduce))],
        "smoothing over the local vocabulary": lambda: [
            (combinations, "whole_sum", lambda here, pg: here)
        ],
        "mean of means": lambda: [(combinations, "step_of", with_means(combinations.step_of))],
        "padded vocabulary takes part": lambda: [
            (parts._HidePadding, "apply", lambda logits, count: logits)
        ],
        "bias of each tp rank counts": lambda: [
            (layers.RowLinear, "forward", times_tp(layers.RowLinear.forward))
        ],
        "mask cut elsewhere than queries": lambda: [
            (passes, "cut_sequence", mask_in_one_piece(passes.cut_sequence))
        ],
        "keys in the order of ranks": lambda: [
            (layers.Attention, "_attend_cp", with_positions(layers, layers.Attention._attend_cp))
        ],
        "angles of local positions": lambda: [
            (parts, "rotary_angles", local_angles(parts.rotary_angles))
        ],
        "window of local positions": lambda: [
            (
                layers.Attention,
                "_attend_in_window",
                at_first_positions(layers.Attention._attend_in_window),
            )
        ],
        "layers without rotary positions counted in each stage": lambda: [
            (SelfAttention, "forward", with_local_number(SelfAttention.forward))
        ],
        "recomputation draws other dropout": lambda: [(random, "_set_all_rng_states", nothing)],
    }[name]()


def times_dp(finalize):
    def scaled(chunks, *arguments, pg_collection=None, **named):
        finalize(chunks, *arguments, pg_collection=pg_collection, **named)
        for chunk in chunks:
            chunk.scale_gradients(float(pg_collection.dp_cp.size()))

    return scaled


def local_share(optimizer, pg):
    """As if each rank's own gradients were the model's: rank zero's norm is everyone's."""
    from megafn.runtime.model.optimizer import chained

    gradients = [
        gradient for part in chained(optimizer) for gradient in part.get_main_grads_for_grad_norm()
    ]
    squared = torch.nn.utils.get_total_norm(gradients).square().double()
    return squared if pg.is_rank_zero else torch.zeros_like(squared)


def of_one(reduce):
    return lambda logits, group, target: reduce(logits, SimpleNamespace(size=lambda: 1), target)


def with_means(step_of):
    def changed(case):
        step = step_of(case)

        def loss(logits, batch, pg):
            one = step.loss(logits, batch, pg)
            return attrs.evolve(one, sum=one.sum / one.count.clamp(min=1), count=1)

        return attrs.evolve(step, loss=loss)

    return changed


def times_tp(forward):
    def added(self, *arguments, **named):
        output, bias = forward(self, *arguments, **named)
        return output, None if bias is None else bias * self.tp_group.size()

    return added


def mask_in_one_piece(cut_sequence):
    def cut(batch, pg):
        made = cut_sequence(batch, pg)
        mask, cp = batch.get("attention_mask"), pg.cp.size()
        if mask is not None and mask.size(2) > 1:
            made["attention_mask"] = mask.chunk(cp, dim=2)[pg.place.cp]
        return made

    return cut


def with_positions(layers, attend_cp):
    def attended(self, *arguments):
        def in_order(sequence, cp, rank, device="cpu"):
            return torch.arange(sequence, device=device).chunk(cp)[rank]

        with mock.patch.object(layers, "cp_positions", in_order):
            return attend_cp(self, *arguments)

    return attended


def local_angles(angles):
    def of_first_positions(chunk, tokens, position_ids):
        with mock.patch.object(chunk, "cp_group", SimpleNamespace(size=lambda: 1)):
            return angles(chunk, tokens, None)

    return of_first_positions


def at_first_positions(attend):
    """As if each chunk of queries began where the sequence does."""

    def attended(self, query, key, value, mask, first):
        here = slice(first, first + query.size(2))
        mask = None if mask is None else mask[..., here]
        return attend(self, query, key[:, :, here], value[:, :, here], mask, 0)

    return attended


def with_local_number(forward):
    """As if each of two stages of two layers counted its layers from the first on."""

    def attended(self, *arguments, **named):
        with mock.patch.object(self, "layer_number", (self.layer_number - 1) % 2 + 1):
            return forward(self, *arguments, **named)

    return attended

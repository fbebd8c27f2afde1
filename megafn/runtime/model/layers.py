"""The layers of a stage: megatron-core's parallel layers around torch's attention and norms."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn.attention.bias import causal_lower_right

from megafn.pure.config.records import TrainConfig
from megafn.runtime.parallel.context import cp_positions
from megafn.runtime.parallel.groups import ProcessGroups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
}


def transformer_config(config: TrainConfig, pg: ProcessGroups) -> TransformerConfig:
    """megatron-core's config of a run, for this process."""
    model, parallel, recompute = config.model, config.parallel, config.recompute
    dtype = DTYPES[config.precision.dtype]
    interleaved = {}
    if parallel.vpp > 1:
        interleaved["virtual_pipeline_model_parallel_size"] = parallel.vpp
        if (
            pg.device.type == "cpu"
        ):  # batched p2p pairs wrongly on gloo with two stages, which also reads freed outputs
            interleaved.update(overlap_p2p_comm=True, batch_p2p_comm=False)
    if recompute.granularity == "full":
        recomputed = dict(
            recompute_granularity="full",
            recompute_method=recompute.method,
            recompute_num_layers=recompute.num_layers,
        )
    elif recompute.granularity == "selective":
        recomputed = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    else:
        recomputed = {}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_size,
        activation_func=_ACTIVATIONS[model.activation],
        gated_linear_unit=model.gated,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_layernorm,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        deallocate_pipeline_outputs=pg.device.type == "cuda",
        moe_token_dispatcher_type="alltoall",  # asked for by variable lengths
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        attention_softmax_in_fp32=False,
        cuda_graph_scope=[],
        **interleaved,
        **recomputed,
    )


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm as torch computes them, with parameters that know sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization != "RMSNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = (
                config.sequence_parallel
            )  # their gradients are summed over tp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return F.rms_norm(hidden, self.shape, self.weight, self.eps)
        return F.layer_norm(hidden, self.shape, self.weight, self.bias, self.eps)


class Attention(MegatronModule):
    """Core attention by torch's `scaled_dot_product_attention` (flash kernels, no mask where it is causal).

    query [sq, b, heads / tp, d], key and value [sk, b, groups / tp, d]; mask bool [b or 1, 1, sq or 1, sk], True = hidden,
    or of the scores' dtype [b or 1, heads / tp, sq, sk], added to them (causality, where it is wanted, is in it then).
    Context parallel: keys and values are gathered over cp, and each of the rank's two chunks of queries attends to
    what lies before it (Llama 3, arXiv 2407.21783, section 3.3.2).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(config=config)
        self.causal, self.scale, self.cp = (
            attn_mask_type == AttnMaskType.causal,
            softmax_scale,
            pg_collection.cp,
        )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query,
        key,
        value,
        attention_mask,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ):
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        mask = (
            attention_mask
            if attention_mask is None or attention_mask.is_floating_point()
            else ~attention_mask
        )
        if self.cp.size() == 1:
            if mask is None and self.causal:
                context = self._attend(query, key, value, None, is_causal=query.size(2) > 1)
            else:
                context = self._attend(
                    query,
                    key,
                    value,
                    self._causal_too(mask, torch.arange(query.size(2), device=query.device)),
                )
        else:
            context = self._attend_cp(query, key, value, mask)
        return context.permute(2, 0, 1, 3).flatten(2)  # [s, b, heads * d]

    def _causal_too(self, mask, positions):
        """A mask of keys alone [.., 1, sk], with the causal part of queries at `positions` added where it is causal."""
        if mask is None or not self.causal or mask.size(-2) > 1:
            return mask
        return mask & (torch.arange(mask.size(-1), device=mask.device) <= positions[:, None])

    def _attend_cp(self, query, key, value, mask):
        cp, rank = self.cp.size(), self.cp.rank()
        both = (
            torch.stack((key, value)).permute(3, 0, 1, 2, 4).contiguous()
        )  # [s / cp, 2, b, groups, d]
        both = gather_from_sequence_parallel_region(
            both, group=self.cp
        )  # [s, ...], rank after rank
        order = torch.cat([cp_positions(both.size(0), cp, r, both.device) for r in range(cp)])
        key, value = both[order.argsort()].permute(1, 2, 3, 0, 4)
        if not self.causal:
            return self._attend(query, key, value, mask)
        half, mine = query.size(2) // 2, cp_positions(key.size(2), cp, rank, query.device)
        parts = []
        for rows in (slice(0, half), slice(half, None)):
            positions = mine[rows]
            seen = (
                (rank + 1) * half if rows.start == 0 else (2 * cp - rank) * half
            )  # nothing behind is attended to
            if mask is None:
                bias = causal_lower_right(half, seen)
            else:
                bias = self._causal_too(
                    mask if mask.size(-2) == 1 else mask[..., rows, :], positions
                )[..., :seen]
            parts.append(
                self._attend(query[:, :, rows], key[:, :, :seen], value[:, :, :seen], bias)
            )
        return torch.cat(parts, dim=2)

    def _attend(self, query, key, value, mask, is_causal=False):
        dropout = self.dropout if self.training else 0.0
        # under sequence parallelism the block's own random state differs over tp already; elsewhere heads need their own
        apart = (
            get_cuda_rng_tracker().fork()
            if dropout and not self.config.sequence_parallel
            else contextlib.nullcontext()
        )
        with apart:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                mask,
                dropout,
                is_causal,
                scale=self.scale,
                enable_gqa=query.size(1) != key.size(1),
            )


class _BiasInside:
    """Before a parallel linear layer of megatron-core: without tensor parallelism, one `addmm` with the bias inside.

    megatron-core hands the bias on to be added by itself: one more pass over memory, one more tensor of the activation's size.
    """

    def forward(self, input_, weight=None, **options):
        if self.tp_group.size() > 1:
            return super().forward(input_, *([] if weight is None else [weight]), **options)
        return F.linear(input_, self.weight if weight is None else weight, self.bias), None


class ColumnLinear(_BiasInside, ColumnParallelLinear):
    pass


class RowLinear(_BiasInside, RowParallelLinear):
    pass


def layer_spec(
    config: TrainConfig, pg: ProcessGroups, mask: AttnMaskType, *, cross: bool = False
) -> ModuleSpec:
    """Which modules megatron-core builds a layer of: self-attention, cross-attention where asked for, MLP; a norm before each."""
    norm_of_heads = Norm if config.model.qk_layernorm else None
    attending = {}
    if cross:
        grouped = partial(ColumnLinear, tp_group=pg.tp)  # megatron-core hands these two no group
        attending = dict(
            pre_cross_attn_layernorm=Norm,
            cross_attn_bda=get_bias_dropout_add,
            cross_attention=ModuleSpec(
                module=CrossAttention,
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=CrossAttentionSubmodules(
                    linear_q=grouped,
                    linear_kv=grouped,
                    core_attention=Attention,
                    linear_proj=RowLinear,
                ),
            ),
        )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnLinear,
                    core_attention=Attention,
                    linear_proj=RowLinear,
                    q_layernorm=norm_of_heads,
                    k_layernorm=norm_of_heads,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            **attending,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    config: TrainConfig,
    mcore: TransformerConfig,
    pg: ProcessGroups,
    vp_stage: int | None,
    mask: AttnMaskType,
) -> TransformerBlockSubmodules:
    """Which layers megatron-core builds a stage's block of, and its last norm."""
    count = get_num_layers_to_build(mcore, vp_stage=vp_stage, pp_rank=pg.place.pp)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config, pg, mask)] * count, layer_norm=Norm
    )


def check_parallel_layers(module: torch.nn.Module, pg: ProcessGroups) -> None:
    """Raises RuntimeError naming each parallel layer without its tensor-parallel group: it would silently not be parallel."""
    kinds = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)
    astray = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, kinds) and layer.tp_group is not pg.tp
    ]
    if astray:
        raise RuntimeError(
            f"layers without the tensor-parallel group of this layout: {', '.join(astray)}; hand them tp_group=pg.tp."
        )

"""The layers of a model: megatron-core's parallel layers around torch's attention and norms."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
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
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from megafn.pure.config.records import (
    ModelConfig,
    ParallelConfig,
    RecomputeConfig,
    TrainConfig,
)
from megafn.runtime.model.key_value_cache import EncoderMemory, KeyValueCache
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


# ------------------------------------------------------------------------ megatron-core's config


def transformer_config(config: TrainConfig, pg: ProcessGroups) -> TransformerConfig:
    """megatron-core's config of a run, for this process."""
    model = config.model
    parallel = config.parallel
    dtype = DTYPES[config.precision.dtype]
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
        softmax_scale=model.softmax_scale,
        # tokens before and after a token that it sees
        window_size=None if model.sliding_window is None else (model.sliding_window - 1, 0),
        no_rope_freq=_layers_without_rope(model),
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
        moe_token_dispatcher_type="alltoall",  # required by variable lengths, for dense models too
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        attention_softmax_in_fp32=False,
        cuda_graph_scope=[],
        **_interleaving(parallel, on_cpu=pg.device.type == "cpu"),
        **_recomputation(config.recompute),
    )


def _layers_without_rope(model: ModelConfig) -> list[int] | None:
    """megatron-core's `no_rope_freq`: for each layer of the whole model 1 if it has no rotation."""
    if not model.layers_without_rope:
        return None
    return [int(layer in model.layers_without_rope) for layer in range(model.num_layers)]


def _interleaving(parallel: ParallelConfig, *, on_cpu: bool) -> dict[str, Any]:
    """megatron-core's settings for several chunks a stage."""
    if parallel.vpp == 1:
        return {}
    settings = {"virtual_pipeline_model_parallel_size": parallel.vpp}
    if on_cpu:
        # with two stages gloo pairs batched messages wrongly, and it reads freed outputs
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return settings


def _recomputation(recompute: RecomputeConfig) -> dict[str, Any]:
    """megatron-core's settings for the activations that the backward pass computes again."""
    if recompute.granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": recompute.method,
            "recompute_num_layers": recompute.num_layers,
        }
    if recompute.granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


# ---------------------------------------------------------------------------------------- parts


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm as torch computes them, also under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.shape = (hidden_size,)
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization != "RMSNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            # megatron-core sums the gradients of such parameters over tp
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return F.rms_norm(hidden, self.shape, self.weight, self.eps)
        return F.layer_norm(hidden, self.shape, self.weight, self.bias, self.eps)


# Queries that attend at once to a sliding window smaller than this: fewer would leave kernels idle.
_LEAST_BLOCK = 128


class Attention(MegatronModule):
    """Core attention by torch's `scaled_dot_product_attention`.

    It has flash kernels, and a causal mask is not in memory.

    query [sq, batch, heads / tp, d], key and value [sk, batch, groups / tp, d] -> context
    [sq, batch, heads / tp * d]. The mask is bool [batch or 1, 1, sq or 1, sk], True = hidden, or of
    the scores' dtype [batch or 1, heads / tp, sq, sk], added to them (with causality in it, if
    there is to be any).

    Context parallel: keys and values are gathered over cp, and each of the rank's two chunks of
    queries attends to what comes before it (Llama 3, arXiv 2407.21783, section 3.3.2).

    packed_seq_params: a KeyValueCache, or None. With a cache, key and value are of the new tokens,
    queries attend to what is cached too, and the mask hides all that is to be hidden (None: what
    causality hides). Context-parallel ranks then all have the whole sequence. If it has a rotation,
    queries and keys are turned here.

    Sliding window: queries attend in blocks, each to the keys that its windows cover, so that time
    and memory grow with sequence * window. A sequence that the window covers needs no band.
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
        self.causal = attn_mask_type == AttnMaskType.causal
        self.rotates = not (config.no_rope_freq and config.no_rope_freq[layer_number - 1])
        self.scale = softmax_scale
        self.cp = pg_collection.cp
        # how many keys a query sees, its own included
        self.window = sys.maxsize if config.window_size is None else config.window_size[0] + 1
        if config.window_size is not None and not self.causal:
            raise ValueError(
                f"model.sliding_window = {self.window}: needs causal layers; leave it out"
            )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: KeyValueCache | None = None,
    ) -> torch.Tensor:
        # [batch, heads, sequence, d]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mask = attention_mask
        if mask is not None and not mask.is_floating_point():
            mask = ~mask  # True = visible, as torch has it
        if packed_seq_params is not None:  # generation: see KeyValueCache
            rotation = packed_seq_params.rotation
            if rotation is not None and self.rotates:
                query, key = rotation.turn(query), rotation.turn(key)
            key, value = packed_seq_params.extend(self, key, value)
            is_causal = self.causal and mask is None and query.size(2) > 1
            context = self._attend(query, key, value, mask, is_causal)
        elif self.cp.size() > 1:
            context = self._attend_cp(query, key, value, mask)
        elif self._is_banded(key.size(2)):
            context = self._attend_in_window(query, key, value, mask, first=0)
        elif mask is None and self.causal:
            context = self._attend(query, key, value, None, is_causal=query.size(2) > 1)
        else:
            positions = torch.arange(query.size(2), device=query.device)
            context = self._attend(query, key, value, self._with_causality(mask, positions))
        return context.permute(2, 0, 1, 3).flatten(2)

    def _with_causality(
        self, mask: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor | None:
        """A mask of keys [.., 1, sk]; if attention is causal, it hides keys after `positions`."""
        if mask is None or not self.causal or mask.is_floating_point() or mask.size(-2) > 1:
            return mask
        keys = torch.arange(mask.size(-1), device=mask.device)
        return mask & (keys <= positions[:, None])

    def _attend_cp(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        cp = self.cp.size()
        rank = self.cp.rank()
        key, value = self._gathered(key, value)
        if not self.causal:
            return self._attend(query, key, value, mask)
        half = query.size(2) // 2
        # of each of the rank's two chunks of queries: its rows, and the position of its first
        chunks = (
            (slice(0, half), rank * half),
            (slice(half, None), (2 * cp - rank - 1) * half),
        )
        contexts = []
        for rows, first in chunks:
            mask_of_rows = None if mask is None else _rows_of(mask, rows)
            contexts.append(self._attend_from(query[:, :, rows], key, value, mask_of_rows, first))
        return torch.cat(contexts, dim=2)

    def _attend_from(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        first: int,
    ) -> torch.Tensor:
        """Causal attention of queries at positions `first`, first + 1, ... to keys from 0 on."""
        seen = first + query.size(2)
        if self._is_banded(seen):
            return self._attend_in_window(query, key, value, mask, first)
        positions = torch.arange(first, seen, device=query.device)
        visible = self._with_causality(mask, positions)
        if visible is None:
            visible = causal_to_the_last(query.size(2), seen)
        else:
            visible = visible[..., :seen]
        return self._attend(query, key[:, :, :seen], value[:, :, :seen], visible)

    def _is_banded(self, keys: int) -> bool:
        """Whether the window hides one of so many keys from the last of them."""
        return self.window < keys

    def _attend_in_window(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        first: int,
    ) -> torch.Tensor:
        """As `_attend_from`, but only to the `window` keys that end with a query's own."""
        block = max(self.window, _LEAST_BLOCK)
        contexts = []
        for start in range(0, query.size(2), block):
            rows = slice(start, min(start + block, query.size(2)))
            queries = range(first + rows.start, first + rows.stop)
            keys = range(max(0, queries.start - self.window + 1), queries.stop)
            seen = slice(keys.start, keys.stop)
            visible = _band(queries, keys, self.window, query.device)
            if mask is not None:
                visible = visible & _rows_of(mask, rows)[..., seen]
            contexts.append(
                self._attend(query[:, :, rows], key[:, :, seen], value[:, :, seen], visible)
            )
        return torch.cat(contexts, dim=2)

    def _gathered(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [batch, groups, sequence, d] of the whole sequence, in its order."""
        cp = self.cp.size()
        # [sequence / cp, 2, batch, groups, d], and gathered one rank after the other
        both = torch.stack((key, value)).permute(3, 0, 1, 2, 4).contiguous()
        both = gather_from_sequence_parallel_region(both, group=self.cp)
        places = [cp_positions(both.size(0), cp, rank, both.device) for rank in range(cp)]
        in_order = torch.cat(places).argsort()
        key, value = both[in_order].permute(1, 2, 3, 0, 4)
        return key, value

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        if dropout and not self.config.sequence_parallel:
            # heads need random numbers of their own on each tp rank; under sequence parallelism
            # the block's random state differs over tp already
            random_state = get_cuda_rng_tracker().fork()
        else:
            random_state = contextlib.nullcontext()
        with random_state:
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


def causal_to_the_last(queries: int, keys: int) -> CausalBias:
    """Causality of the last `queries` of `keys` positions, without a mask in memory on a GPU."""
    # torch cannot make one while a TorchDispatchMode looks on, as torch's FlopCounterMode is.
    with _disable_current_modes():
        return causal_lower_right(queries, keys)


def _rows_of(mask: torch.Tensor, rows: slice) -> torch.Tensor:
    """Of a mask [.., queries or 1, keys] those of some queries."""
    return mask if mask.size(-2) == 1 else mask[..., rows, :]


def _band(queries: range, keys: range, window: int, device: torch.device) -> torch.Tensor:
    """Which keys queries see, bool [queries, keys], both at these positions of the sequence."""
    query_positions = torch.arange(queries.start, queries.stop, device=device)
    key_positions = torch.arange(keys.start, keys.stop, device=device)
    age = query_positions[:, None] - key_positions
    return (age >= 0) & (age < window)


class CrossAttentionToMemory(CrossAttention):
    """megatron-core's, which computes the keys and values of an `EncoderMemory` only once."""

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | EncoderMemory,
        **options: Any,
    ) -> Any:
        memory = key_value_states
        if not isinstance(memory, EncoderMemory):
            return super().get_query_key_value_tensors(hidden_states, memory, **options)
        if self not in memory.keys_and_values:
            query, key, value = super().get_query_key_value_tensors(
                hidden_states, memory.hidden, **options
            )
            memory.keys_and_values[self] = (key, value)
            return query, key, value
        query, _ = self.linear_q(hidden_states)
        heads = (self.num_attention_heads_per_partition, self.hidden_size_per_attention_head)
        return query.view(*query.shape[:-1], *heads), *memory.keys_and_values[self]


def _linear_with_bias(
    layer: ColumnParallelLinear | RowParallelLinear,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    """A parallel layer that is not cut, as one `addmm` with the bias in it.

    megatron-core returns the bias, to be added separately: one more pass over memory and one more
    tensor of the activation's size.
    """
    return F.linear(hidden, layer.weight if weight is None else weight, layer.bias), None


class ColumnLinear(ColumnParallelLinear):
    """megatron-core's, with the bias in the matrix product if there is no tensor parallelism."""

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, **options: Any
    ) -> Any:
        if self.tp_group.size() == 1:
            return _linear_with_bias(self, input_, weight)
        return super().forward(input_, weight, **options)


class RowLinear(RowParallelLinear):
    """megatron-core's, with the bias in the matrix product if there is no tensor parallelism."""

    def forward(self, input_: torch.Tensor) -> Any:
        if self.tp_group.size() == 1:
            return _linear_with_bias(self, input_, None)
        return super().forward(input_)


# --------------------------------------------------------------------------------------- layers


class ParallelResidualLayer(TransformerLayer):
    """megatron-core's layer, of which attention and MLP both read the input (GPT-NeoX).

    x + attention(input_layernorm(x)) + mlp(pre_mlp_layernorm(x)), with dropout on each of the two.
    """

    def forward(
        self, hidden_states: torch.Tensor, *arguments: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with_attention, context = self._forward_attention(hidden_states, *arguments, **named)
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        return self._forward_post_mlp(self.mlp(normed), with_attention), context


def layer_spec(
    config: TrainConfig,
    pg: ProcessGroups,
    mask: AttnMaskType,
    *,
    cross: bool = False,
    attention: Callable[..., torch.nn.Module] = Attention,
) -> ModuleSpec:
    """Which modules megatron-core builds a layer of: self-attention and MLP, a norm before each.

    mask: AttnMaskType.causal, or padding or arbitrary if only the mask hides anything.
    cross: with cross-attention between the two, to the context that the block is given.
    attention: builds the core attention; a module class, or a function, with the arguments of
        `Attention`, called with them by name.
    """
    norm_of_heads = Norm if config.model.qk_layernorm else None
    self_attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnLinear,
            core_attention=attention,
            linear_proj=RowLinear,
            q_layernorm=norm_of_heads,
            k_layernorm=norm_of_heads,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
    )
    return ModuleSpec(
        module=ParallelResidualLayer if config.model.parallel_residual else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=self_attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            **(_cross_attention(pg, attention) if cross else {}),
        ),
    )


def _cross_attention(
    pg: ProcessGroups, attention: Callable[..., torch.nn.Module]
) -> dict[str, Any]:
    """The parts of a layer that attend to the context."""
    linear = partial(ColumnLinear, tp_group=pg.tp)  # megatron-core gives these two no group
    return {
        "pre_cross_attn_layernorm": Norm,
        "cross_attn_bda": get_bias_dropout_add,
        "cross_attention": ModuleSpec(
            module=CrossAttentionToMemory,
            params={"attn_mask_type": AttnMaskType.arbitrary},
            submodules=CrossAttentionSubmodules(
                linear_q=linear,
                linear_kv=linear,
                core_attention=attention,
                linear_proj=RowLinear,
            ),
        ),
    }


def check_parallel_layers(module: torch.nn.Module, pg: ProcessGroups) -> None:
    """Raises RuntimeError naming each parallel layer without its tensor-parallel group.

    Such a layer would not be parallel, without any error.
    """
    kinds = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)
    without_group = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, kinds) and layer.tp_group is not pg.tp
    ]
    if without_group:
        raise RuntimeError(
            f"layers without the tensor-parallel group of this layout: {', '.join(without_group)}; "
            "give them tp_group=pg.tp."
        )

"""Megatron-LM's argument names as config fields: what `other_megatron_args` may hold.

name: (dotted path, conversion or None); or (None, what to say instead).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megafn.pure.accelerate.from_objects import weights


def _not(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return not value


def _swiglu(value: Any) -> str:
    if value is not True:
        raise TypeError
    return "swiglu"


_STRAIGHT = {
    "model": "ffn_hidden_size kv_channels num_query_groups max_position_embeddings rotary_base rotary_percent qk_layernorm "
    "add_bias_linear add_qkv_bias hidden_dropout attention_dropout init_method_std normalization norm_epsilon "
    "bert_binary_head num_tokentypes num_labels num_decoder_layers decoder_start_token_id "
    "relative_attention_num_buckets relative_attention_max_distance",
    "precision": "initial_loss_scale min_loss_scale loss_scale_window hysteresis",
    "data": "reset_position_ids reset_attention_mask eod_mask_loss mask_prob short_seq_prob",
    "": "seed",
}

MEGATRON: dict[str, tuple[str | None, Callable[[Any], Any] | str | None]] = {
    **{
        name: (f"{section}.{name}".strip("."), None)
        for section, names in _STRAIGHT.items()
        for name in names.split()
    },
    "layernorm_epsilon": ("model.norm_epsilon", None),
    "position_embedding_type": ("model.position_embedding", None),
    "swiglu": ("model.activation", _swiglu),
    "disable_bias_linear": ("model.add_bias_linear", _not),
    "untie_embeddings_and_output_weights": ("model.tie_word_embeddings", _not),
    "decoder_num_layers": ("model.num_decoder_layers", None),
    "context_parallel_size": ("parallel.cp", None),
    "expert_model_parallel_size": ("parallel.ep", None),
    "decoder_first_pipeline_num_layers": ("parallel.num_layers_in_first_pipeline_stage", None),
    "decoder_last_pipeline_num_layers": ("parallel.num_layers_in_last_pipeline_stage", None),
    "adam_beta1": ("optimizer.beta1", None),
    "adam_beta2": ("optimizer.beta2", None),
    "adam_eps": ("optimizer.eps", None),
    "sgd_momentum": ("optimizer.momentum", None),
    "optimizer": ("optimizer.name", None),
    "lr_warmup_init": ("schedule.init_lr", None),
    "lr_wsd_decay_style": ("schedule.wsd_decay_style", None),
    "lr_wsd_decay_iters": ("schedule.wsd_decay_iters", None),
    "lr_wsd_decay_samples": ("schedule.wsd_decay_samples", None),
    "recompute_granularity": ("recompute.granularity", None),
    "recompute_method": ("recompute.method", None),
    "recompute_num_layers": ("recompute.num_layers", None),
    "split": ("data.split", weights),
    "dataloader_type": ("data.sampler", None),
    "data_cache_path": ("data.cache", None),
    "log_interval": ("log.interval", None),
    "distributed_timeout_minutes": ("timeout_seconds", lambda minutes: 60.0 * minutes),
    # what has a name of its own
    "tensor_model_parallel_size": (None, "it is the plugin's tp_degree; give it there"),
    "pipeline_model_parallel_size": (None, "it is the plugin's pp_degree; give it there"),
    "sequence_parallel": (None, "it is the plugin's sequence_parallelism; give it there"),
    "clip_grad": (None, "it is the plugin's gradient_clipping; give it there"),
    "global_batch_size": (
        None,
        "it follows from micro_batch_size, num_micro_batches and the number of processes; give num_micro_batches",
    ),
    "virtual_pipeline_model_parallel_size": (
        None,
        "it follows from the plugin's num_layers_per_virtual_pipeline_stage; give that",
    ),
    "data_path": (None, "name the data with data = DataConfig(train=...)"),
    **{
        name: (None, "it is the model's; give another model config")
        for name in (
            "num_layers",
            "encoder_num_layers",
            "hidden_size",
            "num_attention_heads",
            "vocab_size",
        )
    },
    **{
        name: (None, 'it is said by mixed_precision = "fp16" or "bf16"; give it there')
        for name in ("fp16", "bf16")
    },
}

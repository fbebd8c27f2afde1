"""Megatron-LM's argument names as config fields: what `other_megatron_args` may hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen

from megafn.pure.accelerate.from_loaders import weights


@frozen
class MegatronArgument:
    """A config field, and what makes its value of the argument's; None: it is the same.

    `convert` raises TypeError, ValueError or KeyError for a value that the argument does not take.
    """

    path: str
    convert: Callable[[Any], Any] | None = None


def _negated(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return not value


def _swiglu(value: Any) -> str:
    if value is not True:
        raise TypeError
    return "swiglu"


def _rope(value: Any) -> str:
    if value is not True:
        raise TypeError
    return "rope"


def _minutes_as_seconds(value: Any) -> float:
    return 60.0 * value


# Arguments that have the name of the config field, by section; "" for the fields of TrainConfig.
_SAME_NAMES = {
    "model": """
        ffn_hidden_size kv_channels num_query_groups
        max_position_embeddings rotary_base rotary_percent
        normalization norm_epsilon qk_layernorm add_bias_linear add_qkv_bias
        hidden_dropout attention_dropout init_method_std
        num_tokentypes bert_binary_head num_labels
        num_decoder_layers decoder_start_token_id
        relative_attention_num_buckets relative_attention_max_distance
    """,
    "precision": "initial_loss_scale min_loss_scale loss_scale_window hysteresis",
    "data": "reset_position_ids reset_attention_mask eod_mask_loss mask_prob short_seq_prob",
    "": "seed",
}

# Arguments that have another name.
_RENAMED = {
    "layernorm_epsilon": "model.norm_epsilon",
    "position_embedding_type": "model.position_embedding",
    "decoder_num_layers": "model.num_decoder_layers",
    "context_parallel_size": "parallel.cp",
    "expert_model_parallel_size": "parallel.ep",
    "decoder_first_pipeline_num_layers": "parallel.num_layers_in_first_pipeline_stage",
    "decoder_last_pipeline_num_layers": "parallel.num_layers_in_last_pipeline_stage",
    "optimizer": "optimizer.name",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "sgd_momentum": "optimizer.momentum",
    "lr_warmup_init": "schedule.init_lr",
    "lr_wsd_decay_style": "schedule.wsd_decay_style",
    "lr_wsd_decay_iters": "schedule.wsd_decay_iters",
    "lr_wsd_decay_samples": "schedule.wsd_decay_samples",
    "recompute_granularity": "recompute.granularity",
    "recompute_method": "recompute.method",
    "recompute_num_layers": "recompute.num_layers",
    "dataloader_type": "data.sampler",
    "data_cache_path": "data.cache",
    "log_interval": "log.interval",
}

# Arguments that have another meaning.
_CONVERTED = {
    "swiglu": MegatronArgument("model.activation", _swiglu),
    "use_rotary_position_embeddings": MegatronArgument("model.position_embedding", _rope),
    "disable_bias_linear": MegatronArgument("model.add_bias_linear", _negated),
    "untie_embeddings_and_output_weights": MegatronArgument("model.tie_word_embeddings", _negated),
    "split": MegatronArgument("data.split", weights),
    "distributed_timeout_minutes": MegatronArgument("timeout_seconds", _minutes_as_seconds),
}

ARGUMENTS: dict[str, MegatronArgument] = {
    **{
        name: MegatronArgument(f"{section}.{name}" if section else name)
        for section, names in _SAME_NAMES.items()
        for name in names.split()
    },
    **{name: MegatronArgument(path) for name, path in _RENAMED.items()},
    **_CONVERTED,
}

_BELONGS_TO_THE_MODEL = "it belongs to the model; give another model config"
_CHECKPOINTS = "{} of the config; change that: attrs.evolve(config, checkpoint=...)"
_MIXED_PRECISION = 'it is mixed_precision = "fp16" or "bf16"; give it there'

# Arguments that `from_plugin` takes elsewhere, and where.
ELSEWHERE: dict[str, str] = {
    "tensor_model_parallel_size": "it is the plugin's tp_degree; give it there",
    "pipeline_model_parallel_size": "it is the plugin's pp_degree; give it there",
    "sequence_parallel": "it is the plugin's sequence_parallelism; give it there",
    "clip_grad": "it is the plugin's gradient_clipping; give it there",
    "global_batch_size": (
        "it follows from micro_batch_size, num_micro_batches and the number of processes; "
        "give num_micro_batches"
    ),
    "virtual_pipeline_model_parallel_size": (
        "it follows from the plugin's num_layers_per_virtual_pipeline_stage; give that"
    ),
    "data_path": "the data are data = DataConfig(train=...); give them there",
    "num_layers": _BELONGS_TO_THE_MODEL,
    "encoder_num_layers": _BELONGS_TO_THE_MODEL,
    "hidden_size": _BELONGS_TO_THE_MODEL,
    "num_attention_heads": _BELONGS_TO_THE_MODEL,
    "vocab_size": _BELONGS_TO_THE_MODEL,
    "save_interval": _CHECKPOINTS.format("it is checkpoint.interval"),
    "save": _CHECKPOINTS.format("it is checkpoint.directory"),
    "load": _CHECKPOINTS.format("it is checkpoint.directory, from which a run resumes"),
    "async_save": _CHECKPOINTS.format("it is checkpoint.asynchronous"),
    "attention_head_type": 'for "multiquery" give num_query_groups = 1, otherwise leave it out',
    "group_query_attention": "it goes with num_query_groups = the number of groups; give that too",
    "attention_softmax_in_fp32": "attention's softmax is always in fp32; leave it out",
    "fp16": _MIXED_PRECISION,
    "bf16": _MIXED_PRECISION,
}

# Arguments that megafn has nowhere, and what to do. They are never proposed for another name.
NOWHERE: dict[str, str] = {
    "rampup_batch_size": (
        "the batch size of a run does not change; give num_micro_batches, or train in two runs"
    ),
}

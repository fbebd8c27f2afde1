"""The names and variables of accelerate's MegatronLMPlugin; `plugin.from_plugin` says what they mean.

The 40 names and their meanings are those of accelerate 0.27.2; `docs/accelerate.md` has the table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from attrs import frozen

from megafn.pure.config.field_types import type_in_words
from megafn.pure.config.problems import Problem, config_error, did_you_mean


@frozen(kw_only=True)
class PluginFields:
    """The 40 fields with accelerate's types and defaults; None is the default of each, as there."""

    tp_degree: int = 1
    pp_degree: int = 1
    num_micro_batches: int = 1
    gradient_clipping: float = 1.0
    sequence_parallelism: bool = False
    recompute_activations: bool = False
    use_distributed_optimizer: bool = False
    pipeline_model_parallel_split_rank: int | None = None
    num_layers_per_virtual_pipeline_stage: int | None = None
    is_train_batch_min: bool = True
    train_iters: int | None = None
    train_samples: int | None = None
    weight_decay_incr_style: str = "constant"
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    lr_decay_style: str = "linear"
    lr_decay_iters: int | None = None
    lr_decay_samples: int | None = None
    lr_warmup_iters: int | None = None
    lr_warmup_samples: int | None = None
    lr_warmup_fraction: float | None = None
    min_lr: float = 0.0
    consumed_samples: object = None  # a list or tuple of three integers
    no_wd_decay_cond: Callable | None = None
    scale_lr_cond: Callable | None = None
    lr_mult: float = 1.0
    megatron_dataset_flag: bool = False
    seq_length: int | None = None
    encoder_seq_length: int | None = None
    decoder_seq_length: int | None = None
    tensorboard_dir: str | None = None
    set_all_logging_options: bool = False
    eval_iters: int = 100
    eval_interval: int = 1000
    return_logits: bool = False
    custom_train_step_class: object = (
        None  # a class or function (config, **kwargs) -> train step, or a Step
    )
    custom_train_step_kwargs: object = None  # a dict
    custom_model_provider_function: Callable | None = None
    custom_prepare_model_function: Callable | None = None
    other_megatron_args: object = None  # a dict


# Fields that are one config field each, under another name.
SAME = {
    "tp_degree": "parallel.tp",
    "pp_degree": "parallel.pp",
    "gradient_clipping": "optimizer.clip_grad",
    "sequence_parallelism": "parallel.sequence_parallel",
    "use_distributed_optimizer": "optimizer.use_distributed_optimizer",
    "train_iters": "train_iters",
    "train_samples": "train_samples",
    "min_lr": "schedule.min_lr",
    "weight_decay_incr_style": "schedule.weight_decay_incr_style",
    "start_weight_decay": "schedule.start_weight_decay",
    "end_weight_decay": "schedule.end_weight_decay",
    "lr_decay_style": "schedule.decay",
    "lr_decay_iters": "schedule.decay_iters",
    "lr_decay_samples": "schedule.decay_samples",
    "lr_warmup_iters": "schedule.warmup_iters",
    "lr_warmup_samples": "schedule.warmup_samples",
    "lr_warmup_fraction": "schedule.warmup_fraction",
    "no_wd_decay_cond": "optimizer.no_weight_decay_cond",
    "scale_lr_cond": "optimizer.lr_scale_cond",
    "lr_mult": "optimizer.lr_mult",
    "tensorboard_dir": "log.tensorboard_dir",
    "set_all_logging_options": "log.everything",
    "eval_iters": "eval_iters",
    "eval_interval": "eval_interval",
    "custom_model_provider_function": "model_function",
    "custom_prepare_model_function": "prepare_model",
}
_ENVIRONMENT = {
    "TP_DEGREE": int,
    "PP_DEGREE": int,
    "NUM_MICRO_BATCHES": int,
    "GRADIENT_CLIPPING": float,
    "SEQUENCE_PARALLELISM": bool,
    "RECOMPUTE_ACTIVATIONS": bool,
    "USE_DISTRIBUTED_OPTIMIZER": bool,
}
_BOOLS = {
    "1": True,
    "true": True,
    "t": True,
    "yes": True,
    "y": True,
    "on": True,
    "0": False,
    "false": False,
    "f": False,
    "no": False,
    "n": False,
    "off": False,
}


def from_env(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Arguments for `from_plugin` from accelerate's seven variables MEGATRON_LM_*, those that are set.

    Raises ConfigError for a value that is no number or truth value, and for a MEGATRON_LM_ variable that is none of them.

    >>> from_env({"MEGATRON_LM_TP_DEGREE": "2", "MEGATRON_LM_SEQUENCE_PARALLELISM": "true", "HOME": "/"})
    {'tp_degree': 2, 'sequence_parallelism': True}
    """
    found, problems = {}, []
    for name, text in (os.environ if environ is None else environ).items():
        if not name.startswith("MEGATRON_LM_"):
            continue
        key = name.removeprefix("MEGATRON_LM_")
        if key not in _ENVIRONMENT:
            problems.append(
                Problem(
                    name,
                    text,
                    f"there is no such variable{did_you_mean(name, [f'MEGATRON_LM_{known}' for known in _ENVIRONMENT])}",
                )
            )
            continue
        kind, word = _ENVIRONMENT[key], text.strip().lower()
        try:
            found[key.lower()] = _BOOLS[word] if kind is bool else kind(word)
        except (ValueError, KeyError):
            problems.append(Problem(name, text, f"give {type_in_words(kind)}"))
    if problems:
        raise config_error(problems)
    return found

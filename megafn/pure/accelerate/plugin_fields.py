"""The fields of accelerate's MegatronLMPlugin and its variables; `plugin.from_plugin` reads them.

The 40 names and their meanings are those of accelerate 0.27.2; `docs/accelerate.md` has the table.
`later_fields` has those of later versions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

import attrs
from attrs import frozen

from megafn.pure.accelerate.later_fields import (
    LATER_FIELDS,
    later_field_problem,
    megatron_argument,
)
from megafn.pure.config.field_types import has_type, type_problem
from megafn.pure.config.problems import Problem, choice_problem, config_error, did_you_mean
from megafn.pure.config.records import ModelFunction, ParameterCondition, PrepareModel


@frozen(kw_only=True)
class PluginFields:
    """The 40 fields with accelerate's types and defaults; None stands for the default of each."""

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
    # A list or tuple of three integers.
    consumed_samples: object = None
    no_wd_decay_cond: ParameterCondition | None = None
    scale_lr_cond: ParameterCondition | None = None
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
    # A class or function (config, **kwargs) -> train step, or a Step.
    custom_train_step_class: object = None
    # A dict.
    custom_train_step_kwargs: object = None
    custom_model_provider_function: ModelFunction | None = None
    custom_prepare_model_function: PrepareModel | None = None
    # A dict.
    other_megatron_args: object = None


# accelerate's names of number formats -> `PrecisionConfig.dtype`.
PRECISIONS: dict[str, str] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}

FIELD_NAMES: tuple[str, ...] = tuple(attribute.name for attribute in attrs.fields(PluginFields))

# Fields that are one config field each, most under another name.
CONFIG_PATHS: dict[str, str] = {
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

# Fields that count something.
_AT_LEAST_ONE = (
    "tp_degree",
    "pp_degree",
    "num_micro_batches",
    "num_layers_per_virtual_pipeline_stage",
)


def field_problems(fields: Mapping[str, Any]) -> Iterator[Problem]:
    """Why the fields cannot be read: values of wrong types, counts below 1. All names are known."""
    kinds = get_type_hints(PluginFields)
    for name, value in fields.items():
        if not has_type(value, kinds[name]):
            yield type_problem(name, value, kinds[name])
    samples = fields.get("consumed_samples")
    if samples is not None and not _are_three_integers(samples):
        yield Problem(
            "consumed_samples", samples, "give three integers: samples of train, valid and test"
        )
    for name in ("custom_train_step_kwargs", "other_megatron_args"):
        if name in fields and not _is_dict_of_names(fields[name]):
            yield Problem(name, fields[name], "give a dict from names to values")
    for name in _AT_LEAST_ONE:
        if isinstance(fields.get(name), int) and fields[name] < 1:
            yield Problem(name, fields[name], "must be at least 1")


def _are_three_integers(samples: object) -> bool:
    return isinstance(samples, (list, tuple)) and has_type(tuple(samples), tuple[int, int, int])


def _is_dict_of_names(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


# ---- Environment variables

_PREFIX = "MEGATRON_LM_"
_MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"
_VARIABLES: dict[str, type] = {
    "TP_DEGREE": int,
    "PP_DEGREE": int,
    "NUM_MICRO_BATCHES": int,
    "GRADIENT_CLIPPING": float,
    "SEQUENCE_PARALLELISM": bool,
    "RECOMPUTE_ACTIVATIONS": bool,
    "USE_DISTRIBUTED_OPTIMIZER": bool,
    **{name.upper(): later.kind for name, later in LATER_FIELDS.items() if later.kind is not None},
}
_BOOLS = {
    **dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True),
    **dict.fromkeys(("0", "false", "f", "no", "n", "off"), False),
}


# What a variable that is off says, whatever it is for: not "0", which may be a number.
_OFF = ("false", "f", "no", "n", "off")


def from_env(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Arguments for `from_plugin` from accelerate's environment variables.

    MEGATRON_LM_*: those of accelerate 0.27 to 1.15. One that came later than 0.27 and says False
    gives no argument. ACCELERATE_MIXED_PRECISION: "mixed_precision".

    A variable that is not set gives no argument. Raises ConfigError for a value that cannot be
    parsed, for a MEGATRON_LM_ variable that accelerate does not have, and for one that asks for
    what megafn does not have.

    >>> environ = {"MEGATRON_LM_TP_DEGREE": "2", "MEGATRON_LM_SEQUENCE_PARALLELISM": "true"}
    >>> environ |= {"MEGATRON_LM_NO_LOAD_OPTIM": "False", "ACCELERATE_MIXED_PRECISION": "bf16"}
    >>> from_env(environ | {"HOME": "/"})
    {'tp_degree': 2, 'sequence_parallelism': True, 'mixed_precision': 'bf16'}
    """
    fields: dict[str, Any] = {}
    problems: list[Problem] = []
    for variable, text in (os.environ if environ is None else environ).items():
        if variable == _MIXED_PRECISION:
            outcome = _precision_of_variable(text)
        elif variable.startswith(_PREFIX):
            outcome = _field_of_variable(variable, text)
        else:
            continue
        if isinstance(outcome, Problem):
            problems.append(outcome)
        else:
            fields |= outcome
    if problems:
        raise config_error(problems)
    return fields


def _precision_of_variable(text: str) -> dict[str, str] | Problem:
    precision = text.strip().lower()
    if precision not in PRECISIONS:
        return choice_problem(_MIXED_PRECISION, text, PRECISIONS)
    return {"mixed_precision": precision}


def _field_of_variable(variable: str, text: str) -> dict[str, Any] | Problem:
    """{field: value} of a variable MEGATRON_LM_*, {} if it asks for nothing, or its problem."""
    name = variable.removeprefix(_PREFIX)
    if name not in _VARIABLES:
        if text.strip().lower() in _OFF:  # of a version later still
            return {}
        hint = did_you_mean(variable, [_PREFIX + known for known in _VARIABLES])
        return Problem(variable, text, f"there is no such variable{hint}")
    try:
        value = _parsed(text, _VARIABLES[name])
    except (ValueError, KeyError):
        return type_problem(variable, text, _VARIABLES[name])
    field = name.lower()
    if field not in LATER_FIELDS:
        return {field: value}
    problem = later_field_problem(field, value, field=variable)
    if problem is not None:
        return problem
    return {field: value} if megatron_argument(field, value) else {}


def _parsed(text: str, kind: type) -> int | float | bool | str:
    """A variable's value. Raises ValueError or KeyError if it is not of the type."""
    word = text.strip().lower()
    return _BOOLS[word] if kind is bool else kind(word)

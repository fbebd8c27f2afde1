"""torch optimizers and learning rate schedulers as `optimizer.*` and `schedule.*` fields.

Read by their attributes only; torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megafn.pure.config.problems import ConfigError, Problem, config_error

# Class names of optimizers, in lower case -> `OptimizerConfig.name`.
_NAMES = {"adamw": "adam", "adam": "adam", "fusedadam": "adam", "sgd": "sgd"}
_NOT_BUILT = ("amsgrad", "maximize", "nesterov", "dampening")

# Functions of transformers' schedulers -> `ScheduleConfig.decay`.
_STYLES = {
    f"_get_{style}_schedule_with_warmup_lr_lambda": style
    for style in ("linear", "cosine", "constant")
}
# Its scheduler without a warm-up is a plain function: that of transformers 5, or one of 4.
_CONSTANT = ("_get_constant_lambda", "get_constant_schedule.<locals>.<lambda>")


def optimizer_fields(optimizer: Any) -> dict[str, Any]:
    """`optimizer.*` and `schedule.*` fields of a torch optimizer: its class name, its groups.

    AdamW, SGD, and Adam without weight decay (it would add the decay to the gradient; megafn's is
    decoupled). The weight decay of a group may be 0 and is otherwise the same for all;
    `no_wd_decay_cond` chooses the parameters that are not decayed.

    Raises ConfigError if megatron-core's optimizer cannot do the same.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    class_name = type(optimizer).__name__
    name = _NAMES.get(class_name.lower())
    groups = getattr(optimizer, "param_groups", None)
    if name is None or not groups:
        raise _refusal(
            "optimizer",
            class_name,
            "megatron-core has no such optimizer; give torch.optim.AdamW, Adam or SGD",
        )
    for key in _NOT_BUILT:
        value = _common(groups, key)
        if value:
            raise _refusal(
                f"optimizer.{key}", value, "megatron-core's optimizer has none; leave it out"
            )
    fields = {
        "optimizer.name": name,
        # A scheduler has changed lr already; it keeps the one before in initial_lr.
        "schedule.lr": float(_common(groups, "initial_lr") or _common(groups, "lr")),
        "schedule.weight_decay": _weight_decay(groups, class_name),
    }
    if name == "sgd":
        fields["optimizer.momentum"] = float(_common(groups, "momentum"))
    else:
        beta1, beta2 = _common(groups, "betas")
        fields["optimizer.beta1"] = beta1
        fields["optimizer.beta2"] = beta2
        fields["optimizer.eps"] = _common(groups, "eps")
    return fields


def _common(groups: list[Mapping[str, Any]], key: str) -> Any:
    """The value that all parameter groups share."""
    values = {group.get(key) for group in groups}
    if len(values) > 1:
        remedy = "use scale_lr_cond and lr_mult" if key == "lr" else "give all of them the same"
        raise _refusal(
            f"optimizer.{key}",
            tuple(sorted(values, key=str)),
            f"its parameter groups differ; {remedy}",
        )
    return values.pop()


def _weight_decay(groups: list[Mapping[str, Any]], class_name: str) -> float:
    decays = sorted({float(group.get("weight_decay", 0.0)) for group in groups} - {0.0})
    if not decays:
        return 0.0
    if len(decays) > 1:
        raise _refusal(
            "optimizer.weight_decay",
            tuple(decays),
            "its parameter groups differ; give them one value, or 0",
        )
    if class_name.lower() == "adam" and not _common(groups, "decoupled_weight_decay"):
        raise _refusal(
            "optimizer.weight_decay",
            decays[0],
            "torch's Adam adds it to the gradient, megafn decouples it; "
            "use AdamW, or Adam without it",
        )
    return decays[0]


def scheduler_fields(scheduler: Any, micro_batch_size: int) -> dict[str, Any]:
    """`schedule.*` fields of a learning rate scheduler.

    accelerate's MegatronLMDummyScheduler counts the micro-batches of all ranks
    (`len(dataloader) * epochs`), so its total_num_steps are that many times micro_batch_size
    samples. Schedulers of transformers (`get_linear_schedule_with_warmup`, `get_cosine_...`,
    `get_constant_...`) and torch's CosineAnnealingLR count updates.

    Raises ConfigError for any other scheduler.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    if hasattr(scheduler, "total_num_steps"):
        return _dummy_scheduler(scheduler, micro_batch_size)
    if type(scheduler).__name__ == "CosineAnnealingLR":
        return {
            "schedule.decay": "cosine",
            "schedule.decay_iters": scheduler.T_max,
            "schedule.min_lr": float(scheduler.eta_min),
        }
    return _transformers_scheduler(scheduler)


def _dummy_scheduler(scheduler: Any, micro_batch_size: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if scheduler.total_num_steps is not None:
        fields["schedule.decay_samples"] = scheduler.total_num_steps * micro_batch_size
    warmup = getattr(scheduler, "warmup_num_steps", 0)
    if warmup:
        fields["schedule.warmup_samples"] = warmup * micro_batch_size
    return fields


def _transformers_scheduler(scheduler: Any) -> dict[str, Any]:
    """transformers returns torch's LambdaLR over a functools.partial, whose arguments are read."""
    functions = getattr(scheduler, "lr_lambdas", None) or [None]
    if getattr(functions[0], "__qualname__", "") in _CONSTANT:
        return {"schedule.decay": "constant"}
    style = _STYLES.get(getattr(getattr(functions[0], "func", None), "__name__", ""))
    arguments: Mapping[str, Any] = getattr(functions[0], "keywords", None) or {}
    if style is None or arguments.get("num_cycles", 0.5) != 0.5:
        raise _refusal(
            "scheduler",
            type(scheduler).__name__,
            "its steps cannot be read; give an object with total_num_steps and warmup_num_steps, "
            "a linear, cosine or constant scheduler of transformers, or CosineAnnealingLR, "
            "or set lr_decay_style, lr_decay_iters and lr_warmup_iters",
        )
    fields: dict[str, Any] = {"schedule.decay": style}
    if arguments.get("num_warmup_steps"):
        fields["schedule.warmup_iters"] = arguments["num_warmup_steps"]
    if arguments.get("num_training_steps") is not None:
        fields["schedule.decay_iters"] = arguments["num_training_steps"]
    return fields


def _refusal(field: str, value: Any, remedy: str) -> ConfigError:
    return config_error([Problem(field, value, remedy)])

"""accelerate's MegatronLMPlugin as a TrainConfig: a field has an effect or is refused by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from megafn.pure.accelerate.later_fields import LATER_FIELDS, later_field_problem
from megafn.pure.accelerate.plugin_fields import (
    CONFIG_PATHS,
    FIELD_NAMES,
    PRECISIONS,
    PluginFields,
    field_problems,
)
from megafn.pure.accelerate.plugin_object import (
    object_precision,
    object_problems,
    with_object,
)
from megafn.pure.accelerate.settings import Finding, Setting, known_values, merge
from megafn.pure.accelerate.sources import (
    custom_functions,
    later_settings,
    layout,
    loader_settings,
    megatron_arguments,
    missing_batches,
    missing_rate,
    model_sizes,
    optimizer_settings,
    run_length,
    scheduler_settings,
    sequence_lengths,
    with_effect,
)
from megafn.pure.config.field_types import default_of, has_type, section_types, type_problem
from megafn.pure.config.problems import Problem, choice_problem, config_error, did_you_mean
from megafn.pure.config.records import DataConfig, TrainConfig
from megafn.pure.validation.validate import validate

_DEFAULT_SEED: int = default_of(TrainConfig, "seed")

# Arguments of `from_plugin` that are plain values, with their types.
_ARGUMENTS: dict[str, type] = {
    "lr": float,
    "weight_decay": float,
    "micro_batch_size": int,
    "data": DataConfig,
    "seed": int,
    "world_size": int,
}


def from_plugin(
    plugin: Any = None,
    *,
    model: Any,
    optimizer: Any = None,
    scheduler: Any = None,
    dataloaders: Any = None,
    mixed_precision: str | None = None,
    world_size: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    micro_batch_size: int | None = None,
    data: DataConfig | None = None,
    seed: int = _DEFAULT_SEED,
    **fields: Any,
) -> TrainConfig:
    """The TrainConfig that the fields of accelerate's MegatronLMPlugin describe.

    plugin: a MegatronLMPlugin of accelerate 0.27 to 1.15, of which every field that is not at
        accelerate's default is read. Or give the fields by name, or some of them beside it.
    model: a Hugging Face config, or a model that has one (gpt2, llama, mistral, megatron-bert, t5),
        or a ModelConfig. Its sizes are used, its weights are not.
    optimizer, scheduler: torch's, or accelerate's dummies. Or give `lr`, `weight_decay` and the
        fields of the schedule.
        The optimizer that a scheduler holds is read if there is no other.
    dataloaders: those that `train` will get, for their batch sizes. Or give `micro_batch_size`.
    mixed_precision: "no", "bf16" or "fp16"; None: that of the plugin, or "no".
    data: corpora instead of loaders.
    world_size: number of processes; None: the variable WORLD_SIZE, or 1.
    **fields: those of `PluginFields`, under accelerate's names, and those that later versions
        have besides (`later_fields`).

    The global batch is micro_batch_size * num_micro_batches * dp sequences, with
    dp = world_size / (tp * pp * cp).

    Raises ConfigError with all problems at once: unknown names with the nearest one, wrong types,
    and fields that contradict each other, would have no effect, or cannot run. The arguments are
    not changed.

    >>> from megafn.pure.config.records import ModelConfig
    >>> model = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> run = dict(model=model, lr=1e-3, train_iters=10, micro_batch_size=2, world_size=4)
    >>> config = from_plugin(tp_degree=2, num_micro_batches=4, **run)
    >>> config.global_batch_size, config.parallel.tp, config.schedule.decay
    (16, 2, 'linear')
    >>> from_plugin(tp_degre=2, **run)
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: tp_degre = 2: there is no such field; \
did you mean "tp_degree"?
    """
    given = {name: value for name, value in fields.items() if value is not None}
    arguments = dict(
        lr=lr,
        weight_decay=weight_decay,
        micro_batch_size=micro_batch_size,
        data=data,
        seed=seed,
        world_size=world_size,
    )
    if plugin is not None:
        problems = list(object_problems(plugin, given))
        if problems:
            raise config_error(problems)
        given = with_object(plugin, given)
        mixed_precision = mixed_precision or object_precision(plugin)
    problems = list(_argument_problems(given, arguments))
    if problems:
        raise config_error(problems)
    later = {name: given.pop(name) for name in LATER_FIELDS if name in given}
    named = PluginFields(**given)
    if world_size is None:
        world_size = _world_size()

    findings: list[Finding] = list(model_sizes(model))
    findings += _plain_settings(given, arguments)
    findings += _precision(mixed_precision or "no")
    findings += loader_settings(dataloaders, data, named)
    findings += missing_batches(merge(findings), given)
    findings += optimizer_settings(optimizer, scheduler)
    schedule = scheduler_settings(known_values(findings), scheduler)
    findings += schedule
    findings += sequence_lengths(known_values(findings), named)
    findings += custom_functions(named)
    findings += megatron_arguments(known_values(findings), given.get("other_megatron_args", {}))
    findings += later_settings(known_values(findings), later)
    findings += layout(known_values(findings), named, world_size)
    findings += _accelerates_defaults(named)
    findings += run_length(known_values(findings), schedule)

    findings += missing_rate(known_values(findings), optimizer)
    merged = merge(with_effect(findings))
    if merged.problems:
        raise config_error(merged.problems)
    config = _build(merged.values)
    _check(config, world_size, merged.sources)
    return config


def _argument_problems(given: Mapping[str, Any], arguments: Mapping[str, Any]) -> Iterator[Problem]:
    """Unknown names, wrong types and sizes below 1."""
    for name, value in given.items():
        if name in LATER_FIELDS:
            problem = later_field_problem(name, value, field=name)
            if problem is not None:
                yield problem
        elif name not in FIELD_NAMES:
            hint = did_you_mean(name, [*FIELD_NAMES, *LATER_FIELDS, *arguments])
            yield Problem(name, value, f"there is no such field{hint}")
    yield from field_problems({name: given[name] for name in given if name in FIELD_NAMES})
    for name, value in arguments.items():
        if value is not None and not has_type(value, _ARGUMENTS[name]):
            yield type_problem(name, value, _ARGUMENTS[name])
    for name in ("micro_batch_size", "world_size"):
        value = arguments[name]
        if isinstance(value, int) and value < 1:
            yield Problem(name, value, "must be at least 1")


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    try:
        return int(text)
    except ValueError:
        raise config_error([type_problem("WORLD_SIZE", text, int)]) from None


def _plain_settings(given: Mapping[str, Any], arguments: Mapping[str, Any]) -> Iterator[Finding]:
    """Fields and arguments that are one config field each."""
    for name, path in CONFIG_PATHS.items():
        if name in given:
            yield Setting(path, given[name], name)
    if "consumed_samples" in given:
        yield Setting("consumed_samples", tuple(given["consumed_samples"]), "consumed_samples")
    for name, path in (
        ("lr", "schedule.lr"),
        ("weight_decay", "schedule.weight_decay"),
        ("data", "data"),
        ("micro_batch_size", "micro_batch_size"),
    ):
        if arguments[name] is not None:
            yield Setting(path, arguments[name], name)
    # Weak: other_megatron_args has a seed too.
    yield Setting("seed", arguments["seed"], "seed", weak=True)


def _precision(mixed_precision: str) -> Iterator[Finding]:
    if mixed_precision in PRECISIONS:
        yield Setting("precision.dtype", PRECISIONS[mixed_precision], "mixed_precision")
    else:
        yield choice_problem("mixed_precision", mixed_precision, PRECISIONS)


def _accelerates_defaults(plugin: PluginFields) -> Iterator[Finding]:
    """Fields whose default in accelerate is not the config's."""
    for name in ("lr_decay_style", "eval_iters", "eval_interval"):
        if name == "eval_interval" and plugin.eval_iters == 0:
            continue  # there are no evaluations
        yield Setting(CONFIG_PATHS[name], getattr(plugin, name), name, weak=True)


def _build(values: Mapping[str, Any]) -> TrainConfig:
    """The config of values by dotted path."""
    fields: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        if section:
            sections.setdefault(section, {})[name] = value
        else:
            fields[name] = value
    classes = section_types(TrainConfig)
    for name, changes in sections.items():
        # data is given as a whole, and other_megatron_args change some of its fields
        whole = fields.get(name)
        fields[name] = classes[name](**changes) if whole is None else attrs.evolve(whole, **changes)
    return TrainConfig(**fields)


def _check(config: TrainConfig, world_size: int, sources: Mapping[str, str]) -> None:
    """Raises ConfigError with all that `validate` finds, by the names of the user's arguments."""
    problems = validate(config, world_size)
    if problems:
        raise config_error(
            attrs.evolve(problem, field=sources.get(problem.field, problem.field))
            for problem in problems
        )

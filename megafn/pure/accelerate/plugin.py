"""accelerate's MegatronLMPlugin, field by field, as a TrainConfig: each takes effect, or is refused with the reason and the remedy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_type_hints

import attrs

from megafn.pure.accelerate.from_objects import (
    loader_fields,
    model_fields,
    optimizer_fields,
    scheduler_fields,
)
from megafn.pure.accelerate.megatron_names import MEGATRON
from megafn.pure.accelerate.plugin_fields import SAME, PluginFields
from megafn.pure.config import records as configs
from megafn.pure.config.field_types import has_type, type_in_words
from megafn.pure.config.problems import ConfigError, Problem, config_error, did_you_mean
from megafn.pure.config.records import DataConfig, TrainConfig
from megafn.pure.families.built_in import find_spec
from megafn.pure.families.family_spec import FamilySpec
from megafn.pure.validation.validate import validate

_PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
_STEP = ("batch", "forward", "loss")


class _Fields:
    """Config fields by dotted path while they are gathered: who said what, and where two disagree."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.by: dict[str, str] = {}
        self.problems: list[Problem] = []

    def refuse(self, name: str, value: Any, remedy: str) -> None:
        self.problems.append(Problem(name, value, remedy))

    def put(self, path: str, value: Any, by: str) -> None:
        """Said by the user under the name `by`; raises a problem where something else was said before."""
        if path in self.by and not (
            type(self.values[path]) is type(value) and self.values[path] == value
        ):
            self.refuse(
                by, value, f"{self.by[path]} says {self.values[path]!r}; give one of the two"
            )
        else:
            self.values[path], self.by[path] = value, by

    def default(self, path: str, value: Any) -> None:
        """What holds where nobody says anything else."""
        self.values.setdefault(path, value)


def from_plugin(
    *,
    model: Any,
    optimizer: Any = None,
    scheduler: Any = None,
    dataloaders: Any = None,
    mixed_precision: str = "no",
    world_size: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    micro_batch_size: int | None = None,
    data: DataConfig | None = None,
    seed: int = 1234,
    **fields: Any,
) -> TrainConfig:
    """The TrainConfig that the 40 fields of accelerate's MegatronLMPlugin mean (`**fields`, see `PluginFields`).

    model: a Hugging Face config, or a model that has one (gpt2, llama, megatron-bert, t5), or a ModelConfig; sizes are
    taken, weights are not. optimizer, scheduler: torch's, or accelerate's dummies; or say `lr`, `weight_decay` and the
    schedule's fields. dataloaders: those that `train` will be given, for their batch sizes; or say `micro_batch_size`.
    data: corpora instead of loaders. world_size: None means WORLD_SIZE, or 1.

    The global batch is micro_batch_size * num_micro_batches * dp sequences, and dp = world_size / (tp * pp * cp).

    Raises ConfigError with all that is wrong at once: unknown names with the nearest one, wrong types, fields that
    contradict each other, that would have no effect, or that cannot run. Nothing of what is passed is changed.

    >>> model = configs.ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = from_plugin(model=model, tp_degree=2, num_micro_batches=4, train_iters=10, micro_batch_size=2, world_size=4)
    >>> config.global_batch_size, config.parallel.tp, config.schedule.decay
    (16, 2, 'linear')
    >>> from_plugin(model=model, tp_degre=2, train_iters=10, micro_batch_size=2)
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: tp_degre = 2: there is no such field; did you mean "tp_degree"?
    """
    found = _Fields()
    given = {name: value for name, value in fields.items() if value is not None}
    _check_types(
        found,
        given,
        dict(
            lr=lr,
            weight_decay=weight_decay,
            micro_batch_size=micro_batch_size,
            data=data,
            seed=seed,
            world_size=world_size,
        ),
    )
    if found.problems:
        raise config_error(found.problems)
    plugin = PluginFields(**given)
    if world_size is None:
        world_size = _whole("WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))

    _own(
        found, "model", lambda: model_fields(model), weak=not isinstance(model, configs.ModelConfig)
    )
    for name in SAME.keys() & given.keys():
        found.put(SAME[name], _plain(given[name]), name)
    for path, value, name in (
        ("schedule.lr", lr, "lr"),
        ("schedule.weight_decay", weight_decay, "weight_decay"),
        ("data", data, "data"),
        ("micro_batch_size", micro_batch_size, "micro_batch_size"),
    ):
        if value is not None:
            found.put(path, value, name)
    if mixed_precision in _PRECISIONS:
        found.put("precision.dtype", _PRECISIONS[mixed_precision], "mixed_precision")
    else:
        found.refuse("mixed_precision", mixed_precision, f"choose one of {', '.join(_PRECISIONS)}")
    found.default("seed", seed)
    _loaders(found, dataloaders, data, plugin, given)
    if optimizer is not None:
        _own(found, "optimizer", lambda: optimizer_fields(optimizer))
    if scheduler is not None and isinstance(found.values.get("micro_batch_size"), int):
        _own(
            found,
            "scheduler",
            lambda: scheduler_fields(scheduler, found.values["micro_batch_size"]),
        )
    _lengths(found, plugin)
    _functions(found, plugin)
    _others(found, plugin)
    _layout(found, plugin, world_size)
    for path, default in (
        ("schedule.decay", plugin.lr_decay_style),
        ("eval_iters", plugin.eval_iters),
        ("eval_interval", plugin.eval_interval),
    ):
        found.default(path, default)
    if "horizon" in found.values:
        path, steps = found.values.pop("horizon")
        if not {"train_iters", "train_samples"} & found.values.keys():
            found.put(path, steps, "scheduler")
    if not {"train_iters", "train_samples"} & found.values.keys():
        found.refuse(
            "train_iters",
            None,
            "give train_iters, train_samples, or a scheduler that knows its number of steps",
        )
    elif {"train_iters", "train_samples"} <= found.values.keys():
        found.refuse(
            "train_samples",
            plugin.train_samples,
            f"train_iters = {plugin.train_iters} says how long the run is; give one of the two",
        )
    if found.problems:
        raise config_error(found.problems)
    made = _config(found.values)
    problems = validate(made, world_size)
    if problems:
        raise config_error(
            Problem(found.by.get(one.field, one.field), one.value, one.remedy) for one in problems
        )
    return made


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise config_error([Problem(name, text, "give an integer")]) from None


def _check_types(found: _Fields, given: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    kinds = get_type_hints(PluginFields)
    for name, value in given.items():
        if name not in kinds:
            found.refuse(
                name, value, f"there is no such field{did_you_mean(name, [*kinds, *others])}"
            )
        elif not has_type(value, kinds[name]):
            found.refuse(name, value, f"give {type_in_words(kinds[name])}")
    others_kinds = {
        "lr": float,
        "weight_decay": float,
        "micro_batch_size": int,
        "data": DataConfig,
        "seed": int,
        "world_size": int,
    }
    for name, value in others.items():
        if value is not None and not has_type(value, others_kinds[name]):
            found.refuse(name, value, f"give {type_in_words(others_kinds[name])}")
    samples = given.get("consumed_samples", (0, 0, 0))
    if not has_type(_plain(samples), tuple[int, int, int]):
        found.refuse(
            "consumed_samples", samples, "give three integers: samples of train, valid and test"
        )
    for name in ("custom_train_step_kwargs", "other_megatron_args"):
        if name in given and not (
            isinstance(given[name], Mapping) and all(isinstance(key, str) for key in given[name])
        ):
            found.refuse(name, given[name], "give a dict from names to values")
    for name in (
        "tp_degree",
        "pp_degree",
        "num_micro_batches",
        "num_layers_per_virtual_pipeline_stage",
    ):
        if isinstance(given.get(name), int) and given[name] < 1:
            found.refuse(name, given[name], "give 1 or more")
    for name in ("micro_batch_size", "world_size"):
        if isinstance(others[name], int) and others[name] < 1:
            found.refuse(name, others[name], "give 1 or more")


def _own(
    found: _Fields, by: str, read: Callable[[], Mapping[str, Any]], weak: bool = False
) -> None:
    """Fields that an object of another library says; `weak`: other_megatron_args may say something else."""
    try:
        for path, value in read().items():
            found.default(path, value) if weak or path == "horizon" else found.put(path, value, by)
    except ConfigError as error:
        found.problems.append(error)


def _loaders(
    found: _Fields, dataloaders: Any, data: Any, plugin: PluginFields, given: Mapping[str, Any]
) -> None:
    if dataloaders is not None:
        _own(
            found,
            "dataloaders",
            lambda: loader_fields(dataloaders, smallest=plugin.is_train_batch_min),
        )
        if data is not None:
            found.refuse("data", data, "dataloaders give the batches already; give one of the two")
    elif not plugin.is_train_batch_min:
        found.refuse(
            "is_train_batch_min",
            False,
            "it chooses among the batch sizes of dataloaders, and there are none; give them or leave it out",
        )
    if "micro_batch_size" not in found.values and not found.problems:
        found.refuse("micro_batch_size", None, "give it, or dataloaders that have a batch size")
    indexed = found.values.get("data") is not None
    if plugin.megatron_dataset_flag and not indexed:
        found.refuse(
            "megatron_dataset_flag",
            True,
            "the indexed data are named by data = DataConfig(train=...), or by a MegatronLMDummyDataLoader "
            "with data_path in dataloaders; give one of them or leave it out",
        )
    if given.get("megatron_dataset_flag") is False and indexed:
        found.refuse(
            "megatron_dataset_flag",
            False,
            "it says that the batches are loaders' of Hugging Face, and data are given; leave one of the two out",
        )


def _family(found: _Fields) -> FamilySpec | None:
    """The family of the model that was read, or None where none could be."""
    return find_spec(found.values.get("model.family"))


def _lengths(found: _Fields, plugin: PluginFields) -> None:
    if plugin.consumed_samples is not None:
        found.put("consumed_samples", tuple(plugin.consumed_samples), "consumed_samples")
    spec = _family(found)
    if spec is None:
        return
    first, *second = spec.stacks
    for name in ("seq_length", f"{first}_seq_length"):
        if getattr(plugin, name, None) is not None:
            found.put("model.seq_length", getattr(plugin, name), name)
    rows = found.values.get("model.max_position_embeddings")
    if rows is not None:
        found.default("model.seq_length", rows)
    for stack in ("encoder", "decoder"):
        name = f"{stack}_seq_length"
        length = getattr(plugin, name)
        if length is None or stack == first:
            continue
        if stack in second:
            found.put("model.decoder_seq_length", length, name)
        else:
            found.refuse(
                name, length, f"{spec.name} has no {stack}; use seq_length or {first}_seq_length"
            )


def _given_step(step: Any, config: TrainConfig) -> Any:
    return step


def _functions(found: _Fields, plugin: PluginFields) -> None:
    step, arguments = plugin.custom_train_step_class, plugin.custom_train_step_kwargs
    is_record = (
        step is not None
        and not isinstance(step, type)
        and all(callable(getattr(step, name, None)) for name in _STEP)
    )
    if step is None:
        if arguments is not None:
            found.refuse(
                "custom_train_step_kwargs",
                arguments,
                "there is no custom_train_step_class to give them to; give it or leave them out",
            )
    elif is_record:
        if arguments:
            found.refuse(
                "custom_train_step_kwargs",
                arguments,
                "a Step takes none; bind them to its functions with functools.partial",
            )
        found.put("step_function", partial(_given_step, step), "custom_train_step_class")
    elif callable(step):
        found.put("step_function", partial(step, **(arguments or {})), "custom_train_step_class")
    else:
        found.refuse(
            "custom_train_step_class",
            step,
            "give a class that is called with (config, **kwargs), or a megafn.Step",
        )
    if plugin.return_logits:
        found.put("return_logits", "last_stage", "return_logits")
    if plugin.recompute_activations:
        found.put("recompute.granularity", "selective", "recompute_activations")


def _others(found: _Fields, plugin: PluginFields) -> None:
    own = get_type_hints(PluginFields)
    for name, value in (plugin.other_megatron_args or {}).items():
        by = f"other_megatron_args[{name!r}]"
        if name not in MEGATRON:
            hint = (
                "it is a field of the plugin; give it there"
                if name in own or name in ("lr", "weight_decay", "micro_batch_size")
                else f"there is no such argument{did_you_mean(name, MEGATRON) or ', or it has no meaning in megafn'}"
            )
            found.refuse(by, value, hint)
            continue
        path, convert = MEGATRON[name]
        if path is None:
            found.refuse(by, value, convert)
            continue
        section, _, field = path.rpartition(".")
        if section == "data" and found.values.get("data") is None:
            found.refuse(
                by,
                value,
                "it is about indexed data, and there are none; give data = DataConfig(...) or leave it out",
            )
            continue
        try:
            value = convert(value) if convert is not None else value
        except (TypeError, ValueError, KeyError):
            found.refuse(by, value, "give a value that Megatron-LM's argument takes")
            continue
        kind = get_type_hints(_SECTIONS[section] if section else TrainConfig)[field]
        if value is None or not has_type(value, kind):
            found.refuse(by, value, f"give {type_in_words(kind)}")
        elif section == "data":
            found.values["data"] = attrs.evolve(found.values["data"], **{field: value})
        else:
            found.put(path, value, by)


def _layout(found: _Fields, plugin: PluginFields, world_size: int) -> None:
    values, n = found.values, plugin.num_layers_per_virtual_pipeline_stage
    layers = values.get("model.num_layers")
    if n is not None:
        if plugin.pp_degree == 1:
            found.refuse(
                "num_layers_per_virtual_pipeline_stage",
                n,
                "interleaving needs pp_degree of 2 or more; raise that or leave it out",
            )
        elif isinstance(layers, int) and layers % (plugin.pp_degree * n):
            found.refuse(
                "num_layers_per_virtual_pipeline_stage",
                n,
                f"pp_degree * {n} = {plugin.pp_degree * n} must divide the model's {layers} layers",
            )
        elif isinstance(layers, int):
            found.put(
                "parallel.vpp",
                layers // plugin.pp_degree // n,
                "num_layers_per_virtual_pipeline_stage",
            )
    if (split := plugin.pipeline_model_parallel_split_rank) is not None:
        spec = _family(found)
        if spec is None:
            pass
        elif "parallel.pipeline_model_parallel_split_rank" in spec.fields:
            found.put(
                "parallel.pipeline_model_parallel_split_rank",
                split,
                "pipeline_model_parallel_split_rank",
            )
        else:
            found.refuse(
                "pipeline_model_parallel_split_rank",
                split,
                "it is the stage at which T5's decoder begins, and this model is "
                f"of the family {spec.name}; leave it out",
            )
    size = plugin.tp_degree * plugin.pp_degree * values.get("parallel.cp", 1)
    if world_size % size:
        found.refuse(
            "world_size",
            world_size,
            f"tp_degree * pp_degree (* context_parallel_size) = {size} must divide it; start a multiple of {size} processes",
        )
    values["global_batch_size"] = (
        values.get("micro_batch_size", 1) * plugin.num_micro_batches * max(1, world_size // size)
    )
    found.by["global_batch_size"] = "num_micro_batches"


_SECTIONS = {
    "model": configs.ModelConfig,
    "parallel": configs.ParallelConfig,
    "optimizer": configs.OptimizerConfig,
    "schedule": configs.ScheduleConfig,
    "precision": configs.PrecisionConfig,
    "recompute": configs.RecomputeConfig,
    "log": configs.LogConfig,
    "data": configs.DataConfig,
}


def _config(values: Mapping[str, Any]) -> TrainConfig:
    sections: dict[str, dict[str, Any]] = {}
    top = {}
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        (sections.setdefault(section, {}) if section else top)[name] = value
    return TrainConfig(
        **top, **{section: _SECTIONS[section](**fields) for section, fields in sections.items()}
    )

"""The arguments of `from_plugin` as settings: of model, loaders, optimizer, scheduler and plugin.

Each function gives settings and problems. If these depend on other arguments too, the function
takes `known`: the values that the other arguments have set, by path.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from megafn.pure.accelerate.from_loaders import loader_fields
from megafn.pure.accelerate.from_models import model_fields
from megafn.pure.accelerate.from_optimizers import optimizer_fields, scheduler_fields
from megafn.pure.accelerate.later_fields import megatron_argument
from megafn.pure.accelerate.megatron_names import ARGUMENTS, ELSEWHERE, NOWHERE
from megafn.pure.accelerate.plugin_fields import FIELD_NAMES, PluginFields
from megafn.pure.accelerate.settings import Finding, Merged, Setting, known_values
from megafn.pure.config.field_types import all_field_types, has_type, type_problem
from megafn.pure.config.problems import ConfigError, Problem, did_you_mean
from megafn.pure.config.records import DataConfig, ModelConfig, TrainConfig
from megafn.pure.families.built_in import find_spec
from megafn.pure.families.family_spec import FamilySpec

# Arguments of `from_plugin` that Megatron-LM has too.
_COMMON_ARGUMENTS = ("lr", "weight_decay", "micro_batch_size")

# A scheduler that knows where its decay ends gives the length of the run.
_RUN_LENGTHS = {
    "schedule.decay_iters": "train_iters",
    "schedule.decay_samples": "train_samples",
}

_STEP_FUNCTIONS = ("batch", "forward", "loss")


def _read(
    source: str, read: Callable[[], Mapping[str, Any]], *, weak: bool = False
) -> list[Finding]:
    """What `read` finds in an object of another library, or the error that it raises."""
    try:
        return [Setting(path, value, source, weak) for path, value in read().items()]
    except ConfigError as error:
        return [error]


def model_sizes(model: Any) -> list[Finding]:
    """The fields of the model, which are known by their paths: "model.hidden_size"."""
    # other_megatron_args may change what a Hugging Face config says.
    weak = not isinstance(model, ModelConfig)
    return [
        attrs.evolve(finding, source=finding.path) if isinstance(finding, Setting) else finding
        for finding in _read("model", partial(model_fields, model), weak=weak)
    ]


def loader_settings(
    dataloaders: Any, data: DataConfig | None, plugin: PluginFields
) -> Iterator[Finding]:
    """The micro-batch size of the loaders, and the corpora of a loader of indexed data."""
    if dataloaders is not None:
        smallest = plugin.is_train_batch_min
        yield from _read("dataloaders", partial(loader_fields, dataloaders, smallest=smallest))
        if data is not None:
            yield Problem("data", data, "dataloaders give the batches already; give one of the two")
    elif not plugin.is_train_batch_min:
        yield Problem(
            "is_train_batch_min",
            False,
            "it chooses among the batch sizes of dataloaders, and there are none; "
            "give them or leave it out",
        )


def missing_batches(merged: Merged, given: Mapping[str, Any]) -> Iterator[Finding]:
    """Problems of a micro-batch size or indexed data that no source gives.

    given: the plugin's fields that are not left out.
    """
    # What the loaders should have said is missing if they are a problem themselves.
    if not merged.problems and "micro_batch_size" not in merged.values:
        yield Problem("micro_batch_size", None, "give it, or dataloaders that have a batch size")

    expects_data = given.get("megatron_dataset_flag")
    has_data = "data" in merged.values
    if expects_data is True and not has_data:
        yield Problem(
            "megatron_dataset_flag",
            True,
            "there are no indexed data; give data = DataConfig(train=...), or dataloaders with "
            "a MegatronLMDummyDataLoader that has data_path, or leave it out",
        )
    if expects_data is False and has_data:
        yield Problem(
            "megatron_dataset_flag",
            False,
            "batches would come from loaders of Hugging Face, and data are given; "
            "leave one of the two out",
        )


def optimizer_settings(optimizer: Any, scheduler: Any) -> list[Finding]:
    """The fields of the optimizer, or of the one that the scheduler holds if there is no other."""
    if optimizer is not None:
        return _read("optimizer", partial(optimizer_fields, optimizer))
    held = getattr(getattr(scheduler, "scheduler", scheduler), "optimizer", None)
    if held is not None:
        return _read("scheduler.optimizer", partial(optimizer_fields, held))
    return []


def missing_rate(known: Mapping[str, Any], optimizer: Any) -> Iterator[Finding]:
    """A problem if nothing gives a learning rate. An optimizer without one is a problem already."""
    if "schedule.lr" not in known and optimizer is None:
        yield Problem("lr", None, "give lr, an optimizer, or a scheduler that holds an optimizer")


def with_effect(findings: Sequence[Finding]) -> list[Finding]:
    """The findings without what a torch object always says, but this schedule does not read.

    A scheduler knows where its decay ends, though the learning rate may be constant; an optimizer
    has a weight decay, though it may ramp.
    """
    known = known_values(findings)
    idle = set()
    if known.get("schedule.decay") == "constant" and not known.get("schedule.warmup_fraction"):
        idle |= {("scheduler", path) for path in _RUN_LENGTHS}
    if known.get("schedule.weight_decay_incr_style", "constant") != "constant":
        for source in ("optimizer", "scheduler.optimizer"):
            idle.add((source, "schedule.weight_decay"))
    return [
        finding
        for finding in findings
        if not isinstance(finding, Setting) or (finding.source, finding.path) not in idle
    ]


def scheduler_settings(known: Mapping[str, Any], scheduler: Any) -> list[Finding]:
    """The fields of the learning rate scheduler; [] if there is none."""
    # Without a micro-batch size, a problem already, its steps cannot be counted in samples.
    if scheduler is None or "micro_batch_size" not in known:
        return []
    return _read("scheduler", partial(scheduler_fields, scheduler, known["micro_batch_size"]))


def run_length(known: Mapping[str, Any], schedule: Sequence[Finding]) -> Iterator[Finding]:
    """The length of the run: one of train_iters and train_samples, else the scheduler's."""
    given = [name for name in _RUN_LENGTHS.values() if name in known]
    if len(given) == 2:
        yield Problem(
            "train_samples",
            known["train_samples"],
            f"train_iters = {known['train_iters']} is the length of the run already; "
            "give one of the two",
        )
    if given:
        return
    lengths = [
        Setting(_RUN_LENGTHS[finding.path], finding.value, finding.source)
        for finding in schedule
        if isinstance(finding, Setting) and finding.path in _RUN_LENGTHS
    ]
    yield from lengths
    if not lengths:
        yield Problem(
            "train_iters",
            None,
            "give train_iters, train_samples, or a scheduler that knows its number of steps",
        )


def sequence_lengths(known: Mapping[str, Any], plugin: PluginFields) -> Iterator[Finding]:
    """Lengths of the encoder's and the decoder's input."""
    family = find_spec(known.get("model.family"))
    if family is None:
        return

    first, *others = family.stacks
    for name in ("seq_length", f"{first}_seq_length"):
        length = getattr(plugin, name, None)
        if length is not None:
            yield Setting("model.seq_length", length, name)
    rows = known.get("model.max_position_embeddings")
    if rows is not None:
        yield Setting("model.seq_length", rows, "model.max_position_embeddings", weak=True)

    for stack in ("encoder", "decoder"):
        name = f"{stack}_seq_length"
        length = getattr(plugin, name)
        if length is None or stack == first:
            continue
        if stack in others:
            yield Setting("model.decoder_seq_length", length, name)
        else:
            remedy = f"{family.name} has no {stack}; use seq_length or {first}_seq_length"
            yield Problem(name, length, remedy)


def custom_functions(plugin: PluginFields) -> Iterator[Finding]:
    """A custom train step, a model provider, and fields that switch something on."""
    yield from _provider_problems(plugin.custom_model_provider_function)
    yield from _custom_step(plugin.custom_train_step_class, plugin.custom_train_step_kwargs)
    if plugin.return_logits:
        yield Setting("return_logits", "last_stage", "return_logits")
    if plugin.recompute_activations:
        yield Setting("recompute.granularity", "selective", "recompute_activations")


def _custom_step(step: Any, arguments: Any) -> Iterator[Finding]:
    """step: None, a `megafn.Step`, or a class that is called with (config, **arguments)."""
    if step is None:
        if arguments is not None:
            yield Problem(
                "custom_train_step_kwargs",
                arguments,
                "there is no custom_train_step_class to give them to; give it or leave them out",
            )
    elif _is_step(step):
        if arguments:
            yield Problem(
                "custom_train_step_kwargs",
                arguments,
                "a Step takes none; bind them to its functions with functools.partial",
            )
        function = partial(_return_step, step)
        yield Setting("step_function", function, "custom_train_step_class")
    elif (refusal := inherited_step_problem(step)) is not None:
        yield Problem("custom_train_step_class", step, refusal)
    elif callable(step):
        function = partial(step, **(arguments or {}))
        yield Setting("step_function", function, "custom_train_step_class")
    else:
        yield Problem(
            "custom_train_step_class",
            step,
            "give a class that is called with (config, **kwargs), or a megafn.Step",
        )


def _is_step(step: Any) -> bool:
    """Whether it is a `megafn.Step`, which this half of the package does not import."""
    if isinstance(step, type):
        return False
    return all(callable(getattr(step, name, None)) for name in _STEP_FUNCTIONS)


def _return_step(step: Any, config: TrainConfig) -> Any:
    return step


# accelerate's own train steps, and the families whose built-in steps take their place.
_ACCELERATES_STEPS = {"GPTTrainStep": "gpt", "BertTrainStep": "bert", "T5TrainStep": "t5"}
_STEP_METHODS = ("__init__", "get_batch_func", "get_loss_func", "get_forward_step_func")


def inherited_step_problem(step: Any) -> str | None:
    """Why a class cannot run that runs code of accelerate's own train steps, or None.

    That code reads Megatron-LM's global arguments, which do not exist here. A subclass that brings
    a constructor and the three methods of its own runs.
    """
    bases = step.__mro__ if isinstance(step, type) else ()
    base = next((base for base in bases if _is_of_accelerate(base)), None)
    if base is None:
        return None
    family = _ACCELERATES_STEPS[base.__name__]
    if base is step:
        return f'it is what a "{family}" does anyway; leave it out'
    inherited = [name for name in _STEP_METHODS if getattr(step, name) is getattr(base, name)]
    constructor = getattr(step.__init__, "__code__", None)
    if not inherited and "super" not in getattr(constructor, "co_names", ()):
        return None
    return (
        f"accelerate's {base.__name__}, on which it builds, reads Megatron-LM's global arguments; "
        "write instead what it changes, for instance the loss:\n"
        "    def loss(logits, batch, pg):  # [sequence, batch, vocabulary / tp]\n"
        "        losses = megafn.cross_entropy(logits, batch['labels'], pg)\n"
        "        mask = batch['loss_mask']\n"
        "        return megafn.Loss(sum=(losses * mask).sum(), count=mask.sum())\n"
        f"    custom_train_step_class = attrs.evolve(megafn.step_fn('{family}'), loss=loss)"
    )


def _is_of_accelerate(base: type) -> bool:
    return base.__module__.startswith("accelerate.") and base.__name__ in _ACCELERATES_STEPS


def _provider_problems(provider: Any) -> Iterator[Finding]:
    """A model provider of accelerate's signature, (pre_process, post_process), is refused."""
    try:
        signature = inspect.signature(provider)
    except (TypeError, ValueError):
        return
    stage = dict(pre_process=True, post_process=True, vp_stage=None)
    try:
        signature.bind("config", "pg", **stage)
    except TypeError:
        if "pre_process" in signature.parameters:
            yield Problem(
                "custom_model_provider_function",
                provider,
                f"it takes {signature}, and is called with the config and the process groups that "
                "Megatron-LM keeps in globals; let it take "
                "(config, pg, *, pre_process, post_process, vp_stage) and build on "
                "megafn.build_chunk, which takes the same",
            )


def megatron_arguments(known: Mapping[str, Any], arguments: Mapping[str, Any]) -> Iterator[Finding]:
    """other_megatron_args, each as a config field."""
    has_data = "data" in known
    groups = arguments.get("num_query_groups", known.get("model.num_query_groups"))
    for name, value in arguments.items():
        if name == "group_query_attention" and value is (groups is not None):
            continue  # it says no more than the number of groups
        yield _megatron_argument(name, value, has_data)


def later_settings(known: Mapping[str, Any], fields: Mapping[str, Any]) -> Iterator[Finding]:
    """Fields that later versions of accelerate have, each as the argument that it becomes."""
    for name, value in fields.items():
        for argument, setting in megatron_argument(name, value).items():
            finding = _megatron_argument(argument, setting, "data" in known)
            if isinstance(finding, ConfigError):
                yield finding
            elif isinstance(finding, Setting):
                yield attrs.evolve(finding, source=name)
            else:
                yield attrs.evolve(finding, field=name)


def _megatron_argument(name: str, value: Any, has_data: bool) -> Finding:
    source = f"other_megatron_args[{name!r}]"
    if name not in ARGUMENTS:
        remedy = ELSEWHERE.get(name) or NOWHERE.get(name) or _unknown_argument(name)
        return Problem(source, value, remedy)
    argument = ARGUMENTS[name]
    if argument.path.startswith("data.") and not has_data:
        return Problem(
            source,
            value,
            "it is about indexed data, and there are none; "
            "give data = DataConfig(...) or leave it out",
        )
    if argument.convert is not None:
        try:
            value = argument.convert(value)
        except (TypeError, ValueError, KeyError):
            return Problem(source, value, "give a value that Megatron-LM's argument takes")
    kind = dict(all_field_types(TrainConfig))[argument.path]
    if value is None or not has_type(value, kind):
        return type_problem(source, value, kind)
    return Setting(argument.path, value, source)


def _unknown_argument(name: str) -> str:
    if name in FIELD_NAMES or name in _COMMON_ARGUMENTS:
        return "it is a field of the plugin; give it there"
    nearest = did_you_mean(name, [*ARGUMENTS, *ELSEWHERE])
    return f"there is no such argument{nearest or ', or it has no meaning in megafn'}"


def layout(known: Mapping[str, Any], plugin: PluginFields, world_size: int) -> Iterator[Finding]:
    """How the model is cut, and the global batch that follows."""
    yield from _interleaving(known.get("model.num_layers"), plugin)
    yield from _split_rank(find_spec(known.get("model.family")), plugin)

    size = plugin.tp_degree * plugin.pp_degree * known.get("parallel.cp", 1)
    if world_size % size:
        yield Problem(
            "world_size",
            world_size,
            f"tp_degree * pp_degree (* context_parallel_size) = {size} must divide it; "
            f"start a multiple of {size} processes",
        )
    dp = max(1, world_size // size)
    micro_batch_size = known.get("micro_batch_size", 1)
    yield Setting(
        "global_batch_size",
        micro_batch_size * plugin.num_micro_batches * dp,
        "num_micro_batches",
    )


def _interleaving(layers: Any, plugin: PluginFields) -> Iterator[Finding]:
    """Model chunks per stage, from the layers of each."""
    name = "num_layers_per_virtual_pipeline_stage"
    per_chunk = plugin.num_layers_per_virtual_pipeline_stage
    if per_chunk is None:
        return
    if plugin.pp_degree == 1:
        yield Problem(
            name,
            per_chunk,
            "interleaving needs pp_degree of at least 2; raise that or leave it out",
        )
        return
    if not isinstance(layers, int):
        return
    unit = plugin.pp_degree * per_chunk
    if layers % unit:
        yield Problem(
            name,
            per_chunk,
            f"pp_degree * {per_chunk} = {unit} must divide the model's {layers} layers",
        )
    else:
        yield Setting("parallel.vpp", layers // unit, name)


def _split_rank(family: FamilySpec | None, plugin: PluginFields) -> Iterator[Finding]:
    name = "pipeline_model_parallel_split_rank"
    split = plugin.pipeline_model_parallel_split_rank
    if split is None or family is None:
        return
    if f"parallel.{name}" in family.fields:
        yield Setting(f"parallel.{name}", split, name)
    else:
        yield Problem(
            name,
            split,
            "it is the stage at which T5's decoder begins, and this model is "
            f"of the family {family.name}; leave it out",
        )

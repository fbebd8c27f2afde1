"""The step of a config; and accelerate's train steps, objects with three methods, as a Step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import Parameter
from typing import Any

import torch

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig
from megafn.runtime.families.built_in import family_of, step_fn
from megafn.runtime.families.step import Batch, Step
from megafn.runtime.model.losses import Loss
from megafn.runtime.parallel.groups import ProcessGroups

# Attributes of an accelerate train step -> the methods that return them.
METHODS = {
    "get_batch": "get_batch_func",
    "loss_func": "get_loss_func",
    "forward_step": "get_forward_step_func",
}

# What accelerate passes to each, by position: today's call first, then those of its BERT step and
# of version 0.27, whose methods do not get the accelerator.
_CALLS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "get_batch_func": (("accelerator", "megatron_dataset_flag"), ("megatron_dataset_flag",)),
    "get_loss_func": (
        ("accelerator",),
        ("accelerator", "pretraining_flag", "num_labels"),
        ("pretraining_flag", "num_labels"),
    ),
    "get_forward_step_func": ((), ("pretraining_flag", "bert_binary_head")),
}

# forward_step(data_iterator, model) -> (output, function from the output to the loss).
ForwardStep = Callable[[Iterator[Batch], Callable[..., Any]], tuple[Any, Callable[[Any], Any]]]


def step_of(config: TrainConfig) -> Step:
    """The step of a config: what its `step_function` returns, or its family's."""
    if config.step_function is None:
        return step_fn(config.model.family)
    return step_from_object(config.step_function(config), config)


def step_from_object(step: Any, config: TrainConfig) -> Step:
    """The Step of what a config's `step_function` returned.

    step: a Step, returned as it is, or an object with accelerate's methods get_batch_func,
        get_loss_func and get_forward_step_func. Each is called once, as accelerate calls it, with
        (accelerator=None, megatron_dataset_flag), (accelerator=None) and (): by name if its
        parameters have these names, else by position. What they return becomes the object's
        get_batch, loss_func and forward_step, unless it has set those itself, as accelerate's own
        classes do.

    forward_step(data_iterator, model) -> (output, loss function). `model` is called as

        model(tokens, position_ids, attention_mask, labels=labels), for a GPT: per-token losses
            [batch, sequence], or logits without labels;
        model(tokens, padding_mask, tokentype_ids=types, lm_labels=labels), for a BERT: (losses,
            logits of the sentence order or None), or logits without labels;
        model(tokens_enc, tokens_dec, enc_mask, dec_mask, enc_dec_mask, tokentype_ids=None,
            lm_labels=labels), for a T5: per-token losses, or logits without labels. Masks are
            bool [batch or 1, queries, keys], True = hidden.

    The loss function returns (mean, {name: mean}), as in accelerate: the gradient is that of the
    mean over micro-batches and data-parallel ranks. Or, better, (sum, count, {name: sum}): the
    gradient is that of the sum over the count of the global batch.

    Indexed data have the key "text" [batch, sequence + 1] too, and for a T5 masks of Megatron-LM's
    shape [batch, queries, keys], 1 = real.

    Raises ConfigError for an object without the methods or with other parameters, and under context
    parallelism, which cuts the sequences that they see.
    """
    if isinstance(step, Step):
        return step
    _check_methods(step, config)
    _keep_functions(step, config)
    call = family_of(config.model.family).train_step_calls.call
    return Step(batch=_batch, forward=partial(_forward, step.forward_step, call), loss=_loss)


def _check_methods(step: Any, config: TrainConfig) -> None:
    name = type(step).__name__
    missing = [method for method in METHODS.values() if not callable(getattr(step, method, None))]
    if missing:
        raise ConfigError(
            f"step_function: it returned a {name} without {', '.join(missing)}; "
            f"return a megafn.Step, or an object with {', '.join(METHODS.values())}"
        )
    if config.parallel.cp > 1:
        raise ConfigError(
            f"parallel.cp = {config.parallel.cp}: the methods of {name} need whole sequences; "
            "set it to 1, or write a megafn.Step"
        )


def _keep_functions(step: Any, config: TrainConfig) -> None:
    """Call the three methods and keep what they return as attributes of the object."""
    model = config.model
    offered = {
        "accelerator": None,
        "megatron_dataset_flag": config.data is not None,
        "pretraining_flag": model.num_labels is None,
        "num_labels": model.num_labels,
        "bert_binary_head": model.bert_binary_head,
    }
    for name, method in METHODS.items():
        if not hasattr(step, name):
            setattr(step, name, _call_as_accelerate(step, method, offered))


def _call_as_accelerate(step: Any, method: str, offered: Mapping[str, Any]) -> Any:
    """What a method returns, called with those of the offered arguments that it takes."""
    getter = getattr(step, method)
    parameters = inspect.signature(getter).parameters.values()
    required = [parameter for parameter in parameters if _is_required(parameter)]
    takes_any_number = any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters)
    takes_names = all(
        parameter.name in offered and parameter.kind is not Parameter.POSITIONAL_ONLY
        for parameter in required
    )
    if takes_names and not takes_any_number:
        names = [parameter.name for parameter in parameters if parameter.name in offered]
        return getter(**{name: offered[name] for name in names})

    for positional in _CALLS[method]:
        fits = len(required) == len(positional)
        if takes_any_number:
            fits = len(required) <= len(positional)
        if fits:
            return getter(*(offered[name] for name in positional))
    taken = ", ".join(parameter.name for parameter in required)
    raise ConfigError(
        f"step_function: {type(step).__name__}.{method} takes ({taken}); "
        f"let it take ({', '.join(_CALLS[method][0])}), which is what accelerate passes"
    )


def _is_required(parameter: Parameter) -> bool:
    collects = parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return parameter.default is Parameter.empty and not collects


def _batch(raw: Mapping[str, Any], config: TrainConfig, pg: ProcessGroups) -> Batch:
    tensors = {key: torch.as_tensor(value) for key, value in raw.items()}
    batch = family_of(config.model.family).train_step_calls.batch(tensors)
    return {key: value.to(pg.device, non_blocking=True) for key, value in batch.items()}


def _forward(
    forward_step: ForwardStep,
    call: Callable[..., tuple[Any, Any]],
    model: torch.nn.Module,
    batch: Batch,
) -> Any:
    """`Step.forward`: run the user's forward step on one micro-batch."""
    chunk = getattr(model, "module", model)
    # The model's own outputs: the logits, which the forward step may not return.
    outputs: list[Any] = []

    def called_model(*inputs: Any, **named: Any) -> Any:
        output, for_train_step = call(model, chunk, *inputs, **named)
        outputs.append(output)
        return for_train_step

    output, loss = forward_step(iter([batch]), called_model)
    if not getattr(chunk, "post_process", True):
        return output
    logits = outputs[-1] if outputs else output
    # The loss function travels with the tensor that it belongs to.
    _first(logits).loss_of_step = partial(loss, output)
    return logits


def _loss(logits: Any, batch: Batch, pg: ProcessGroups) -> Loss:
    """`Step.loss`: call the loss function that the user's forward step returned."""
    loss = _first(logits).loss_of_step()
    if isinstance(loss, tuple) and len(loss) == 3:
        total, count, report = loss
        return Loss(sum=total, count=count, report=report)
    if isinstance(loss, tuple) and len(loss) == 2:
        mean, report = loss
        return Loss(sum=mean, count=1, report=report)
    raise TypeError(
        f"loss function of the train step: expected (mean, dict of means) or "
        f"(sum, count, dict of sums), got {type(loss).__name__}"
    )


def _first(logits: Any) -> Any:
    """The logits of tokens, if there are those of the sentence order beside them."""
    return logits[0] if isinstance(logits, tuple) else logits

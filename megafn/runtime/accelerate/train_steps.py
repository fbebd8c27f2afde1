"""The step of a config; and accelerate's train steps, objects with three methods, as a Step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
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
        get_loss_func and get_forward_step_func. Each is called once, with those of
        (megatron_dataset_flag, accelerator=None) that it names. What they return becomes the
        object's get_batch, loss_func and forward_step, unless it has set those itself, as
        accelerate's own classes do.

    forward_step(data_iterator, model) -> (output, loss function). `model` is called as

        model(tokens, position_ids, attention_mask, labels=labels), for a GPT: per-token losses
            [batch, sequence], or logits without labels;
        model(tokens, padding_mask, tokentype_ids=types, lm_labels=labels), for a BERT: (losses,
            logits of the sentence order or None), or logits without labels.

    The loss function returns (mean, {name: mean}), as in accelerate: the gradient is that of the
    mean over micro-batches and data-parallel ranks. Or, better, (sum, count, {name: sum}): the
    gradient is that of the sum over the count of the global batch.

    Indexed data have the key "text" [batch, sequence + 1] too.

    Raises ConfigError for an object without the methods, and under context parallelism, which cuts
    the sequences that they see.
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
    offered = {"megatron_dataset_flag": config.data is not None, "accelerator": None}
    for name, method in METHODS.items():
        if hasattr(step, name):
            continue
        getter = getattr(step, method)
        accepted = inspect.signature(getter).parameters
        arguments = {key: value for key, value in offered.items() if key in accepted}
        setattr(step, name, getter(**arguments))


def _batch(raw: Mapping[str, Any], config: TrainConfig, pg: ProcessGroups) -> Batch:
    batch = {key: torch.as_tensor(value) for key, value in raw.items()}
    batch = family_of(config.model.family).train_step_calls.batch(batch)
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

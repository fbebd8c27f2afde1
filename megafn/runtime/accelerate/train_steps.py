"""The step of a config; and accelerate's train steps, objects with three methods, made a Step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig
from megafn.runtime.families.built_in import family_of, step_fn
from megafn.runtime.families.step import Batch, Step
from megafn.runtime.model.losses import Loss
from megafn.runtime.parallel.groups import ProcessGroups

METHODS = {
    "get_batch": "get_batch_func",
    "loss_func": "get_loss_func",
    "forward_step": "get_forward_step_func",
}


def step_of(config: TrainConfig) -> Step:
    """The step of a config: what its `step_function` makes, or its family's."""
    return (
        step_fn(config.model.family)
        if config.step_function is None
        else step_from_object(config.step_function(config), config)
    )


def step_from_object(made: Any, config: TrainConfig) -> Step:
    """The Step that a config's `step_function` made: a Step as it is, or one of an object with accelerate's three methods.

    The methods are called once, with those of (megatron_dataset_flag, accelerator = None) that they name, and what they
    return is kept as the object's get_batch, loss_func and forward_step, unless it has set those itself, as accelerate's
    own classes do. forward_step(data_iterator, model) -> (output, loss function); model(tokens, position_ids,
    attention_mask, labels=labels) gives losses [batch, sequence] where labels are given, else logits; a BERT is called
    as model(tokens, padding_mask, tokentype_ids=types, lm_labels=labels), and gives (losses, logits of the order or None)
    where labels are given. The loss
    function returns (mean, {name: mean}) as there: the gradient is then that of the mean over micro-batches and
    data-parallel ranks; or, better, (sum, count, {name: sum}), and it is that of the sum over the global batch's count.
    Indexed data come with the key "text" [batch, sequence + 1] too.

    Raises ConfigError for an object without the methods, and under context parallelism, which they know nothing of.
    """
    if isinstance(made, Step):
        return made
    missing = [method for method in METHODS.values() if not callable(getattr(made, method, None))]
    if missing:
        raise ConfigError(
            f"step_function: it gave a {type(made).__name__} without {', '.join(missing)}; let it give a megafn.Step, "
            f"or an object with {', '.join(METHODS.values())}"
        )
    if config.parallel.cp > 1:
        raise ConfigError(
            f"parallel.cp = {config.parallel.cp}: {type(made).__name__}'s methods see whole sequences; set it to 1, or write a megafn.Step"
        )
    offered = {"megatron_dataset_flag": config.data is not None, "accelerator": None}
    for name, method in METHODS.items():
        if not hasattr(made, name):
            getter = getattr(made, method)
            wanted = inspect.signature(getter).parameters
            setattr(
                made,
                name,
                getter(**{key: value for key, value in offered.items() if key in wanted}),
            )
    call = family_of(config.model.family).train_step_calls.call
    return Step(batch=_batch, forward=partial(_forward, made.forward_step, call), loss=_loss)


def _batch(raw: Mapping[str, Any], config: TrainConfig, pg: ProcessGroups) -> Batch:
    batch = {key: torch.as_tensor(value) for key, value in raw.items()}
    batch = family_of(config.model.family).train_step_calls.batch(batch)
    return {key: value.to(pg.device, non_blocking=True) for key, value in batch.items()}


def _forward(forward_step: Callable, call: Callable, model: torch.nn.Module, batch: Batch) -> Any:
    """The model's output, with what the train step makes of it: its loss, to be called later."""
    chunk = getattr(model, "module", model)
    outputs = []

    def called_model(*inputs: Any, **named: Any) -> Any:
        output, for_train_step = call(model, chunk, *inputs, **named)
        outputs.append(output)
        return for_train_step

    output, loss = forward_step(iter([batch]), called_model)
    if not getattr(chunk, "post_process", True):
        return output
    logits = outputs[-1] if outputs else output
    first = logits[0] if isinstance(logits, tuple) else logits
    first.loss_of_step = partial(loss, output)  # travels with the tensor that it belongs to
    return logits


def _loss(logits: Any, batch: Batch, pg: ProcessGroups) -> Loss:
    found = (logits[0] if isinstance(logits, tuple) else logits).loss_of_step()
    if isinstance(found, tuple) and len(found) == 3:
        return Loss(sum=found[0], count=found[1], report=found[2])
    if isinstance(found, tuple) and len(found) == 2:
        return Loss(sum=found[0], count=1, report=found[1])
    raise TypeError(
        f"the loss function of the train step returned {type(found).__name__}: (mean, dict of means) or (sum, count, dict of sums) is wanted."
    )

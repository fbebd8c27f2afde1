"""A run's tensors in pieces of whole ones: parameters and optimizer state, by names and places that no layout changes.

Every local parameter knows its name and place in the whole model (`weights.parts`); what the optimizer keeps of it, fp32
masters included, lies as it does, or is a range of its flattened elements (distributed optimizer). So one description
serves every layout and family, and reading back is copying what overlaps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from attrs import frozen

from megafn.pure.checkpoint.boxes import Box, Index, boxes, flat, in_whole
from megafn.pure.config.problems import ConfigError
from megafn.runtime.model.optimizer import chained, inner_optimizers
from megafn.runtime.model.state import State
from megafn.runtime.model.weights import LocalParameter, local_parameters


@frozen(kw_only=True, eq=False)
class StateBox:
    """A box of one whole tensor; `view`, of the box's size, shares its memory with the state."""

    tensor: str  # "parameter/NAME", or "exp_avg/NAME" and what else the optimizer keeps, by torch's names
    shape: Index  # of the whole tensor
    box: Box
    view: torch.Tensor


@frozen(kw_only=True, eq=False)
class OptimizerShard:
    """What the optimizer updates of a parameter: elements start to end - 1 of its local part, flattened, and their state."""

    value: torch.Tensor
    start: int
    end: int
    slots: dict[str, Any]


def _optimizer_shards(optimizer: Any) -> Callable[[torch.nn.Parameter], OptimizerShard | None]:
    """The master of a parameter; None where other data-parallel ranks hold all of it."""
    slots, sharded = {}, {}
    for inner in inner_optimizers(optimizer):
        slots.update(
            {value: inner.state[value] for group in inner.param_groups for value in group["params"]}
        )
    for part in chained(optimizer):
        for parameter, (group, place) in getattr(part, "model_param_group_index_map", {}).items():
            held = part._get_model_param_range_map(parameter)["param"]
            sharded[parameter] = (
                part.optimizer.param_groups[group]["params"][place],
                held.start,
                held.end,
            )
        cut = hasattr(part, "model_param_group_index_map")

    def master(parameter):
        if not parameter.requires_grad:  # frozen: nobody updates it
            return OptimizerShard(value=parameter, start=0, end=parameter.numel(), slots={})
        if cut and parameter not in sharded:
            return None
        value, start, end = sharded.get(parameter) or (
            getattr(parameter, "main_param", parameter),
            0,
            parameter.numel(),
        )
        return OptimizerShard(value=value, start=start, end=end, slots=slots[value])

    return master


def _views(
    part: LocalParameter, tensor: torch.Tensor, start: int, end: int
) -> Iterator[tuple[Box, torch.Tensor]]:
    """The boxes of the whole parameter that a flattened range of its local part covers, and views of them in `tensor`."""
    local = tuple(part.parameter.shape)
    strides = torch.empty(local, device="meta").stride()
    for box in boxes(local, start, end):
        for there, at in in_whole(
            box, local, part.shape, part.dim, stride=part.stride, tp=part.tp, tp_rank=part.tp_rank
        ):
            yield (
                there,
                tensor.as_strided(
                    there[1], strides, tensor.storage_offset() + flat(at, local) - start
                ),
            )


def check_buffers(state: State) -> None:
    """Raises ConfigError where a module of the user's has a persistent buffer: nothing says how layouts cut it, so it is not saved."""
    for chunk in state.chunks:
        for name, module in chunk.named_modules():
            for buffer in sorted(module._buffers.keys() - module._non_persistent_buffers_set):
                if module._buffers[buffer] is not None:
                    raise ConfigError(
                        f"model: checkpoints hold parameters, and {type(module).__name__} has the buffer {buffer!r} at {name or 'its root'}; "
                        f"make it a parameter, or register it with persistent=False"
                    )


@torch.no_grad()
def state_boxes(state: State) -> Iterator[StateBox]:
    """Every piece that this process holds; others may hold the same."""
    master = _optimizer_shards(state.optimizer)
    for chunk in state.chunks:
        for part in local_parameters(chunk, state.config.model, state.pg):
            if (held := master(part.parameter)) is None:
                continue
            for kind, tensor in {"parameter": held.value, **held.slots}.items():
                if kind != "step" and isinstance(tensor, torch.Tensor):
                    for box, view in _views(
                        part, tensor.detach().contiguous(), held.start, held.end
                    ):
                        yield StateBox(
                            tensor=f"{kind}/{part.name}", shape=part.shape, box=box, view=view
                        )


def adam_step(state: State) -> int | None:
    """How many updates Adam has made; None where this process knows of none."""
    steps = {
        int(slots["step"])
        for inner in inner_optimizers(state.optimizer)
        for slots in inner.state.values()
        if "step" in slots
    }
    if len(steps) > 1:
        raise RuntimeError(
            f"optimizer steps = {sorted(steps)}: one number for all parameters was expected"
        )
    return steps.pop() if steps else None


@torch.no_grad()
def fill_state(
    state: State,
    copy: Callable[[str, Index, Box, torch.Tensor], None],
    kinds: Iterable[str],
    step: int | None,
) -> None:
    """Give every tensor of the state its value; copy(tensor, whole shape, box, target) copies a box into `target`.

    kinds: what the optimizer keeps besides the parameters, (): nothing yet. step: see `adam_step`.
    """
    master = _optimizer_shards(state.optimizer)
    for chunk in state.chunks:
        for part in local_parameters(chunk, state.config.model, state.pg):
            held = master(part.parameter)
            whole = torch.zeros(
                part.parameter.shape,
                dtype=(part.parameter if held is None else held.value).dtype,
                device=part.parameter.device,
            )
            for box, view in _views(
                part, whole, 0, whole.numel()
            ):  # rows that pad the vocabulary stay zero
                copy(f"parameter/{part.name}", part.shape, box, view)
            part.parameter.copy_(whole)
            if held is None:
                continue
            if held.value is not part.parameter:
                held.value.copy_(whole.flatten()[held.start : held.end].view_as(held.value))
            if not part.parameter.requires_grad:
                continue
            held.slots.clear()
            for kind in kinds:
                held.slots[kind] = torch.zeros_like(held.value, requires_grad=False)
                for box, view in _views(part, held.slots[kind], held.start, held.end):
                    copy(f"{kind}/{part.name}", part.shape, box, view)
            if step is not None:
                held.slots["step"] = torch.full(
                    (), float(step), dtype=torch.float32, device=held.value.device
                )  # one for each: it counts in place

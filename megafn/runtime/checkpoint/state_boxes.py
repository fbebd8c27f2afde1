"""A run's state as boxes of whole tensors, under names and places that no layout changes.

Every local parameter knows its name and place in the whole model (`weights.local_parameters`).
What the optimizer keeps of it, fp32 masters included, has the same shape, or is a range of its
flattened elements (distributed optimizer). So one description serves every layout and family,
and reading a checkpoint is copying what overlaps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen

from megafn.pure.checkpoint.boxes import Box, Index, boxes, flat, in_whole
from megafn.pure.config.problems import ConfigError
from megafn.runtime.model.optimizer import chained, inner_optimizers
from megafn.runtime.model.state import State
from megafn.runtime.model.weights import LocalParameter, local_parameters

CopyBox = Callable[[str, Index, Box, torch.Tensor], None]


@frozen(kw_only=True, eq=False)
class StateBox:
    """A box of one whole tensor; `view`, of the box's size, shares its memory with the state."""

    tensor: str  # "parameter/NAME", or "exp_avg/NAME" and so on, see `tensor_name`
    shape: Index  # of the whole tensor
    box: Box
    view: torch.Tensor


# ------------------------------------------------------------------------------------- names

# The kind of the parameters themselves; other kinds are what the optimizer keeps of them.
PARAMETER = "parameter"


def tensor_name(kind: str, parameter: str) -> str:
    """The name of what a checkpoint holds of a parameter; kinds of slots have torch's names.

    >>> tensor_name(PARAMETER, "output_layer.weight")
    'parameter/output_layer.weight'
    """
    return f"{kind}/{parameter}"


def kind_and_parameter(tensor: str) -> tuple[str, str]:
    """The inverse of `tensor_name`.

    >>> kind_and_parameter("exp_avg/output_layer.weight")
    ('exp_avg', 'output_layer.weight')
    """
    kind, _, parameter = tensor.partition("/")
    return kind, parameter


# ------------------------------------------------------------------------------ what is saved


def check_buffers(state: State) -> None:
    """Raises ConfigError if a module has a persistent buffer: nothing says how layouts split it."""
    for chunk in state.chunks:
        for place, module in chunk.named_modules():
            for name, _ in module.named_buffers(recurse=False, remove_duplicate=False):
                if name not in module._non_persistent_buffers_set:
                    raise ConfigError(
                        f"model: checkpoints hold parameters, and {type(module).__name__} has the "
                        f"buffer {name!r} at {place or 'its root'}; make it a parameter, or "
                        "register it with persistent=False"
                    )


@torch.no_grad()
def state_boxes(state: State, *, trained_only: bool = False) -> Iterator[StateBox]:
    """Every box that this process holds; other processes may hold the same ones.

    trained_only: without the parameters that are frozen.
    """
    index = _index_optimizer(state.optimizer)
    for part in _parameters(state):
        if trained_only and not part.parameter.requires_grad:
            continue
        shard = _shard_of(part.parameter, index)
        if shard is None:
            continue
        for kind, tensor in _tensors_of(shard).items():
            for box, view in _views(part, tensor.detach().contiguous(), shard.start, shard.end):
                name = tensor_name(kind, part.name)
                yield StateBox(tensor=name, shape=part.shape, box=box, view=view)


def adam_step(state: State) -> int | None:
    """Adam's step count, or None if this rank holds no optimizer state."""
    steps = set()
    for inner in inner_optimizers(state.optimizer):
        for slots in inner.state.values():
            if "step" in slots:
                steps.add(int(slots["step"]))
    if len(steps) > 1:
        raise RuntimeError(
            f"optimizer steps = {sorted(steps)}: expected one number for all parameters"
        )
    return steps.pop() if steps else None


def loss_scale(state: State) -> dict[str, float] | None:
    """The state of fp16's loss scale, or None in other precisions."""
    for scaler in _grad_scalers(state):
        return {name: float(value) for name, value in scaler.state_dict().items()}
    return None


# ----------------------------------------------------------------------------- what is loaded


@torch.no_grad()
def fill_state(
    state: State,
    copy: CopyBox,
    kinds: Mapping[str, Sequence[str]],
    step: int | None,
    *,
    unchanged: Collection[str] = (),
) -> None:
    """Give every tensor of the state its value.

    copy(tensor, whole shape, box, target) copies a box into `target`. kinds: what the optimizer
    keeps of a parameter, by its name; empty before the first step. step: see `adam_step`.
    unchanged: names of parameters that keep the value they have.
    """
    index = _index_optimizer(state.optimizer)
    for part in _parameters(state):
        shard = _shard_of(part.parameter, index)
        if part.name not in unchanged:
            _fill_parameter(part, shard, copy)
        if shard is not None and part.parameter.requires_grad:
            _fill_slots(part, shard, copy, kinds.get(part.name, ()), step)


def set_loss_scale(state: State, values: Mapping[str, float]) -> None:
    """Give fp16's loss scale the values that `loss_scale` returned."""
    counters = {name: int(value) for name, value in values.items() if name != "scale"}
    scale = torch.tensor([values["scale"]], device=state.pg.device)
    for scaler in _grad_scalers(state):
        scaler.load_state_dict({"scale": scale, **counters})


def _fill_parameter(part: LocalParameter, shard: OptimizerShard | None, copy: CopyBox) -> None:
    """Fill a local parameter, and the fp32 master of what this rank updates of it."""
    parameter = part.parameter
    local = torch.zeros(
        parameter.shape,  # rows that pad the vocabulary stay zero
        dtype=parameter.dtype if shard is None else shard.value.dtype,
        device=parameter.device,
    )
    for box, view in _views(part, local, 0, local.numel()):
        copy(tensor_name(PARAMETER, part.name), part.shape, box, view)
    parameter.copy_(local)
    if shard is not None and shard.value is not parameter:
        shard.value.copy_(local.flatten()[shard.start : shard.end].view_as(shard.value))


def _fill_slots(
    part: LocalParameter,
    shard: OptimizerShard,
    copy: CopyBox,
    kinds: Sequence[str],
    step: int | None,
) -> None:
    shard.slots.clear()
    for kind in kinds:
        slot = torch.zeros_like(shard.value, requires_grad=False)
        for box, view in _views(part, slot, shard.start, shard.end):
            copy(tensor_name(kind, part.name), part.shape, box, view)
        shard.slots[kind] = slot
    if step is not None and "exp_avg" in kinds:
        # a tensor for each parameter, because it counts in place
        shard.slots["step"] = torch.full(
            (), float(step), dtype=torch.float32, device=shard.value.device
        )


# ---------------------------------------------------------------- where the optimizer keeps it


@frozen(kw_only=True, eq=False)
class OptimizerShard:
    """What this rank's optimizer updates of a parameter, and its state.

    It is elements start to end - 1 of the flattened local part.
    """

    value: torch.Tensor
    start: int
    end: int
    slots: dict[str, Any]  # torch's own: what is changed here is changed in the optimizer


@frozen(kw_only=True, eq=False)
class OptimizerIndex:
    """Where an optimizer keeps its state."""

    slots: Mapping[torch.Tensor, dict[str, Any]]  # by the tensor that is updated
    ranges: Mapping[torch.nn.Parameter, tuple[torch.Tensor, int, int]]  # distributed optimizer only
    is_distributed: bool


def _index_optimizer(optimizer: Any) -> OptimizerIndex:
    slots = {}
    for inner in inner_optimizers(optimizer):
        for group in inner.param_groups:
            for value in group["params"]:
                slots[value] = inner.state[value]
    ranges = {}
    is_distributed = False
    for part in chained(optimizer):
        if not hasattr(part, "model_param_group_index_map"):
            continue
        is_distributed = True
        for parameter, (group_number, place) in part.model_param_group_index_map.items():
            value = part.optimizer.param_groups[group_number]["params"][place]
            local_range = part._get_model_param_range_map(parameter)["param"]
            ranges[parameter] = (value, local_range.start, local_range.end)
    return OptimizerIndex(slots=slots, ranges=ranges, is_distributed=is_distributed)


def _shard_of(parameter: torch.nn.Parameter, index: OptimizerIndex) -> OptimizerShard | None:
    """The shard of a parameter, or None if other data-parallel ranks hold all of it."""
    if not parameter.requires_grad:  # frozen: no rank updates it
        return OptimizerShard(value=parameter, start=0, end=parameter.numel(), slots={})
    if not index.is_distributed:
        value = getattr(parameter, "main_param", parameter)
        start = 0
        end = parameter.numel()
    elif parameter in index.ranges:
        value, start, end = index.ranges[parameter]
    else:
        return None
    return OptimizerShard(value=value, start=start, end=end, slots=index.slots[value])


def _tensors_of(shard: OptimizerShard) -> dict[str, torch.Tensor]:
    """The tensors of a shard that are saved; Adam's step is one number for all of them."""
    tensors = {PARAMETER: shard.value}
    for kind, slot in shard.slots.items():
        if kind != "step" and isinstance(slot, torch.Tensor):
            tensors[kind] = slot
    return tensors


def _grad_scalers(state: State) -> Iterator[Any]:
    for part in chained(state.optimizer):
        scaler = getattr(part, "grad_scaler", None)
        if scaler is not None:
            yield scaler


def held_shapes(state: State) -> dict[str, Index]:
    """The whole shape of each parameter that this process holds a part of, by its name."""
    return {part.name: part.shape for part in _parameters(state)}


def frozen_names(state: State) -> frozenset[str]:
    """Names of the parameters of this process that are not trained."""
    return frozenset(part.name for part in _parameters(state) if not part.parameter.requires_grad)


def _parameters(state: State) -> Iterator[LocalParameter]:
    for chunk in state.chunks:
        yield from local_parameters(chunk, state.config.model, state.pg)


def _views(
    part: LocalParameter, tensor: torch.Tensor, start: int, end: int
) -> Iterator[tuple[Box, torch.Tensor]]:
    """The boxes of the whole parameter that a local range covers, and views of them in `tensor`.

    The range is of the flattened local part, and `tensor` holds it.
    """
    local = tuple(part.parameter.shape)
    strides = torch.empty(local, device="meta").stride()
    for local_box in boxes(local, start, end):
        blocks = in_whole(
            local_box,
            local,
            part.shape,
            part.dim,
            stride=part.stride,
            tp=part.tp,
            tp_rank=part.tp_rank,
        )
        for box, local_offset in blocks:
            _, size = box
            place = tensor.storage_offset() + flat(local_offset, local) - start
            yield box, tensor.as_strided(size, strides, place)

"""Tensors that have a shape, a dtype and a lifetime, and no memory; and answers for their values.

Where a program reads the value of such a tensor (`item`, `tolist`, `if tensor`) it gets one with
which a training step runs to its end: numbers are 1, conditions are False, and a mask selects
everything, which is the most that it can. Answers come from modes of torch, which end with the
`with`; what no mode sees is exchanged in one place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork, Work
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megafn.runtime.parallel.exchanged import exchanged

_aten = torch.ops.aten


@contextlib.contextmanager
def fake_values() -> Iterator[FakeTensorMode]:
    """Every tensor that is made in the `with` is fake; real ones may be used beside them."""
    with (
        exchanged([(torch.nn.Module, "_apply", _apply), (FakeTensorMode, "cache", {})]),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        _AnswersToOperations(),
        _AnswersToFunctions(),
    ):
        yield mode


def without_values(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor in place of a real one, which it keeps alive: so that its bytes are counted."""
    fake = mode.from_tensor(tensor)
    fake.stands_for = tensor  # type: ignore[attr-defined]
    return fake


def _answer(tensor: torch.Tensor) -> Any:
    """The value of each element of a fake tensor."""
    if getattr(tensor, "has_no_infinity", False):
        return 0.0
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1


class _AnswersToFunctions(TorchFunctionMode):
    """Answers functions of torch that no operation is dispatched for."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is torch.Tensor.tolist and isinstance(args[0], FakeTensor):
            return _nested(_answer(args[0]), args[0].shape)
        return function(*args, **(kwargs or {}))


def _nested(value: Any, shape: Sequence[int]) -> Any:
    """A value in nested lists of this shape."""
    if not shape:
        return value
    return [_nested(value, shape[1:]) for _ in range(shape[0])]


class _AnswersToOperations(TorchDispatchMode):
    """Answers operations whose result depends on values, or that fake tensors do not have."""

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_fake(args):
            return operation(*args, **kwargs)
        if operation is _aten._local_scalar_dense.default:
            return _answer(args[0])
        if operation is _aten.nonzero.default:
            return _every_place(args[0])
        if operation is _aten.masked_select.default:
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
            return args[0].new_empty(shape.numel())
        if operation.overloadpacket in _INDEXED_BY_MASKS:
            return operation(args[0], _without_masks(args[1]), *args[2:], **kwargs)
        if operation.namespace == "c10d" and "coalesced_" in operation.name():
            return Work.boxed(FakeWork())
        result = operation(*args, **kwargs)
        if operation is _aten._amp_foreach_non_finite_check_and_unscale_.default:
            args[1].has_no_infinity = True
        return result


def _is_fake(args: Sequence[Any]) -> bool:
    """Whether the first tensor among the arguments of an operation is fake."""
    first = args[0] if args else None
    while isinstance(first, list | tuple) and first:
        first = first[0]
    return isinstance(first, FakeTensor)


_INDEXED_BY_MASKS = frozenset({_aten.index, _aten.index_put, _aten.index_put_})


def _every_place(mask: torch.Tensor) -> torch.Tensor:
    """What `nonzero` returns if no element is zero: int64 [elements, dimensions]."""
    return torch.empty(mask.numel(), mask.dim(), dtype=torch.long, device=mask.device)


def _without_masks(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The indices, with the places that a mask selects for each of its dimensions."""
    places: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            places += _every_place(index).unbind(1)
        else:
            places.append(index)
    return places


def _apply(
    module: torch.nn.Module,
    function: Callable[[torch.Tensor], torch.Tensor],
    recurse: bool = True,
) -> torch.nn.Module:
    """In place of torch's `Module._apply`, under `Module.to` and the like.

    That one exchanges a fake parameter for a new one, without the attributes that mark it.
    """
    with torch.no_grad():
        for part in module.modules() if recurse else [module]:
            for parameter in part._parameters.values():
                if parameter is not None:
                    _apply_to_parameter(parameter, function)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = function(buffer)
    return module


def _apply_to_parameter(
    parameter: torch.nn.Parameter, function: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    applied = function(parameter)
    if applied is not parameter:
        parameter.data = applied
    if parameter.grad is not None:
        parameter.grad.data = function(parameter.grad)

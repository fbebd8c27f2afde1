"""Pickles of other programs, read without executing anything of them.

A pickle names classes and functions, and calls them with what it holds: torch.load without
weights_only runs whatever stands there, and with it refuses the arguments that Megatron-LM keeps
beside its weights. Here a name is never looked up. A few are known, and stand for harmless
functions; in the place of any other stands a new class that keeps what it is given.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch

Known = Mapping[tuple[str, str], Any]


class InertUnpickler(pickle.Unpickler):
    """Reads a pickle; no name in it is imported.

    known: what stands for a name, by module and name; these are called as the pickle says, so they
    must be harmless with any argument. persistent_load: makes an object of a persistent id.
    """

    def __init__(
        self, file: BinaryIO, known: Known, persistent_load: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__(file)
        self._known = known
        self._persistent_load = persistent_load

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name."""
        if (module, name) in _HARMLESS:
            return _HARMLESS[module, name]
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch":
            dtype = vars(torch).get(name)  # getattr may import a module of torch
            if isinstance(dtype, torch.dtype):
                return dtype
        return _inert_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """What a persistent id stands for."""
        if self._persistent_load is None:
            raise pickle.UnpicklingError("it refers to objects outside of it")
        return self._persistent_load(pid)


_HARMLESS: Known = {("collections", "OrderedDict"): OrderedDict, ("torch", "Size"): tuple}


def is_inert(value: Any, class_name: str | None = None) -> bool:
    """Whether a value stands for an object of a class that was not looked up, or of this one."""
    name = getattr(type(value), "inert_name", None)
    return name is not None and class_name in (None, name)


def fields_of(value: Any) -> dict[str, Any]:
    """The attributes that a pickle gives to an object which it builds; {} if it gives none."""
    return value.__dict__ if is_inert(value) else {}


def _inert_class(module: str, name: str) -> type:
    """A new class whose objects keep the attributes that the pickle gives them."""
    methods = {
        "__new__": _new,
        "__init__": _ignore,
        "__call__": _ignore,
        "__setstate__": _set_state,
        "__setitem__": _ignore,
        "append": _ignore,
        "extend": _ignore,
        "add": _ignore,
        "inert_name": name,
    }
    return type("Inert", (), {**methods, "__module__": __name__})


def _new(cls: type, *_: Any, **__: Any) -> Any:
    return object.__new__(cls)


def _ignore(self: Any, *_: Any, **__: Any) -> None:
    return None


def _set_state(self: Any, state: Any) -> None:
    """Keep attributes by their names; a state of another kind under "state"."""
    attributes = state if isinstance(state, dict) else {"state": state}
    for name, value in attributes.items():
        if isinstance(name, str):
            self.__dict__[name] = value

"""accelerate's MegatronLMPlugin as an object, versions 0.27 to 1.15.

Read by its attributes; accelerate is not imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from megafn.pure.accelerate.later_fields import LATER_FIELDS
from megafn.pure.accelerate.plugin_fields import PluginFields
from megafn.pure.config.problems import Problem

_DEFAULTS: Mapping[str, Any] = {
    **{field.name: field.default for field in attrs.fields(PluginFields)},
    **{name: later.default for name, later in LATER_FIELDS.items()},
}
# Set together or not at all: the first one's default in accelerate is that of a field in use.
_RECOMPUTATION = ("recompute_granularity", "recompute_method", "recompute_num_layers")


def object_problems(plugin: Any, given: Mapping[str, Any]) -> Iterator[Problem]:
    """Why a plugin cannot be read beside the fields `given` by name."""
    has_sizes = hasattr(plugin, "tp_degree") and hasattr(plugin, "pp_degree")
    if isinstance(plugin, type) or not has_sizes:
        yield Problem("plugin", plugin, "give a MegatronLMPlugin of accelerate, or its fields")
        return
    for name, field in getattr(plugin, "__dataclass_fields__", {}).items():
        value = getattr(plugin, name, None)
        if name not in _DEFAULTS and value not in (None, False, field.default):
            yield Problem(f"plugin.{name}", value, "there is no such field here; leave it out")
    for name, value in object_fields(plugin).items():
        if name in given and given[name] != value:
            yield Problem(
                name, given[name], f"contradicts plugin.{name} = {value!r}; give one of the two"
            )


def object_fields(plugin: Any) -> dict[str, Any]:
    """The fields of a plugin that are not at accelerate's defaults."""
    fields = {}
    for name, default in _DEFAULTS.items():
        value = getattr(plugin, name, None)
        if value is not None and value != default:
            fields[name] = value
    if not fields.keys().isdisjoint(_RECOMPUTATION):
        fields["recompute_granularity"] = plugin.recompute_granularity
    return fields


def with_object(plugin: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields given by name, and those of a plugin.

    Warns of context_parallel_size = 2, accelerate 1.15's default.
    """
    name = "context_parallel_size"
    default = LATER_FIELDS[name].default
    given_by_name = {**given, **given.get("other_megatron_args", {})}
    if getattr(plugin, name, None) == default and name not in given_by_name:
        warnings.warn(
            f"MegatronLMPlugin.{name} = {default} is what accelerate sets if you don't, and is "
            f"not read: the sequence is not cut; if you mean it, give from_plugin {name}={default}",
            stacklevel=3,
        )
    return object_fields(plugin) | dict(given)


def object_precision(plugin: Any) -> str | None:
    """The mixed precision that accelerate's Accelerator has set on a plugin, or None."""
    arguments = getattr(plugin, "megatron_lm_default_args", None) or {}
    for precision in ("bf16", "fp16"):
        if arguments.get(precision) is True:
            return precision
    return None

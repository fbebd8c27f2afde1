"""Checkpoints of a run with adapters: what they say of them, and of the weights beneath.

The frozen weights are those that the run started from. If these have a place, `state.pretrained`,
checkpoints hold what is trained and refer to it; else, or if `lora(save_base=True)` asks for it,
they hold everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megafn.pure.config.problems import Problem, config_error
from megafn.runtime.model.lora import Lora, lora, lora_of
from megafn.runtime.model.state import State

# The settings on which the values of the other parameters depend.
_FIXED = ("rank", "alpha", "modules", "train_modules")

# (a state, the manifest of a checkpoint that refers to its base) -> the state with the base.
ReadBase = Callable[[State, Mapping[str, Any]], State]


def refers_to_base(state: State) -> bool:
    """Whether checkpoints of a state hold what is trained only."""
    lora = lora_of(state.chunks)
    return lora is not None and not lora.save_base and state.pretrained is not None


def adapters_to_dict(state: State) -> dict[str, Any] | None:
    """For the manifest of a checkpoint; None without adapters."""
    lora = lora_of(state.chunks)
    if lora is None:
        return None
    return _fixed_settings(lora) | {"holds_base": not refers_to_base(state)}


def lora_of_manifest(manifest: Mapping[str, Any]) -> Callable[..., Any] | None:
    """The prepare_model that made a checkpoint's adapters, or None if it has none."""
    adapters = manifest.get("adapters")
    return None if adapters is None else lora(**{name: adapters[name] for name in _FIXED})


def needs_base(manifest: Mapping[str, Any]) -> bool:
    """Whether a checkpoint lacks the frozen weights, and refers to them by its "pretrained"."""
    adapters = manifest.get("adapters")  # older manifests have no such key
    return adapters is not None and not adapters["holds_base"]


def adapters_scale(manifest: Mapping[str, Any]) -> float | None:
    """The factor of the adapters' output, or None if a checkpoint has no adapters."""
    adapters = manifest.get("adapters")
    return None if adapters is None else adapters["alpha"] / adapters["rank"]


def check_adapters(manifest: Mapping[str, Any], state: State) -> None:
    """Raises ConfigError if a checkpoint's adapters are not those of the state's model."""
    saved = manifest.get("adapters")
    lora = lora_of(state.chunks)
    if saved is None and lora is None:
        return
    if saved is None:
        remedy = (
            "the checkpoint was written without adapters; start from it with "
            "checkpoint.pretrained, and another checkpoint.directory"
        )
        raise config_error([Problem("prepare_model", lora, remedy)])
    if lora is None:
        given = ", ".join(f"{name}={saved[name]!r}" for name in _FIXED)
        remedy = f"the checkpoint was written with mf.lora({given}); set that"
        raise config_error([Problem("prepare_model", state.config.prepare_model, remedy)])
    problems = []
    for name, value in _fixed_settings(lora).items():
        if value != saved[name]:
            remedy = f"the checkpoint was written with {saved[name]!r}; set that"
            problems.append(Problem(f"lora.{name}", value, remedy))
    if problems:
        raise config_error(problems)


def _fixed_settings(lora: Lora) -> dict[str, Any]:
    """As JSON has them."""
    settings = {name: getattr(lora, name) for name in _FIXED}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()
    }

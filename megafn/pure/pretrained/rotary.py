"""Rotary positions in config.json, as transformers 4 and 5 write them.

transformers 5 has one object `rope_parameters`; transformers 4 has `rope_theta`, and `rope_scaling`
for what is not plain. Both read what 4 writes, so that is what `rotary_config` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megafn.pure.config.records import ModelConfig, RopeScaling
from megafn.pure.pretrained.config_reader import ConfigReader

_DEFAULT_BASE = 10_000.0


def read_rotary(
    reader: ConfigReader,
    *,
    default_base: float = _DEFAULT_BASE,
    base_key: str = "rope_theta",
    percent_key: str | None = None,
    default_percent: float = 1.0,
) -> dict[str, Any]:
    """The fields of `ModelConfig` about rotary positions.

    base_key, percent_key: what transformers 4 calls the base and the share of a head that is
        rotated; percent_key = None: this architecture rotates whole heads only.
    """
    name = "rope_scaling" if reader.get("rope_scaling") else "rope_parameters"
    rope = ConfigReader(config=reader.mapping(name), problems=[])
    nested = [key for key, value in rope.config.items() if isinstance(value, Mapping)]
    if nested:
        reader.refuse(
            f"{name}.{nested[0]}",
            rope.config[nested[0]],
            "layers with rotary positions of several kinds are not built; "
            "choose a model with one kind",
        )
        return {"position_embedding": "rope"}

    base = rope.number("rope_theta", reader.number(base_key, default_base))
    percent = default_percent
    if percent_key is not None:
        percent = reader.number(percent_key, default_percent)
    percent = rope.number("partial_rotary_factor", percent)
    if percent_key is None and percent != 1.0:
        rope.refuse(
            "partial_rotary_factor",
            percent,
            f"{reader.model_type} of transformers rotates whole heads; leave it out",
        )
    scaling = _scaling(rope, reader)
    for problem in rope.problems:
        reader.refuse(f"{name}.{problem.field}", problem.value, problem.remedy)
    return {
        "position_embedding": "rope",
        "rotary_base": base,
        "rotary_percent": percent,
        "rope_scaling": scaling,
    }


def _scaling(rope: ConfigReader, reader: ConfigReader) -> RopeScaling | None:
    """The scaling that `rope_type` names, called `type` before transformers 4.43."""
    key = "rope_type" if "rope_type" in rope.config else "type"
    kind = rope.get(key, "default")
    if kind == "default":
        return None
    if kind != "llama3":
        rope.refuse(
            key,
            kind,
            "of the scaled rotary positions only llama3 is built; "
            "choose a model with default or llama3",
        )
        return None
    original = rope.optional_integer("original_max_position_embeddings")
    if original is None:
        original = reader.integer("max_position_embeddings")
    return RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=original,
    )


def rotary_config(
    model: ModelConfig, *, base_key: str = "rope_theta", percent_key: str | None = None
) -> dict[str, Any]:
    """The keys of config.json for the model's fields; the inverse of `read_rotary`."""
    config: dict[str, Any] = {base_key: model.rotary_base}
    if percent_key is not None:
        config[percent_key] = model.rotary_percent
    scaling = model.rope_scaling
    if scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return config

"""The architectures of transformers that megafn's layers can compute, and which one is whose."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megafn.pure.config.family_record import family_name
from megafn.pure.config.problems import (
    ConfigError,
    Problem,
    config_error,
    did_you_mean,
)
from megafn.pure.config.records import ModelConfig
from megafn.pure.pretrained.architecture import SPECIAL_IDS, Architecture, different_fields
from megafn.pure.pretrained.config_reader import ConfigJson
from megafn.pure.pretrained.gpt2 import GPT2
from megafn.pure.pretrained.gpt_neox import GPT_NEOX
from megafn.pure.pretrained.llama import (
    LLAMA,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
    STARCODER2,
)
from megafn.pure.pretrained.megatron_bert import MASKED_LM, PRETRAINING, SEQUENCE_CLASSIFICATION
from megafn.pure.pretrained.t5 import T5

CONFIG = "config.json"

# By name. A model made from scratch is exported as the first one that expresses it.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        architecture.name: architecture
        for architecture in (
            GPT2,
            LLAMA,
            MISTRAL,
            QWEN2,
            QWEN3,
            PHI3,
            STARCODER2,
            SMOLLM3,
            GPT_NEOX,
            MASKED_LM,
            PRETRAINING,
            SEQUENCE_CLASSIFICATION,
            T5,
        )
    }
)

_EXPERTS = "experts are not built"
_GEMMA = "its embedding is multiplied by hidden_size ** 0.5 and its norms by 1 + weight"
_NORMS_AFTER = "its norms come after attention and MLP, megatron-core's before them"

# What megafn's layers lack for architectures that people ask for.
_NOT_BUILT = {
    "bert": "its norms come after the residual sum, megatron-core's before it (megatron-bert)",
    "gemma": _GEMMA,
    "gemma2": f"{_GEMMA}, and its scores are capped",
    "gemma3": f"{_GEMMA}, and windows of some layers are not built",
    "gemma3_text": f"{_GEMMA}, and windows of some layers are not built",
    "olmo2": _NORMS_AFTER,
    "olmo3": _NORMS_AFTER,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "deepseek_v2": f"{_EXPERTS}, nor is latent attention",
    "deepseek_v3": f"{_EXPERTS}, nor is latent attention",
}


def architecture_of(config: ConfigJson) -> Architecture:
    """The architecture of a parsed config.json, by its `architectures` and its `model_type`.

    Raises ConfigError naming the one that megafn does not have.

    >>> architecture_of({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}).name
    'LlamaForCausalLM'
    """
    model_type = config.get("model_type")
    candidates = [one for one in ARCHITECTURES.values() if one.model_type == model_type]
    if not candidates:
        raise config_error([_unknown_type(model_type)])
    names = config.get("architectures") or []
    if names in ([], [candidates[0].base_model]):
        return candidates[0]
    for architecture in candidates:
        if names == [architecture.name]:
            return architecture
    heads = " or ".join(one.name for one in candidates)
    remedy = f"this head is not built; change it to {heads} to read the layers below it"
    raise config_error([Problem("architectures", names, remedy)])


def _unknown_type(model_type: Any) -> Problem:
    if isinstance(model_type, str) and model_type in _NOT_BUILT:
        return Problem("model_type", model_type, f"{_NOT_BUILT[model_type]}; choose another model")
    known = list(dict.fromkeys(one.model_type for one in ARCHITECTURES.values()))
    hint = did_you_mean(model_type, known) if isinstance(model_type, str) else ""
    remedy = f"megafn does not have this architecture; choose one of {', '.join(known)}{hint}"
    return Problem("model_type", model_type, remedy)


def pretrained_model(path: str | os.PathLike[str]) -> ModelConfig:
    """The model of a Hugging Face directory, from its config.json alone; no weight is read.

    `seq_length` and `max_position_embeddings` are the model's number of positions (512 for a T5
    that names none), so that a shorter `seq_length` keeps the shape of a learned table:
    `attrs.evolve(model, seq_length=...)`.

    Raises ConfigError with every problem at once: an unknown architecture, or a field that megafn
    cannot express.

    >>> pretrained_model("nowhere")
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: nowhere/config.json: cannot be read \
(No such file or directory); give a directory that transformers' save_pretrained wrote
    """
    _, _, model = read_directory(path)
    return model


def read_directory(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], Architecture, ModelConfig]:
    """The config.json of a Hugging Face directory, its architecture and its model.

    Raises ConfigError as `pretrained_model` does.
    """
    file = Path(path) / CONFIG
    config = _read_json(file)
    try:
        architecture = architecture_of(config)
        fields, problems = architecture.read_config(config)
        if problems:
            raise config_error(problems)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return config, architecture, ModelConfig(**fields)


def _read_json(file: Path) -> dict[str, Any]:
    """A parsed config.json. Raises ConfigError naming the file if it is not one."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}); "
            "give a directory that transformers' save_pretrained wrote"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: is not valid JSON ({error}); correct it there") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: must be an object of names and values; correct it there")
    return config


def simplest_architecture(model: ModelConfig) -> Architecture:
    """The first architecture that expresses a model, for one that was made from scratch.

    Raises ConfigError naming the fields that none expresses.
    """
    family = family_name(model.family)
    candidates = [one for one in ARCHITECTURES.values() if one.family == family]
    if not candidates:
        families = ", ".join(dict.fromkeys(one.family for one in ARCHITECTURES.values()))
        remedy = f"transformers has no architecture of this family; choose one of {families}"
        raise config_error([Problem("model.family", family, remedy)])
    refusals: list[list[Problem]] = []
    for architecture in candidates:
        problems = architecture.problems_of(model)
        if not problems:
            return architecture
        refusals.append(problems)
    nearest: list[Problem] = min(refusals, key=len)
    raise config_error(nearest)


def architecture_for(model: ModelConfig, source: Architecture | None = None) -> Architecture:
    """The architecture that a model is exported as.

    source: the one that its weights came from, which is preferred; after it those of its model
        type, so that a BERT with another head stays a BERT.

    Raises ConfigError naming the fields that none expresses.
    """
    if source is None:
        return simplest_architecture(model)
    relatives = [one for one in ARCHITECTURES.values() if one.model_type == source.model_type]
    for architecture in (source, *relatives):
        if not architecture.problems_of(model):
            return architecture
    return simplest_architecture(model)


def exported_config(
    architecture: Architecture, model: ModelConfig, source: ConfigJson | None = None
) -> dict[str, Any]:
    """The config.json of an exported model.

    source: the config.json that the model came from. What it says beyond the model is given back as
        it was: special ids, names of labels, settings of transformers. None: there are no special
        ids.

    Raises ConfigError as `Architecture.write_config` does.
    """
    written = architecture.write_config(model)
    if source is None:
        return written
    if _says_the_same(architecture, source, model):
        return {**source, "architectures": [architecture.name]}
    ours = {key: value for key, value in written.items() if key not in SPECIAL_IDS}
    kept = {key: value for key, value in source.items() if key not in ours}
    # positions are written in the other dialect
    kept.pop("rope_parameters", None)
    kept.pop("rope_scaling", None)
    return {**kept, **ours}


def _says_the_same(architecture: Architecture, source: ConfigJson, model: ModelConfig) -> bool:
    """Whether the source's config.json, read as this architecture, is the model already."""
    if source.get("model_type") != architecture.model_type:
        return False
    fields, problems = architecture.read_config(source)
    return not problems and not different_fields(ModelConfig(**fields), model)

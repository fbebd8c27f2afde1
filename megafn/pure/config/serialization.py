"""Configs from and to plain dicts and TOML files, through cattrs."""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import attrs
import tomli_w
from cattrs import ClassValidationError, Converter
from cattrs.gen import make_dict_structure_fn

from megafn.pure.config.cattrs_errors import WrongType, problems_in
from megafn.pure.config.family_record import FamilyRecord
from megafn.pure.config.field_types import FieldType, has_type, is_section
from megafn.pure.config.problems import ConfigError, Problem, config_error
from megafn.pure.config.records import TrainConfig

Config = TypeVar("Config", bound=attrs.AttrsInstance)

# ---- To a dict


def to_dict(config: attrs.AttrsInstance) -> dict[str, Any]:
    """A config as plain dicts, lists, strings and numbers, as TOML can hold them.

    None is left out, a tuple becomes a list, a family's record its name. Raises ConfigError naming
    the field if a value, such as a function, cannot be written to a file.

    >>> from megafn.pure.config.records import RecomputeConfig
    >>> to_dict(RecomputeConfig(num_layers=2))
    {'method': 'uniform', 'num_layers': 2}
    """
    return _plain_section(config, "")


def _plain_section(config: attrs.AttrsInstance, prefix: str) -> dict[str, Any]:
    plain = {}
    for attribute in attrs.fields(type(config)):
        value = getattr(config, attribute.name)
        if value is not None:
            plain[attribute.name] = _plain(value, prefix + attribute.name)
    return plain


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, FamilyRecord):
        return value.name
    if callable(value):
        raise _not_for_a_file(path, value, "function")
    if attrs.has(type(value)):
        return _plain_section(value, f"{path}.")
    if isinstance(value, (list, tuple)):
        return [_plain(item, path) for item in value]
    if isinstance(value, str) and _has_surrogates(value):
        raise _not_for_a_file(path, value, "string that is not Unicode")
    if isinstance(value, (bool, int, float, str)):
        return value
    raise _not_for_a_file(path, value, f"value of type {type(value).__name__}")


def _has_surrogates(text: str) -> bool:
    """Halves of UTF-16 pairs, as in undecodable file names, which UTF-8 does not hold."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _not_for_a_file(path: str, value: Any, kind: str) -> ConfigError:
    remedy = f"a {kind} cannot be written to a file; leave it out and set it in code"
    return config_error([Problem(path, value, remedy)])


def without_functions(config: Config) -> Config:
    """The same config without what no file can hold.

    Functions are None, a family's record is its name.

    >>> from megafn.pure.config.records import OptimizerConfig
    >>> config = OptimizerConfig(lr_mult=0.5, lr_scale_cond=lambda name, parameter: "bias" in name)
    >>> without_functions(config) == OptimizerConfig(lr_mult=0.5)
    True
    """
    changes: dict[str, Any] = {}
    for attribute in attrs.fields(type(config)):
        value = getattr(config, attribute.name)
        if isinstance(value, FamilyRecord):
            changes[attribute.name] = value.name
        elif callable(value):
            changes[attribute.name] = None
        elif attrs.has(type(value)):
            changes[attribute.name] = without_functions(value)
    # mypy cannot see that a subtype of AttrsInstance is an attrs class
    return attrs.evolve(config, **changes)  # type: ignore[misc]


# ---- From a dict


@overload
def from_dict(mapping: Mapping[str, Any]) -> TrainConfig: ...


@overload
def from_dict(mapping: Mapping[str, Any], cls: type[Config]) -> Config: ...


def from_dict(mapping: Mapping[str, Any], cls: type = TrainConfig) -> Any:
    """The config of class `cls` that a nested mapping describes; the inverse of `to_dict`.

    Nothing is converted except lists to tuples: "3" and True are not integers. An int passes for a
    float.

    Raises ConfigError with every problem at once: unknown fields with the nearest name, missing
    fields, wrong types.

    >>> from megafn.pure.config.records import ParallelConfig
    >>> from_dict({"tp": 2, "order": "tp-dp-pp"}, ParallelConfig).tp
    2
    >>> from_dict({"tp": "2", "vp": 2}, ParallelConfig)
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: 2 problems:
      tp = '2': give an integer
      vp = 2: there is no such field; did you mean "vpp"?
    """
    try:
        return _converter().structure(mapping, cls)
    except (ClassValidationError, WrongType) as error:
        raise config_error(problems_in(error, mapping, cls)) from None


@functools.cache
def _converter() -> Converter:
    converter = Converter(forbid_extra_keys=True, detailed_validation=True)
    converter.register_structure_hook_factory(
        attrs.has, functools.partial(_section_hook, converter=converter)
    )
    # cattrs has hooks of its own for these, which would convert "3" to 3.
    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, _checked)
    converter.register_structure_hook_func(lambda kind: not is_section(kind), _checked)
    return converter


# (value, the type that it should have) -> the value with that type
Structure = Callable[[Any, FieldType], Any]


def _section_hook(cls: type, converter: Converter) -> Structure:
    """How a mapping becomes a config of class `cls`."""
    structure: Structure = make_dict_structure_fn(cls, converter)
    return functools.partial(_structured, structure=structure)


def _structured(value: Any, kind: FieldType, structure: Structure) -> Any:
    if not isinstance(value, Mapping):
        raise WrongType(value, kind)
    return structure(value, kind)


def _checked(value: Any, kind: FieldType) -> Any:
    """The value of a field that is not a section, with tuples for lists."""
    frozen = _tuples_for_lists(value)
    if not has_type(frozen, kind):
        raise WrongType(value, kind)
    return frozen


def _tuples_for_lists(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_tuples_for_lists, value))
    return value


# ---- Files


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """The TrainConfig in a TOML file.

    Raises ConfigError naming the file, with every problem in it (see `from_dict`).

    >>> load_config("nowhere.toml")
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: nowhere.toml: cannot be read \
(No such file or directory); give the path of a TOML file
    """
    mapping = read_toml(path)
    try:
        return from_dict(mapping)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a TOML file holds. Raises ConfigError naming the file if it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give the path of a TOML file"
        ) from None
    except (ValueError, RecursionError) as error:  # ValueError: not TOML, or not UTF-8
        raise ConfigError(f"{path}: is not valid TOML ({error}); correct it there") from None


def dump_config(config: TrainConfig, path: str | os.PathLike[str]) -> None:
    """Write a config as TOML for `load_config`; the file is replaced as a whole or not at all.

    Raises ConfigError as `to_dict` does, OSError if the folder cannot be written to.

    >>> import tempfile
    >>> from megafn.pure.config.records import ModelConfig
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=2, global_batch_size=16, train_iters=9)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dump_config(config, f"{folder}/config.toml")
    ...     load_config(f"{folder}/config.toml") == config
    True
    """
    content = tomli_w.dumps(to_dict(config)).encode()
    path = Path(path)
    # Written beside the file and renamed: a reader, or a full disk, never leaves half a config.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

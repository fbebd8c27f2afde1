"""Configs from and to dicts and TOML, through cattrs; and what a field's type is and is called."""

from __future__ import annotations

import functools
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import attrs
import tomli_w
from cattrs import AttributeValidationNote, ClassValidationError, Converter, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn

from megafn.pure.config.family_record import FamilyRecord
from megafn.pure.config.field_types import has_type, is_section, type_in_words
from megafn.pure.config.problems import ConfigError, Problem, config_error, did_you_mean
from megafn.pure.config.records import TrainConfig


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists, strings and numbers, as TOML can hold them: None is left out, a tuple is a list.

    Raises ConfigError naming the field where a value, such as a function, cannot be written to a file.

    >>> from megafn.pure.config.records import ParallelConfig
    >>> to_dict(ParallelConfig(tp=2))
    {'tp': 2, 'pp': 1, 'vpp': 1, 'cp': 1, 'ep': 1, 'sequence_parallel': False, 'order': 'tp-cp-ep-dp-pp'}
    """

    def plain(value: Any, at: str) -> Any:
        if attrs.has(type(value)):
            if isinstance(value, FamilyRecord):
                return value.name
            fields = ((a.name, getattr(value, a.name)) for a in attrs.fields(type(value)))
            return {
                name: plain(item, f"{at}.{name}" if at else name)
                for name, item in fields
                if item is not None
            }
        if isinstance(value, (list, tuple)):
            return [plain(item, at) for item in value]
        kind = "function" if callable(value) else f"value of type {type(value).__name__}"
        if isinstance(value, (bool, int, float, str)):
            if not isinstance(value, str) or not any(
                "\ud800" <= letter <= "\udfff" for letter in value
            ):
                return value
            kind = "string that is no Unicode"
        raise config_error(
            [
                Problem(
                    at,
                    value,
                    f"a {kind} cannot be written to a file; leave it out and set it in code",
                )
            ]
        )

    return plain(config, "")


def without_functions(config: Any) -> Any:
    """The same config without what no file can hold: functions are None, a family's record is its name.

    >>> from megafn.pure.config.records import OptimizerConfig
    >>> without_functions(OptimizerConfig(lr_mult=0.5, lr_scale_cond=lambda name, parameter: "bias" in name)).lr_scale_cond is None
    True
    """
    if isinstance(config, FamilyRecord):
        return config.name
    values = {a.name: getattr(config, a.name) for a in attrs.fields(type(config))}
    changed = {
        name: without_functions(value) if attrs.has(type(value)) else None
        for name, value in values.items()
        if attrs.has(type(value)) or callable(value)
    }
    return attrs.evolve(config, **changed)


def from_dict(mapping: Mapping[str, Any], cls: type = TrainConfig) -> Any:
    """The config of class `cls` that a nested mapping describes; the inverse of `to_dict`.

    Nothing is converted but lists to tuples: "3" and True are no integers, while 3 will do for a float.

    Raises ConfigError with every problem at once: unknown fields with the nearest name, missing ones, wrong types.

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
    except (ClassValidationError, _Misfit) as error:
        raise config_error(_without_echoes(list(_problems_in(error, mapping, cls, "")))) from None


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """The TrainConfig in a TOML file. Raises ConfigError naming the file, with every problem in it (see `from_dict`).

    >>> load_config("nowhere.toml")
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: nowhere.toml: cannot be read (No such file or directory); give the path of a TOML file
    """
    try:
        mapping = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give the path of a TOML file"
        ) from None
    except (ValueError, RecursionError) as error:  # ValueError: not TOML, or not UTF-8
        raise ConfigError(f"{path}: is no TOML ({error}); correct it there") from None
    try:
        return from_dict(mapping)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def dump_config(config: TrainConfig, path: str | os.PathLike[str]) -> None:
    """Write a config as TOML for `load_config`; the file is replaced whole or not at all.

    Raises ConfigError as `to_dict` does, OSError where the folder cannot be written to.

    >>> import tempfile
    >>> from megafn.pure.config.records import ModelConfig
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=2, global_batch_size=16, train_iters=9)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dump_config(config, f"{folder}/config.toml")
    ...     load_config(f"{folder}/config.toml") == config
    True
    """
    data, path = tomli_w.dumps(to_dict(config)).encode(), Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class _Misfit(ValueError):
    """Raised by the converter: a value that its field cannot take."""

    def __init__(self, value: Any, kind: Any):
        self.value, self.kind = value, kind


@functools.cache
def _converter() -> Converter:
    converter = Converter(forbid_extra_keys=True, detailed_validation=True)

    def section(kind: type) -> Any:
        structure = make_dict_structure_fn(kind, converter)

        def hook(value: Any, _: Any) -> Any:
            if not isinstance(value, Mapping):
                raise _Misfit(value, kind)
            return structure(value, kind)

        return hook

    def leaf(value: Any, kind: Any) -> Any:
        frozen = _tupled(value)
        if not has_type(frozen, kind):
            raise _Misfit(value, kind)
        return frozen

    converter.register_structure_hook_factory(attrs.has, section)
    for kind in (bool, int, float, str):  # cattrs's own hooks of these convert
        converter.register_structure_hook(kind, leaf)
    converter.register_structure_hook_func(lambda kind: not is_section(kind), leaf)
    return converter


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, (list, tuple)) else value


def _problems_in(error: Exception, mapping: Any, root: type, at: str) -> Iterator[Problem | str]:
    """cattrs's tree of errors below `at`, as a flat list in the order of the fields."""
    if isinstance(error, _Misfit):
        yield Problem(at or "config", error.value, f"give {type_in_words(error.kind)}")
    elif isinstance(error, KeyError):
        yield f"{at} is missing: give {type_in_words(dict(_fields(root))[at])}"
    elif isinstance(error, ForbiddenExtraKeysError):
        own, everywhere = [a.name for a in attrs.fields(error.cl)], dict(_fields(root))
        for key in sorted(error.extra_fields, key=str):
            path = f"{at}.{key}" if at else str(key)
            moved = [known for known in everywhere if known.endswith(f".{key}")]
            hint = (
                f'; did you mean "{moved[0]}"?'
                if moved
                else did_you_mean(str(key), own) or _choice(own)
            )
            if path == "parallel.dp":
                hint = "; data parallelism is what the number of processes leaves over: world_size / (tp * pp * cp)"
            yield Problem(path, mapping[key], f"there is no such field{hint}")
    else:
        for inner in error.exceptions:
            name = next(
                (
                    note.name
                    for note in getattr(inner, "__notes__", ())
                    if isinstance(note, AttributeValidationNote)
                ),
                None,
            )
            if name is None:
                yield from _problems_in(inner, mapping, root, at)
            else:
                yield from _problems_in(
                    inner, mapping.get(name), root, f"{at}.{name}" if at else name
                )


def _choice(names: list[str], most: int = 12) -> str:
    """The end of a sentence that names a section's fields, where they are few enough to read."""
    return (
        f"; there are {', '.join(names)}"
        if len(names) <= most
        else f"; docs/configuration.md lists the {len(names)} there are"
    )


def _without_echoes(problems: list[Problem | str]) -> Iterator[Problem | str]:
    """A misspelt name is one problem: that the field it stood for is missing goes without saying."""
    meant = set()
    for problem in problems:
        if isinstance(problem, Problem) and (
            hint := re.search(r'did you mean "(.+)"', problem.remedy)
        ):
            section = problem.field.rpartition(".")[0]
            meant |= {hint[1], f"{section}.{hint[1]}"}
    return (
        problem
        for problem in problems
        if isinstance(problem, Problem) or problem.partition(" is missing")[0] not in meant
    )


def _fields(cls: type, at: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, type) of every field of a config class."""
    for name, kind in get_type_hints(cls).items():
        yield at + name, kind
        for section in filter(attrs.has, (kind, *get_args(kind))):
            yield from _fields(section, f"{at}{name}.")

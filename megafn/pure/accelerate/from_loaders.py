"""Data loaders as the micro-batch size, and accelerate's loader of indexed data as a DataConfig."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megafn.pure.config.field_types import default_of
from megafn.pure.config.problems import ConfigError, Problem, config_error
from megafn.pure.config.records import DataConfig

# accelerate's default, as its signature has it.
_ACCELERATES_SPLIT = "969, 30, 1"


def loader_fields(dataloaders: Any, *, smallest: bool) -> dict[str, Any]:
    """ "micro_batch_size" of one or several loaders, and "data" of a MegatronLMDummyDataLoader.

    The micro-batch size is the smallest, or else the largest, of the loaders' batch sizes.
    Raises ConfigError for loaders of both kinds, and for one without a batch size.
    """
    loaders = dataloaders if isinstance(dataloaders, (tuple, list)) else (dataloaders,)
    # accelerate's MegatronLMDummyDataLoader keeps its arguments in `dataset_args`.
    indexed = [
        loader.dataset_args
        for loader in loaders
        if isinstance(getattr(loader, "dataset_args", None), Mapping)
    ]
    if indexed and len(indexed) < len(loaders):
        raise ConfigError(
            "dataloaders: some are of indexed data, some of batches; give loaders of one kind"
        )
    if indexed:
        sizes = [args["micro_batch_size"] for args in indexed if args.get("micro_batch_size")]
    else:
        sizes = [_batch_size(loader) for loader in loaders]

    fields: dict[str, Any] = {}
    if sizes:
        fields["micro_batch_size"] = min(sizes) if smallest else max(sizes)
    if indexed:
        fields["data"] = _data_config(indexed[0])
    return fields


def _batch_size(loader: Any) -> int:
    sampler = getattr(loader, "batch_sampler", None)
    size = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(
            f"dataloaders: {type(loader).__name__} has no batch_size; "
            "leave it out and give micro_batch_size"
        )
    return size


def _data_config(arguments: Mapping[str, Any]) -> DataConfig:
    paths = arguments.get("data_path")
    if not paths:
        raise ConfigError(
            "dataloaders: the loader of indexed data has no data_path; "
            "give one, or data = DataConfig(...)"
        )
    split = arguments.get("splits_string") or arguments.get("split") or _ACCELERATES_SPLIT
    return DataConfig(
        train=paths if isinstance(paths, str) else _blend(paths),
        split=weights(split),
        sampler=arguments.get("dataloader_type") or default_of(DataConfig, "sampler"),
    )


def _blend(paths: Sequence[str]) -> str | tuple[tuple[float, str], ...]:
    """A list of one path, or of weights and paths in turn."""
    if len(paths) == 1:
        return paths[0]
    return tuple(
        (float(weight), path) for weight, path in zip(paths[::2], paths[1::2], strict=False)
    )


def weights(text: str | Iterable[float]) -> tuple[float, ...]:
    """Megatron's split string as numbers.

    >>> weights("969, 30, 1")
    (969.0, 30.0, 1.0)
    """
    try:
        return tuple(map(float, text.split(",") if isinstance(text, str) else text))
    except (TypeError, ValueError):
        problem = Problem("split", text, 'give three weights, such as "969, 30, 1"')
        raise config_error([problem]) from None

"""Low-rank adapters (LoRA, arXiv 2106.09685) on the frozen parallel layers of a model.

The output of a layer with weight W becomes W x + alpha / rank * B A x, where A is [rank, in] and B
[out, rank]. They are the layer's modules `lora_a` and `lora_b`, so that W keeps its name, and the
names of all weights are those of the base model.

A layer that is cut over tp has one adapter that is cut as it is. On a column-parallel layer every
rank has all of A, and its rows of B; on a row-parallel layer its columns of A, and all of B. So
what is exchanged between tp ranks beside the layer's own exchange is `rank` wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from attrs import frozen
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megafn.pure.config.problems import ConfigError, Problem, config_error
from megafn.runtime.model.layers import ColumnLinear, RowLinear
from megafn.runtime.model.weights import names_in_the_whole_model


@frozen(kw_only=True)
class Lora:
    """What `lora` returns: a function for `prepare_model`, whose settings can be read."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    train_modules: tuple[str, ...] = ()
    save_base: bool = False

    @property
    def scale(self) -> float:
        """Factor of the adapters' output."""
        return self.alpha / self.rank

    def __call__(self, provider: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """The chunk that `provider` builds: frozen, with adapters that are trained."""
        chunk: Any = provider()
        chunk.requires_grad_(False)
        matched = set()
        for name, module in names_in_the_whole_model(chunk):
            for pattern in self.modules:
                if _is_named(name, pattern):
                    _add_adapter(name, module, self)
                    matched.add(pattern)
            for pattern in self.train_modules:
                if _is_named(name, pattern):
                    module.requires_grad_(True)
                    matched.add(pattern)
        chunk.adapters = Adapters(lora=self, matched=frozenset(matched))
        return chunk


@frozen(kw_only=True)
class Adapters:
    """What `Lora` leaves on a chunk: its settings, and which of the names it found there."""

    lora: Lora
    matched: frozenset[str]


def chunks_adapters(chunks: Iterable[torch.nn.Module]) -> tuple[Adapters, ...]:
    """What `Lora` left on the chunks of a process; () without adapters."""
    modules = (getattr(chunk, "module", chunk) for chunk in chunks)
    left = (getattr(module, "adapters", None) for module in modules)
    return tuple(adapters for adapters in left if isinstance(adapters, Adapters))


def lora_of(chunks: Iterable[torch.nn.Module]) -> Lora | None:
    """The settings of the adapters of a process's chunks, or None without adapters."""
    adapters = chunks_adapters(chunks)
    return adapters[0].lora if adapters else None


def lora(
    rank: int,
    alpha: float,
    modules: Sequence[str],
    *,
    train_modules: Sequence[str] = (),
    save_base: bool = False,
) -> Lora:
    """A function for `TrainConfig.prepare_model`: low-rank adapters on a model that is frozen.

    rank: inner width of an adapter. alpha: adapters are scaled by alpha / rank (PEFT's lora_alpha).
    modules: names of linear layers, "linear_qkv" or with a part of their path, as in the whole
        model: "mlp.linear_fc1", "decoder.layers.0.self_attention.linear_proj".
    train_modules: names of modules that are trained in whole beside the adapters, such as the new
        "classification_head" of a classifier.
    save_base: checkpoints hold the frozen weights too, instead of a reference to the weights that
        the run started from.
    Raises ConfigError for settings out of range; `setup` raises it if a name matches no module on
    any stage, or one that is not a linear layer.
    A is drawn by name, normal with the variance 1 / (3 * in) (PEFT's, whose values are uniform), B
    is zero.
    """
    problems = []
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        problems.append(Problem("lora.rank", rank, "must be an integer of at least 1"))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        problems.append(Problem("lora.alpha", alpha, "must be a finite number above 0"))
    for field, names in (("lora.modules", modules), ("lora.train_modules", train_modules)):
        if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
            problems.append(Problem(field, names, 'must be names, such as ("linear_qkv",)'))
    if not modules:
        problems.append(Problem("lora.modules", modules, "name at least one linear layer"))
    if problems:
        raise config_error(problems)
    return Lora(
        rank=rank,
        alpha=float(alpha),
        modules=tuple(modules),
        train_modules=tuple(train_modules),
        save_base=save_base,
    )


def _is_named(name: str, pattern: str) -> bool:
    """Whether the last parts of a module's path are the pattern's.

    >>> _is_named("decoder.layers.0.mlp.linear_fc1", "mlp.linear_fc1")
    True
    >>> _is_named("decoder.layers.0.mlp.linear_fc1", "fc1")
    False
    """
    return f".{name}".endswith(f".{pattern}")


# ------------------------------------------------------------------------------------ adapters


def _add_adapter(name: str, layer: Any, lora: Lora) -> None:
    if hasattr(layer, "lora_a"):
        raise ConfigError(f"lora.modules = {name!r}: two names match it; name each layer once")
    make: Callable[[Any, int], tuple[Any, Any]]
    if isinstance(layer, ColumnParallelLinear):
        make = _of_column_parallel
    elif isinstance(layer, RowParallelLinear):
        make = _of_row_parallel
    elif isinstance(layer, torch.nn.Linear):
        make = _of_linear
    else:
        raise ConfigError(
            f"lora.modules = {name!r}: it is a {type(layer).__name__}; name linear layers only"
        )
    if layer.weight is None or getattr(layer.weight, "shared_embedding", False):
        raise ConfigError(
            f"lora.modules = {name!r}: it shares the table of the word embeddings, so that an "
            "adapter on it could not be merged; leave it out"
        )
    layer.lora_a, layer.lora_b = make(layer, lora.rank)
    for adapter in (layer.lora_a, layer.lora_b):
        adapter.weight.initialize_by_name = True
    layer.register_forward_hook(partial(_add_low_rank_output, lora.scale))


def _of_column_parallel(
    layer: ColumnParallelLinear, rank: int
) -> tuple[torch.nn.Linear, ColumnLinear]:
    lora_b = ColumnLinear(
        rank,
        layer.output_size,
        config=layer.config,
        init_method=_leave,
        bias=False,
        gather_output=layer.gather_output,
        stride=getattr(layer.weight, "partition_stride", 1),
        tp_group=layer.tp_group,
    )
    # under sequence parallelism A sees this rank's share of the sequence
    lora_a = _replicated(layer, layer.input_size, rank, layer.sequence_parallel)
    return lora_a, lora_b


def _of_row_parallel(layer: RowParallelLinear, rank: int) -> tuple[RowLinear, torch.nn.Linear]:
    lora_a = RowLinear(
        layer.input_size,
        rank,
        config=layer.config,
        init_method=_leave,
        bias=False,
        input_is_parallel=layer.input_is_parallel,
        skip_bias_add=False,
        tp_group=layer.tp_group,
    )
    # A sums over tp, or scatters that sum over the sequence, which is what B sees then
    lora_b = _replicated(layer, rank, layer.output_size, layer.sequence_parallel)
    return lora_a, lora_b


def _of_linear(layer: torch.nn.Linear, rank: int) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    of_a_share = getattr(layer.weight, "sequence_parallel", False)
    lora_a = _replicated(layer, layer.in_features, rank, of_a_share)
    lora_b = _replicated(layer, rank, layer.out_features, of_a_share)
    return lora_a, lora_b


def _replicated(
    layer: torch.nn.Module, inputs: int, outputs: int, sequence_parallel: bool
) -> torch.nn.Linear:
    """A linear layer that every tp rank holds in whole, of the device and dtype of another."""
    weight: Any = layer.weight
    linear = torch.nn.Linear(inputs, outputs, bias=False, device=weight.device, dtype=weight.dtype)
    marked: Any = linear.weight
    marked.sequence_parallel = sequence_parallel  # its gradient is to be summed over tp
    return linear


def _leave(weight: torch.Tensor) -> torch.Tensor:
    """In place of megatron-core's initial values: `setup` gives them by name."""
    return weight


def _add_low_rank_output(scale: float, layer: Any, inputs: Any, output: Any) -> Any:
    """A forward hook: the layer's output [sequence, batch, out (/ tp)] plus its adapter's."""
    low_rank = _without_bias(layer.lora_a(inputs[0])) * scale
    correction = _without_bias(layer.lora_b(low_rank))
    if isinstance(output, tuple):  # of a parallel layer: output and bias
        return output[0] + correction, *output[1:]
    return output + correction


def _without_bias(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output

"""Which parameter of the whole model a local one is, and which part of it lies here; initial values from the name alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from attrs import frozen
from megatron.core.distributed import DistributedDataParallel

from megafn.pure.config.records import ModelConfig
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.megatron_context import derive_seed

_WORDS = "embedding.word_embeddings.weight"


@frozen(kw_only=True)
class LocalParameter:
    """What a process holds of one parameter of the whole model.

    `shape` is the whole parameter's, without rows that only pad the vocabulary; it is cut over tp along `dim`
    (None: every tp rank holds all of it), in `stride` blocks cut one by one (2: gate and up of a gated layer).
    """

    name: str
    parameter: torch.nn.Parameter
    shape: tuple[int, ...]
    dim: int | None
    stride: int
    tp: int
    tp_rank: int

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's part of a whole parameter; rows that pad the vocabulary are zero."""
        if self.dim is None:
            return whole
        missing = self.parameter.shape[self.dim] * self.tp - whole.shape[self.dim]
        if missing:
            whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
        blocks = [
            block.chunk(self.tp, self.dim)[self.tp_rank]
            for block in whole.chunk(self.stride, self.dim)
        ]
        return torch.cat(blocks, self.dim) if self.stride > 1 else blocks[0]

    def join(self, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        """The whole parameter from the parts of all tp ranks, in their order: the inverse of `cut`."""
        parts = list(parts)
        if self.dim is None:
            return parts[0]
        blocks = zip(*(part.chunk(self.stride, self.dim) for part in parts))
        return torch.cat([torch.cat(block, self.dim) for block in blocks], self.dim).narrow(
            self.dim, 0, self.shape[self.dim]
        )


def local_parameters(
    chunk: torch.nn.Module, model: ModelConfig, pg: ProcessGroups
) -> Iterator[LocalParameter]:
    """Every parameter of a model chunk, by its name in the whole model: layers are numbered over all stages,
    and a tied output table bears the name of the word embeddings."""
    if isinstance(chunk, DistributedDataParallel):
        chunk = chunk.module
    layers = {
        name: f"{name.rpartition('.')[0]}.{module.layer_number - 1}"
        for name, module in chunk.named_modules()
        if re.search(r"(^|\.)layers\.\d+$", name)
    }
    for name, parameter in chunk.named_parameters():
        for local, whole in layers.items():
            if name.startswith(local + "."):
                name = whole + name[len(local) :]
                break
        vocabulary = name.endswith((_WORDS, "output_layer.weight", "output_layer.bias"))
        if model.tie_word_embeddings and name == "output_layer.weight":
            name = _WORDS
        split = getattr(parameter, "tensor_model_parallel", False)
        shape, dim = (
            list(parameter.shape),
            getattr(parameter, "partition_dim", -1) if split else None,
        )
        if split:
            shape[dim] = model.vocab_size if vocabulary else shape[dim] * pg.groups.parallel.tp
        yield LocalParameter(
            name=name,
            parameter=parameter,
            shape=tuple(shape),
            dim=dim,
            stride=getattr(parameter, "partition_stride", 1) if split else 1,
            tp=pg.groups.parallel.tp if split else 1,
            tp_rank=pg.place.tp if split else 0,
        )


def initial_value(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> torch.Tensor:
    """The first value of a parameter of the whole model, fp32: a function of (seed, name), so that every layout starts alike.

    Matrices are normal with `init_method_std`, those that write to the residual stream with that over
    sqrt(2 * layers of their half) (GPT-2); norms are one, biases zero.
    """
    if len(shape) == 1:
        return (torch.ones if name.endswith("norm.weight") else torch.zeros)(shape)
    std = model.init_method_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(
            2 * (model.decoder_layers if name.startswith("decoder.") else model.num_layers)
        )
    return torch.empty(shape).normal_(
        0.0, std, generator=torch.Generator().manual_seed(derive_seed(seed, name))
    )


@torch.no_grad()
def initialize_weights(
    chunk: torch.nn.Module, model: ModelConfig, pg: ProcessGroups, seed: int
) -> None:
    """Give every parameter of a model chunk its `initial_value`."""
    for part in local_parameters(chunk, model, pg):
        part.parameter.copy_(part.cut(initial_value(part.name, part.shape, model, seed)))


@torch.no_grad()
def whole_parameters(
    chunks: Iterable[torch.nn.Module], model: ModelConfig, pg: ProcessGroups
) -> dict[str, torch.Tensor]:
    """The parameters of this process's stage, gathered over tp: name in the whole model to tensor of the whole shape."""
    whole = {}
    for chunk in chunks:
        for part in local_parameters(chunk, model, pg):
            local = part.parameter.detach().contiguous()
            if part.dim is not None and pg.tp.size() > 1:
                pieces = [torch.empty_like(local) for _ in range(pg.tp.size())]
                dist.all_gather(pieces, local, group=pg.tp)
            else:
                pieces = [local.clone()]
            whole[part.name] = part.join(pieces)
    return whole

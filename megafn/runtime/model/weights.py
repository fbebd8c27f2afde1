"""Parameters by their names in the whole model: the part that is here, and initial values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from attrs import frozen
from megatron.core.distributed import DistributedDataParallel

from megafn.pure.config.records import ModelConfig
from megafn.pure.families.built_in import spec_of
from megafn.pure.families.family_spec import Constant
from megafn.pure.families.transformer import distribution_by_name
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.megatron_context import derive_seed

_WORD_TABLE = "embedding.word_embeddings.weight"
_CUT_OVER_THE_VOCABULARY = (
    _WORD_TABLE,
    "output_layer.weight",
    "output_layer.bias",
    "output_layer.lora_b.weight",
)
_LAYER = re.compile(r"(^|\.)layers\.\d+$")


@frozen(kw_only=True)
class LocalParameter:
    """What a process holds of one parameter of the whole model.

    `shape` is the whole parameter's, without rows that only pad the vocabulary. It is cut over tp
    along `dim` (None: every tp rank holds all of it), in `stride` blocks that are cut one by one
    (2: gate and up of a gated layer).
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
        padding = self.parameter.shape[self.dim] * self.tp - whole.shape[self.dim]
        if padding:
            whole = torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])])
        blocks = [
            block.chunk(self.tp, self.dim)[self.tp_rank]
            for block in whole.chunk(self.stride, self.dim)
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, self.dim)

    def join(self, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        """The whole parameter from the parts of all tp ranks, in order: the inverse of `cut`."""
        parts = list(parts)
        if self.dim is None:
            return parts[0]
        blocks_of_ranks = (part.chunk(self.stride, self.dim) for part in parts)
        blocks = [torch.cat(block, self.dim) for block in zip(*blocks_of_ranks, strict=True)]
        padded = torch.cat(blocks, self.dim)
        return padded.narrow(self.dim, 0, self.shape[self.dim])


def local_parameters(
    chunk: torch.nn.Module, model: ModelConfig, pg: ProcessGroups
) -> Iterator[LocalParameter]:
    """Every parameter of a model chunk, by its name in the whole model.

    Layers are numbered over all stages, and a tied output table has the name of the word table.
    """
    if isinstance(chunk, DistributedDataParallel):
        chunk = chunk.module
    layers = _layers_in_the_whole_model(chunk)
    for local_name, parameter in chunk.named_parameters():
        name = _name_in_the_whole_model(local_name, layers)
        over_vocabulary = name.endswith(_CUT_OVER_THE_VOCABULARY)
        if model.tie_word_embeddings and name == "output_layer.weight":
            name = _WORD_TABLE
        if not getattr(parameter, "tensor_model_parallel", False):
            yield LocalParameter(
                name=name,
                parameter=parameter,
                shape=tuple(parameter.shape),
                dim=None,
                stride=1,
                tp=1,
                tp_rank=0,
            )
            continue
        tp = pg.groups.parallel.tp
        dim = getattr(parameter, "partition_dim", -1)
        shape = list(parameter.shape)
        shape[dim] = model.vocab_size if over_vocabulary else shape[dim] * tp
        yield LocalParameter(
            name=name,
            parameter=parameter,
            shape=tuple(shape),
            dim=dim,
            stride=getattr(parameter, "partition_stride", 1),
            tp=tp,
            tp_rank=pg.place.tp,
        )


def names_in_the_whole_model(
    chunk: torch.nn.Module,
) -> list[tuple[str, torch.nn.Module]]:
    """Every module inside a chunk's layers and beside them, by its name in the whole model."""
    layers = _layers_in_the_whole_model(chunk)
    return [
        (_name_in_the_whole_model(name, layers), module) for name, module in chunk.named_modules()
    ]


def _layers_in_the_whole_model(chunk: torch.nn.Module) -> dict[str, str]:
    """Names of the chunk's layers: on a second stage "decoder.layers.0" may be number 4."""
    names = {}
    for name, module in chunk.named_modules():
        if _LAYER.search(name):
            stack = name.rpartition(".")[0]
            names[name] = f"{stack}.{module.layer_number - 1}"
    return names


def _name_in_the_whole_model(name: str, layers: dict[str, str]) -> str:
    for local, whole in layers.items():
        if name.startswith(local + "."):
            return whole + name[len(local) :]
    return name


def initial_value(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> torch.Tensor:
    """The first value of a parameter of the whole model, fp32, as its family's spec has it.

    A name that the spec does not know gets GPT-2's value for its shape (`distribution_by_name`). A
    function of (seed, name), so that every layout begins with the same weights.
    """
    distribution = spec_of(model).initial_distribution(name, shape, model)
    if distribution is None:
        distribution = distribution_by_name(name, shape, model)
    if isinstance(distribution, Constant):
        return torch.full(shape, distribution.value)
    generator = torch.Generator().manual_seed(derive_seed(seed, name))
    return torch.empty(shape).normal_(0.0, distribution.std, generator=generator)


@torch.no_grad()
def initialize_weights(
    chunk: torch.nn.Module, model: ModelConfig, pg: ProcessGroups, seed: int
) -> None:
    """Give the parameters of a model chunk their `initial_value`.

    A parameter whose name the family's spec does not know keeps the value that its module gave it,
    unless its attribute `initialize_by_name` is True, as `mcore.init_method` sets it.
    """
    known = spec_of(model).initial_distribution
    for part in local_parameters(chunk, model, pg):
        asked = getattr(part.parameter, "initialize_by_name", False)
        if not asked and known(part.name, part.shape, model) is None:
            continue
        whole = initial_value(part.name, part.shape, model, seed)
        part.parameter.copy_(part.cut(whole))


@torch.no_grad()
def initialize_added_weights(
    chunk: torch.nn.Module, model: ModelConfig, pg: ProcessGroups, seed: int
) -> None:
    """Give an `initial_value` to what was added to a chunk and asks for one.

    Those are the parameters whose name the family's spec does not know and whose attribute
    `initialize_by_name` is True.
    """
    known = spec_of(model).initial_distribution
    for part in local_parameters(chunk, model, pg):
        asked = getattr(part.parameter, "initialize_by_name", False)
        if asked and known(part.name, part.shape, model) is None:
            whole = initial_value(part.name, part.shape, model, seed)
            part.parameter.copy_(part.cut(whole))


@torch.no_grad()
def whole_parameters(
    chunks: Iterable[torch.nn.Module], model: ModelConfig, pg: ProcessGroups
) -> dict[str, torch.Tensor]:
    """The parameters of this process's stage, gathered over tp.

    {name in the whole model: tensor of the whole shape}; collective over tp.
    """
    pg.check_open()
    whole = {}
    for chunk in chunks:
        for part in local_parameters(chunk, model, pg):
            local = part.parameter.detach().contiguous()
            whole[part.name] = part.join(_of_all_tp_ranks(local, part, pg))
    return whole


def _of_all_tp_ranks(
    local: torch.Tensor, part: LocalParameter, pg: ProcessGroups
) -> list[torch.Tensor]:
    if part.dim is None or pg.tp.size() == 1:
        return [local.clone()]
    parts = [torch.empty_like(local) for _ in range(pg.tp.size())]
    dist.all_gather(parts, local, group=pg.tp)
    return parts

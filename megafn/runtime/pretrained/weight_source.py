"""Weights at a path, open for reading: what each format gives to `from_pretrained` and `export`.

A format is a function that finds its files at a path, and one that opens them. What differs between
formats is how a box of a parameter of the whole model is read; everything else (which parameters
are new, which stored tensors nobody reads, padding, masters, optimizer shards) is done once, for
all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from math import prod
from pathlib import Path

import torch
from attrs import frozen

from megafn.pure.checkpoint.boxes import Box, Index
from megafn.pure.config.records import ModelConfig
from megafn.pure.pretrained.pretrained import Pretrained


@frozen(kw_only=True)
class StoredTensor:
    """A tensor as the files hold it."""

    shape: Index
    file: str  # name of the file that holds it, or of the first that does
    dtype: torch.dtype | None = None  # None: not known without opening the file


_WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def commonest_dtype(tensors: Iterable[StoredTensor]) -> str:
    """The dtype of most elements that are weights, in the words of `Pretrained`."""
    elements: dict[str, int] = {}
    for tensor in tensors:
        if tensor.dtype in _WORDS:
            word = _WORDS[tensor.dtype]
            elements[word] = elements.get(word, 0) + prod(tensor.shape)
    return max(elements, key=elements.__getitem__, default="fp32")


def _no_damage(rank: int, world_size: int) -> list[str]:
    return []


def _never(tensor: str) -> bool:
    return False


@frozen(kw_only=True, eq=False)
class WeightSource:
    """Weights at a path, open for reading. Nothing in the files is executed.

    path: where they lie. `remember()`: the record that a state keeps of them; reads some of the
        files, so only rank zero calls it.
    model: the model that the files describe, or None if they describe none.
    tensors: the stored weights by their names in the files; neither optimizer state nor bytes.
    made_of(name, shape): names of the stored tensors that a parameter of the whole model is made
        of; () if it is not stored at all. Raises CheckpointError if it is stored in part, or in
        another shape.
    copy(name, shape, box, target): copy a box of that parameter into `target`, a tensor of the
        box's size and of any floating dtype, from the files' own.
    damage(rank, world_size): what is wrong with the files that are this rank's to verify; each file
        is verified by one rank.
    is_known_buffer(tensor): stored, but no weight: a causal mask, rotary frequencies.
    is_head(tensor): part of a head, which a config with another head replaces.
    parameters: the parameters of the whole model and their shapes, if the files hold megafn's own
        parameters; empty for other formats.
    base: the weights that these refer to, if they are adapters and what else was trained; None:
        they are whole. `base.open_weights` opens both.
    adapters_scale: the factor of the adapters' output, None if there are none.
    """

    path: Path
    remember: Callable[[], Pretrained]
    model: ModelConfig | None
    tensors: Mapping[str, StoredTensor]
    made_of: Callable[[str, Index], Sequence[str]]
    copy: Callable[[str, Index, Box, torch.Tensor], None]
    damage: Callable[[int, int], list[str]] = _no_damage
    is_known_buffer: Callable[[str], bool] = _never
    is_head: Callable[[str], bool] = _never
    parameters: Mapping[str, Index] = {}
    base: Pretrained | None = None
    adapters_scale: float | None = None


# (the path that `find` returned, the model to read into) -> the open weights. A model of None means
# the one that the files describe. Raises CheckpointError if something is missing or damaged,
# ConfigError if config.json is, or the files describe a model that megafn cannot express, and
# OSError. Communicates nothing.
OpenWeights = Callable[[Path, ModelConfig | None], AbstractContextManager[WeightSource]]


@frozen(kw_only=True)
class WeightFormat:
    """One format of weights on disk.

    name: in words, for messages.
    find(path): where such weights lie at a path (of several checkpoints in a folder the newest), or
        None if there are none.
    """

    name: str
    find: Callable[[Path], Path | None]
    open: OpenWeights

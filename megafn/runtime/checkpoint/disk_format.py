"""The format of a checkpoint: which files it has, what they are called, what the manifest says.

A checkpoint is a folder iteration-00000012 of
    rank-00000.safetensors ...  boxes of whole tensors (parameters in the precision of the fp32
                                masters, optimizer state), each written once
    manifest.json               config, versions, position, and for each whole tensor its shape
                                and which file holds which box
    SHA256SUMS                  of all of them, for `sha256sum -c` too
It is written in a hidden folder beside its final place, flushed, and renamed by rank zero after
every rank has reported that its file is on disk: so it is there, whole, or not at all.

Why not megatron-core's dist_checkpointing, which does the parallel mathematics elsewhere in megafn:
- It maps modules to whole tensors by methods of each module. megafn's names and places
  (`weights.local_parameters`) are there already, in one place, tested by the law, and the same for
  every family, for tables that several stages hold and for padded vocabularies.
- Its distributed optimizer has other keys than the plain one, so neither reads the other's; it
  gathers every shard on one rank to be reshardable; and it has three defects when it loads torch's
  Adam (a fresh one cannot load; all parameters share one step tensor; the loaded step is
  overwritten by 0), which could only be repaired by replacing its inner methods. Boxes need no
  gathering.
- Its files hold pickles (.metadata, common.pt, byte items), which run what an attacker put there;
  torch's own reader of them does too. safetensors and JSON hold none, so there is nothing to guard.
- Its data and torch's have no checksums, and its writer needs psutil and forks, and takes seconds
  for a tiny model.
What is used instead: safetensors to read, and 60 lines of boxes (`pure.checkpoint.boxes`), tested
over every pair of layouts.

Random states are not saved: they are a function of (seed, consumed samples, place). Nor is the
schedule: it is a function of consumed samples.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megafn import __version__
from megafn.pure.checkpoint.boxes import Index
from megafn.pure.checkpoint.write_plan import WritePlan
from megafn.pure.config.serialization import to_dict, without_functions
from megafn.pure.pretrained.pretrained import pretrained_to_dict
from megafn.runtime.checkpoint.adapters import adapters_to_dict
from megafn.runtime.checkpoint.atomic_files import CHECKSUMS
from megafn.runtime.checkpoint.state_boxes import loss_scale
from megafn.runtime.model.state import State

FORMAT = 1
MANIFEST = "manifest.json"
FOLDER = re.compile(r"iteration-(\d+)")


# -------------------------------------------------------------------------------------- names


def folder_name(iteration: int) -> str:
    """The name of a checkpoint's folder.

    >>> folder_name(12)
    'iteration-00000012'
    """
    return f"iteration-{iteration:08d}"


def file_name(rank: int) -> str:
    """The name of the file that a rank writes.

    >>> file_name(3)
    'rank-00003.safetensors'
    """
    return f"rank-{rank:05d}.safetensors"


def tensor_key(tensor: str, offset: Index) -> str:
    """The name of a box within its file.

    >>> tensor_key("parameter/output_layer.weight", (8, 0))
    'parameter/output_layer.weight@8,0'
    """
    return f"{tensor}@{','.join(map(str, offset))}"


def checkpoints(directory: str | Path) -> dict[int, Path]:
    """The checkpoints in a directory by iteration, ascending.

    A folder gets its name only once it is whole.
    """
    paths = {}
    for path in Path(directory).glob("iteration-*"):
        match = FOLDER.fullmatch(path.name)
        if match:
            paths[int(match[1])] = path
    return dict(sorted(paths.items()))


def checkpoint_around(directory: Path) -> Path | None:
    """The checkpoint that a directory is or lies in, or None if it is none and lies in none."""
    directory = directory.absolute()
    if re.fullmatch(r"iteration-\d{8,}", directory.name):  # damaged or missing, too
        return directory
    for folder in (directory, *directory.parents):
        if (folder / MANIFEST).is_file() and (folder / CHECKSUMS).is_file():
            return folder
    return None


def latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint in a directory, or None if there is none."""
    paths = checkpoints(directory)
    return paths[max(paths)] if paths else None


# ----------------------------------------------------------------------------------- manifest


def make_manifest(
    state: State,
    plan: WritePlan,
    optimizer_step: int | None,
    last_sample: int | None,
    data: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The manifest of a checkpoint; the sizes of its files are added once they are written.

    last_sample: fingerprint of the last global batch's first sample, see `first_sample`.
    data: tokenizer and corpora, see `describe_data`; None: not known.
    """
    tensors = {}
    for name, (shape, writes) in plan.items():
        pieces = [[file_name(writer), offset, size] for (offset, size), writer in writes]
        tensors[name] = {"shape": shape, "pieces": pieces}
    versions = {
        "megafn": __version__,
        "megatron-core": importlib.metadata.version("megatron-core"),
        "torch": torch.__version__,
    }
    return {
        "format": FORMAT,
        "versions": versions,
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "skipped_samples": state.skipped_samples,
        "grad_norms": state.grad_norms,
        "optimizer_step": optimizer_step,
        "grad_scaler": loss_scale(state),
        "world_size": state.pg.world_size,
        "config": to_dict(without_functions(state.config)),
        "tensors": tensors,
        "pretrained": pretrained_to_dict(state.pretrained),
        "adapters": adapters_to_dict(state),
        "last_sample": last_sample,
        "data": data,
    }

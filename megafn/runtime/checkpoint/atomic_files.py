"""Files that outlive a crash: tensors without pickles, checksums, and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(ValueError):
    """A checkpoint that is not there, is damaged or could not be written; the message names the file."""


def write_file(path: Path, *data: bytes) -> str:
    """Write a new file and flush it to disk; its sha256."""
    return _write(path, iter(data))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write a new file in the format of safetensors and flush it to disk; the sha256 of what was meant to be written.

    Not by safetensors' own writer, which makes a second copy of everything before it writes, holds the interpreter
    meanwhile, and would have to be read back for the checksum. One tensor at a time is copied here, off a GPU too.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = prod(tensor.shape) * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def data():
        yield len(head).to_bytes(8, "little") + head
        for tensor in tensors.values():
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()

    return _write(path, data())


def _write(path, data):
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for block in data:
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(aside: Path, folder: Path, sums: Mapping[str, str]) -> None:
    """Give a finished folder its name: from then on it is there, whole. sums: the sha256 of each of its files."""
    write_file(
        aside / SUMS,
        "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode(),
    )
    sync_folder(aside)
    os.rename(aside, folder)
    sync_folder(folder.parent)


def read_sums(folder: Path) -> dict[str, str]:
    """The sha256 of each file, as `publish` wrote them. Raises CheckpointError where that is not what they are."""
    try:
        text = (folder / SUMS).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / SUMS} is damaged: {error}") from None
    if not re.fullmatch(r"([0-9a-f]{64}  [\w.-]+\n)+", text):
        raise CheckpointError(f"{folder / SUMS} is damaged: it is no list of checksums")
    return {name: digest for digest, name in (line.split("  ") for line in text.splitlines())}


def find_damage(path: Path, digest: str | None) -> str | None:
    """What is wrong with a file whose sha256 should be `digest`, in words; None: nothing."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except OSError as error:
        return f"{path} is damaged: {error.strerror}"
    return (
        None
        if found == digest
        else f"{path} is damaged: its {size} bytes do not have the sha256 that {SUMS} gives"
    )

"""Files that survive a crash: tensors without pickles, checksums, and folders that appear whole or
not at all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from megafn.pure.checkpoint.boxes import Index

CHECKSUMS = "SHA256SUMS"  # as `sha256sum -c` reads it

# There is no such file. Other errors of the operating system say nothing of what is in it.
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)

_SAFETENSORS_NAMES = {
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
    """A checkpoint is missing, damaged or could not be written; the message names the file."""


def write_file(path: Path, data: bytes) -> str:
    """Write a new file and flush it to disk. Returns its sha256."""
    return _write_blocks(path, [data])


@frozen(kw_only=True)
class TensorType:
    """Shape and dtype of a tensor that is to be written."""

    shape: Index
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write a new file in the safetensors format and flush it to disk. Returns its sha256."""
    types = {}
    for name, tensor in tensors.items():
        types[name] = TensorType(shape=tuple(tensor.shape), dtype=tensor.dtype)
    return write_tensor_stream(path, types, tensors.values())


def write_tensor_stream(
    path: Path,
    types: Mapping[str, TensorType],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """`write_tensors` of tensors that come one after the other, in the order of `types`.

    metadata: what the file says of itself.
    The checksum is of what was meant to be written, not of what can be read back.
    safetensors' own writer makes a second copy of everything before it writes, holds the
    interpreter meanwhile, and its file would have to be read back for the checksum. Here one
    tensor at a time is copied, also from a GPU.
    """
    header = _safetensors_header(types, metadata)
    return _write_blocks(path, itertools.chain([header], map(_tensor_bytes, tensors)))


def _safetensors_header(
    types: Mapping[str, TensorType], metadata: Mapping[str, str] | None
) -> bytes:
    """Eight bytes with the length of the JSON, and the JSON, padded to a multiple of eight."""
    entries: dict[str, Any] = {}
    if metadata is not None:
        entries["__metadata__"] = dict(metadata)
    start = 0
    for name, tensor in types.items():
        end = start + tensor.size
        entries[name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _write_blocks(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush the list of names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(hidden: Path, folder: Path, checksums: Mapping[str, str]) -> None:
    """Rename a finished hidden folder to its final name: from then on it is there, whole.

    checksums: the sha256 of each of its files.
    """
    lines = [f"{digest}  {name}\n" for name, digest in sorted(checksums.items())]
    write_file(hidden / CHECKSUMS, "".join(lines).encode())
    sync_folder(hidden)
    os.rename(hidden, folder)
    sync_folder(folder.parent)


def read_checksums(folder: Path) -> dict[str, str]:
    """The sha256 of each file, as `publish` wrote them.

    Raises CheckpointError if there are none or they are damaged, and OSError as `find_damage`.
    """
    path = folder / CHECKSUMS
    try:
        text = path.read_bytes().decode()
    except (*_ABSENT, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if not re.fullmatch(r"([0-9a-f]{64}  [\w.-]+\n)+", text):
        raise CheckpointError(f"{path} is damaged: it is not a list of checksums")
    checksums = {}
    for line in text.splitlines():
        digest, name = line.split("  ")
        checksums[name] = digest
    return checksums


def find_damage(path: Path, expected_digest: str | None) -> str | None:
    """What is wrong with a file, or None if its sha256 is the expected one.

    A file that is there but cannot be read (permissions, a disk or network that fails now) may be
    whole: that raises OSError.
    """
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except _ABSENT as error:
        return f"{path} is damaged: {error.strerror}"
    except OSError as error:
        raise _unreadable(path, error) from None
    if digest == expected_digest:
        return None
    return f"{path} is damaged: its {size} bytes do not have the sha256 in {CHECKSUMS}"


def _unreadable(path: Path, error: OSError) -> OSError:
    """The error with the file's name, which an error of reading lacks."""
    return OSError(error.errno, error.strerror, str(path))

"""Tensors in files that torch.save wrote, read where they lie. Nothing in a file is executed.

Such a file is a zip archive, not compressed: a pickle, and an entry for the storage of each tensor.
The pickle is read by `inert_pickle`, and of a storage only the pages that hold what is asked for.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import pickle
import struct
import zipfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen

from megafn.pure.checkpoint.boxes import Box, Index, slices_of
from megafn.runtime.checkpoint.atomic_files import CheckpointError
from megafn.runtime.pretrained.inert_pickle import InertUnpickler, Known

_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch before 1.6: no archive


# A pickle may set the state of any object that it has made. Without attrs' __setstate__ it cannot:
# else it could make a FileTensor of another file, and have that read.


@frozen(kw_only=True, getstate_setstate=False)
class FileTensor:
    """A tensor, and where it lies in a file."""

    path: Path
    start: int  # byte of the file at which its first element lies
    dtype: torch.dtype
    shape: Index
    strides: Index  # in elements


# ------------------------------------------------------------------------------------- open files

_MOST_OPEN = 64  # a process may have about 1,000 files open, and a checkpoint may have more


@frozen(kw_only=True)
class OpenFiles:
    """Files that are mapped into memory, the one that was opened last at the end."""

    maps: dict[Path, mmap.mmap]


@contextlib.contextmanager
def open_files() -> Iterator[OpenFiles]:
    """Maps of files, made when they are first needed, for the length of the `with`."""
    files = OpenFiles(maps={})
    try:
        yield files
    finally:
        for data in files.maps.values():
            _close(data)


def mapped(files: OpenFiles, path: Path) -> mmap.mmap:
    """The content of a file. Raises CheckpointError if it is missing or empty, and OSError."""
    if path not in files.maps:
        if len(files.maps) >= _MOST_OPEN:
            oldest = next(iter(files.maps))
            _close(files.maps.pop(oldest))
        files.maps[path] = _map(path)
    return files.maps[path]


def _map(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy the whole checkpoint again") from None
    except ValueError:
        raise CheckpointError(f"{path} is damaged: it is empty") from None


def _close(data: mmap.mmap) -> None:
    with contextlib.suppress(BufferError):  # an error's traceback still refers to a view
        data.close()


# ------------------------------------------------------------------------------------------- read


def read_archive(files: OpenFiles, path: Path, start: int = 0, end: int | None = None) -> Any:
    """What torch.save wrote into a file, or into bytes start to end - 1 of it.

    A `FileTensor` stands for each tensor, and an inert object for each other one that is not of
    Python's own types.
    Raises CheckpointError if the file is missing, truncated or of another format, and OSError.
    """
    data = mapped(files, path)
    end = len(data) if end is None else end
    if not 0 <= start < end <= len(data):
        raise CheckpointError(f"{path} is damaged: it has {len(data)} bytes, and should have {end}")
    if data[start : start + len(_OLD_FORMAT)] == _OLD_FORMAT:
        raise CheckpointError(
            f"{path} is in the format of torch before 1.6: load it and save it with a newer torch"
        )
    try:
        return _unpickle(data, path, start, end)
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(
            f"{path} is damaged: it is not a file of torch.save ({error or type(error).__name__})"
        ) from None


def _unpickle(data: mmap.mmap, path: Path, start: int, end: int) -> Any:
    with zipfile.ZipFile(_Region(data, start, end)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise zipfile.BadZipFile("an entry is compressed")
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        content = archive.read(pickled)
    folder = pickled.removesuffix("data.pkl") + "data/"
    storages = {}
    for entry in entries:
        if entry.filename.startswith(folder):
            first = _first_byte(data, start + entry.header_offset)
            if first + entry.file_size > end:
                raise zipfile.BadZipFile("an entry ends after it")
            storages[entry.filename.removeprefix(folder)] = (first, entry.file_size)

    def storage(pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{kind!r} is not the storage of a tensor")
        first, size = storages[key]
        return _Storage(path=path, start=first, size=size, dtype=dtype)

    return InertUnpickler(io.BytesIO(content), _KNOWN, storage).load()


class _Region(io.RawIOBase):
    """Bytes start to end - 1 of a file as a file."""

    def __init__(self, data: mmap.mmap, start: int, end: int) -> None:
        super().__init__()
        self._data = data
        self._start = start
        self._end = end
        self._position = start

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {
            io.SEEK_SET: self._start,
            io.SEEK_CUR: self._position,
            io.SEEK_END: self._end,
        }[whence]
        if origin + offset < self._start:
            raise OSError("a place before the beginning")
        self._position = origin + offset
        return self.tell()

    def read(self, size: int | None = -1) -> bytes:
        end = self._end
        if size is not None and size >= 0:
            end = min(end, self._position + size)
        content = self._data[self._position : end]
        self._position += len(content)
        return content


_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name


def _first_byte(data: mmap.mmap, header: int) -> int:
    """Where the content of a zip entry begins whose header begins here."""
    name_size, extra_size = struct.unpack_from("<HH", data, header + 26)
    return header + _LOCAL_HEADER + name_size + extra_size


# -------------------------------------------------------------------- what stands for torch's names


@frozen(kw_only=True, getstate_setstate=False)
class _Storage:
    """Bytes of a file that hold elements of one type."""

    path: Path
    start: int
    size: int
    dtype: torch.dtype


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> FileTensor:
    """Stands for torch._utils._rebuild_tensor_v2. Raises UnpicklingError beyond the storage."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor without a storage")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor whose shape is not of integers")
    itemsize = storage.dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if prod(shape) > 0 and (last + 1) * itemsize > storage.size:
        raise pickle.UnpicklingError("a tensor that is larger than its storage")
    return FileTensor(
        path=storage.path,
        start=storage.start + offset * itemsize,
        dtype=storage.dtype,
        shape=tuple(shape),
        strides=tuple(strides),
    )


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    """Stands for torch._utils._rebuild_parameter."""
    return tensor


_KNOWN: Known = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
    # bytes without a type, as Transformer Engine's states may have them
    ("torch.storage", "UntypedStorage"): torch.uint8,
}


# ------------------------------------------------------------------------------------------- copy

_INTEGERS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}  # numpy has no bfloat16


def copy_part(files: OpenFiles, tensor: FileTensor, box: Box) -> torch.Tensor:
    """A box of a tensor in a file, as a new tensor of its dtype."""
    itemsize = tensor.dtype.itemsize
    whole = np.ndarray(
        tensor.shape,
        _INTEGERS[itemsize],
        buffer=mapped(files, tensor.path),
        offset=tensor.start,
        strides=[step * itemsize for step in tensor.strides],
    )
    part = np.array(whole[slices_of(box)], order="C")
    return torch.from_numpy(part).view(tensor.dtype)

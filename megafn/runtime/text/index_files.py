"""The two files of megatron-core's indexed datasets, read and checked."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

import numpy as np
from attrs import frozen
from megatron.core.datasets.indexed_dataset import DType

from megafn.pure.config.problems import ConfigError

_MAGIC = b"MMIDIDX\0\0" + struct.pack("<Q", 1)  # megatron-core's format, version 1
_HEADER = struct.Struct("<BQQ")  # type code, number of sequences, length of the document list
_INTEGER_CODES = (1, 2, 3, 4, 5, 8)


@frozen(kw_only=True)
class DatasetIndex:
    """What the .idx of an indexed dataset says, and the last token of its .bin."""

    dtype: np.dtype  # of the token ids
    lengths: np.ndarray  # of the sequences, int32 [sequences]
    documents: np.ndarray  # first sequence of each, and the end of the last, int64 [documents + 1]
    last_token: int


def read_index(prefix: str, field: str) -> DatasetIndex:
    """What an indexed dataset holds.

    Raises ConfigError, naming the config's field, if its files are missing or damaged.
    """
    where = f"{field}: {prefix}"
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            raise _damaged(where, f"{suffix} is missing")
    with open(prefix + ".idx", "rb") as file:
        header = _read_header(file, where)
        lengths = np.fromfile(file, np.int32, header.sequences)
        offsets = np.fromfile(file, np.int64, header.sequences)
        documents = np.fromfile(file, np.int64, header.documents)
    if not _fit_together(lengths, offsets, documents, header):
        raise _damaged(
            where, ".idx is damaged: its lengths, places and documents do not fit together"
        )
    expected_size = int(lengths.sum(dtype=np.int64)) * header.dtype.itemsize
    size = os.path.getsize(prefix + ".bin")
    if size != expected_size:
        raise _damaged(
            where, f".bin is truncated or another's: {size} bytes, {expected_size} by its .idx"
        )
    if size == 0:
        raise _damaged(where, ".bin is empty")
    last_token = _last_token(prefix + ".bin", header.dtype)
    return DatasetIndex(
        dtype=header.dtype, lengths=lengths, documents=documents, last_token=last_token
    )


def _damaged(where: str, what: str) -> ConfigError:
    return ConfigError(
        f"{where}{what}; write it again (if it is in the cache folder: remove its folder)"
    )


@frozen(kw_only=True)
class _Header:
    dtype: np.dtype
    sequences: int
    documents: int


def _read_header(file: BinaryIO, where: str) -> _Header:
    """Read what the .idx says of its arrays, and check that the file is long enough for them."""
    raw = file.read(len(_MAGIC) + _HEADER.size)
    if len(raw) < len(_MAGIC) + _HEADER.size or not raw.startswith(_MAGIC):
        raise _damaged(where, ".idx is not an index of megatron-core's format, version 1")
    code, sequences, documents = _HEADER.unpack(raw[len(_MAGIC) :])
    if code not in _INTEGER_CODES:
        raise _damaged(where, f".idx: type code {code} is not an integer type")
    if os.path.getsize(file.name) < len(raw) + 12 * sequences + 8 * documents:
        raise _damaged(
            where,
            f".idx is truncated: {sequences} sequences and {documents - 1} documents do not fit "
            "into it",
        )
    dtype = np.dtype(DType.dtype_from_code(code))
    return _Header(dtype=dtype, sequences=sequences, documents=documents)


def _fit_together(
    lengths: np.ndarray, offsets: np.ndarray, documents: np.ndarray, header: _Header
) -> bool:
    """Whether each sequence follows the one before it in the .bin, and documents cover them all."""
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    return bool(
        (lengths >= 0).all()
        and (offsets == begins * header.dtype.itemsize).all()
        and len(documents) > 0
        and documents[0] == 0
        and documents[-1] == header.sequences
        and (np.diff(documents) >= 0).all()
    )


def _last_token(path: str, dtype: np.dtype) -> int:
    with open(path, "rb") as file:
        file.seek(-dtype.itemsize, os.SEEK_END)
        return int(np.fromfile(file, dtype, 1)[0])

"""The user's cache folder, and texts that are indexed into it once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from megafn.pure.config.problems import ConfigError
from megafn.runtime.text.documents import SPLITS, unreadable
from megafn.runtime.text.indexing import DEFAULT_JSON_KEY, index_text
from megafn.runtime.text.tokenizer import Tokenizer

# Raised whenever the same text gives other documents or sentences than before.
_READING = 2


def cache_folder(folder: str | None = None) -> Path:
    """`folder`, or megafn's in the user's cache, created if missing.

    The user's cache is $XDG_CACHE_HOME, else ~/.cache.
    Raises ConfigError if it cannot be created.
    """
    path = Path(folder) if folder else _user_cache() / "megafn"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data.cache = {folder!r}: {path} can't be created ({error.strerror}); name a folder "
            "that can be written to in data.cache or XDG_CACHE_HOME"
        ) from error
    return path


def _user_cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return Path(folder) if os.path.isabs(folder) else Path.home() / ".cache"


def indexed_text(
    source: str,
    *,
    tokenizer: Tokenizer,
    split: Sequence[float],
    cache: str | None = None,
    split_sentences: bool = False,
    json_key: str = DEFAULT_JSON_KEY,
) -> dict[str, str]:
    """As `index_text`, into the cache folder, once: later calls and other processes find it there.

    The key is the source's path, size and time of change, the tokenizer, the split and json_key.
    On each host one process writes while the others wait; if several hosts share the folder, the
    first to finish wins.
    """
    key = _key(source, tokenizer, split, split_sentences, json_key)
    folder = cache_folder(cache)
    home = folder / f"{Path(source).stem}-{key}"
    if not home.is_dir():  # else it is whole, and may be another user's, who owns the lock
        write = partial(
            index_text,
            source,
            tokenizer=tokenizer,
            split=split,
            split_sentences=split_sentences,
            json_key=json_key,
        )
        try:
            _write_once(home, folder / f".{key}.lock", f".{key}.", write)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise ConfigError(
                f"data.cache = {cache!r}: {folder} can't be written to, and does not hold "
                f"{source} as this config needs it; name a folder that can be written to in "
                "data.cache or XDG_CACHE_HOME"
            ) from error
    return {
        name: str(home / f"text_{name}") for name in SPLITS if (home / f"text_{name}.idx").exists()
    }


def _key(
    source: str,
    tokenizer: Tokenizer,
    split: Sequence[float],
    split_sentences: bool,
    json_key: str,
) -> str:
    """A hash of all that decides what an indexed text holds."""
    try:
        status = os.stat(source)
    except OSError as error:
        raise unreadable(source, error) from error
    identity = [
        os.path.realpath(source),
        status.st_size,
        status.st_mtime_ns,
        dict(tokenizer.unique_identifiers),
        [float(weight) for weight in split],
        json_key,
        _READING,
    ]
    if split_sentences:
        identity.append("sentences")
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _write_once(home: Path, lock: Path, prefix: str, write: Callable[[str], object]) -> None:
    """Make the folder `home` of the files that `write` writes, given their prefix, if missing."""
    with _lock(lock):
        if not home.is_dir():
            with _published_folder(home, prefix) as unfinished:
                write(f"{unfinished}/text")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file's lock, which the processes of this host wait for; it ends with its process.

    A lock that another user left is opened for reading, which is enough to hold it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        if not path.exists():
            raise
        descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _published_folder(home: Path, prefix: str) -> Iterator[str]:
    """A new folder that becomes `home` if the body succeeds, else is removed."""
    unfinished = tempfile.mkdtemp(prefix=prefix, dir=home.parent)
    try:
        yield unfinished
        shutil.copymode(home.parent, unfinished)
        os.rename(unfinished, home)
    except OSError:
        if not home.is_dir():  # else another host finished first, with the same content
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

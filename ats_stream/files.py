"""Writing a file whole or not at all, and checking what a file holds."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ats_stream.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def open_atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well: readers see the old or the new one.

    It is made beside its place, missing parent folders too. Raises StorageError when the disk refuses; after
    any error no temporary file is left.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {_reason(error)}") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {_reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` as :func:`open_atomic` does."""
    with open_atomic(path) as stream:
        stream.write(data)
    return Path(path)


def sha256_of(data: bytes) -> str:
    """The SHA-256 of `data` as 64 lower-case hexadecimal digits.

    >>> sha256_of(b"")[:16]
    'e3b0c44298fc1c14'
    """
    return hashlib.sha256(data).hexdigest()


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _umask() -> int:
    # the only portable way to read the mask is to set it; mkstemp itself gives 0600, too private for a report
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

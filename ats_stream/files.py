"""Writing a file whole or not at all, and checking what a file holds."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from ats_stream.errors import StorageError


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` through a temporary file beside it: readers see the old file or the new one.

    Missing parent folders are made. Raises StorageError, and leaves no temporary file, when the disk refuses.
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
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {_reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def sha256_of(data: bytes) -> str:
    """The SHA-256 of `data` as 64 lower-case hexadecimal digits.

    >>> sha256_of(b"")[:16]
    'e3b0c44298fc1c14'
    """
    return hashlib.sha256(data).hexdigest()


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _umask() -> int:
    # the only portable way to read the mask is to set it; mkstemp itself gives 0600, too private for a report
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

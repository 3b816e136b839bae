"""What can go wrong when the bytes behind a key are read; a pyramid turns it into an error that names it."""

from __future__ import annotations


class StoreError(Exception):
    """A key cannot be read; one line tells which and why, without credentials."""


class TransientError(StoreError):
    """A failure that another try may not meet: a cut connection, a busy server, no answer in time."""


class MissingKeyError(StoreError):
    """A remote key turned out to be absent when it was read."""


class DeniedError(StoreError):
    """The server refuses: no, or the wrong, credentials, or a key that it does not tell to be absent."""


def too_large(key: str, nbytes: int, max_bytes: int) -> StoreError:
    """The error for a key of more bytes than anything sensible needs there."""
    return StoreError(f"{key} has {nbytes} bytes, at most {max_bytes} are read")

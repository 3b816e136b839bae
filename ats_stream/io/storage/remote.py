"""Object storage and web servers as stores, through obstore: ``s3://``, ``gs://``, ``az://``, ``http(s)://``."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from ats_stream.errors import InputError
from ats_stream.io.storage.client_options import obstore_arguments
from ats_stream.io.storage.retry import RetryPolicy
from ats_stream.io.storage.store_error import (
    DeniedError,
    MissingKeyError,
    StoreError,
    TransientError,
    too_large,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

Value = TypeVar("Value")
SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")
DEFAULT_TIMEOUT_S = 30.0
# requests for stamps that are under way at once
STAMP_REQUESTS = 16
# what a server may answer when asking again helps: too slow, too many requests, or an error of its own
TRANSIENT_STATUS = frozenset({408, 425, 429})
_STATUS = re.compile(r"status(?: code)?: (\d{3}) ?([A-Za-z ]*)")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")


class ObjectStore:
    """Objects under a URL. ``options`` are those of obstore's ``from_url``, and some of our own:
    ``timeout_s`` for each try of a request, ``max_retries``, and for http(s) ``user`` and ``password``.

    Neither ``repr`` nor any error shows the values of options, nor a user or password in the URL.
    """

    is_remote = True

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        """InputError for options or a URL that cannot be used; nothing is requested yet."""
        self._url, self._options = url.rstrip("/"), dict(options or {})
        self.shown_url = shown(self._url)
        rest = dict(self._options)
        self.timeout_s = _number(rest.pop("timeout_s", DEFAULT_TIMEOUT_S), "timeout_s")
        retries = rest.pop("max_retries", RetryPolicy.max_retries)
        self.policy = RetryPolicy(max_retries=int(_number(retries, "max_retries", least=0)))
        parts = urlsplit(self._url)
        if parts.scheme not in SCHEMES or not parts.netloc:
            raise InputError(f"expected a URL of {', '.join(s + '://' for s in SCHEMES)}")
        if parts.query or parts.fragment:
            raise InputError("a URL with '?' or '#' cannot be opened: give credentials as storage_options")
        self._config = rest
        self._connected: tuple[int, Any] | None = None
        self._client()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connected": None}

    def __repr__(self) -> str:
        names = ", ".join(sorted(self._options))
        return f"ObjectStore({self.shown_url!r}{', options ' + names if names else ''})"

    @property
    def identity(self) -> Hashable:
        """URL and options."""
        return ("remote", self._url, repr(sorted(self._options.items(), key=lambda item: item[0])))

    def place(self, key: str) -> str:
        """The URL without user and password."""
        return "/".join(part for part in (self.shown_url, key) if part)

    def _client(self) -> Any:
        """The connection pool; each process makes its own."""
        if self._connected is None or self._connected[0] != os.getpid():
            self._connected = (os.getpid(), self._connect())
        return self._connected[1]

    def _connect(self) -> Any:
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        arguments = obstore_arguments(self._url, self._config, os.environ, timeout_s=self.timeout_s)
        try:
            return from_url(**arguments)
        except (BaseError, ValueError, TypeError) as error:
            reason = str(error).split("\n", 1)[0]
            raise InputError(f"storage options or URL cannot be used: {self._redact(reason)}") from error

    def open(self, key: str) -> ObjectBlob:
        """Nothing is requested until something is read."""
        return ObjectBlob(self, key)

    def get(self, key: str, max_bytes: int) -> bytes | None:
        """One request."""
        try:
            return ObjectBlob(self, key).whole(max_bytes)
        except MissingKeyError:
            return None

    def size(self, key: str) -> int | None:
        """One request of the head alone."""
        import obstore

        try:
            return int(self.attempt(key, lambda client: obstore.head(client, key))["size"])
        except MissingKeyError:
            return None

    def objects(self) -> Iterator[tuple[str, int]]:
        """Some requests, a thousand objects each; web servers have no lists."""
        import obstore

        if self._url.startswith("http"):
            raise StoreError(f"web servers do not list what is under {self.shown_url}")
        pages = self.attempt("the list of objects", lambda client: iter(obstore.list(client)))
        while True:
            page = self.attempt("the list of objects", lambda _: next(pages, None))
            if page is None:
                return
            for one in page:
                yield str(one["path"]), int(one["size"])

    def stamps(self, keys: Sequence[str]) -> Hashable:
        """Entity tags, by one request of the head of each key; None where the server states none."""
        with ThreadPoolExecutor(min(STAMP_REQUESTS, len(keys))) as pool:
            found = list(pool.map(self._stamp, keys))
        return None if None in found else tuple(found)

    def _stamp(self, key: str) -> Hashable:
        import obstore

        try:
            head = self.attempt(key, lambda client: obstore.head(client, key))
        except MissingKeyError:
            return ()
        tag = head["e_tag"]
        return None if tag is None else (tag, head["size"], head["last_modified"], head["version"])

    def afresh(self) -> ObjectStore:
        """Nothing is remembered."""
        return self

    def attempt(self, key: str, action: Callable[[Any], Value]) -> Value:
        """Do one request; whatever goes wrong becomes a StoreError of one line without credentials."""
        from obstore import exceptions

        try:
            return action(self._client())
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise StoreError(f"the bucket of {self.shown_url} does not exist") from error
            raise MissingKeyError(f"{key} does not exist") from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError) as error:
            raise DeniedError(f"access to {key} is denied: {_status(str(error))}") from error
        except exceptions.NotSupportedError as error:
            raise StoreError(f"the server does not give ranges of bytes of {key}") from error
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise self._failure(key, str(error)) from error

    def _failure(self, key: str, text: str) -> StoreError:
        found = _STATUS.search(text)
        if found is not None:
            status = int(found[1])
            is_passing = status >= 500 or status in TRANSIENT_STATUS
            kind = TransientError if is_passing else StoreError
            return kind(f"cannot read {key}: {_status(text)}")
        if "UnexpectedRange" in text:
            return TransientError(f"cannot read {key}: the server gave other bytes than it was asked for")
        if "Timeout" in text or "TimedOut" in text:
            return TransientError(f"cannot read {key}: no answer in {self.timeout_s:g} s")
        if "error sending request" in text or "body error" in text or "connection" in text.lower():
            what = "cannot connect" if "Connect" in text else "the connection broke"
            return TransientError(f"cannot read {key}: {what}")
        if "credential" in text.lower() or "token" in text.lower():
            return StoreError(f"cannot read {key}: no credentials that could be used")
        return StoreError(
            f"cannot read {key}: {self._redact(' '.join(text.split(chr(10), 1)[0].split()))[:200]}"
        )

    def _redact(self, text: str) -> str:
        for value in _texts(self._options):
            text = text.replace(value, "***")
        return text.replace(self._url, self.shown_url)


class ObjectBlob:
    """One object; every read is one request."""

    stamp = None

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store, self.key = store, key

    def read(self, start: int, nbytes: int) -> bytes:
        """One request of a range."""
        import obstore

        if nbytes == 0:
            return b""
        return self._store.attempt(
            self.key,
            lambda client: bytes(obstore.get_range(client, self.key, start=start, length=nbytes)),
        )

    def tail(self, nbytes: int) -> tuple[bytes, int]:
        """One request of a suffix; two where suffixes are unknown (Azure)."""
        import obstore

        def suffix(client: Any) -> tuple[bytes, int]:
            result = obstore.get(client, self.key, options={"range": {"suffix": nbytes}})
            return bytes(result.bytes()), int(result.meta["size"])

        def by_size(client: Any) -> tuple[bytes, int]:
            size = int(obstore.head(client, self.key)["size"])
            start = max(0, size - nbytes)
            length = size - start
            data = bytes(obstore.get_range(client, self.key, start=start, length=length)) if length else b""
            return data, size

        is_azure = self._store.shown_url.startswith(("az:", "abfs:", "abfss:"))
        return self._store.attempt(self.key, by_size if is_azure else suffix)

    def whole(self, max_bytes: int) -> bytes:
        """One request of everything; the size is looked at before the body is read."""
        import obstore

        def read(client: Any) -> bytes:
            result = obstore.get(client, self.key)
            size = int(result.meta["size"])
            if size > max_bytes:
                raise too_large(self.key, size, max_bytes)
            return bytes(result.bytes())

        return self._store.attempt(self.key, read)

    def __enter__(self) -> ObjectBlob:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def shown(url: str) -> str:
    """A URL as it may be shown: without user, password, query and fragment; a path as it is.

    >>> shown("https://me:secret@host:8080/a.zarr?sig=abc"), shown("scans/a?.svs")
    ('https://host:8080/a.zarr', 'scans/a?.svs')
    """
    if "://" not in url:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:  # no URL at all; what could be a password still goes
        return url.split("?", 1)[0].rpartition("@")[2]
    netloc = parts.netloc.rpartition("@")[2] if has_login(url) else parts.netloc
    return urlunsplit((parts.scheme, netloc, parts.path.rstrip("/"), "", ""))


def has_login(url: str) -> bool:
    """Whether a user or password stands in a URL; what stands before the ``@`` of Azure is a container.

    >>> has_login("https://me:secret@host/a.zarr"), has_login("s3://bucket/a@b.zarr"), has_login("a@b.svs")
    (True, False, False)
    >>> has_login("abfss://container@account.dfs.core.windows.net/a.zarr")
    False
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return "@" in url
    user, at, _ = parts.netloc.rpartition("@")
    is_container = parts.scheme in ("abfs", "abfss") and ":" not in user
    return bool(at) and not is_container


def _status(text: str) -> str:
    """What the server answered: status and, of S3, the code; never the body, which may repeat credentials."""
    found, code = _STATUS.search(text), _CODE.search(text)
    if found is None:
        return "the server refused"
    status = f"{found[1]} {found[2]}".strip()
    return f"the server answered {status}" + (f" ({code[1]})" if code else "")


def _texts(options: Mapping[str, Any]) -> list[str]:
    """Every string in the options, those nested as well, longest first."""
    texts = []
    for value in options.values():
        if isinstance(value, dict):
            texts += _texts(value)
        elif isinstance(value, str) and value:
            texts.append(value)
    return sorted(texts, key=len, reverse=True)


def _number(value: Any, name: str, *, least: float = 1e-3) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value < float("inf"):
        raise InputError(
            f"storage option {name} must be a number of at least {least:g}, got {type(value).__name__}"
        )
    return float(value)

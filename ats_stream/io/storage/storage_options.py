"""Options for stores behind URLs, which may be secrets: carried to where images are opened, never shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ats_stream.errors import InputError
from ats_stream.io.opening import open_pyramid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ats_stream.io.pyramid import Pyramid

NUMBERS = ("timeout_s", "max_retries")
FILE_ENDINGS = (".yaml", ".yml")


class StorageOptions:
    """What ``open_pyramid`` takes as ``storage_options``, for the URLs of a list that may hold paths too.

    It is no mapping, and shows the names of options alone, so that nothing that prints, logs or describes an
    object shows their values. Pickling carries them.

    >>> StorageOptions({"region": "eu", "secret_access_key": "hush"})
    StorageOptions(region, secret_access_key)
    """

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self._values = dict(values or {})

    @classmethod
    def of(cls, given: StorageOptions | Mapping[str, Any] | None) -> StorageOptions:
        """The options as such an object."""
        return given if isinstance(given, StorageOptions) else cls(given)

    def __repr__(self) -> str:
        return f"StorageOptions({', '.join(sorted(self._values))})"

    def open(self, source: str) -> Pyramid:
        """Open an image, with the options if it lies behind a URL; errors as ``open_pyramid``."""
        return open_pyramid(source, storage_options=self.values_for(source))

    def values_for(self, source: str) -> Mapping[str, Any] | None:
        """The options of a source, None for a path; never to be shown."""
        return self._values if "://" in source else None


def parse_storage_options(words: Sequence[str]) -> StorageOptions:
    """Options of words KEY=VALUE and of paths of YAML files, each a mapping; the later one of a name holds.

    Every value stays the text that it is, apart from our own ``timeout_s`` and ``max_retries``. InputError,
    never showing a value, for what cannot be understood.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if word.lower().endswith(FILE_ENDINGS) and not equals:
            values |= _read_file(Path(word))
        elif equals and key:
            values[key] = value
        else:
            endings = " or ".join(FILE_ENDINGS)
            raise InputError(f"storage options are KEY=VALUE, or a file that ends in {endings}")
    for name in NUMBERS:
        if name in values:
            values[name] = _number(name, values[name])
    return StorageOptions(values)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        # all scalars as the text that they are: a key of digits is no number, "no" is not False
        content = yaml.load(text, yaml.BaseLoader)  # noqa: S506  # it makes strings, lists and mappings only
    except OSError as error:
        raise InputError(f"{path}: cannot read the storage options: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError):
        # what the parser says repeats the text, which may be a secret; so does a chained error
        raise InputError(f"{path}: the storage options are not YAML") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: the storage options are no mapping of names to values")
    return content


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"storage option {name} must be a number") from None

"""Slide files behind a URL: fetched whole into a temporary folder of the worker, converted, and removed."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ats_stream.errors import SlideError, StorageError
from ats_stream.io.storage.retry import with_retries
from ats_stream.io.storage.store_error import MissingKeyError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ats_stream.io.conversion.config import ConvertSummary
    from ats_stream.io.conversion.manifest import ManifestEntry
    from ats_stream.io.conversion.plan import Shard
    from ats_stream.io.conversion.state import ConvertJob


def fetch(url: str, folder: Path, storage_options: Mapping[str, Any] | None) -> Path:
    """Copy an object to a file with its name and time of change, so that it is known again.

    SlideError when it cannot be read, StorageError when the folder cannot be written.
    """
    import obstore

    from ats_stream.io.storage.remote import ObjectStore

    outer, _, key = url.rpartition("/")
    store = ObjectStore(outer, storage_options)
    path = folder / unquote(key)

    def copy(client: Any) -> float:
        result = obstore.get(client, key)
        with path.open("wb") as file:
            for chunk in result.stream(min_chunk_size=8 << 20):
                try:
                    file.write(chunk)
                except OSError as error:
                    raise StorageError(f"{path}: cannot write: {error.strerror or error}") from error
        return float(result.meta["last_modified"].timestamp())

    try:
        changed_s = with_retries(lambda: store.attempt(key, copy), store.policy)
    except (StoreError, MissingKeyError) as error:
        raise SlideError(store.place(key), str(error)) from error
    os.utime(path, ns=(int(changed_s) * 10**9,) * 2)
    return path


@dataclass(frozen=True)
class FetchCall:
    """Fetch a slide file and convert all of it."""

    job: ConvertJob
    num_threads: int | None

    def run(self, _: Callable[[Shard, ManifestEntry], None]) -> ConvertSummary:
        """The summary of the conversion, with the URL as its source."""
        from ats_stream.io.conversion.executors import SerialExecutor
        from ats_stream.io.conversion.run import run_jobs

        assert isinstance(self.job.source, str)
        with tempfile.TemporaryDirectory(prefix="ats-stream-") as folder:
            path = fetch(self.job.source, Path(folder), self.job.source_options)
            config = replace(self.job.config, num_threads=self.num_threads)
            job = replace(self.job, source=str(path), config=config, source_options=None)
            try:
                (summary,) = run_jobs([job], SerialExecutor(), is_strict=True, progress=False)
            except SlideError as error:
                raise SlideError(self.job.shown, error.reason) from error
        return replace(summary, source=self.job.shown)  # type: ignore[return-value]  # strict: no failure comes

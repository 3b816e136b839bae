"""Verifying that a store is whole: every byte, every chunk, every level.

With the manifest that :func:`ats_stream.io.convert` leaves beside a store, any changed, missing or
surplus byte is found. Without one, as for stores of other programs, damage is found that breaks the metadata,
the index of a shard, a checksum of a codec or of a zip file, or a chunk's size, or that makes levels differ.

Memory: for each thread a piece of 8 MiB of an object, then boxes of 16 MiB of pixels of two levels, several
times over; and about 300 bytes for each object.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ats_stream.errors import AtsStreamError, SlideError
from ats_stream.io.conversion.manifest import manifest_place, read_manifest
from ats_stream.io.layout import grid_shape
from ats_stream.io.opening import open_inside, open_pyramid, open_store
from ats_stream.io.parallel import in_threads
from ats_stream.io.sources import StoreSource
from ats_stream.io.storage.retry import with_retries
from ats_stream.io.storage.store_error import StoreError
from ats_stream.io.verification.objects import METADATA_FILES, Array, array_of, check_object, stray_reason
from ats_stream.io.verification.pixels import check_pixels
from ats_stream.io.verification.report import Finding, Report
from ats_stream.io.verification.source import check_source, find_source
from ats_stream.io.verification.structure import (
    INSTALL,
    check_documents,
    image_prefixes,
    metadata_key,
    read_metadata,
    validate,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ats_stream.io.conversion.manifest import Manifest
    from ats_stream.io.pyramid import Pyramid
    from ats_stream.io.storage.stores import Store

# objects of a remote store that are read at once
REMOTE_THREADS = 16


def verify(
    target: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    quick: bool = False,
    num_threads: int | None = None,
    progress: bool | None = None,
    on_finding: Callable[[Finding], None] | None = None,
) -> Report:
    """Verify an OME-Zarr store: a folder, a zip file, or either behind a URL.

    The metadata are validated, objects compared with the manifest beside the store, indices of shards parsed,
    all chunks decoded, each level compared with the one above it, and level 0 with ``source``: the slide it
    was made from, or a folder that holds it; without it, a slide of the manifest's name beside the store.
    ``quick`` compares metadata and sizes alone. ``num_threads`` is one per core, at most 8, by default;
    ``progress`` shows a bar on standard error, by default when that is a terminal. ``on_finding`` is called
    for each finding, in this thread, when it is made.

    Raises SlideError when there is no store, or a given source is not there.
    """
    store = open_store(target, storage_options)
    shown = sys.stderr.isatty() if progress is None else progress
    threads = num_threads or min(8, os.cpu_count() or 1)
    job = _Verification(store, os.fspath(target).rstrip("/"), threads, quick, shown, on_finding)
    return job.run(None if source is None else os.fspath(source), storage_options)


class _Verification:
    """One verification: what is known of the store, and what was found so far."""

    def __init__(
        self,
        store: Store,
        target: str,
        num_threads: int,
        is_quick: bool,
        is_shown: bool,
        on_finding: Callable[[Finding], None] | None,
    ) -> None:
        self.store, self.num_threads, self.is_quick, self.is_shown = store, num_threads, is_quick, is_shown
        self.target, self.shown = target, store.place("").rstrip("/")
        self.on_finding = on_finding
        self.findings: list[Finding] = []
        self.told: set[Finding] = set()
        self.notes: list[str] = []
        self.manifest: Manifest | None = None
        self.listed: dict[str, int] | None = None
        self.documents: list[str] = []
        self.images: dict[str, Pyramid] = {}
        self.arrays: dict[str, Array] = {}
        self.num_objects = self.num_bytes = 0

    def run(self, source: str | None, storage_options: Mapping[str, Any] | None) -> Report:
        """Do all of it."""
        began = time.perf_counter()
        self._read_manifest(storage_options)
        self._list()
        self._check_structure()
        self._check_objects()
        if not self.is_quick:
            for prefix, pyramid in self.images.items():
                self._check_pixels(prefix, pyramid)
        self._check_source(source, storage_options)
        return Report(
            target=self.shown,
            findings=tuple(self.findings),
            num_objects=self.num_objects,
            num_bytes=self.num_bytes,
            num_levels=sum(len(pyramid.levels) for pyramid in self.images.values()),
            has_manifest=self.manifest is not None,
            is_quick=self.is_quick,
            notes=tuple(self.notes),
            seconds=time.perf_counter() - began,
        )

    def _found(self, finding: Finding) -> None:
        if finding in self.told:
            return
        self.told.add(finding)
        self.findings.append(finding)
        if self.on_finding is not None:
            self.on_finding(finding)

    def _read_manifest(self, storage_options: Mapping[str, Any] | None) -> None:
        # a store that was packed is beside the manifest of its folder
        base = self.target[:-4] if self.target.lower().endswith(".zip") else self.target
        for place in dict.fromkeys((self.target, base)):
            try:
                self.manifest = read_manifest(place, storage_options=storage_options)
            except SlideError as error:
                self._found(Finding(PurePosixPath(manifest_place(place)).name, error.reason))
                self.notes.append("the manifest is broken")
                return
            if self.manifest is not None:
                if not self.manifest.is_complete:
                    name = PurePosixPath(manifest_place(place)).name
                    self._found(Finding(name, "the conversion has not come to its end, run it again"))
                return
        self.notes.append("without a manifest, damage that still decodes may not be seen")

    def _list(self) -> None:
        try:
            self.listed = dict(self.store.objects())
        except StoreError:
            self.notes.append("objects cannot be listed: those that do not belong there are not seen")

    def _check_structure(self) -> None:
        documents, findings = read_metadata(self.store, self._metadata_keys())
        self.documents = sorted(documents)
        complaints, missing = validate(documents)
        for finding in [*findings, *check_documents(documents), *complaints]:
            self._found(finding)
        if missing:
            self.notes.append(f"metadata not validated by {' and '.join(missing)}: {INSTALL}")
        prefixes = image_prefixes(documents)
        if not prefixes and not self.findings:
            self._found(Finding("zarr.json", "no OME-Zarr image: there are no 'multiscales'"))
        for prefix in prefixes:
            try:
                pyramid = open_inside(self.store, prefix, cache_bytes=0, num_threads=1)
            except SlideError as error:
                self._found(Finding(metadata_key(documents, prefix), error.reason))
                continue
            self.images[prefix] = pyramid
            for one in pyramid.sources:
                if isinstance(one, StoreSource):
                    self.arrays[one.prefix] = Array(one.prefix, one.layout)

    def _metadata_keys(self) -> Iterable[str]:
        if self.listed is not None:
            return list(self.listed)
        if self.manifest is not None:
            return list(self.manifest.entries)
        # what opening it asks for
        keys = [folder + name for folder in ("", "labels/") for name in METADATA_FILES]
        with suppress(SlideError):
            pyramid = open_inside(self.store, "", cache_bytes=0, num_threads=1)
            images = ["", *(f"labels/{name}/" for name in pyramid.label_names)]
            keys += [f"{image}{name}" for image in images[1:] for name in METADATA_FILES]
            for image in images:
                inside = pyramid if not image else pyramid.label(image.split("/")[1])
                folders = [s.prefix for s in inside.sources if isinstance(s, StoreSource)]
                keys += [folder + name for folder in folders for name in METADATA_FILES]
        return keys

    def _check_objects(self) -> None:
        entries = self.manifest.entries if self.manifest is not None else None
        if self.listed is not None or entries is not None:
            keys: Iterable[str] = sorted({*(self.listed or ()), *(entries or ())})
        else:
            keys = itertools.chain(self.documents, self._keys_of_arrays())
        threads = max(self.num_threads, REMOTE_THREADS if self.store.is_remote else 1)

        def check(key: str) -> tuple[str, int | None, str | None]:
            try:
                nbytes = self._size(key)
            except StoreError as error:
                return key, 0, str(error)
            entry = None if entries is None else entries.get(key)
            stray = None if nbytes is None else stray_reason(key, self.arrays, entries)
            if stray is not None or (nbytes is None and entries is None):
                return key, nbytes, stray
            array = array_of(key, self.arrays)
            is_metadata = key.rpartition("/")[2] in METADATA_FILES
            return (
                key,
                nbytes,
                check_object(
                    self.store,
                    key,
                    nbytes,
                    array=None if is_metadata else array,
                    entry=entry,
                    is_quick=self.is_quick,
                ),
            )

        total = None if self.listed is None else sum(self.listed.values())
        with self._bar("objects", total) as bar:
            for key, nbytes, reason in in_threads(check, keys, threads):
                self.num_objects += nbytes is not None
                self.num_bytes += nbytes or 0
                if reason is not None:
                    self._found(Finding(key, reason))
                bar.update(nbytes or 0)

    def _size(self, key: str) -> int | None:
        if self.listed is not None:
            return self.listed.get(key)
        return with_retries(lambda: self.store.size(key), self.store.policy)

    def _keys_of_arrays(self) -> Iterator[str]:
        for prefix, array in self.arrays.items():
            grid = grid_shape(array.layout.shape, array.layout.shard_shape)
            for place in itertools.product(*map(range, grid)):
                yield prefix + array.layout.key(place)

    def _check_pixels(self, prefix: str, pyramid: Pyramid) -> None:
        total = sum(math.prod(level.shape) * level.dtype.itemsize for level in pyramid.levels)
        profile = None if self.manifest is None else self.manifest.header.profile
        known = {finding.key for finding in self.findings}
        with self._bar(prefix.rstrip("/") or "pixels", total) as bar:
            for finding in check_pixels(prefix, pyramid, profile, known, self.num_threads, bar.update):
                self._found(finding)

    def _check_source(self, given: str | None, storage_options: Mapping[str, Any] | None) -> None:
        place = find_source(given, self.target, self.manifest)
        if place is None or "" not in self.images:
            return
        try:
            options = storage_options if "://" in place else None
            for finding in check_source(self.images[""], open_pyramid(place, storage_options=options)):
                self._found(finding)
        except AtsStreamError as error:
            if given is not None:
                raise
            self.notes.append(f"source not compared: {error}")

    def _bar(self, what: str, total: int | None) -> Any:
        from tqdm import tqdm

        return tqdm(
            desc=f"{PurePosixPath(self.target).name} {what}",
            total=total,
            unit="B",
            unit_scale=True,
            leave=False,
            disable=not self.is_shown,
            file=sys.stderr,
        )

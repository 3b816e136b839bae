"""One pyramid in the making as its run sees it: what is done, what can be done next, how it ends."""

from __future__ import annotations

import math
import time
import uuid
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import google_crc32c

from ats_stream import __version__
from ats_stream.errors import TargetExistsError
from ats_stream.io.conversion.calls import BuildCall, Conversion, FinishCall
from ats_stream.io.conversion.config import ConvertConfig, ConvertSummary
from ats_stream.io.conversion.fetched_slide import FetchCall
from ats_stream.io.conversion.manifest import (
    Manifest,
    ManifestEntry,
    ManifestHeader,
    SourceStamp,
    complete_line,
    entry_line,
    entry_of,
    header_line,
    parse_manifest,
)
from ats_stream.io.conversion.setup import make_plan
from ats_stream.io.conversion.slides import SlideSource, open_source
from ats_stream.io.conversion.targets import open_target
from ats_stream.io.shard import check_index, index_nbytes, parse_index

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ats_stream.io.conversion.calls import Call
    from ats_stream.io.conversion.plan import ConvertPlan, Shard
    from ats_stream.io.conversion.targets import Target
    from ats_stream.io.ngff import Channel

# an object of more is no shard of ours
MAX_SHARD_BYTES = 1 << 32
NO_STAMP = SourceStamp(name="", nbytes=0, mtime_ns=0)


@dataclass(frozen=True, kw_only=True)
class ConvertJob:
    """One pyramid to be made."""

    source: str | SlideSource
    target: str
    config: ConvertConfig
    name: str | None = None
    channels: tuple[Channel, ...] | None = None
    source_options: Mapping[str, Any] | None = field(default=None, repr=False)
    target_options: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def shown(self) -> str:
        """What messages call the source, without credentials."""
        if not isinstance(self.source, str):
            return self.source.path
        if "://" not in self.source:
            return self.source
        from ats_stream.io.storage.remote import shown

        return shown(self.source)


class Fetching:
    """A pyramid of a slide file behind a URL, which one worker fetches and converts as a whole."""

    num_px = done_px = 0

    def __init__(self, job: ConvertJob, num_threads: int | None) -> None:
        self.job = job
        self._num_threads = num_threads
        self._is_started = False
        self.error: BaseException | None = None
        self.summary: ConvertSummary | None = None

    @property
    def name(self) -> str:
        """What a progress bar calls it."""
        return self.job.shown.rpartition("/")[2]

    def start(self) -> None:
        """Nothing is known before the worker has fetched it."""

    def next_call(self) -> tuple[int, Call] | None:
        """The one call."""
        if self._is_started:
            return None
        self._is_started = True
        return 0, FetchCall(self.job, self._num_threads)

    def on_shard(self, shard: Shard, entry: ManifestEntry) -> None:
        """The worker notes its shards."""

    def on_end(self, _: int, result: Any) -> None:
        """Its summary, or why there is none."""
        if isinstance(result, BaseException):
            self.error = result
        else:
            self.summary = result

    @property
    def has_ended(self) -> bool:
        """Whether the worker has."""
        return self.summary is not None or self.error is not None

    def close(self, *, discard: bool = False) -> None:
        """The worker has given everything back."""


class Making:
    """A pyramid in the making: holds the target's lock from :meth:`start` to :meth:`close`."""

    def __init__(self, job: ConvertJob, *, num_threads: int | None, in_process: bool) -> None:
        """``in_process`` says that the calls run here, one after another."""
        self.job = job
        self._num_threads, self._in_process = num_threads, in_process
        self._began = time.perf_counter()
        self.error: BaseException | None = None
        self.in_flight = 0
        self.num_px = self.done_px = 0
        self._tasks: list[tuple[BuildCall, set[int]]] = []
        self._started: set[int] = set()
        self._finished: set[int] = set()
        self._entries: dict[str, ManifestEntry] = {}
        self._is_finishing = False
        self.summary: ConvertSummary | None = None
        self._notes: list[str] = []
        self._num_resumed = 0

    @property
    def name(self) -> str:
        """What a progress bar calls it."""
        return self._about[1]

    def start(self) -> None:
        """Open the source, plan, and find out what is there already.

        Raises SlideError, TargetExistsError, InputError or StorageError.
        """
        job = self.job
        self.target = open_target(job.target, job.target_options)
        source = (
            open_source(job.source, storage_options=job.source_options, num_threads=self._num_threads)
            if isinstance(job.source, str)
            else job.source
        )
        setup = make_plan(source, job.config, name=job.name, channels=job.channels)
        self.plan = setup.plan
        self._notes += setup.notes
        self._about = (source.path, source.name if job.name is None else job.name, source.shape)
        self._source_bytes = source.source_bytes
        self.num_px = self.plan.num_px
        self.target.lock()
        try:
            self._resume(_header(self.plan, source.stamp), can_resume=source.stamp is not None)
            self.conversion = Conversion(
                key=uuid.uuid4().hex,
                source=job.source,
                storage_options=job.source_options,
                target=self.target,
                plan=self.plan,
                stamp=source.stamp,
                num_threads=self._num_threads,
            )
            if self._in_process:
                self.conversion.builder(source)
            pending = [s for s in self.plan.shards() if self.plan.key(s) not in self._entries]
            # what was stored as JPEG cannot be read back as it was encoded
            is_exact = all(level.spec.codec.jpeg is None for level in self.plan.levels)
            self._tasks = [
                (BuildCall(self.conversion, task), set(needs))
                for task, needs in self.plan.tasks(pending, is_whole=self._in_process or not is_exact)
            ]
        except BaseException:
            self.target.unlock()
            raise

    def _resume(self, header: ManifestHeader, *, can_resume: bool) -> None:
        """Take over what an earlier run with the same plan left; remove what another one left."""
        target = self.target
        if target.exists():
            if not self.job.config.overwrite:
                raise TargetExistsError(f"{target.shown}: exists already")
            target.clear()
        data, sizes = target.read_manifest(), target.sizes()
        left = _parsed(data)
        if can_resume and left is not None and _is_same(left.header, header):
            self._entries = _done(self.plan, target, left, sizes)
            keys = {key for key in self._entries if self._entries[key].nbytes}
            target.delete(key for key in sizes if key not in keys)
            self._num_resumed = len(self._entries)
            self.done_px = sum(
                self.plan.shard_px(s) for s in self.plan.shards() if self.plan.key(s) in self._entries
            )
            self._notes.append(f"resumed: {self._num_resumed} of {self.plan.num_shards} shards were there")
        elif data is not None or sizes:
            why = "source or settings" if can_resume else "an array that is not known again"
            self._notes.append(f"begun anew: what an earlier run left was made from other {why}")
            target.discard()
        self._first_line = header_line(header)
        lines = [entry_line(entry) for entry in self._entries.values()]
        target.write_manifest(self._first_line + b"".join(lines))

    def build_calls(self) -> list[tuple[BuildCall, set[int]]]:
        """All calls that make shards, each with the numbers of those before it, to be made by the caller."""
        self._started.update(range(len(self._tasks)))
        self.in_flight += len(self._tasks)
        return self._tasks

    def next_call(self) -> tuple[int, Call] | None:
        """A call that can be made now, with its number; None when there is none."""
        if self.error is not None:
            return None
        for number, (call, needs) in enumerate(self._tasks):
            if number not in self._started and needs <= self._finished:
                self._started.add(number)
                self.in_flight += 1
                return number, call
        if len(self._finished) == len(self._tasks) and not self._is_finishing:
            self._is_finishing = True
            self.in_flight += 1
            return len(self._tasks), FinishCall(self.conversion)
        return None

    def on_shard(self, shard: Shard, entry: ManifestEntry) -> None:
        """Note a shard that is stored."""
        self._note(entry)
        self.done_px += self.plan.shard_px(shard)

    def _note(self, entry: ManifestEntry) -> None:
        self._entries[entry.key] = entry
        self.target.append_manifest(entry_line(entry))

    def on_end(self, number: int, result: Any) -> None:
        """Note the end of a call; after the last one the pyramid has its name."""
        self.in_flight -= 1
        if isinstance(result, BaseException):
            self.error = self.error or result
        elif number < len(self._tasks):
            self._finished.add(number)
        else:
            entries, share = result
            for entry in entries:
                self._note(entry)
            # written anew in one order, so that it is the same however the work was shared and interrupted
            lines = [self._first_line, *(entry_line(self._entries[key]) for key in sorted(self._entries))]
            data = b"".join(lines)
            last = complete_line(len(self._entries), google_crc32c.value(data))
            self.target.write_manifest(data + last)
            self.target.publish()
            self.summary = self._summary(share)

    @property
    def has_ended(self) -> bool:
        """Whether nothing is under way and nothing will be."""
        return self.in_flight == 0 and (self.summary is not None or self.error is not None)

    def close(self, *, discard: bool = False) -> None:
        """Give the lock back; ``discard`` removes what is there of the pyramid."""
        if hasattr(self, "conversion"):
            self.conversion.forget()
            if discard:
                self.target.discard()
            self.target.unlock()

    def _summary(self, share: float | None) -> ConvertSummary:
        path, name, shape = self._about
        return ConvertSummary(
            source=path,
            target=self.job.target,
            name=name,
            shape=shape,
            num_levels=len(self.plan.levels),
            pixel_size_um=self.plan.pixel_size_um,
            seconds=time.perf_counter() - self._began,
            source_bytes=self._source_bytes,
            stored_bytes=sum(entry.nbytes for entry in self._entries.values()),
            num_shards=self.plan.num_shards,
            num_resumed=self._num_resumed,
            tissue_share=share,
            notes=tuple(self._notes),
        )


def _header(plan: ConvertPlan, stamp: SourceStamp | None) -> ManifestHeader:
    sizes = plan.pixel_size_um
    return ManifestHeader(
        tool=f"ats-stream {__version__}",
        profile=plan.profile,
        source=stamp or NO_STAMP,
        plan=plan.digest,
        pixel_size_um=None if sizes is None else tuple(None if math.isnan(s) else s for s in sizes),
    )


def _is_same(left: ManifestHeader, header: ManifestHeader) -> bool:
    """Whether two runs would write the same bytes; the name of the tool does not matter."""
    return replace(left, tool=header.tool) == header


def _parsed(data: bytes | None) -> Manifest | None:
    try:
        return None if data is None else parse_manifest(data)
    except ValueError:
        return None


def _done(
    plan: ConvertPlan, target: Target, left: Manifest, sizes: Mapping[str, int]
) -> dict[str, ManifestEntry]:
    """Shards that are whole: those of the manifest, and others that can be read."""
    done = {}
    for shard in plan.shards():
        key = plan.key(shard)
        entry = left.entries.get(key)
        if entry is None or entry.nbytes != sizes.get(key, 0):
            entry = _adopted(target, key, plan.levels[shard.level].spec.grid) if key in sizes else None
        if entry is not None:
            done[key] = entry
    return done


def _adopted(target: Target, key: str, grid: Sequence[int]) -> ManifestEntry | None:
    """The entry of a shard that was stored but not noted any more; None if it is not whole."""
    data = target.store.get(key, MAX_SHARD_BYTES)
    try:
        if data is None:
            return None
        check_index(parse_index(data, grid), len(data) - index_nbytes(grid))
    except ValueError:
        return None
    return entry_of(key, [data])

"""Calls that a worker makes for a conversion: pieces of work that travel to other processes and machines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ats_stream.errors import SlideError
from ats_stream.io.conversion.finish import finish
from ats_stream.io.conversion.slides import SlideSource, open_source
from ats_stream.io.conversion.tree import ShardBuilder
from ats_stream.io.formats.kept import Kept

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ats_stream.io.conversion.manifest import ManifestEntry, SourceStamp
    from ats_stream.io.conversion.plan import ConvertPlan, Shard, Task
    from ats_stream.io.conversion.targets import Target

Report = "Callable[[Shard, ManifestEntry], None]"
# pyramids in the making that a worker keeps open
MAX_OPEN = 2
_builders: Kept[ShardBuilder] = Kept(MAX_OPEN)


class Call(Protocol):
    """Something to be done by a worker; pickles."""

    def run(self, report: Callable[[Shard, ManifestEntry], None]) -> Any:
        """Do it; ``report`` hears of every shard that is stored."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What workers need to know of one pyramid in the making."""

    key: str
    """Different for every run."""
    source: str | SlideSource
    """A path or URL that workers open on their own, or a source that travels with the call."""
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    target: Target
    plan: ConvertPlan
    stamp: SourceStamp | None
    num_threads: int | None

    def builder(self, source: SlideSource | None = None) -> ShardBuilder:
        """The builder of this process, which keeps the source open; made with ``source`` if that is given."""

        def make() -> ShardBuilder:
            return ShardBuilder(self.plan, source or self._open(), self.target, num_threads=self.num_threads)

        return _builders.get(self.key, make)

    def _open(self) -> SlideSource:
        if not isinstance(self.source, str):
            return self.source
        return open_source(self.source, storage_options=self.storage_options, num_threads=self.num_threads)

    def forget(self) -> None:
        """Close the builder of this process."""
        _builders.drop(self.key)


@dataclass(frozen=True)
class BuildCall:
    """Make some shards."""

    conversion: Conversion
    task: Task

    def run(self, report: Callable[[Shard, ManifestEntry], None]) -> None:
        """Make them."""
        self.conversion.builder().build(self.task.shards, self.task.roots, report)


@dataclass(frozen=True)
class FinishCall:
    """Store everything else, once all shards are there."""

    conversion: Conversion

    def run(self, _: Callable[[Shard, ManifestEntry], None]) -> tuple[list[ManifestEntry], float | None]:
        """SlideError when the source is not the one that was opened."""
        builder = self.conversion.builder()
        if builder.source.stamp_now() != self.conversion.stamp:
            raise SlideError(builder.source.path, "the file changed while it was converted")
        return finish(builder)

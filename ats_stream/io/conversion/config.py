"""What a conversion is asked for, and what it reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ats_stream.io.conversion.layout import check_blocks
from ats_stream.io.tissue_method import OTSU, TissueMethod, method_name

# name of the codec of each profile whose pixels are decoded
PROFILE_CODECS = {"lossless": "zstd", "lz4": "lz4", "raw": "raw"}
PROFILES = ("pass", *PROFILE_CODECS)
"""Names of what chunks are written as: the JPEG tiles of the slide, or pixels by a codec."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """How pyramids are written."""

    profile: str = "lossless"
    """``pass``: the slide's own JPEG tiles, unchanged; ``lossless``: zstd; ``lz4``; ``raw``: uncompressed."""
    chunk_px: int | None = None
    """Side of the chunks that are decoded at once; by default 128 for an image (y, x), 32 for a volume."""
    shard_px: int | None = None
    """Side of the files' content, an even multiple of chunk_px; by default 4096 for an image (y, x), less
    where pixels are large. Memory goes with its square."""
    shard_bytes: int | None = None
    """Size that files should have, instead of shard_px."""
    codec_level: int = 1
    """Effort of zstd, 1 to 22."""
    coarsest_px: int = 256
    """Levels are added until the longest side is no larger."""
    levels: int | None = None
    """Levels at most."""
    tissue: bool = True
    """Whether to store the mask ``labels/tissue`` of an image (y, x)."""
    tissue_method: str | TissueMethod = OTSU
    """How the mask is found: ``otsu``, ``module:function``, or such a function, of which the name is kept.
    See :mod:`ats_stream.io.tissue_method`."""
    keep_associated: bool = False
    """Whether to copy label, macro and thumbnail pictures, which may show names."""
    pixel_size_um: float | None = None
    """Overrides the pixel size that the slide states."""
    overwrite: bool = False
    """Whether to replace a target that exists."""
    num_threads: int | None = None
    """Threads of a worker that decode and encode; by default one per core, at most 8."""

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {self.profile!r}")
        check_blocks(self.chunk_px, self.shard_px)
        try:
            object.__setattr__(self, "tissue_method", method_name(self.tissue_method))
        except ValueError as error:
            raise ValueError(f"tissue_method: {error}") from error
        if self.shard_bytes is not None and (self.shard_bytes < 1 or self.shard_px is not None):
            raise ValueError(f"shard_bytes must be positive and without shard_px, got {self.shard_bytes}")
        if not 1 <= self.codec_level <= 22:
            raise ValueError(f"codec_level must be 1 to 22, got {self.codec_level}")
        if self.coarsest_px < 1:
            raise ValueError(f"coarsest_px must be positive, got {self.coarsest_px}")
        if self.levels is not None and self.levels < 1:
            raise ValueError(f"levels must be positive, got {self.levels}")
        if self.pixel_size_um is not None and not 0 < self.pixel_size_um < math.inf:
            raise ValueError(f"pixel_size_um must be positive, got {self.pixel_size_um}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be positive, got {self.num_threads}")


@dataclass(frozen=True, kw_only=True)
class ConvertSummary:
    """What one conversion did; prints as one line."""

    source: str
    target: str
    name: str
    shape: tuple[int, ...]
    """(C, *space)."""
    num_levels: int
    pixel_size_um: tuple[float, ...] | None
    seconds: float
    source_bytes: int
    stored_bytes: int
    num_shards: int
    num_resumed: int = 0
    """Shards that an earlier run had finished."""
    tissue_share: float | None = None
    notes: tuple[str, ...] = ()
    """What the user should know: pixel sizes that disagree, why tiles were decoded, what was resumed."""

    ok = True

    def __str__(self) -> str:
        sizes = [s for s in self.pixel_size_um or () if s > 0]
        size = f"{math.prod(sizes) ** (1 / len(sizes)):.3g} um/px" if sizes else "um/px unknown"
        tissue = f", tissue {self.tissue_share:.1%}" if self.tissue_share is not None else ""
        speed = math.prod(self.shape[1:]) / 1e6 / max(self.seconds, 1e-9)
        extent = " x ".join(str(n) for n in reversed(self.shape[1:]))
        return (
            f"{self.name}: {extent}, {self.num_levels} levels, {size}, {speed:.1f} MPix/s, "
            f"{self.source_bytes / 1e6:.1f} -> {self.stored_bytes / 1e6:.1f} MB{tissue}"
        )


@dataclass(frozen=True, kw_only=True)
class ConvertFailure:
    """A slide that was not converted, and why; prints as one line."""

    source: str
    reason: str

    ok = False

    def __str__(self) -> str:
        return (
            f"failed: {self.reason}"
            if self.source in self.reason
            else f"failed: {self.source}: {self.reason}"
        )

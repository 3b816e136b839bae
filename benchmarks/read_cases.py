"""What the reading benchmark reads: the slide, the stores made from it, and who reads which patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import synthetic_slide
from machine import warm
from synthetic_slide import SITE_PX, SlideConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Array = npt.NDArray[Any]
Draw = Callable[[np.random.Generator], Array]
OURS = "ats-stream"
OURS_1 = "ats-stream, 1 thread"
NUM_PATCHES = 64
NUM_HOT_SPOTS = 4
HOT_SPOT_PX = 500.0  # deviation of the patches around a hot spot
DELAY_MS = 30.0
GIGAPIXELS = (1, 10, 100)
REAL_SLIDES = {
    "Aperio SVS": "aperio/CMU-1-Small-Region.svs",
    "JPEG TIFF": "tiff/CMU-1-Small-Region.jpeg.tiff",
}
ZARR = (
    "tensorstore",
    "tensorstore, 1 thread",
    "tensorstore, cache of 64 MiB",
    "zarr-python loop",
    "zarr-python gather",
)
SLIDE = ("cuCIM", "cuCIM batch", "OpenSlide", "OpenSlide, default cache", "libvips")
# a decoder of JPEG may round otherwise, and upsample colours otherwise: mean of the differences, of 255
JPEG_TOLERANCE = 1.0


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """An engine at a place, under a name."""

    name: str
    engine: str
    place: str
    draw: Draw


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is read, and who reads it."""

    name: str
    what: str
    size_px: int
    contestants: tuple[Contestant, ...]
    tolerance: float = 0.0
    """Largest mean difference of pixels from the first contestant's; 0 means none at all."""
    server: str | None = None
    """Address of the HTTP server behind the places."""
    with_same_pixels: bool = True


def random_offsets(shape: Sequence[int], size_px: int) -> Draw:
    """Patches anywhere inside of the image."""
    high = [n - size_px + 1 for n in shape]
    return lambda rng: rng.integers(0, high, (NUM_PATCHES, 2))


def clustered_offsets(shape: Sequence[int], size_px: int) -> Draw:
    """Patches around a few hot spots, as attention draws them."""
    high = np.array([n - size_px for n in shape])

    def draw(rng: np.random.Generator) -> Array:
        centres = rng.integers(0, high + 1, (NUM_HOT_SPOTS, 2))
        spread = rng.normal(0, HOT_SPOT_PX, (NUM_PATCHES, 2)).round().astype(np.int64)
        return np.clip(centres[np.arange(NUM_PATCHES) % NUM_HOT_SPOTS] + spread, 0, high)

    return draw


def site_offsets(side_px: int, size_px: int) -> Draw:
    """One patch inside of each written square; for every image size at the same places in their squares."""
    first = synthetic_slide.sites(side_px)
    return lambda rng: first + rng.integers(0, SITE_PX - size_px + 1, first.shape)


class Data:
    """The slide and its stores in a folder, made when they are asked for."""

    def __init__(self, folder: Path, config: SlideConfig, real: Path | None) -> None:
        self.folder, self.config, self.real = folder / str(config.side_px), config, real
        self.slide = synthetic_slide.make_slide(self.folder, config)

    def _keep(self, name: str, make: Callable[[Path], None], **parameters: Any) -> Path:
        made_from = {"version": self.config.version, "seed": self.config.seed, **parameters}
        path = synthetic_slide.keep(self.folder / name, made_from, make)
        warm(path)
        return path

    def zstd(self, chunk_px: int, slide: Path | None = None) -> Path:
        """Chunks of zstd in shards, of the synthetic slide or of another."""
        source = slide or self.slide
        return self._keep(
            f"{source.stem}-zstd-{chunk_px}.ome.zarr",
            lambda path: synthetic_slide.write_store(source, path, chunk_px),
            chunk_px=chunk_px,
        )

    def jpeg(self) -> Path:
        """The slide's tiles in shards."""
        return self._keep(
            "slide-jpeg.ome.zarr", lambda path: synthetic_slide.write_jpeg_store(self.slide, path)
        )

    def sparse(self, gigapixels: int) -> Path:
        """An image of so many gigapixels, mostly absent."""
        side = sparse_side(gigapixels)
        return self._keep(
            f"sparse-{gigapixels}.ome.zarr",
            lambda path: synthetic_slide.write_sparse_store(path, side, 128, self.config.seed),
            side_px=side,
        )


def sparse_side(gigapixels: int) -> int:
    """Side of a square image in pixels."""
    return math.isqrt(gigapixels * 10**9)


def _contestants(names: Sequence[str], place: Path | str, draw: Draw) -> tuple[Contestant, ...]:
    return tuple(Contestant(name=n, engine=n, place=str(place), draw=draw) for n in names)


def zstd_case(
    data: Data, *, name: str, size_px: int, chunk_px: int, is_clustered: bool, others: Sequence[str] = ()
) -> Case:
    """Patches of a local store of zstd chunks in shards, anywhere or around hot spots."""
    where = f"around {NUM_HOT_SPOTS} hot spots" if is_clustered else "anywhere"
    draw = (clustered_offsets if is_clustered else random_offsets)((data.config.side_px,) * 2, size_px)
    return Case(
        name=name,
        what=f"{NUM_PATCHES} patches of {size_px} x {size_px} {where}, zstd chunks of {chunk_px} in shards "
        "of 4096, local",
        size_px=size_px,
        contestants=_contestants((OURS, OURS_1, *ZARR, *others, "zstd alone"), data.zstd(chunk_px), draw),
    )


def jpeg_case(data: Data) -> Case:
    side = data.config.side_px
    draw = random_offsets((side, side), 256)
    warm(data.slide)
    in_place = {"ats-stream, the slide": OURS, "ats-stream, the slide, 1 thread": OURS_1}
    return Case(
        name="jpeg",
        what="64 random patches of 256 x 256 of JPEG tiles of 256: ours from shards and from the slide, "
        "the others from the slide",
        size_px=256,
        contestants=(
            *_contestants((OURS, OURS_1), data.jpeg(), draw),
            *(
                Contestant(name=name, engine=engine, place=str(data.slide), draw=draw)
                for name, engine in in_place.items()
            ),
            *_contestants((*SLIDE, "JPEG alone"), data.slide, draw),
        ),
        tolerance=JPEG_TOLERANCE,
    )


def real_cases(data: Data) -> list[Case]:
    """Small real slides, in place, and one of them converted; patches share many of the few tiles."""
    if data.real is None:
        return []
    cases = []
    for name, place in REAL_SLIDES.items():
        slide = data.real / place
        draw = random_offsets(_slide_shape(slide), 256)
        cases.append(
            Case(
                name=f"real {name}",
                what=f"64 random patches of 256 x 256 of the real slide {slide.name}, in place",
                size_px=256,
                contestants=_contestants((OURS, OURS_1, *SLIDE, "JPEG alone"), slide, draw),
                tolerance=JPEG_TOLERANCE,
            )
        )
    slide = data.real / REAL_SLIDES["Aperio SVS"]
    draw = random_offsets(_slide_shape(slide), 256)
    cases.append(
        Case(
            name="real zstd",
            what=f"64 random patches of 256 x 256 of {slide.name}, converted to zstd chunks of 128",
            size_px=256,
            contestants=_contestants((OURS, OURS_1, *ZARR, "zstd alone"), data.zstd(128, slide), draw),
        )
    )
    return cases


def _slide_shape(slide: Path) -> tuple[int, int]:
    from ats_stream.io import open_slide

    with open_slide(slide) as source:
        return source.shape[1], source.shape[2]


def latency_case(data: Data, server: str) -> Case:
    side = data.config.side_px
    place = f"{server}/{data.zstd(128).name}"
    return Case(
        name="latency",
        what="64 random patches of 256 x 256, zstd chunks of 128 in shards of 4096, "
        f"HTTP with {DELAY_MS:g} ms per request",
        size_px=256,
        contestants=_contestants((OURS, OURS_1, *ZARR), place, random_offsets((side, side), 256)),
        server=server,
    )


def size_case(data: Data) -> Case:
    contestants = [
        Contestant(
            name=f"{engine}, {n} gigapixels",
            engine=engine,
            place=str(data.sparse(n)),
            draw=site_offsets(sparse_side(n), 256),
        )
        for engine in (OURS, "tensorstore")
        for n in GIGAPIXELS
    ]
    return Case(
        name="size",
        what="64 patches of 256 x 256 inside of the written chunks of sparse images, one per written square",
        size_px=256,
        contestants=tuple(contestants),
    )


ZSTD_CASES: dict[str, dict[str, Any]] = {
    "random": {"size_px": 256, "chunk_px": 128, "is_clustered": False, "others": ("dask",)},
    "random 100": {"size_px": 100, "chunk_px": 64, "is_clustered": False},
    "clustered": {"size_px": 256, "chunk_px": 128, "is_clustered": True},
}
CASES = (*ZSTD_CASES, "jpeg", "real", "latency", "size")


def local_cases(data: Data, name: str) -> list[Case]:
    """The cases of one of the names above, but not those behind a server."""
    if name in ZSTD_CASES:
        return [zstd_case(data, name=name, **ZSTD_CASES[name])]
    makers = {"jpeg": lambda: [jpeg_case(data)], "real": lambda: real_cases(data)}
    return makers.get(name, lambda: [size_case(data)])()

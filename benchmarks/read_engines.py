"""The libraries that the reading benchmark compares, each behind the same few calls, in a process of its own.

Every engine reads a batch of N square patches of level 0 into one array, channels wherever it puts them. No
engine caches decoded chunks, except where its name says so.
"""

from __future__ import annotations

import asyncio
import os
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from machine import mib, peak_bytes

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Array = npt.NDArray[Any]
NUM_CORES = os.cpu_count() or 1
CACHE_POOL_BYTES = 64 << 20  # 64 MiB


class Engine:
    """Opens a place, a path or a URL, in its constructor and reads batches of patches from it."""

    channels_last = False

    def __init__(self, place: str, size_px: int) -> None:
        self.place, self.size_px = place, size_px

    def prepare(self, offsets_N2: Array) -> Any:
        """What does not count: by default nothing but plain numbers."""
        return [(int(y), int(x)) for y, x in offsets_N2]

    def read(self, job: Any) -> Any:
        """Read the batch: what is measured."""
        raise NotImplementedError


class AtsStream(Engine):
    """The package, decoding in one thread."""

    num_threads = 1

    def __init__(self, place: str, size_px: int) -> None:
        super().__init__(place, size_px)
        from ats_stream.io import open_pyramid

        self.pyramid = open_pyramid(place, cache_bytes=0, num_threads=self.num_threads)

    def prepare(self, offsets_N2: Array) -> Any:
        return offsets_N2

    def read(self, job: Any) -> Any:
        return self.pyramid.read_patches(0, job, (self.size_px, self.size_px))


class AtsStreamThreads(AtsStream):
    """The package, decoding in as many threads as there are cores, as the other engines do."""

    num_threads = NUM_CORES


class TensorStore(Engine):
    """``ts.stack`` of all patches, read at once."""

    context: dict[str, Any] = {}  # noqa: RUF012  # a constant

    def __init__(self, place: str, size_px: int) -> None:
        super().__init__(place, size_px)
        import tensorstore

        self.ts = tensorstore
        if "://" in place:
            kvstore = {"driver": "http", "base_url": f"{place}/0/"}
        else:
            kvstore = {"driver": "file", "path": f"{place}/0/"}
        spec = {"driver": "zarr3", "kvstore": kvstore, "context": self.context}
        self.array = tensorstore.open(spec, read=True, open=True).result()

    def read(self, job: Any) -> Any:
        size = self.size_px
        views = [self.array[:, y : y + size, x : x + size] for y, x in job]
        return self.ts.stack([view[self.ts.d[:].translate_to[0]] for view in views]).read().result()


class TensorStore1(TensorStore):
    """The same, copying and reading files in one thread each."""

    context = {  # noqa: RUF012
        "data_copy_concurrency": {"limit": 1},
        "file_io_concurrency": {"limit": 1},
    }


class TensorStoreCached(TensorStore):
    """The same with a cache of 64 MiB, so that it need not read the indices of shards again."""

    context = {"cache_pool": {"total_bytes_limit": CACHE_POOL_BYTES}}  # noqa: RUF012


def _open_zarr(place: str) -> Any:
    import zarr

    if "://" not in place:
        return zarr.open_array(f"{place}/0", mode="r")
    from obstore.store import HTTPStore
    from zarr.storage import ObjectStore

    store = HTTPStore.from_url(f"{place}/0", client_options={"allow_http": True})
    return zarr.open_array(ObjectStore(store, read_only=True), mode="r")


class ZarrLoop(Engine):
    """zarr-python, one patch after another."""

    def __init__(self, place: str, size_px: int) -> None:
        super().__init__(place, size_px)
        self.array = _open_zarr(place)

    def read(self, job: Any) -> Any:
        size = self.size_px
        return np.stack([self.array[:, y : y + size, x : x + size] for y, x in job])


class ZarrGather(ZarrLoop):
    """zarr-python, all patches at once through its asynchronous interface."""

    def read(self, job: Any) -> Any:
        from zarr.core.sync import sync

        size = self.size_px
        array = self.array.async_array

        async def gather() -> list[Any]:
            boxes = ((slice(None), slice(y, y + size), slice(x, x + size)) for y, x in job)
            return await asyncio.gather(*(array.getitem(box) for box in boxes))

        return np.stack(sync(gather()))


class Dask(Engine):
    """dask over zarr-python, all patches in one graph."""

    def __init__(self, place: str, size_px: int) -> None:
        super().__init__(place, size_px)
        import dask.array

        self.array = dask.array.from_zarr(_open_zarr(place))

    def read(self, job: Any) -> Any:
        import dask

        size = self.size_px
        views = [self.array[:, y : y + size, x : x + size] for y, x in job]
        return np.stack(dask.compute(*views, scheduler="threads"))


class CuCim(Engine):
    """cuCIM on the CPU, one patch after another."""

    channels_last = True

    def __init__(self, place: str, size_px: int) -> None:
        super().__init__(place, size_px)
        from cucim import CuImage

        self.image = CuImage(place)

    def read(self, job: Any) -> Any:
        size = (self.size_px, self.size_px)
        return np.stack([np.asarray(self.image.read_region((x, y), size, 0)) for y, x in job])


class CuCimBatch(CuCim):
    """cuCIM on the CPU, all patches at once in as many workers as there are cores."""

    def read(self, job: Any) -> Any:
        size = (self.size_px, self.size_px)
        places = [(x, y) for y, x in job]
        parts = self.image.read_region(places, size, 0, batch_size=len(places), num_workers=NUM_CORES)
        return np.concatenate([np.asarray(part).reshape(-1, *size, 3) for part in parts])


class OpenSlide(Engine):
    """OpenSlide, one patch after another, without its cache of tiles."""

    channels_last = True

    def __init__(self, place: str, size_px: int) -> None:
        super().__init__(place, size_px)
        import openslide

        self.slide = openslide.OpenSlide(place)
        self.slide.set_cache(openslide.OpenSlideCache(0))

    def read(self, job: Any) -> Any:
        size = (self.size_px, self.size_px)
        return np.stack([np.asarray(self.slide.read_region((x, y), 0, size))[..., :3] for y, x in job])


class OpenSlideCached(OpenSlide):
    """OpenSlide with the cache that it has by default."""

    def __init__(self, place: str, size_px: int) -> None:
        Engine.__init__(self, place, size_px)
        import openslide

        self.slide = openslide.OpenSlide(place)


class Vips(Engine):
    """libvips through pyvips, one patch after another; it keeps a few rows of decoded tiles."""

    channels_last = True

    def __init__(self, place: str, size_px: int) -> None:
        super().__init__(place, size_px)
        import pyvips

        self.image = pyvips.Image.new_from_file(place, access="random")

    def read(self, job: Any) -> Any:
        size = self.size_px
        return np.stack([self.image.crop(x, y, size, size).numpy() for y, x in job])


class _Floor(Engine):
    """Decoding the chunks needed, each once, from memory: what no reader of this store can go below."""

    def read(self, job: Any) -> Any:
        for data in job:
            self.decode(data)

    def decode(self, data: bytes) -> None:
        raise NotImplementedError


class ZstdFloor(_Floor):
    """zstd alone."""

    def __init__(self, place: str, size_px: int) -> None:
        super().__init__(place, size_px)
        import json

        import zstandard

        meta = json.loads((Path(place) / "0" / "zarr.json").read_text())
        shard_shape = meta["chunk_grid"]["configuration"]["chunk_shape"]
        self.chunk_px = meta["codecs"][0]["configuration"]["chunk_shape"][1]
        self.grid = (1, *(n // self.chunk_px for n in shard_shape[1:]))
        self.decompress = zstandard.ZstdDecompressor().decompress

    def prepare(self, offsets_N2: Array) -> Any:
        from ats_stream.io.shard import ABSENT, index_nbytes, parse_index

        _, rows, columns = self.grid
        chunks = []
        indices: dict[tuple[int, int], Any] = {}
        for row, column in sorted(needed_chunks(offsets_N2, self.size_px, self.chunk_px)):
            shard = (row // rows, column // columns)
            path = Path(self.place) / "0" / "c" / "0" / str(shard[0]) / str(shard[1])
            with path.open("rb") as file:
                if shard not in indices:
                    file.seek(-index_nbytes(self.grid), os.SEEK_END)
                    indices[shard] = parse_index(file.read(), self.grid)
                begin, size = (int(v) for v in indices[shard][0, row % rows, column % columns])
                if begin != ABSENT:
                    file.seek(begin)
                    chunks.append(file.read(size))
        return chunks

    def decode(self, data: bytes) -> None:
        self.decompress(data)


class JpegFloor(_Floor):
    """libjpeg-turbo alone, on the tiles of the slide."""

    def __init__(self, place: str, size_px: int) -> None:
        super().__init__(place, size_px)
        import imagecodecs
        import tifffile

        from ats_stream.io.jpeg import memory_for

        self.file = tifffile.TiffFile(place)
        self.page: Any = self.file.pages[0]
        self.out = memory_for(self.page.tilelength, self.page.tilewidth, 3)
        self.jpeg_decode = imagecodecs.jpeg8_decode
        self.space = "RGB" if self.page.photometric == 2 else "YCBCR"

    def prepare(self, offsets_N2: Array) -> Any:
        across = -(-self.page.imagewidth // self.page.tilewidth)
        tiles = []
        for row, column in sorted(needed_chunks(offsets_N2, self.size_px, self.page.tilewidth)):
            self.file.filehandle.seek(self.page.dataoffsets[row * across + column])
            tiles.append(self.file.filehandle.read(self.page.databytecounts[row * across + column]))
        return tiles

    def decode(self, data: bytes) -> None:
        tables = self.page.jpegtables
        self.jpeg_decode(data, tables=tables, colorspace=self.space, outcolorspace="RGB", out=self.out)


def needed_chunks(offsets_N2: Array, size_px: int, chunk_px: int) -> set[tuple[int, int]]:
    """Row and column of all chunks under square patches, in the grid of chunks.

    >>> sorted(needed_chunks(np.array([[0, 0], [0, 9]]), 4, 10))
    [(0, 0), (0, 1)]
    """
    return {
        (row, column)
        for y, x in offsets_N2.tolist()
        for row in range(y // chunk_px, (y + size_px - 1) // chunk_px + 1)
        for column in range(x // chunk_px, (x + size_px - 1) // chunk_px + 1)
    }


ENGINES: dict[str, type[Engine]] = {
    "ats-stream": AtsStreamThreads,
    "ats-stream, 1 thread": AtsStream,
    "tensorstore": TensorStore,
    "tensorstore, 1 thread": TensorStore1,
    "tensorstore, cache of 64 MiB": TensorStoreCached,
    "zarr-python loop": ZarrLoop,
    "zarr-python gather": ZarrGather,
    "dask": Dask,
    "cuCIM": CuCim,
    "cuCIM batch": CuCimBatch,
    "OpenSlide": OpenSlide,
    "OpenSlide, default cache": OpenSlideCached,
    "libvips": Vips,
    "zstd alone": ZstdFloor,
    "JPEG alone": JpegFloor,
}
FLOORS = ("zstd alone", "JPEG alone")


def serve(connection: Connection, engine_name: str, place: str, size_px: int) -> None:
    """Open a place and answer requests until told to stop; runs in a process of its own.

    A request is (what, offsets), what being "measure", "pixels" or "memory". The first message is None, or
    why the place cannot be opened.
    """
    try:
        engine = ENGINES[engine_name](place, size_px)
    except Exception as error:  # whatever a library raises makes it a peer that is missing
        connection.send(f"{type(error).__name__}: {error}")
        return
    base_bytes = peak_bytes()
    connection.send(None)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            what, offsets_N2 = connection.recv()
            try:
                if what == "measure":
                    reply: Any = _measure(engine, offsets_N2)
                elif what == "pixels":
                    batch = np.asarray(engine.read(engine.prepare(offsets_N2)))
                    reply = batch.transpose(0, 3, 1, 2) if engine.channels_last else batch
                else:
                    reply = {"peak_mib": mib(peak_bytes()), "opened_mib": mib(base_bytes)}
                    reply |= _traced(engine, offsets_N2)
            except Exception as error:  # reported, the others go on
                reply = f"{type(error).__name__}: {error}"
            connection.send(reply)


def _measure(engine: Engine, offsets_N2: Array) -> dict[str, float]:
    job = engine.prepare(offsets_N2)
    read_before = _bytes_read()
    wall, cpu = time.perf_counter(), time.process_time()
    batch = engine.read(job)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    del batch
    return {"wall_s": wall, "cpu_s": cpu, "bytes": _bytes_read() - read_before}


def _traced(engine: Engine, offsets_N2: Array) -> dict[str, float]:
    """Memory that Python and numpy take for one batch, the batch itself included."""
    job = engine.prepare(offsets_N2)
    tracemalloc.start()
    try:
        engine.read(job)
        return {"batch_mib": mib(tracemalloc.get_traced_memory()[1])}
    finally:
        tracemalloc.stop()


def _bytes_read() -> int:
    """What this process asked of the system to read from files so far; memory maps do not show."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))

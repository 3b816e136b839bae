"""The libraries that the conversion benchmark compares, each behind the same call, in a process of its own.

Every engine makes a pyramid of a source at a target, with levels halved until they fit in 256 pixels. Peers
that take dask arrays get a slide from our own reader, which spares them OpenSlide or zarr-python over a TIFF.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil
from machine import files_of, mib, peak_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

Array = npt.NDArray[Any]
# enough pixels that the package takes its compiled ways: loading those counts as importing
WARM_UP_PX = 4096
CHUNK_PX, SHARD_PX, COARSEST_PX = 128, 4096, 256
BLOCK_PX = 2048  # of dask arrays: 12.6 MB
POLL_S = 0.05
PIXEL_UM = 0.5
NUM_CORES = os.cpu_count() or 1


def level_shapes(shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Shapes (C, y, x) of all levels."""
    channels, height, width = shape
    shapes = [(channels, height, width)]
    while max(height, width) > COARSEST_PX:
        height, width = -(-height // 2), -(-width // 2)
        shapes.append((channels, height, width))
    return shapes


class Engine:
    """Imports what it needs, and loads an array, in its constructor; ``run`` is what is measured."""

    def __init__(self, source: str, target: str) -> None:
        self.source, self.target = source, target
        self.pixels: Array | None = np.load(source) if source.endswith(".npy") else None

    def run(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """What is not measured any more."""


class AtsStream(Engine):
    """The package with a profile."""

    warm_up_px = WARM_UP_PX

    def __init__(self, source: str, target: str, profile: str, num_threads: int | None = None) -> None:
        super().__init__(source, target)
        from ats_stream.io import ConvertConfig, convert, write_pyramid

        self.config = ConvertConfig(profile=profile, tissue=False, num_threads=num_threads)
        self.convert, self.write_pyramid = convert, write_pyramid
        self._warm_up()

    def _warm_up(self) -> None:
        """Convert something small, which imports and compiles what is needed on first use."""
        import tifffile

        side = np.arange(self.warm_up_px) // 8
        ramps = [side[:, None] + side, side[:, None] - side, side[:, None] * side]
        pixels = np.stack(ramps, axis=-1).astype(np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            if self.pixels is None:
                slide = Path(folder, "small.tiff")
                tifffile.imwrite(
                    slide, pixels, tile=(256, 256), compression="jpeg", photometric="ycbcr", metadata=None
                )
                self.convert(slide, Path(folder, "small"), self.config, progress=False)
            else:
                self.write_pyramid(
                    pixels.transpose(2, 0, 1), Path(folder, "small"), self.config, progress=False
                )

    def run(self) -> None:
        if self.pixels is None:
            self.convert(self.source, self.target, self.config, progress=False)
        else:
            self.write_pyramid(self.pixels, self.target, self.config, pixel_size_um=PIXEL_UM, progress=False)


class Pass(AtsStream):
    """Tiles copied as they are."""

    warm_up_px = 1024  # nothing compiled is at work, and what a larger picture leaves behind counts as memory

    def __init__(self, source: str, target: str) -> None:
        super().__init__(source, target, "pass")


class Lossless(AtsStream):
    """The default."""

    def __init__(self, source: str, target: str) -> None:
        super().__init__(source, target, "lossless")


class LosslessOneThread(AtsStream):
    """The default in one thread, as the floor is: two on one core slow each other down."""

    def __init__(self, source: str, target: str) -> None:
        super().__init__(source, target, "lossless", num_threads=1)


class CopyFile(Engine):
    """The file copied as it is: what no copying of tiles can go below."""

    def run(self) -> None:
        Path(self.target).mkdir()
        # through memory, as a pyramid is written; copying inside of the system would not even read the file
        with Path(self.source).open("rb") as source, Path(self.target, "copy").open("wb") as target:
            shutil.copyfileobj(source, target, 8 << 20)


class TensorStore(Engine):
    """One pass over level 0 by hand: blocks written as they come, coarser levels kept in memory."""

    def __init__(self, source: str, target: str) -> None:
        super().__init__(source, target)
        import tensorstore

        from ats_stream.io import open_pyramid
        from ats_stream.io.reduce import halve

        self.ts, self.halve = tensorstore, halve
        self.pyramid = None if self.pixels is not None else open_pyramid(source, num_threads=NUM_CORES)
        self.shape = self.pyramid.levels[0].shape if self.pyramid else np.shape(self.pixels)

    def run(self) -> None:
        writes: list[Any] = []
        level: Any = self._blocks()
        shapes = level_shapes(self.shape)
        for number, shape in enumerate(shapes):
            store = self._create(number, shape)
            coarse = np.empty((shape[0], -(-shape[1] // 2), -(-shape[2] // 2)), np.uint8)
            for y, x, block in level:
                writes.append(store[:, y : y + block.shape[1], x : x + block.shape[2]].write(block))
                half = self.halve(block)
                coarse[:, y // 2 : y // 2 + half.shape[1], x // 2 : x // 2 + half.shape[2]] = half
                while len(writes) > 2:
                    writes.pop(0).result()
            level = _blocks_of(coarse)
        for write in writes:
            write.result()
        _write_group(self.target, len(shapes))

    def _blocks(self) -> Iterator[tuple[int, int, Array]]:
        if self.pixels is not None:
            yield from _blocks_of(self.pixels)
            return
        assert self.pyramid is not None
        channels, height, width = self.shape
        for y in range(0, height, SHARD_PX):
            for x in range(0, width, SHARD_PX):
                stop = (channels, min(y + SHARD_PX, height), min(x + SHARD_PX, width))
                yield y, x, self.pyramid.read(0, (0, y, x), stop)

    def _create(self, number: int, shape: tuple[int, int, int]) -> Any:
        channels, *sides = shape
        chunk = [channels, CHUNK_PX, CHUNK_PX]
        cover = [min(SHARD_PX, -(-n // CHUNK_PX) * CHUNK_PX) for n in sides]
        codecs = [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1}}]
        sharding = {"chunk_shape": chunk, "codecs": codecs}
        metadata = {
            "shape": list(shape),
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [channels, *cover]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["c", "y", "x"],
        }
        kvstore = {"driver": "file", "path": f"{self.target}/{number}/", "file_io_sync": False}
        spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
        return self.ts.open(spec, create=True, open=False).result()


def _blocks_of(pixels: Array) -> Iterator[tuple[int, int, Array]]:
    for y in range(0, pixels.shape[1], SHARD_PX):
        for x in range(0, pixels.shape[2], SHARD_PX):
            yield y, x, pixels[:, y : y + SHARD_PX, x : x + SHARD_PX]


def _write_group(target: str, num_levels: int) -> None:
    import json

    from ats_stream.io.ngff import build_image, group_json

    attributes = build_image(
        name="image",
        axes="cyx",
        paths=[str(i) for i in range(num_levels)],
        downsamples=[(2**i, 2**i) for i in range(num_levels)],
        pixel_size_um=(PIXEL_UM, PIXEL_UM),
    )
    Path(target, "zarr.json").write_text(json.dumps(group_json(attributes)))


class _WithDask(Engine):
    def __init__(self, source: str, target: str) -> None:
        super().__init__(source, target)
        import dask
        import dask.array

        from ats_stream.io import open_pyramid

        dask.config.set(scheduler="threads", num_workers=NUM_CORES)
        if self.pixels is not None:
            self.array = dask.array.from_array(self.pixels, chunks=(-1, BLOCK_PX, BLOCK_PX), name=False)
        else:
            lazy = open_pyramid(source).dask(0)
            self.array = lazy.rechunk((-1, BLOCK_PX, BLOCK_PX))
        self.factors = [2**i for i in range(1, len(level_shapes(self.array.shape)))]


class Dask(_WithDask):
    """dask by hand: each level written through zarr-python and coarsened from what was written."""

    def run(self) -> None:
        import dask.array
        import zarr

        group = zarr.create_group(self.target)
        level = self.array
        shapes = level_shapes(level.shape)
        for number, shape in enumerate(shapes):
            side = min(SHARD_PX, -(-max(shape[1:]) // CHUNK_PX) * CHUNK_PX)
            array = group.create_array(
                str(number),
                shape=shape,
                dtype="uint8",
                chunks=(shape[0], CHUNK_PX, CHUNK_PX),
                shards=(shape[0], side, side),
                compressors=zarr.codecs.ZstdCodec(level=1),
                dimension_names=("c", "y", "x"),
            )
            # a shard is written by one task
            dask.array.to_zarr(level.rechunk((-1, side, side)), array)
            level = dask.array.from_zarr(array)
            level = dask.array.coarsen(np.mean, level, {1: 2, 2: 2}, trim_excess=True)
            level = level.round().astype(np.uint8)
        _write_group(self.target, len(shapes))


class OmeZarr(_WithDask):
    """ome-zarr-py with its own defaults, OME-Zarr 0.5."""

    def __init__(self, source: str, target: str) -> None:
        super().__init__(source, target)
        from ome_zarr import writer

        self.writer = writer

    def run(self) -> None:
        import zarr

        group = zarr.create_group(self.target)
        self.writer.write_image(self.array, group, axes="cyx", scale_factors=tuple(self.factors))


class NgffZarr(_WithDask):
    """ngff-zarr with its own defaults, OME-Zarr 0.5."""

    method: str | None = None

    def __init__(self, source: str, target: str) -> None:
        super().__init__(source, target)
        import dask.array
        import ngff_zarr

        self.ngff_zarr = ngff_zarr
        # its filters are compiled when they are used first
        with tempfile.TemporaryDirectory() as folder:
            self._convert(dask.array.zeros((3, 512, 512), dtype=np.uint8), [2], folder)

    def run(self) -> None:
        self._convert(self.array, self.factors, self.target)

    def _convert(self, array: Any, factors: list[int], target: str) -> None:
        library = self.ngff_zarr
        image = library.to_ngff_image(array, dims=["c", "y", "x"])
        method = None if self.method is None else library.Methods(self.method)
        levels = library.to_multiscales(image, factors, method=method)
        library.to_ngff_zarr(target, levels, version="0.5")


class NgffZarrBinShrink(NgffZarr):
    """ngff-zarr with means of blocks."""

    method = "itkwasm_bin_shrink"


class Vips(Engine):
    """libvips to a pyramidal TIFF of deflated tiles (its wheel has no zstd for TIFF): not zarr."""

    def __init__(self, source: str, target: str) -> None:
        super().__init__(source, target)
        import pyvips

        self.pyvips = pyvips
        if self.pixels is None:
            self.image = pyvips.Image.new_from_file(source, access="sequential")
        else:
            self.image = pyvips.Image.new_from_array(np.ascontiguousarray(self.pixels.transpose(1, 2, 0)))

    def run(self) -> None:
        Path(self.target).mkdir()
        self.image.tiffsave(
            str(Path(self.target, "image.tiff")),
            compression="deflate",
            level=1,
            tile=True,
            tile_width=CHUNK_PX,
            tile_height=CHUNK_PX,
            pyramid=True,
            bigtiff=True,
            region_shrink="mean",
        )


class Floor(Engine):
    """JPEG decoding of tiles and zstd-1 of 4/3 as many pixels, from memory, in one thread: what re-encoding
    cannot go below. Tiles all over the slide stand for it. Of the zstd libraries at hand the fastest is at
    work, which is that of ``zstandard`` without Python around it.
    """

    num_tiles = 512

    def __init__(self, source: str, target: str) -> None:
        super().__init__(source, target)
        import imagecodecs
        import tifffile

        from ats_stream.io.zstd_library import zstd_encoder

        self.imagecodecs = imagecodecs
        library = zstd_encoder()
        if library is None:
            raise RuntimeError("no zstd library to call")
        self.library, self.context = library, library.new_context(1)
        with tifffile.TiffFile(source) as tiff:
            page: Any = tiff.pages[0]
            chosen = np.random.default_rng(0).permutation(len(page.dataoffsets))[: self.num_tiles]
            self.tables, self.tile_px = page.jpegtables, page.tilewidth
            self.tiles = []
            for number in sorted(chosen.tolist()):
                tiff.filehandle.seek(page.dataoffsets[number])
                self.tiles.append(tiff.filehandle.read(page.databytecounts[number]))
        self.num_px = len(self.tiles) * self.tile_px**2

    def run(self) -> None:
        codecs, side = self.imagecodecs, self.tile_px
        out = np.empty((side, side, 3), np.uint8)
        frame = np.empty(self.library.max_frame_bytes(3 * CHUNK_PX**2), np.uint8)
        encode, context, to = self.library.call, self.context.address, frame.ctypes.data
        owed = 0.0
        for data in self.tiles:
            tile = codecs.jpeg8_decode(
                data, tables=self.tables, colorspace="YCBCR", outcolorspace="RGB", out=out
            )
            chunks = [
                np.ascontiguousarray(tile[y : y + CHUNK_PX, x : x + CHUNK_PX].transpose(2, 0, 1)).reshape(-1)
                for y in range(0, side, CHUNK_PX)
                for x in range(0, side, CHUNK_PX)
            ]
            # coarse levels compress like this one; a third of the chunks is encoded twice for them
            owed += len(chunks) / 3
            for chunk in [*chunks, *chunks[: int(owed)]]:
                encode(context, to, len(frame), chunk.__array_interface__["data"][0], len(chunk))
            owed -= int(owed)


class Slides(Engine):
    """The package over a folder of slides, in processes of this machine."""

    on_ray = False

    def __init__(self, source: str, target: str) -> None:
        super().__init__(source, target)
        from ats_stream.io import ConvertConfig, preprocess

        self.config = ConvertConfig(tissue=False)
        self.preprocess = preprocess
        self.slides = sorted(str(path) for path in Path(source).glob("*.tiff"))

    def run(self) -> None:
        results = list(
            self.preprocess(
                self.slides,
                self.target,
                self.config,
                workers=NUM_CORES,
                on_ray=self.on_ray,
                progress=False,
            )
        )
        failed = [str(result) for result in results if not result.ok]
        if failed:
            raise RuntimeError(failed[0])


class SlidesOnRay(Slides):
    """The same on a Ray cluster of two nodes on this machine, which share its cores."""

    on_ray = True

    def __init__(self, source: str, target: str) -> None:
        super().__init__(source, target)
        import ray
        from ray.cluster_utils import Cluster
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        share = max(1, NUM_CORES // 2)
        memory_bytes = 256 << 20  # 256 MiB
        self.ray = ray
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": share,
                "object_store_memory": memory_bytes,
                "include_dashboard": False,
            },
        )
        self.cluster.add_node(num_cpus=share, object_store_memory=memory_bytes)
        ray.init(address=self.cluster.address, log_to_driver=False)

        # processes that have imported the package, as the nodes of a cluster that is in use have; tasks that
        # may run anywhere would all run where the first process is there
        @ray.remote(num_cpus=1)
        def start() -> str:
            import ats_stream.io

            return ats_stream.io.__name__

        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        on_nodes = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        ray.get([start.options(scheduling_strategy=on).remote() for on in on_nodes for _ in range(share)])

    def stop(self) -> None:
        self.ray.shutdown()
        self.cluster.shutdown()


ENGINES: dict[str, type[Engine]] = {
    "ats-stream pass": Pass,
    "ats-stream": Lossless,
    "ats-stream, one thread": LosslessOneThread,
    "copy of the file": CopyFile,
    "tensorstore": TensorStore,
    "dask by hand": Dask,
    "ome-zarr-py": OmeZarr,
    "ngff-zarr": NgffZarr,
    "ngff-zarr bin-shrink": NgffZarrBinShrink,
    "libvips": Vips,
    "re-encoding alone": Floor,
    "ats-stream, processes": Slides,
    "ats-stream, Ray": SlidesOnRay,
}


def serve(connection: Connection, engine_name: str, source: str, target: str) -> None:
    """Open a source, and convert it when told to; runs in a process of its own.

    The first message is None, or why it cannot be opened; then, for each request, a sample or an error.
    """
    try:
        engine = ENGINES[engine_name](source, target)
    except Exception as error:  # whatever a library raises makes it a peer that is missing
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(None)
    with suppress(EOFError, KeyboardInterrupt):
        connection.recv()
        try:
            reply: Any = _measure(engine)
        except Exception as error:  # reported, the others go on
            reply = f"{type(error).__name__}: {error}"
        connection.send(reply)
    engine.stop()


def _measure(engine: Engine) -> dict[str, float]:
    # the peak is that of the run, not of what was done before it
    Path("/proc/self/clear_refs").write_text("5")
    opened_bytes = peak_bytes()
    with _Memory() as memory:
        cpu, wall = _cpu_s(), time.perf_counter()
        engine.run()
        wall, cpu = time.perf_counter() - wall, _cpu_s() - cpu
    files = files_of(Path(engine.target)) if Path(engine.target).exists() else []
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "peak_mib": mib(max(memory.peak_bytes, peak_bytes())),
        "opened_mib": mib(opened_bytes),
        "bytes": sum(file.stat().st_size for file in files),
        "files": len(files),
        **({"num_px": engine.num_px} if isinstance(engine, Floor) else {}),
    }


def _cpu_s() -> float:
    """Of this process with all its threads, and of its processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class _Memory:
    """The largest sum of resident memory of this process and all that it started, looked at every 50 ms, or
    less often where there are so many processes that looking would take a hundredth of a core.
    """

    def __enter__(self) -> _Memory:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        pause_s = POLL_S
        while not self._stop.wait(pause_s):
            began = time.thread_time()
            total = 0
            for one in [process, *process.children(recursive=True)]:
                with suppress(psutil.Error):
                    total += one.memory_info().rss
            self.peak_bytes = max(self.peak_bytes, total)
            pause_s = max(POLL_S, 100 * (time.thread_time() - began))

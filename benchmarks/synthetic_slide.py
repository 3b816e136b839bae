"""A synthetic H&E slide of any size for the reading benchmarks, and the pyramids made from it.

The slide is a pyramidal TIFF of JPEG tiles; every store holds its decoded pixels, as a converted slide would.
Nuclei, chromatin and fibres are smooth random fields of the densities of two stains, turned into colours by
Beer-Lambert's law; their strengths are set so that decoded pixels compress to as many bytes per pixel, with
zstd and with JPEG, as those of a real slide (:func:`compressed_sizes` says how many).

Memory is bounded by one row of blocks and the second level. What exists already with the same parameters is
kept.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from ats_stream.io import ConvertConfig, PyramidWriter, convert
from ats_stream.io.layout import grid_shape
from ats_stream.io.ngff import build_image, default_channels, group_json
from ats_stream.io.shard import encode_shard_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Array = npt.NDArray[Any]
BLOCK_PX = 1024
TILE_PX = 256
SHARD_PX = 4096
JPEG_QUALITY = 80
LEVEL_FACTOR = 4
PIXEL_UM = 0.5
MADE = "made.json"
VERSION = 1  # of everything below: raise it when the pixels or files change

# optical density per unit of stain (Ruifrok and Johnston 2001), in red, green, blue
HEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
EOSIN = np.array([0.07, 0.99, 0.11], np.float32)
WHITE = 243.0
STAIN_NOISE = 0.05  # of the density
CAMERA_NOISE = 2.0
TISSUE_BIAS = 0.25  # in deviations: positive for more tissue than glass

SITES_PER_SIDE = 8
SITE_PX = 512
SPARSE_COLUMN = 1 << 20  # no slide has that many blocks


@dataclass(frozen=True, kw_only=True)
class SlideConfig:
    """What the synthetic data depend on."""

    side_px: int
    seed: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.side_px < BLOCK_PX or self.side_px % BLOCK_PX:
            raise ValueError(f"side_px must be a multiple of {BLOCK_PX}, got {self.side_px}")

    @property
    def level_sides(self) -> list[int]:
        """Sides of the TIFF's levels: each a quarter of the one before."""
        return [self.side_px, self.side_px // LEVEL_FACTOR, self.side_px // LEVEL_FACTOR**2]


@cache
def _weights(side: int, cell: float) -> Array:
    """(side, knots): quadratic B-spline that spreads one value per cell over the pixels."""
    num_knots = int(side / cell) + 3
    distance = np.abs((np.arange(side) / cell + 1)[:, None] - np.arange(num_knots))
    weights = np.where(
        distance < 0.5, 0.75 - distance**2, np.where(distance < 1.5, 0.5 * (1.5 - distance) ** 2, 0)
    )
    return weights.astype(np.float32)


def _smooth(rng: np.random.Generator, side: int, cell: float) -> Array:
    """A random field (side, side) of mean 0 and deviation 1 that varies over ``cell`` pixels."""
    weights = _weights(side, cell)
    knots = rng.standard_normal((weights.shape[1],) * 2, dtype=np.float32)
    field: Array = weights @ knots @ weights.T
    return field / float(field.std())


def tissue_block(seed: int, row: int, column: int) -> Array:
    """Pixels (BLOCK_PX, BLOCK_PX, 3) as a camera sees them, the same ones for the same place."""
    rng = np.random.default_rng((seed, row, column))

    def field(cell: float) -> Array:
        return _smooth(rng, BLOCK_PX, cell)

    tissue = np.clip(4 * (0.6 * field(256) + 0.2 * field(30) + rng.normal(TISSUE_BIAS, 1)), 0, 1)
    crowding = 0.5 * field(200) + 0.3 * field(60)
    nuclei = np.clip(field(14) + 0.5 * field(6) - 1.0 + crowding, 0, 2)
    hematoxylin = 0.08 + nuclei * (0.9 + 0.4 * field(3))
    fibres = np.clip(0.5 + 0.15 * field(40) + 0.25 * field(9) + 0.25 * field(4), 0.02, 2)
    density = 0.9 * hematoxylin[..., None] * HEMATOXYLIN + 0.7 * fibres[..., None] * EOSIN
    density += STAIN_NOISE * rng.standard_normal(density.shape, dtype=np.float32)
    pixels = WHITE * np.exp(-tissue[..., None] * density)
    pixels += CAMERA_NOISE * rng.standard_normal(density.shape, dtype=np.float32)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _encode(tile: Array) -> bytes:
    data = imagecodecs.jpeg8_encode(
        tile, JPEG_QUALITY, colorspace="RGB", outcolorspace="YCBCR", subsampling="420"
    )
    return bytes(data)


def _tiles(image: Array) -> Iterator[tuple[int, int, bytes]]:
    for y in range(0, image.shape[0], TILE_PX):
        for x in range(0, image.shape[1], TILE_PX):
            tile = image[y : y + TILE_PX, x : x + TILE_PX]
            missing = [(0, TILE_PX - n) for n in tile.shape[:2]]
            yield y // TILE_PX, x // TILE_PX, _encode(np.pad(tile, (*missing, (0, 0)), mode="edge"))


def _mean(image: Array) -> Array:
    """Means of blocks of LEVEL_FACTOR^2 pixels."""
    side = image.shape[0] // LEVEL_FACTOR
    blocks = image.reshape(side, LEVEL_FACTOR, side, LEVEL_FACTOR, image.shape[2])
    return np.rint(blocks.mean(axis=(1, 3), dtype=np.float32)).astype(np.uint8)


def write_slide(path: Path, config: SlideConfig) -> None:
    """Write the slide as a BigTIFF with levels of 1, 1/4 and 1/16 of the side."""
    coarse = np.empty((config.level_sides[1],) * 2 + (3,), np.uint8)
    side = BLOCK_PX // LEVEL_FACTOR
    num_blocks = config.side_px // BLOCK_PX

    def finest() -> Iterator[bytes]:
        for row in range(num_blocks):
            tiles: dict[tuple[int, int], bytes] = {}
            for column in range(num_blocks):
                block = tissue_block(config.seed, row, column)
                for y, x, data in _tiles(block):
                    tiles[y, column * BLOCK_PX // TILE_PX + x] = data
                coarse[row * side : (row + 1) * side, column * side : (column + 1) * side] = _mean(block)
            yield from (tiles[place] for place in sorted(tiles))

    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for number, level_side in enumerate(config.level_sides):
            data = finest() if number == 0 else (tile for _, _, tile in _tiles(coarse))
            um = PIXEL_UM * LEVEL_FACTOR**number
            writer.write(
                data,
                shape=(level_side, level_side, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                compression="jpeg",
                photometric="ycbcr",
                subsampling=(2, 2),
                subfiletype=int(number > 0),
                resolution=(1e4 / um, 1e4 / um),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
            if number:
                coarse = _mean(coarse)


def write_store(slide: Path, target: Path, chunk_px: int, shard_px: int = SHARD_PX) -> None:
    """Convert the slide to chunks of zstd in shards."""
    convert(slide, target, ConvertConfig(chunk_px=chunk_px, shard_px=shard_px, tissue=False), progress=False)


def write_jpeg_store(slide: Path, target: Path, shard_px: int = SHARD_PX) -> None:
    """Copy the slide's JPEG tiles as they are into shards of an OME-Zarr pyramid."""
    with tifffile.TiffFile(slide) as tiff:
        pages = [level.pages[0] for level in tiff.series[0].levels]
        for number, page in enumerate(pages):
            _copy_tiles(tiff.filehandle, page, target / str(number), shard_px)
        width = pages[0].imagewidth
        attributes = build_image(
            name=slide.stem,
            axes="cyx",
            paths=[str(i) for i in range(len(pages))],
            downsamples=[(round(width / p.imagewidth),) * 2 for p in pages],
            pixel_size_um=(PIXEL_UM, PIXEL_UM),
            channels=default_channels(3),
        )
    (target / "zarr.json").write_text(json.dumps(group_json(attributes)))


def _copy_tiles(file: Any, page: Any, folder: Path, shard_px: int) -> None:
    shape = (int(page.imagelength), int(page.imagewidth))
    across = -(-shape[1] // TILE_PX)
    per_side = min(shard_px // TILE_PX, across)
    for row, column in np.ndindex(*grid_shape(shape, (per_side * TILE_PX,) * 2)):
        chunks = {}
        for y, x in np.ndindex(per_side, per_side):
            number = (row * per_side + y) * across + column * per_side + x
            if column * per_side + x < across and number < len(page.dataoffsets):
                file.seek(page.dataoffsets[number])
                chunks[0, y, x] = file.read(page.databytecounts[number])
        path = folder / "c" / "0" / str(row) / str(column)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(encode_shard_parts(chunks, (1, per_side, per_side))))
    meta = _jpeg_array_json(shape, per_side * TILE_PX)
    (folder / "zarr.json").write_text(json.dumps(meta))


def _jpeg_array_json(shape: tuple[int, int], shard_px: int) -> dict[str, Any]:
    inner = {
        "chunk_shape": [3, TILE_PX, TILE_PX],
        "codecs": [
            {"name": "transpose", "configuration": {"order": [1, 2, 0]}},
            {"name": "imagecodecs_jpeg", "configuration": {}},
        ],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [3, *shape],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, shard_px, shard_px]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 255,
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        "dimension_names": ["c", "y", "x"],
        "attributes": {},
    }


def sites(side_px: int) -> Array:
    """First pixels (y, x) of the written squares of a sparse image: a grid over all of it."""
    step = side_px // SITES_PER_SIDE
    first = (np.arange(SITES_PER_SIDE) * step + step // 4) // SITE_PX * SITE_PX
    return np.stack(np.meshgrid(first, first, indexing="ij"), axis=-1).reshape(-1, 2)


def write_sparse_store(target: Path, side_px: int, chunk_px: int, seed: int) -> None:
    """An image of which only squares of SITE_PX at :func:`sites` are written; the rest is absent."""
    blocks = []
    for number in range(4):
        pixels = tissue_block(seed, number, SPARSE_COLUMN)
        blocks += [
            np.ascontiguousarray(pixels[y : y + chunk_px, x : x + chunk_px].transpose(2, 0, 1))
            for y in range(0, BLOCK_PX, chunk_px)
            for x in range(0, BLOCK_PX, chunk_px)
        ]
    per_site = SITE_PX // chunk_px
    with PyramidWriter(
        target, level_shapes=[(3, side_px, side_px)], dtype="uint8", chunk_px=chunk_px, fill_value=255
    ) as writer:
        for number, (y, x) in enumerate(sites(side_px) // chunk_px):
            places = list(np.ndindex(per_site, per_site))
            writer.write_chunks(
                0,
                {
                    (int(y) + i, int(x) + j): blocks[(number * len(places) + n) % len(blocks)]
                    for n, (i, j) in enumerate(places)
                },
            )


def keep(path: Path, parameters: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """Make a file or folder unless it is there, made with the same parameters; return its path."""
    note = path.with_name(f"{path.name}.{MADE}")
    if path.exists() and note.is_file() and json.loads(note.read_text()) == parameters:
        return path
    note.unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    note.write_text(json.dumps(parameters))
    return path


def make_slide(folder: Path, config: SlideConfig) -> Path:
    """The slide of this configuration in the folder, kept from an earlier run if it can be."""
    return keep(folder / "slide.tiff", asdict(config), lambda path: write_slide(path, config))


def compressed_sizes(slide: Path, chunk_px: int = 128, num_tiles: int = 64) -> dict[str, float]:
    """Bytes per pixel of a slide's level 0: as stored, of decoded chunks as zstd, of tiles as JPEG."""
    with tifffile.TiffFile(slide) as tiff:
        page: Any = tiff.pages[0]
        stored = sum(page.databytecounts) / (page.imagelength * page.imagewidth)
        rng = np.random.default_rng(0)
        zstd, jpeg = [], []
        whole = page.asarray() if page.imagelength * page.imagewidth < 64 << 20 else None
        across = -(-page.imagewidth // page.tilewidth)
        for _ in range(num_tiles):
            if whole is not None:
                y, x = (int(rng.integers(n - TILE_PX)) for n in whole.shape[:2])
                tile = np.ascontiguousarray(whole[y : y + TILE_PX, x : x + TILE_PX])
            else:
                number = int(rng.integers(len(page.dataoffsets)))
                tiff.filehandle.seek(page.dataoffsets[number])
                data = tiff.filehandle.read(page.databytecounts[number])
                tile = page.decode(data, number % across, jpegtables=page.jpegtables)[0][0]
            chunk = np.ascontiguousarray(tile[:chunk_px, :chunk_px].transpose(2, 0, 1))
            zstd.append(len(imagecodecs.zstd_encode(chunk, 1)) / chunk_px**2)
            jpeg.append(len(_encode(tile)) / (tile.shape[0] * tile.shape[1]))
    return {
        "stored": round(stored, 3),
        f"zstd {chunk_px}": round(float(np.mean(zstd)), 3),
        f"jpeg q{JPEG_QUALITY}": round(float(np.mean(jpeg)), 3),
    }

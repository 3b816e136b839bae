"""Damaged pyramids are refused in one line, or read right; nothing hangs, and memory stays bounded.

What covers which bytes. An index of a shard has a crc32c: damage to its bytes is an error. Chunks of the
store ``checked`` have a crc32c each, those of ``gzip`` the CRC-32 of their format: damage is an error or
changes nothing. No checksum covers the chunks of ``zstd`` (frames without checksum, the default of this
package), ``raw`` and ``v2`` (Blosc): there a patch of the right shape and dtype may have wrong pixels, if it
touches the damaged file and no other. A file that is missing stands for the fill value, as zarr defines it.
Nothing covers the metadata: what is read has the shape and dtype that the levels state.

Bounds: a case may claim ADDRESS_BYTES of addresses, touch RESIDENT_BYTES of memory, and take CASE_S seconds
of processor time.
"""

from __future__ import annotations

import copy
import json
import math
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from ats_stream.errors import AtsStreamError, InputError
from ats_stream.io import Level, Pyramid, PyramidWriter, ngff, open_pyramid
from ats_stream.io.layout import grid_shape
from ats_stream.io.opening import open_inside
from ats_stream.io.shard import index_nbytes
from ats_stream.io.storage.stores import LocalStore

STORES = ("zstd", "raw", "checked", "gzip", "v2")
CHUNK, SHARD = 32, 64
SHAPES = [(3, 64, 128), (3, 32, 64)]
# 2,000 cases in the ordinary suite, 100,000 with those of the torture
NUM_CASES = 500
NUM_ORDINARY_BATCHES = 4
NUM_BATCHES = 200
CASE_S = 20.0
ADDRESS_BYTES = 1 << 30
RESIDENT_BYTES = 48 << 20  # 48 MiB
NUM_ZIP_CASES = 250
# larger levels, or more chunks, which damaged metadata may state, are read in patches alone
WHOLE_BYTES = 4 << 20
WHOLE_CHUNKS = 4096


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 200, shape) // 20 * 20 + 5).astype(np.uint8) for shape in SHAPES]


def write_own(folder: Path, codec: str) -> None:
    with PyramidWriter(
        folder,
        level_shapes=SHAPES,
        dtype="uint8",
        pixel_size_um=0.5,
        chunk_px=CHUNK,
        shard_px=SHARD,
        codec=codec,
        metadata={"vendor": "x", "objective_power": 20},
    ) as writer:
        for level, image in enumerate(pictures()):
            for column in range(0, image.shape[2], SHARD):
                writer.write_shard(level, (0, column // SHARD), image[:, :, column : column + SHARD])
        writer.write_label("tissue", (pictures()[1][0] > 99).astype(np.uint8), downsample=2)


def write_foreign(folder: Path, store: str) -> None:
    """The same image by zarr-python: shards with checksums, gzip without shards, or zarr v2 with Blosc."""
    attributes = ngff.build_image(
        name="x", axes="cyx", paths=["0", "1"], downsamples=[(1, 1), (2, 2)], pixel_size_um=(0.5, 0.5)
    )
    options: dict[str, Any] = {
        "checked": {
            "shards": (3, SHARD, SHARD),
            "compressors": [zarr.codecs.ZstdCodec(level=1), zarr.codecs.Crc32cCodec()],
        },
        "gzip": {"compressors": [zarr.codecs.GzipCodec(level=1)]},
        "v2": {
            "zarr_format": 2,
            "compressors": [numcodecs.Blosc()],
            "chunk_key_encoding": {"name": "v2", "separator": "/"},
        },
    }[store]
    zarr_format = options.get("zarr_format", 3)
    if zarr_format == 2:
        first = attributes["ome"]["multiscales"][0]
        attributes = {"multiscales": [{**first, "version": "0.4"}], "omero": {"channels": [{"label": "a"}]}}
    zarr.create_group(str(folder), zarr_format=zarr_format, attributes=attributes)
    for level, image in enumerate(pictures()):
        array = zarr.create_array(
            str(folder / str(level)),
            shape=image.shape,
            chunks=(3, CHUNK, CHUNK),
            dtype="uint8",
            fill_value=0,
            **options,
        )
        array[:] = image


@dataclass(frozen=True)
class Store:
    """An undamaged pyramid, its files, and what its levels and its label hold."""

    name: str
    folder: Path
    files: dict[str, bytes]
    levels: list[np.ndarray]
    label: np.ndarray | None

    def box(self, file: str) -> tuple[int, slice, slice] | None:
        """Level and pixels of a file of an image; None for metadata and labels."""
        parts = [part for part in file.split("/") if part != "c"]
        if parts[-1].endswith((".json", ".zarray", ".zattrs", ".zgroup")) or parts[0] == "labels":
            return None
        side = CHUNK if self.name in {"gzip", "v2"} else SHARD
        level, _, row, column = map(int, parts)
        return level, slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)

    def is_covered(self, file: str, kind: str, start: int) -> bool:
        """Whether a checksum covers the damaged bytes of this file of the image."""
        if kind == "missing":
            return False
        if self.name in {"checked", "gzip"}:
            return True
        is_index = self.name != "v2" and start >= len(self.files[file]) - index_nbytes(self.grid(file))
        return is_index and kind in {"flip", "replace", "zeros"}

    def grid(self, file: str) -> tuple[int, int, int]:
        return (1, 2, 2) if file.startswith("0/") else (1, 1, 2)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    made = {}
    for name in STORES:
        folder = tmp_path_factory.mktemp("fuzz") / f"{name}.zarr"
        if name in {"zstd", "raw"}:
            write_own(folder, name)
        else:
            write_foreign(folder, name)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        pyramid = open_pyramid(folder)
        label = pyramid.label("tissue").read(0) if pyramid.label_names else None
        made[name] = Store(name, folder, files, [pyramid.read(v) for v in pyramid.levels], label)
        for level, image in zip(made[name].levels, pictures(), strict=True):
            np.testing.assert_array_equal(level, image)
    return made


HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 1.5, -0.0, 7e-320, 1e308, math.inf, math.nan, 2**31, 2**53 + 1, 2**63,
    2**64, 10**15, -(10**15), 10**400, "", "x", "/", ".", "..", "../..", "/etc", "a\nb", "\0", "\ud800",
    "n" * 300, "NaN", "0x7fc00000", "0xffffffffffffffffff", "Infinity", "uint16", "float64", "bool",
    "complex64", "v2", "default", "group", "big", "start", [], {}, [[]], [None], [1, 2], {"a": 1},
    {"name": "bytes"}, {"name": "zstd"}, [1] * 40, [10**9] * 3, [10**6, 10**6, 10**3], [3, 10**8, 10**8],
    [3, 32, 10**12], [3, 1, 1], [1, 1, 1], [3, 2**31, 2**31],
]  # fmt: skip


def spoil_json(data: bytes, rng: np.random.Generator) -> bytes:
    """Replace, remove or double one to three values anywhere in a JSON document."""
    content = json.loads(data)
    for _ in range(int(rng.integers(1, 4))):
        node, places = content, []
        stack = [content]
        while stack:
            node = stack.pop()
            keys = (
                list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
            )
            places += [(node, key) for key in keys]
            stack += [node[key] for key in keys]
        if not places:
            break
        node, key = places[rng.integers(len(places))]
        kind = rng.integers(8)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        elif kind == 2 and isinstance(node[key], (int, float)):
            node[key] = node[key] * int(rng.choice([-1, 2, 3, 1000, 2**40]))
        else:
            node[key] = copy.deepcopy(HOSTILE[rng.integers(len(HOSTILE))])
    return json.dumps(content).encode()


def attempt(store: Store, action: Any) -> Any:
    """The result of an action, or None when it was refused as it should be: in one line, naming the slide."""
    try:
        return action()
    except AtsStreamError as error:
        refusal = error
    # only damage is met here, or sizes that it claims: nothing else may be wrong with what is asked
    assert isinstance(refusal, InputError), repr(refusal)
    assert str(refusal).startswith(str(store.folder)), refusal
    assert "\n" not in str(refusal), refusal
    return None


def is_small(level: Level) -> bool:
    num_chunks = math.prod(grid_shape(level.shape, level.chunk_shape))
    return math.prod(level.shape) * level.dtype.itemsize <= WHOLE_BYTES and num_chunks <= WHOLE_CHUNKS


def check_read(store: Store, pyramid: Any) -> None:
    """Everything that damaged metadata may still let through: shapes and dtypes are what the levels say."""
    assert isinstance(pyramid.name, str)
    assert len(repr(pyramid)) < 2000
    assert len(pyramid.axes) == len(pyramid.levels[0].shape)
    assert all(isinstance(c.label, str) for c in pyramid.channels)
    assert isinstance(dict(pyramid.metadata), dict)
    assert pyramid.level_for(downsample=2) in pyramid.levels
    for level in pyramid.levels:
        assert all(isinstance(n, int) and n > 0 for n in level.shape)
        if is_small(level):
            whole = attempt(store, lambda level=level: pyramid.read(level))
            assert whole is None or (whole.shape, whole.dtype) == (level.shape, level.dtype)
        size = (16,) * (len(level.shape) - 1)
        if level.shape[0] * level.dtype.itemsize * math.prod(size) <= WHOLE_BYTES:
            far = [[0] * len(size), [n - 8 for n in level.shape[1:]], [-5] * len(size)]
            patches = attempt(
                store, lambda level=level, far=far, size=size: pyramid.read_patches(level, far, size)
            )
            if patches is not None:
                assert patches.shape == (3, level.shape[0], *size)
                assert patches.dtype == level.dtype
    for name in pyramid.label_names:
        label = attempt(store, lambda name=name: pyramid.label(name))
        if label is not None and is_small(label.levels[0]):
            attempt(store, lambda label=label: label.read(0))


def check_pixels(store: Store, pyramid: Any, file: str, kind: str, start: int) -> None:
    """Patches off the damaged file are right; those on it are right, refused, or of the right shape."""
    box, covered = store.box(file), store.is_covered(file, kind, start)
    for level, image in enumerate(store.levels):
        for y in range(0, image.shape[1], CHUNK):
            for x in range(0, image.shape[2], CHUNK):
                expected = image[:, y : y + CHUNK, x : x + CHUNK]
                is_hit = (
                    box is not None
                    and box[0] == level
                    and box[1].start <= y < box[1].stop
                    and box[2].start <= x < box[2].stop
                )
                if not is_hit:
                    patch = pyramid.read_patches(level, [[y, x]], (CHUNK, CHUNK))[0]
                    np.testing.assert_array_equal(patch, expected)
                    continue
                read = attempt(
                    store, lambda level=level, y=y, x=x: pyramid.read_patches(level, [[y, x]], (CHUNK, CHUNK))
                )
                if read is None:
                    assert kind != "missing"
                    continue
                assert (read[0].shape, read.dtype) == (expected.shape, expected.dtype)
                if covered:
                    np.testing.assert_array_equal(read[0], expected)
                if kind == "missing":  # the fill value, or a chunk that had been read before
                    assert not read.any() or np.array_equal(read[0], expected)
    whole = attempt(store, lambda: pyramid.read(0))
    assert whole is None or (whole.shape, whole.dtype) == (SHAPES[0], np.uint8)
    if covered and whole is not None:
        np.testing.assert_array_equal(whole, store.levels[0])


def check_label(store: Store, pyramid: Any, file: str, kind: str) -> None:
    label = attempt(store, lambda: pyramid.label("tissue").read(0))
    if label is not None and store.label is not None:
        assert (label.shape, label.dtype) == (store.label.shape, store.label.dtype)
        if not file.startswith("labels/tissue/0"):
            np.testing.assert_array_equal(label, store.label)


class SlowFolder(LocalStore):
    """A folder that is read as a remote store is: indices first, then ranges, in threads."""

    is_remote = True


def open_somehow(folder: Path, is_remote: bool, **options: Any) -> Pyramid:
    if not is_remote:
        return open_pyramid(folder, **options)
    return open_inside(SlowFolder(folder), "", **{"cache_bytes": 0, "num_threads": 1, **options})


def run_case(store: Store, rng: np.random.Generator, damaged: Any) -> None:
    """Damage one file, read everything, put the file back."""
    is_remote = rng.integers(3) == 0
    file = sorted(store.files)[rng.integers(len(store.files))]
    data, path = store.files[file], store.folder / file
    is_metadata = Path(file).name in {"zarr.json", ".zarray", ".zattrs", ".zgroup"}
    # a pyramid that was open before the damage holds indices and metadata of before
    opened = None
    if rng.integers(4) == 0:
        opened = open_somehow(store.folder, is_remote, cache_bytes=1 << 12)
        opened.read_patches(0, [[0, 0]], (CHUNK, CHUNK))
    try:
        if rng.integers(25) == 0:
            kind, start = "missing", 0
            path.unlink()
        elif is_metadata and rng.integers(3):
            kind, start = "json", 0
            path.write_bytes(spoil_json(data, rng))
        else:
            kind, start, broken = damaged(data, rng)
            path.write_bytes(broken)
        if is_metadata:
            pyramid = attempt(store, lambda: open_somehow(store.folder, is_remote))
            if pyramid is not None:
                check_read(store, pyramid)
        else:
            pyramid = opened or open_somehow(store.folder, is_remote)
            check_pixels(store, pyramid, file, kind, start) if store.box(file) else check_label(
                store, pyramid, file, kind
            )
    finally:
        path.write_bytes(data)


def batches() -> list[Any]:
    """The first batches belong to the ordinary suite, the others are the torture."""
    more = range(NUM_ORDINARY_BATCHES, NUM_BATCHES)
    return [*range(NUM_ORDINARY_BATCHES), *[pytest.param(n, marks=pytest.mark.torture) for n in more]]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("batch", batches())
def test_damage_anywhere_is_an_error_or_harmless(
    stores: dict[str, Store],
    damaged: Any,
    cpu_limit: Any,
    watch_memory: Any,
    address_limit: Any,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
) -> None:
    if batch % 2:  # these reads are small: compiled code would be left for larger ones
        monkeypatch.setattr("ats_stream.io.fetch.MIN_COMPILED_PIECES", 0)
    for store in stores.values():  # what is loaded and started once is no case's memory
        for is_remote in (False, True):
            check_pixels(store, open_somehow(store.folder, is_remote), "0/zarr.json", "flip", 0)
    watch = watch_memory()
    address_limit(ADDRESS_BYTES)
    for case in range(batch * NUM_CASES, (batch + 1) * NUM_CASES):
        store = stores[STORES[case % len(STORES)]]
        try:
            with cpu_limit(CASE_S):
                run_case(store, np.random.default_rng(case), damaged)
            assert watch.peak_bytes() < RESIDENT_BYTES
        except BaseException as error:
            error.add_note(f"case {case}, store {store.name}")
            raise


def zip_batches() -> list[Any]:
    return [0, *[pytest.param(n, marks=pytest.mark.torture) for n in range(1, 10)]]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("batch", zip_batches())
def test_a_damaged_zip_gives_errors_right_pixels_or_absent_members(
    stores: dict[str, Store],
    tmp_path: Path,
    damaged: Any,
    cpu_limit: Any,
    watch_memory: Any,
    address_limit: Any,
    batch: int,
    method: int,
) -> None:
    """No checksum covers the names in a zip, so a member may seem absent: fill values, as zarr defines it."""
    store, path = stores["checked"], tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in store.files.items():
            archive.writestr(name, content)
    data = path.read_bytes()
    np.testing.assert_array_equal(open_pyramid(path).read(0), store.levels[0])
    zipped = replace(store, folder=path)
    watch = watch_memory()
    address_limit(ADDRESS_BYTES)
    for case in range(batch * NUM_ZIP_CASES, (batch + 1) * NUM_ZIP_CASES):
        rng = np.random.default_rng((case, method))
        _, start, broken = damaged(data, rng)
        path.write_bytes(broken)
        try:
            with cpu_limit(CASE_S):
                pyramid = attempt(zipped, lambda: open_pyramid(path))
                for level, image in enumerate(store.levels if pyramid is not None else []):
                    if level >= len(pyramid.levels) or pyramid.levels[level].shape != image.shape:
                        continue  # the metadata of a level were hit and still make sense
                    read = attempt(zipped, lambda level=level, pyramid=pyramid: pyramid.read(level))
                    if read is not None:
                        assert ((read == image) | (read == 0)).all()
            assert watch.peak_bytes() < RESIDENT_BYTES
        except BaseException as error:
            error.add_note(f"case {case}, damage from {start}")
            raise

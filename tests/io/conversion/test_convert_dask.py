"""A pyramid as one dask graph: the bytes of the plain way, each block computed once, on any scheduler."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import pytest

from ats_stream.errors import InputError, SlideError, StorageError
from ats_stream.io import ConvertConfig, open_pyramid, write_pyramid

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ConvertConfig(chunk_px=16, shard_px=64, coarsest_px=32, tissue=False)


def contents(target: Path) -> dict[str, bytes]:
    return {str(p.relative_to(target)): p.read_bytes() for p in sorted(target.rglob("*")) if p.is_file()}


def image(*shape: int, dtype: str = "uint8") -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 300, 217), "uint8"), ((1, 70, 90, 130), "uint16"), ((2, 513), "float32"), ((3, 20, 20), "uint8")],
)
@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_a_graph_writes_the_bytes_of_the_plain_way(
    shape: tuple[int, ...], dtype: str, scheduler: str, tmp_path: Path
) -> None:
    array = image(*shape, dtype=dtype)
    plain = write_pyramid(array, tmp_path / "plain.zarr", SMALL, name="a")
    lazy = da.from_array(array, chunks=tuple(min(n, 50) for n in shape))
    summary = write_pyramid(lazy, tmp_path / "graph.zarr", SMALL, name="a", scheduler=scheduler)
    assert contents(tmp_path / "graph.zarr") == contents(tmp_path / "plain.zarr")
    assert (summary.num_shards, summary.stored_bytes) == (plain.num_shards, plain.stored_bytes)
    write_pyramid(array, tmp_path / "again.zarr", SMALL, name="a", scheduler=scheduler)
    assert contents(tmp_path / "again.zarr") == contents(tmp_path / "plain.zarr")


def test_each_block_is_computed_once(tmp_path: Path) -> None:
    counts: Counter[Any] = Counter()

    def block(block_info: Any = None) -> np.ndarray[Any, Any]:
        where = block_info[None]
        counts[tuple(where["chunk-location"])] += 1
        return np.full(where["chunk-shape"], sum(where["chunk-location"]), np.uint8)

    # blocks that lie across the edges of shards
    lazy = da.map_blocks(
        block, chunks=((1,), (50,) * 6, (50,) * 6), dtype=np.uint8, meta=np.empty(0, np.uint8)
    )
    write_pyramid(lazy, tmp_path / "a.zarr", SMALL, scheduler="synchronous")
    assert set(counts.values()) == {1}
    assert len(counts) == 36
    wanted = np.add.outer(np.arange(300) // 50, np.arange(300) // 50)
    np.testing.assert_array_equal(open_pyramid(tmp_path / "a.zarr").read(0)[0], wanted)


def test_an_interrupted_graph_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = da.from_array(image(3, 300, 300), chunks=100, name="known")
    write_pyramid(lazy, tmp_path / "whole.zarr", SMALL, name="a", scheduler="synchronous")
    from ats_stream.io.conversion.targets import LocalTarget

    put, done = LocalTarget.put, []

    def fails_later(self: Any, key: str, parts: Any) -> None:
        if len(done) == 7:
            raise StorageError("full")
        done.append(key)
        put(self, key, parts)

    monkeypatch.setattr(LocalTarget, "put", fails_later)
    with pytest.raises(StorageError, match="full"):
        write_pyramid(lazy, tmp_path / "a.zarr", SMALL, name="a", scheduler="synchronous")
    monkeypatch.setattr(LocalTarget, "put", put)
    summary = write_pyramid(lazy, tmp_path / "a.zarr", SMALL, name="a", scheduler="synchronous")
    assert summary.num_resumed == 7
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "whole.zarr")


def test_an_array_that_cannot_be_computed_is_named(tmp_path: Path) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("no\nsuch file")

    lazy = da.from_array(image(1, 100, 100), chunks=50).map_blocks(
        broken, dtype=np.uint8, meta=np.empty(0, np.uint8)
    )
    with pytest.raises(SlideError, match=r"cannot be computed: RuntimeError: no such file"):
        write_pyramid(lazy, tmp_path / "a.zarr", SMALL, scheduler="synchronous")
    assert list(tmp_path.iterdir()) == []


def test_workers_and_a_scheduler_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give one of the two"):
        write_pyramid(image(1, 9, 9), tmp_path / "a.zarr", SMALL, workers=2, scheduler="threads")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*'shuffle'.*:FutureWarning")
def test_on_ray_it_writes_the_same(tmp_path: Path, ray_local: None) -> None:
    from ray.util.dask import ray_dask_get

    array = image(3, 300, 217)
    write_pyramid(array, tmp_path / "plain.zarr", SMALL, name="a")
    lazy = da.from_array(array, chunks=(3, 100, 100))
    write_pyramid(lazy, tmp_path / "ray.zarr", SMALL, name="a", scheduler=ray_dask_get)
    assert contents(tmp_path / "ray.zarr") == contents(tmp_path / "plain.zarr")

"""What windows may take of the object store, and stores that are too small, before anything starts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_job, make_sampler, run_config, visit, weights

from ats_stream.errors import ClusterError, SlideError
from ats_stream.workers import ClusterConfig, train
from ats_stream.workers.store_room import first_item_bytes, window_within, with_room

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from ats_stream.io import Archive


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 1000), st.integers(1, 8))
def test_windows_fill_half_of_a_store_at_most(store: int, window: int, step: int, ranks: int) -> None:
    if 2 * step * ranks > store:
        with pytest.raises(ClusterError, match=r"object store has .* MiB, and two steps of its"):
            window_within(store, window_bytes=window, step_bytes=step, ranks_on_node=ranks)
        return
    found = window_within(store, window_bytes=window, step_bytes=step, ranks_on_node=ranks)
    assert 1 <= found <= window
    assert 2 * ranks * found <= store or found == 1
    # nothing is given away: either all that was asked for, or one byte more would not fit
    assert found == window or 2 * ranks * (found + 1) > store


@pytest.mark.parametrize("prior", ["foreground", None])
def test_the_bytes_of_an_item_are_known_from_the_shapes(
    archive: Archive, tmp_path: Path, prior: str | None
) -> None:
    config = run_config()
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, prior_label=prior))
    job = make_job(archive, tmp_path, config)
    sampler = make_sampler(archive, prior_label=prior)
    assert first_item_bytes(job) == sampler.sample(visit(job.train_rows[0]), weights()).num_bytes
    gone = dataclasses.replace(job, slides=["/nowhere/gone.ome.zarr", *job.slides[1:]])
    with pytest.raises(SlideError, match="gone"):
        first_item_bytes(gone)
    skip = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, on_bad_image="skip"))
    assert first_item_bytes(dataclasses.replace(gone, config=skip)) == first_item_bytes(job)
    nothing = dataclasses.replace(gone, slides=["/nowhere"] * len(job.slides), config=skip)
    assert first_item_bytes(nothing) is None


@pytest.mark.slow
def test_a_store_that_is_too_small_is_refused_before_anything_is_written(
    archive: Archive, ray_local: ModuleType, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"executor": "ray", "num_ranks": 2, "cpus_per_rank": 0.5, "cpus_per_sampler": 0.1}
    job = make_job(archive, tmp_path, run_config(), **given)
    item = first_item_bytes(job)
    assert item is not None
    store = next(node["Resources"]["object_store_memory"] for node in ray_local.nodes())
    assert with_room(job).cluster.window_bytes == int(0.5 * store) // 2
    # images of a step that fill more than the store has
    batch = 2 * int(store / 2 / 2 / item + 1)
    with pytest.raises(ClusterError, match=r"two steps of its 2 ranks take .* MiB: give it more, or lower"):
        train(archive, tmp_path / "run", run_config(batch_size=batch), ClusterConfig(**given))
    assert not (tmp_path / "run").exists()

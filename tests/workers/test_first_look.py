"""What a run is told before it starts: images that do not fit, in one line, and nothing written."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tiny import run_config

from ats_stream.errors import SlideError
from ats_stream.io import read_archive, write_archive, write_pyramid
from ats_stream.workers import ClusterConfig, RunConfig, train
from ats_stream.workers.first_look import NUM_LOOKED_AT, spread

if TYPE_CHECKING:
    from pathlib import Path

    from ats_stream.io import Archive


def with_sampler(**changed: Any) -> RunConfig:
    config = run_config(num_epochs=1)
    return dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, **changed))


def sized_archive(folder: Path, sizes_um: list[float | None], *, channels: int = 3) -> Archive:
    """Images of noise with these pixel sizes."""
    rows = []
    for number, size_um in enumerate(sizes_um):
        pixels = np.random.default_rng(number).integers(0, 255, (channels, 64, 64), np.uint8)
        place = folder / f"{number}.ome.zarr"
        write_pyramid(pixels, place, pixel_size_um=None if size_um is None else (size_um, size_um))
        rows.append((place, str(number % 2), "train"))
    write_archive(folder / "archive.csv", rows)
    return read_archive(folder / "archive.csv")


NOISE = {"prior_label": None, "view_downsample": 1.0}


def test_images_of_another_pixel_size_are_refused_or_left_out(tmp_path: Path) -> None:
    archive = sized_archive(tmp_path, [0.25, None, 0.26, 0.5])
    config = with_sampler(**NOISE, pixel_size_um=0.25)
    with pytest.raises(
        SlideError, match=r"1\.ome\.zarr: its pixel size is unknown, and the model reads 0\.25"
    ):
        train(archive, tmp_path / "run", config)
    with pytest.raises(SlideError, match=r"0\.ome\.zarr: no level near 0\.5 um per pixel"):
        train(archive, tmp_path / "run", with_sampler(**NOISE, pixel_size_um=0.5))
    assert not (tmp_path / "run").exists()
    # those that do not have it are bad images, which may be left out
    trainer = dataclasses.replace(config.trainer, on_bad_image="skip", max_bad_share=0.5)
    result = train(archive, tmp_path / "skip", dataclasses.replace(config, trainer=trainer))
    assert {one.image for one in result.skipped} == {1, 3}


def test_a_size_of_the_table_comes_before_that_of_the_image(tmp_path: Path) -> None:
    archive = sized_archive(tmp_path, [0.25, None, 0.26, 0.5])
    config = with_sampler(**NOISE, pixel_size_um=0.25)

    def given(**sizes: float) -> Archive:
        rows = [
            dataclasses.replace(row, pixel_size_um=sizes.get(f"of_{number}"))
            for number, row in enumerate(archive.rows)
        ]
        return dataclasses.replace(archive, rows=tuple(rows))

    with pytest.raises(SlideError, match=r"0\.ome\.zarr: no level near 0\.25 .* its levels have 0\.5"):
        train(given(of_0=0.5, of_1=0.25, of_3=0.25), tmp_path / "run", config)
    with pytest.raises(SlideError, match=r"3\.ome\.zarr: no level near 0\.25"):
        train(given(of_1=0.25), tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
    result = train(given(of_1=0.25, of_3=0.25), tmp_path / "run", config)
    assert result.metrics[-1]["epoch"] == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prior_label": "tissue"}, "no label 'tissue' to draw within; labels there: foreground"),
        ({"view_downsample": 300.0}, "no level near downsampling 300; there are 1, 32"),
    ],
)
@pytest.mark.parametrize("executor", ["serial", "ray"])
def test_what_images_do_not_have_is_told_before_anything_starts(
    archive: Archive, tmp_path: Path, changed: dict[str, Any], said: str, executor: str
) -> None:
    with pytest.raises(SlideError, match=said):
        train(archive, tmp_path / "run", with_sampler(**changed), ClusterConfig(executor=executor))
    assert not (tmp_path / "run").exists()


def test_an_image_without_a_drawable_position_is_named(archive: Archive, tmp_path: Path) -> None:
    import shutil
    from pathlib import Path

    row = archive.rows[0]
    copy = shutil.copytree(row.slide, tmp_path / "empty.ome.zarr")
    for chunk in (copy / "labels" / "foreground").rglob("*"):
        if chunk.is_file() and chunk.name not in ("zarr.json", ".zattrs", ".zarray", ".zgroup"):
            chunk.unlink()  # what is not stored is 0: nothing is foreground
    assert Path(copy).is_dir()
    broken = dataclasses.replace(archive, rows=(dataclasses.replace(row, slide=str(copy)), *archive.rows[1:]))
    with pytest.raises(SlideError, match="label 'foreground' is empty: no position can be drawn"):
        train(broken, tmp_path / "run", run_config(num_epochs=1))
    assert not (tmp_path / "run").exists()


def test_images_of_other_channels_are_refused(tmp_path: Path) -> None:
    archive = sized_archive(tmp_path, [0.5, 0.5], channels=1)
    with pytest.raises(SlideError, match="has 1 channels, the model reads 3"):
        train(archive, tmp_path / "run", with_sampler(**NOISE))
    assert not (tmp_path / "run").exists()


def test_images_from_all_over_are_looked_at() -> None:
    rows = tuple(range(100, 1100))
    found = spread(rows, NUM_LOOKED_AT)
    assert (len(found), found[0]) == (NUM_LOOKED_AT, 100)
    assert max(b - a for a, b in itertools.pairwise(found)) == 1000 // NUM_LOOKED_AT

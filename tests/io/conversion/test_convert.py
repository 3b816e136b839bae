from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import dask.array
import numpy as np
import openslide
import pytest
import tifffile
import zarr

from ats_stream.errors import InputError, SlideError, StorageError, TargetExistsError
from ats_stream.io import (
    ConvertConfig,
    convert,
    open_pyramid,
    preprocess,
    target_path,
    working_memory_bytes,
    write_pyramid,
)
from ats_stream.io.conversion import array_writer
from ats_stream.io.tissue import tissue_mask

SMALL = ConvertConfig(chunk_px=32, shard_px=128)


def naive_half(level):
    """Means in float64 over what is there; sums of four small integers are exact, so rint is half to even."""
    _, height, width = level.shape
    padded = np.pad(
        level.astype(np.float64), ((0, 0), (0, height % 2), (0, width % 2)), constant_values=np.nan
    )
    blocks = padded.reshape(padded.shape[0], padded.shape[1] // 2, 2, padded.shape[2] // 2, 2)
    return np.nanmean(blocks, axis=(2, 4))


def check_pyramid(target, level_0):
    """Level 0 as given, every other one the naive mean of the one above it, down to 256 px."""
    pyramid = open_pyramid(target)
    np.testing.assert_array_equal(pyramid.read(0), level_0)
    for above, level in zip(pyramid.levels, pyramid.levels[1:], strict=False):
        expected = naive_half(pyramid.read(above))
        assert level.shape[1:] == tuple(-(-n // 2) for n in above.shape[1:])
        assert level.downsample == tuple(2 * d for d in above.downsample)
        if level.dtype.kind == "f":
            np.testing.assert_allclose(pyramid.read(level), expected, rtol=1e-6)
        else:
            np.testing.assert_array_equal(pyramid.read(level), np.rint(expected).astype(level.dtype))
    assert max(pyramid.levels[-1].shape[1:]) <= 256 or len(pyramid.levels) == 1
    return pyramid


@pytest.fixture(scope="module")
def converted(slide_path, tmp_path_factory):
    target = tmp_path_factory.mktemp("convert") / "CMU.ome.zarr"
    summary = convert(slide_path, target, ConvertConfig(shard_px=1024), progress=False)
    return target, summary


def test_a_real_slide_pixel_by_pixel(slide_path, converted, assert_valid):
    target, summary = converted
    with openslide.OpenSlide(slide_path) as slide:
        width, height = slide.dimensions
        expected = np.asarray(slide.read_region((0, 0), 0, (width, height)).convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(expected, tifffile.imread(slide_path, key=0).transpose(2, 0, 1))
    pyramid = check_pyramid(target, expected)
    assert_valid(target)
    np.testing.assert_array_equal(zarr.open_array(str(target / "0"), mode="r")[:], expected)
    assert [v.shape[1:] for v in pyramid.levels] == [
        (2967, 2220),
        (1484, 1110),
        (742, 555),
        (371, 278),
        (186, 139),
    ]
    assert [v.pixel_size_um[0] for v in pyramid.levels] == pytest.approx([0.499 * 2**i for i in range(5)])
    assert summary.shape == (3, 2967, 2220)
    assert summary.stored_bytes == sum(p.stat().st_size for p in target.rglob("*") if p.is_file())


def test_the_tissue_label_is_otsu_at_8_um(converted):
    target, summary = converted
    pyramid = open_pyramid(target)
    tissue = pyramid.label("tissue")
    assert tissue.levels[0].pixel_size_um == pytest.approx((7.984, 7.984))
    np.testing.assert_array_equal(tissue.read(0)[0], tissue_mask(pyramid.read(4)))
    assert summary.tissue_share == tissue.read(0).mean()
    assert 0.2 < summary.tissue_share < 0.5


def test_the_summary_is_one_line(converted):
    line = str(converted[1])
    assert "\n" not in line
    assert line.startswith("CMU-1-Small-Region: 2220 x 2967, 5 levels, 0.499 um/px, ")
    assert " -> " in line
    assert line.endswith("%")


FORBIDDEN = (
    "ScanScope",
    "Filename",
    "User",
    "Date",
    "Time",
    "Title",
    "ImageID",
    "Parmset",
    "Barcode",
    "Aperio Image",
)


def test_patient_tags_and_pictures_of_the_label_stay_behind(slide_path, converted, tmp_path, assert_valid):
    target, _ = converted
    texts = [p.read_text() for p in target.rglob("zarr.json")]
    with openslide.OpenSlide(slide_path) as slide:
        secrets = {v for k, v in slide.properties.items() if k.startswith("aperio.") and len(v) > 4}
        pictures = {
            k: np.asarray(v.convert("RGB")).transpose(2, 0, 1) for k, v in slide.associated_images.items()
        }
    # the name of the file becomes the name of the image
    secrets = {s for s in secrets if s not in slide_path.stem}
    assert secrets
    for text in texts:
        assert not [s for s in (*FORBIDDEN, *secrets) if s in text]
    assert not (target / "associated").exists()
    assert set(open_pyramid(target).metadata) <= {"vendor", "compression", "objective_power"}

    kept = tmp_path / "kept.zarr"
    convert(slide_path, kept, ConvertConfig(keep_associated=True, tissue=False), progress=False)
    assert_valid(kept)
    assert sorted(p.name for p in (kept / "associated").iterdir() if p.is_dir()) == sorted(pictures)
    for name, picture in pictures.items():
        assert_valid(kept / "associated" / name)
        np.testing.assert_array_equal(open_pyramid(kept / "associated" / name).read(0), picture)
        np.testing.assert_array_equal(open_pyramid(kept).associated(name), picture)
    assert open_pyramid(kept).label_names == ()


@pytest.mark.parametrize(
    "name",
    [
        "wsi/tiff/CMU-1-Small-Region.jpeg.tiff",
        "wsi/tiff/CMU-1-Small-Region.webp.tiff",
        "wsi/openslide-python-fixtures/boxes.tiff",
        "wsi/ometiff/2048x2048_ome6_tiled.ome.tif",
        "geotiff/cog.tif",
    ],
)
def test_tiffs_pixel_by_pixel(test_data, tmp_path, assert_valid, name):
    with tifffile.TiffFile(test_data / name) as tiff:
        expected = tiff.series[0].asarray()
        expected = expected.transpose(2, 0, 1) if tiff.series[0].axes == "YXS" else expected
    expected = expected.reshape(-1, *expected.shape[-2:])
    summary = convert(test_data / name, tmp_path / "a.zarr", ConvertConfig(shard_px=1024), progress=False)
    check_pyramid(tmp_path / "a.zarr", expected)
    assert_valid(tmp_path / "a.zarr")
    assert summary.tissue_share is not None


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (1, 1, 700), (3, 257, 256), (3, 512, 300), (2, 513, 1027), (4, 130, 131)]
)
def test_arrays_of_every_shape(tmp_path, picture, assert_valid, shape, dtype):
    """Shards of 128 px: one, several, odd edges, strips of one pixel."""
    image = picture(shape, dtype)
    summary = write_pyramid(image, tmp_path / "a.zarr", SMALL, pixel_size_um=0.5, progress=False)
    assert_valid(tmp_path / "a.zarr")
    check_pyramid(tmp_path / "a.zarr", image)
    assert summary.num_levels == len(open_pyramid(tmp_path / "a.zarr").levels)


def test_dask_numpy_and_every_cut_give_the_same_pixels(tmp_path, picture):
    image = picture((3, 300, 401))
    sources = {
        "numpy": image,
        "dask": dask.array.from_array(image, chunks=(3, 100, 333)),
        "view": image[:, ::-1][:, ::-1],
    }
    results = []
    for name, source in sources.items():
        write_pyramid(source, tmp_path / name, SMALL, progress=False)
        results.append(open_pyramid(tmp_path / name))
    for config in (
        ConvertConfig(),
        ConvertConfig(chunk_px=16, shard_px=16, profile="raw"),
        ConvertConfig(profile="lz4"),
        ConvertConfig(num_threads=1),
    ):
        target = tmp_path / f"{config.shard_px}-{config.profile}-{config.num_threads}"
        write_pyramid(image, target, config, progress=False)
        results.append(open_pyramid(target))
    for other in results[1:]:
        for level in results[0].levels:
            np.testing.assert_array_equal(other.read(level.index), results[0].read(level))
        np.testing.assert_array_equal(other.label("tissue").read(0), results[0].label("tissue").read(0))


def test_the_pixel_size_can_be_overridden(tmp_path, slide_path):
    config = ConvertConfig(pixel_size_um=0.25, coarsest_px=2000)
    convert(slide_path, tmp_path / "a", config, progress=False)
    assert [v.pixel_size_um for v in open_pyramid(tmp_path / "a").levels] == [(0.25, 0.25), (0.5, 0.5)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"chunk_px": 0},
        {"shard_px": 200},
        {"shard_px": 0},
        {"chunk_px": 3, "shard_px": 9},
        {"profile": "jpeg"},
        {"codec_level": 0},
        {"coarsest_px": 0},
        {"pixel_size_um": -1.0},
        {"num_threads": 0},
    ],
)
def test_the_config_names_the_wrong_field(wrong):
    name, value = list(wrong.items())[-1]
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        ConvertConfig(**wrong)


def test_preprocess_records_a_bad_slide_and_goes_on(slide_path, tmp_path):
    data = slide_path.read_bytes()
    (tmp_path / "cut.svs").write_bytes(data[:1_500_000])
    (tmp_path / "note.txt").write_text("no slide")
    good = tmp_path / "good.svs"
    good.write_bytes(data)
    slides = [tmp_path / "cut.svs", good, tmp_path / "note.txt", tmp_path / "none.svs"]
    config = ConvertConfig(shard_px=1024, coarsest_px=3000, tissue=False)
    results = list(preprocess(slides, tmp_path / "out", config, progress=False))
    assert [r.ok for r in results] == [False, True, False, False]
    for result, slide in zip(results, slides, strict=True):
        assert result.source == str(slide)
        assert "\n" not in str(result)
    assert "truncated" in results[0].reason
    assert "not a slide" in str(results[2])
    assert "no such file" in str(results[3])
    assert results[1].target == target_path(good, tmp_path / "out")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["good.ome.zarr", "good.ome.zarr.manifest.jsonl"]
    again = list(preprocess([good], tmp_path / "out", config, progress=False))
    assert "exists already" in again[0].reason


def test_preprocess_refuses_two_slides_for_one_target(tmp_path):
    with pytest.raises(InputError, match=r"a/x\.svs and b/x\.tif would both become"):
        preprocess(["a/x.svs", "b/x.tif"], tmp_path)


def test_a_full_disk_ends_everything_and_is_gone_on_from(slide_path, tmp_path, monkeypatch):
    write = array_writer.write_parts

    def failing(path, parts):
        if path.parts[-4:-1] == ("c", "0", "1") and path.name.startswith(".0."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, parts)

    monkeypatch.setattr(array_writer, "write_parts", failing)
    with pytest.raises(StorageError, match="0/c/0/1/0: cannot write: No space left"):
        list(preprocess([slide_path], tmp_path / "out", ConvertConfig(shard_px=1024), progress=False))
    assert all(".partial" in p.name for p in (tmp_path / "out").iterdir())
    monkeypatch.undo()
    (summary,) = preprocess([slide_path], tmp_path / "out", ConvertConfig(shard_px=1024), progress=False)
    assert 0 < summary.num_resumed < summary.num_shards
    check_pyramid(summary.target, tifffile.imread(slide_path, key=0).transpose(2, 0, 1))


def test_a_slide_damaged_in_the_middle_leaves_nothing(slide_path, tmp_path):
    with tifffile.TiffFile(slide_path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[100], tiff.pages[0].databytecounts[100]
    data = bytearray(slide_path.read_bytes())
    data[offset : offset + count] = bytes(count)
    (tmp_path / "a.svs").write_bytes(data)
    with pytest.raises(SlideError, match="tile 100"):
        convert(tmp_path / "a.svs", tmp_path / "a.zarr", ConvertConfig(shard_px=512), progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.svs"]


def test_an_existing_target_is_replaced_only_when_asked(tmp_path, picture):
    write_pyramid(picture((3, 50, 60)), tmp_path / "a", SMALL)
    with pytest.raises(TargetExistsError):
        write_pyramid(picture((3, 20, 20)), tmp_path / "a", SMALL)
    assert open_pyramid(tmp_path / "a").levels[0].shape == (3, 50, 60)
    write_pyramid(picture((3, 20, 20)), tmp_path / "a", ConvertConfig(overwrite=True))
    assert open_pyramid(tmp_path / "a").levels[0].shape == (3, 20, 20)


def test_progress_goes_to_standard_error_only_when_asked(tmp_path, picture, capsys):
    write_pyramid(picture((3, 300, 300)), tmp_path / "a", SMALL)
    assert capsys.readouterr() == ("", "")
    write_pyramid(picture((3, 300, 300)), tmp_path / "b", SMALL, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "b:" in shown.err


WAITING = """
import signal, sys
import numpy as np
from ats_stream.io import ConvertConfig, write_pyramid

class Slow:
    shape, dtype, num_reads = (3, 1024, 1024), np.dtype("uint8"), 0

    def __getitem__(self, key):
        self.num_reads += 1
        if self.num_reads == 9:
            print("waiting", flush=True)
            signal.pause()
        return np.full([len(range(*s.indices(n))) for s, n in zip(key, self.shape)], 7, np.uint8)

write_pyramid(Slow(), sys.argv[1], ConvertConfig(shard_px=256))
"""


def test_ctrl_c_leaves_no_target(tmp_path):
    target = tmp_path / "a.zarr"
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr.partial", "a.zarr.partial.manifest.jsonl"]


def test_a_killed_conversion_leaves_nothing_that_opens(tmp_path):
    target = tmp_path / "a.zarr"
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(target)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "waiting\n"
        process.kill()
        process.wait(timeout=60)
    left = sorted(tmp_path.iterdir())
    assert [p.name for p in left] == [f"a.zarr.partial{end}" for end in ("", ".lock", ".manifest.jsonl")]
    with pytest.raises(SlideError, match=r"neither zarr\.json nor"):
        open_pyramid(left[0])


PEAK = """
import json, sys
import numpy as np
from ats_stream.io import ConvertConfig, write_pyramid, working_memory_bytes

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith(key)).split()[1])

class Made:
    dtype = np.dtype("uint8")

    def __init__(self, side_y, side_x):
        self.shape = (3, side_y, side_x)
        self.tile = np.random.default_rng(0).integers(0, 9, (3, 1024, 1024), dtype=np.uint8)

    def __getitem__(self, key):
        return self.tile[:, : key[1].stop - key[1].start, : key[2].stop - key[2].start]

config = ConvertConfig(shard_px=1024, num_threads=2)
# large enough for compiled code, whose library is not what is measured
write_pyramid(Made(4096, 4096), sys.argv[1] + "/warm", config)
source = Made(int(sys.argv[2]), int(sys.argv[3]))
before = status("VmRSS")
write_pyramid(source, sys.argv[1] + "/a", config)
print(json.dumps([status("VmHWM") - before, working_memory_bytes(source.shape, "uint8", config)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_memory_is_bounded_and_within_what_is_computed_before(tmp_path):
    """Eight times as many pixels (400 MB) take little more memory than a few shards of 3 MB."""
    peaks = []
    for number, (height, width) in enumerate([(4096, 4096), (8192, 16384)]):
        folder = tmp_path / str(number)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder), str(height), str(width)],
            capture_output=True,
            text=True,
            check=True,
            timeout=280,
        )
        peak, computed = json.loads(done.stdout)
        assert peak <= computed
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 40 << 20
    assert computed < 8192 * 16384 * 3 // 2


def test_the_bound_of_memory_does_not_grow_with_the_slide():
    config = ConvertConfig()
    bound = working_memory_bytes((3, 200_000, 200_000), "uint8", config)
    assert bound == pytest.approx(working_memory_bytes((3, 100_000, 100_000), "uint8", config), rel=0.3)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 4, 40])
@pytest.mark.parametrize("side", [1000, 60_000, 200_000, 1_000_000])
def test_the_bound_of_memory_is_less_than_a_gibibyte(side, channels, dtype):
    for shape in ((channels, side, side), (channels, side, 4 * side), (channels, 100, 20_000, side)):
        for profile in ("lossless", "raw"):
            assert working_memory_bytes(shape, dtype, ConvertConfig(profile=profile)) < 1 << 30

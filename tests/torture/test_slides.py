"""Damaged slides, pictures and videos end in pixels or in one line; nothing hangs, crashes, or takes memory
without bound.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile

NUM_ORDINARY_CASES = 330
NUM_CASES = 1500
NUM_TORTURE_BATCHES = 10
# addresses that a process may claim: libraries and threads take most of it, a damaged file the rest
ADDRESS_BYTES = 6 << 30
# what a batch may touch of it: a tile or picture as large as is accepted, and its copy
RESIDENT_MIB = 1100
BATCH_S = 280


def make_files(folder: Path) -> None:
    """Small whole files of every kind that needs no other library to be written."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :112]
    image = np.stack([y * 2, x * 2, 128 + 40 * np.sin((x + y) / 9)], axis=-1)
    image = np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    tiles: dict[str, Any] = {"tile": (32, 32), "photometric": "rgb", "metadata": None}
    for name in ("jpeg", "webp", "jpeg2000", "lzw", "deflate", "zstd"):
        with tifffile.TiffWriter(folder / f"{name}.tif") as writer:
            writer.write(image, compression=name, **tiles)
            writer.write(image[::2, ::2], compression=name, subfiletype=1, **tiles)
    description = (
        "Aperio Image Library v11\r\n112x96 [0,0 112x96] (32x32) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
    )
    with tifffile.TiffWriter(folder / "aperio.svs") as writer:
        writer.write(image, compression="jpeg", description=description, **tiles)
        writer.write(image[::4, ::4], compression="jpeg", photometric="rgb", metadata=None,
                     description="Aperio Image Library v11\r\n28x24 -> 28x24")  # fmt: skip
    volume = rng.integers(0, 999, (2, 3, 40, 50), dtype=np.uint16)
    tifffile.imwrite(folder / "series.ome.tif", volume, metadata={"axes": "CZYX"}, photometric="minisblack")
    tifffile.imwrite(folder / "stack.tif", volume[0], imagej=True, metadata={"axes": "ZYX"})
    for name, encode in [
        ("a.png", imagecodecs.png_encode),
        ("a.jpg", imagecodecs.jpeg8_encode),
        ("a.jp2", imagecodecs.jpeg2k_encode),
    ]:
        (folder / name).write_bytes(bytes(encode(image)))
    with suppress(ImportError):  # the extra video
        make_video(folder / "a.mp4", image)


def make_video(path: Path, image: Any) -> None:
    """Twelve frames in three groups of pictures."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "4", "bf": "1"})
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
        for step in range(12):
            frame = av.VideoFrame.from_ndarray(np.roll(image, 3 * step, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))


def batches() -> list[Any]:
    """Batch 0 belongs to the ordinary suite, the others are the torture."""
    return [0, *[pytest.param(n, marks=pytest.mark.torture) for n in range(1, NUM_TORTURE_BATCHES + 1)]]


@pytest.mark.parametrize("batch", batches())
def test_damaged_slides_end_in_pixels_or_in_one_line(tmp_path: Path, batch: int) -> None:
    make_files(tmp_path)
    first = batch * NUM_CASES
    last = first + (NUM_CASES if batch else NUM_ORDINARY_CASES)
    script = Path(__file__).with_name("slide_cases.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(first), str(last)],
        capture_output=True,
        text=True,
        timeout=BATCH_S,
        check=False,
        preexec_fn=limit_memory,
    )
    where = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"exit {done.returncode} after {where}: {done.stderr[-4000:]}"
    # neither is every damage refused, nor is any overlooked
    words = where[0].split()
    assert 0 < int(words[0]) < last - first
    assert int(words[-3]) < RESIDENT_MIB

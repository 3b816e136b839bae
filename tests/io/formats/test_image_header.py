"""What heads declare is what decoders give, for every kind of data that encoders write."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from ats_stream.io.formats.image_header import jpeg2000_size, jpeg_size, webp_size

SIZES = [(1, 1), (16, 31), (257, 8), (300, 411)]


def image(height, width, samples, dtype=np.uint8):
    rng = np.random.default_rng(height * width)
    return rng.integers(0, 255, (height, width, samples)[: 2 if samples == 1 else 3]).astype(dtype)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(height, width, samples, progressive):
    pixels = image(height, width, samples)
    file = io.BytesIO()
    # profiles and comments stand before the frame
    Image.fromarray(pixels).save(
        file, "jpeg", progressive=progressive, comment=b"\xff\xc0" * 9, icc_profile=bytes(70_000)
    )
    assert jpeg_size(file.getvalue()) == (height, width, samples)
    assert jpeg_size(imagecodecs.jpeg8_encode(pixels)) == (height, width, samples)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("samples", [1, 3, 4])
@pytest.mark.parametrize("kind", ["jp2", "j2k"])
def test_jpeg2000(height, width, samples, kind):
    data = imagecodecs.jpeg2k_encode(image(height, width, samples, np.uint16), codecformat=kind)
    assert jpeg2000_size(bytes(data)) == (height, width, samples)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("samples", [3, 4])
def test_webp(height, width, lossless, samples):
    data = imagecodecs.webp_encode(image(height, width, samples), lossless=lossless)
    assert webp_size(bytes(data)) == (height, width, 4)


@pytest.mark.parametrize("size_of", [jpeg_size, jpeg2000_size, webp_size])
def test_other_data_are_refused(size_of):
    whole = [
        bytes(imagecodecs.jpeg8_encode(image(16, 16, 3))),
        bytes(imagecodecs.jpeg2k_encode(image(16, 16, 3))),
        bytes(imagecodecs.webp_encode(image(16, 16, 3))),
    ]
    own = [jpeg_size, jpeg2000_size, webp_size].index(size_of)
    for number, data in enumerate(whole):
        if number == own:
            head = next(n for n in range(len(data)) if not fails(size_of, data[:n]))
            # nothing is believed before it is there, and once it is, more changes nothing
            assert size_of(data[:head]) == size_of(data)
        else:
            assert fails(size_of, data)
    rng = np.random.default_rng(0)
    for length in range(60):
        assert fails(size_of, rng.bytes(length))


def fails(size_of, data):
    try:
        size_of(data)
    except ValueError:
        return True
    return False

"""fma_float32 against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from exact import FORMATS, exact_fma, rounded
from hypothesis import given, settings
from hypothesis import strategies as st

from ats_stream.kernels.rounding import fma_float32

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _fma(pixels: list[int], scale: list[float], shift: list[float]) -> list[float]:
    x = torch.from_numpy(np.array(pixels, np.uint16))
    return fma_float32(x, torch.tensor(scale), torch.tensor(shift)).tolist()


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 65535), FLOAT32, FLOAT32), min_size=1, max_size=20))
def test_one_rounding_for_any_operands(rows: list[tuple[int, float, float]]) -> None:
    pixels, scale, shift = (list(column) for column in zip(*rows, strict=True))
    assert _fma(pixels, scale, shift) == [exact_fma(*row) for row in rows]


def test_one_rounding_beside_a_midpoint() -> None:
    # products of 25 bits that end in 1 lie midway between two float32 values: the shift alone decides the
    # side, and is too small for float64 to keep it
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 32768, 4000) * 2 + 1
    factors = (2**24 // pixels + rng.integers(1, 2**24 // pixels // 2 + 2, 4000)) | 1
    keep = (pixels * factors >= 2**24) & (pixels * factors < 2**25) & (factors < 2**24)
    pixels, factors = pixels[keep], factors[keep]
    assert len(pixels) > 1000
    scale = factors * 2.0**-24
    # from about one unit in the last place of float64, 2^-52, down to far below it
    exponents = np.where(
        rng.random(len(pixels)) < 0.5, rng.uniform(51, 55, len(pixels)), rng.uniform(55, 140, len(pixels))
    )
    shift = (rng.choice([-1.0, 1.0], len(pixels)) * 2.0**-exponents).astype(np.float32).astype(np.float64)
    expected = [exact_fma(*row) for row in zip(pixels.tolist(), scale.tolist(), shift.tolist(), strict=True)]
    assert _fma(pixels.tolist(), scale.tolist(), shift.tolist()) == expected
    # the same in float64 with a second rounding is wrong for many of them, so the rows do test the difference
    twice = (pixels * scale + shift).astype(np.float32)
    assert np.mean(twice != np.array(expected)) > 0.2


@pytest.mark.parametrize(
    ("pixel", "scale", "shift"),
    [
        (0, -1.0, -0.0),  # -0 + -0 is -0
        (0, -1.0, 0.0),
        (1, 1.0, -1.0),
        (0, float("inf"), 1.0),
        (3, float("inf"), 1.0),
        (3, float("-inf"), 1.0),
        (3, float("inf"), float("-inf")),
        (3, 1.0, float("nan")),
        (65535, 3e38, 0.0),
        (65535, 3e38, -3e38),
    ],
)
def test_signed_zeros_and_what_is_not_finite(pixel: int, scale: float, shift: float) -> None:
    got = np.float32(_fma([pixel], [scale], [shift])[0])
    with np.errstate(all="ignore"):
        expected = np.float32(
            np.float64(pixel) * np.float64(np.float32(scale)) + np.float64(np.float32(shift))
        )
    assert np.array_equal(got, expected, equal_nan=True)
    assert np.isnan(got) or np.signbit(got) == np.signbit(expected)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_the_reference_itself_rounds_as_torch_converts(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(6)
    values = rng.choice([-1.0, 1.0], 2000) * 2.0 ** rng.uniform(-30, 20, 2000)
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).to(dtype).tolist()
    assert [rounded(Fraction(float(value)), dtype) for value in values] == expected

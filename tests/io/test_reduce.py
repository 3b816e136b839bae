from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ats_stream.io import reduce
from ats_stream.io.reduce import block_means, halve, halve_labels, shrink

DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32"]


def naive(block, factor):
    """Exact rational means of blocks, rounded half to even, by Python's own rule."""
    channels, height, width = block.shape
    out = np.empty((channels, -(-height // factor), -(-width // factor)), block.dtype)
    for place in np.ndindex(*out.shape):
        c, y, x = place
        values = block[c, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        out[place] = round(Fraction(sum(int(v) for v in values.flat), values.size))
    return out


images = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7)))
)


@given(images)
def test_halve_equals_exact_arithmetic(block):
    half = halve(block)
    assert half.dtype == block.dtype
    np.testing.assert_array_equal(half, naive(block, 2))


@given(images, st.integers(1, 5))
def test_shrink_equals_exact_arithmetic(block, factor):
    np.testing.assert_array_equal(shrink(block, factor), naive(block, factor))


def test_every_sum_of_four_bytes_rounds_half_to_even():
    """All sums that four uint8 can have, and all that two can have (the cut off edge)."""
    sums = np.arange(4 * 255 + 1)
    four = np.stack([np.clip(sums - 255 * i, 0, 255) for i in range(4)]).astype(np.uint8)
    block = four.reshape(2, 2, -1).transpose(0, 2, 1).reshape(1, 2, -1)
    np.testing.assert_array_equal(halve(block)[0, 0], np.rint(sums / 4).astype(np.uint8))
    sums = np.arange(2 * 255 + 1)
    two = np.stack([np.minimum(sums, 255), np.maximum(sums - 255, 0)]).astype(np.uint8)
    np.testing.assert_array_equal(halve(two.T[None])[0, :, 0], naive(two.T[None], 2)[0, :, 0])
    np.testing.assert_array_equal(
        np.concatenate([halve(two[None, :, i : i + 1])[0, 0] for i in range(len(sums))]), np.rint(sums / 2)
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floats_are_means(dtype):
    block = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(dtype)
    padded = np.pad(block.astype(np.float64), ((0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    expected = np.nanmean(padded.reshape(2, 3, 2, 4, 2), axis=(2, 4)).astype(dtype)
    np.testing.assert_allclose(halve(block), expected, rtol=1e-6)
    assert halve(block).dtype == dtype


@given(hnp.arrays("int16", st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_labels_take_the_largest_value(mask):
    height, width = mask.shape
    expected = [[mask[y : y + 2, x : x + 2].max() for x in range(0, width, 2)] for y in range(0, height, 2)]
    np.testing.assert_array_equal(halve_labels(mask), expected)


@given(
    hnp.arrays("int16", st.tuples(*[st.integers(1, 5)] * 4)),
    st.tuples(*[st.integers(1, 3)] * 4),
)
def test_means_of_blocks_along_any_axes_are_exact(block, factors):
    expected = np.empty([-(-n // f) for n, f in zip(block.shape, factors, strict=True)], block.dtype)
    for place in np.ndindex(*expected.shape):
        box = tuple(slice(p * f, (p + 1) * f) for p, f in zip(place, factors, strict=True))
        values = [int(v) for v in block[box].flat]
        expected[place] = round(Fraction(sum(values), len(values)))
    np.testing.assert_array_equal(block_means(block, factors), expected)


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]
)
def test_compiled_code_gives_the_bits_of_numpy(monkeypatch, dtype):
    rng = np.random.default_rng(0)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        block = (rng.normal(size=(2, 37, 50)) * 1e3).astype(kind)
    else:
        limits = np.iinfo(kind)
        block = rng.integers(limits.min, limits.max, (2, 37, 50), kind, endpoint=True)
    expected = halve(block)
    monkeypatch.setattr(reduce, "MIN_COMPILED", 0)
    monkeypatch.setattr(reduce, "LOADED_AFTER", 0)
    assert reduce._compiled_means(block[:, :36], np.empty((2, 18, 25), kind))
    np.testing.assert_array_equal(halve(block), expected)


def test_compiled_code_is_loaded_for_much_work_alone(monkeypatch):
    monkeypatch.setattr(reduce, "_halved", reduce._Halved())
    monkeypatch.setattr(reduce, "LOADED_AFTER", 3 * reduce.MIN_COMPILED)
    block, out = np.zeros((1, 512, 512), np.uint8), np.ones((1, 256, 256), np.uint8)
    assert [reduce._compiled_means(block, out) for _ in range(4)] == [False, False, True, True]
    assert not out.any()

"""What the tests of io share: validators, a store made by zarr-python, seeded pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray


@pytest.fixture
def assert_valid() -> Callable[[Path], None]:
    """Run both validators of OME-Zarr 0.5: each finds violations that the other misses."""
    import yaozarrs
    import zarr
    from ome_zarr_models.v05 import Image

    def check(target: Path) -> None:
        yaozarrs.validate_zarr_store(str(target))
        Image.from_zarr(zarr.open_group(str(target), mode="r"))

    return check


@pytest.fixture(scope="session")
def picture() -> Callable[..., NDArray[Any]]:
    """Seeded pictures (C, y, x): smooth fields with some noise, so that they compress like photographs."""

    def make(shape: tuple[int, int, int], dtype: str = "uint8", seed: int = 0) -> NDArray[Any]:
        rng = np.random.default_rng(seed)
        channels, height, width = shape
        y = np.sin(np.linspace(0, 9, height))[None, :, None]
        x = np.cos(np.linspace(0, 7, width))[None, None, :]
        field = (y + x + np.arange(channels)[:, None, None]) % 2 / 2 + rng.normal(0, 0.02, shape)
        kind = np.dtype(dtype)
        if kind.kind == "f":
            return field.astype(kind)
        limits = np.iinfo(kind)
        return np.clip(field * limits.max, limits.min, limits.max).astype(kind)

    return make

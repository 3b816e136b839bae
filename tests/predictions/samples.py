"""Records for the tests of what predictions leave behind."""

from __future__ import annotations

from typing import Any

import numpy as np

from ats_stream.predictions.record import Patches, PredictionInfo, SlideRecord


def info(**changed: Any) -> PredictionInfo:
    """A prediction of two classes."""
    given: dict[str, Any] = {
        "model": "m",
        "images": "i",
        "num_images": 3,
        "task": "classification",
        "outputs": ("normal", "tumor"),
        "scheme": "murthy",
        "num_draws": 2,
        "num_patches": 3,
    }
    return PredictionInfo(**{**given, **changed})


def record(number: int = 0, **changed: Any) -> SlideRecord:
    """A slide with 6 patches of two draws; numbers are floats of 32 bits, as they come from a model."""
    rng = np.random.default_rng(number)
    probability = rng.random()

    def numbers() -> tuple[float, ...]:
        return tuple(rng.random(6, np.float32).tolist())

    given: dict[str, Any] = {
        "slide": f"/slides/{number}.ome.zarr",
        "name": f"s{number}",
        "label": "tumor",
        "split": "test",
        "group": f"p{number // 2}",
        "predicted": "tumor" if probability > 0.5 else "normal",
        "right": probability > 0.5,
        "value_K": (1 - probability, probability),
        "standard_error_K": (0.01, 0.01),
        "height": 5000,
        "width": 7000,
        "pixel_size_um": 0.5,
        "patch_px": 64,
        "patches": Patches(
            draw=(0, 0, 0, 1, 1, 1),
            y=tuple(rng.integers(-32, 5000, 6).tolist()),
            x=tuple(rng.integers(-32, 7000, 6).tolist()),
            attention=numbers(),
            weight=numbers(),
        ),
        "stored_bytes": 1000,
        "decoded_bytes": 5000,
        "full_bytes": 105_000_000,
        "seconds": 0.25,
    }
    return SlideRecord(**{**given, **changed})


def bad_record(number: int = 0) -> SlideRecord:
    """A slide that could not be read."""
    return SlideRecord(slide=f"/slides/{number}.svs", name=f"bad{number}", label="normal", error="truncated")

"""What the tests of workers share: tiny archives of digits, and configurations that fit them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ats_stream.demo.digits import DigitsConfig, build_archive
from ats_stream.io import read_archive

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ats_stream.io import Archive

# makes the helpers beside the tests importable, and the slow device of the kernels' tests
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "kernels")]


@pytest.fixture(scope="session")
def archive(
    digits: tuple[NDArray[np.uint8], NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory
) -> Archive:
    """7 images to train on, 3 to validate with, 2 to test with, each 512 px wide, of the classes 0 and 1."""
    config = DigitsConfig(
        num_train=7,
        num_val=3,
        num_test=2,
        classes=(0, 1),
        num_matching=4,
        num_other=0,
        num_clutter=4,
        side_px=512,
        gap_px=8,
    )
    return read_archive(build_archive(tmp_path_factory.mktemp("archive"), digits, config))

"""Reading the IDX files of MNIST: a magic number, big-endian sizes, then the bytes themselves.

The format is described on the MNIST page of LeCun, Cortes and Burges: two zero bytes, a type byte (8 is
uint8), the number of dimensions, one 32-bit size each, data in C order.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

from ats_stream.errors import InputError, MissingFileError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_MAX_BYTES = 1 << 30  # 1 GiB, far above any MNIST-like set; a broken size must not exhaust memory


def read(path: Path, *, num_dims: int) -> NDArray[np.uint8]:
    """Read one IDX file of uint8 in `num_dims` dimensions, gzip-compressed when its name ends in .gz.

    Raises MissingFileError when there is no such file, InputError when it is not a whole file of that kind.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            return _parse(cast("BinaryIO", stream), num_dims)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise InputError(f"{path}: not a whole {num_dims}-D IDX file of uint8: {error}") from error


def _parse(stream: BinaryIO, num_dims: int) -> NDArray[np.uint8]:
    magic = stream.read(4)
    expected = bytes([0, 0, 8, num_dims])
    if magic != expected:
        raise ValueError(f"magic {magic.hex() or 'missing'}, expected {expected.hex()}")
    shape = struct.unpack(f">{num_dims}I", stream.read(4 * num_dims))
    num_bytes = math.prod(shape)
    if num_bytes > _MAX_BYTES:
        raise ValueError(f"shape {shape} is {num_bytes} bytes, more than {_MAX_BYTES}")
    data = stream.read(num_bytes + 1)
    if len(data) != num_bytes:
        came = len(data) if len(data) < num_bytes else "more"
        raise ValueError(f"shape {shape} needs {num_bytes} bytes, {came} came")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)

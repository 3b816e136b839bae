"""The compiled CPU path of the exponential race: who arrives first in each row, and the mass of the others.

Imports numba on first use. Where numba cannot be used there is no compiled path, and callers keep to torch,
which gives the same bits.

Shapes: B rows, M positions, K arrivals kept, L levels of a sum.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ats_stream.compiled import compiled_module
from ats_stream.errors import InputError
from ats_stream.kernels.arithmetic import NUM_LEVELS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

_MIN_VALUES = 1 << 14  # below, torch is as fast, and numba need not be imported
_MIN_VALUES_PER_TASK = 1 << 17
_choice: bool | None = None


@contextmanager
def compiled_path(is_used: bool) -> Iterator[None]:
    """Force compiled code, or torch, whatever the size: for tests and benchmarks, not for several threads."""
    global _choice
    before, _choice = _choice, is_used
    try:
        yield
    finally:
        _choice = before


def is_torch_forced() -> bool:
    """Whether torch is to be used whatever the tensor."""
    return _choice is False


def is_compiled(logits_BM: Tensor) -> bool:
    """Whether :func:`race_cpu` is the way to handle these logits."""
    if logits_BM.device.type != "cpu" or _choice is False:
        return False
    if _choice is None and logits_BM.numel() < _MIN_VALUES:
        return False
    return _numba_code() is not None


def race_cpu(
    logits_BM: Tensor,
    num_kept: int,
    *,
    seed: int,
    stream_ids_B: Tensor,
    by_logit: bool,
    global_index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the race over columns in as many ranges as there are threads for, and join the ranges.

    ``logits_BM`` is any floating point CPU tensor without NaN or +inf. ``by_logit`` ranks by logit, without
    noise. Returns the fields of :class:`ats_stream.kernels.sample.Arrivals` but the last. The arithmetic is
    that of ats_stream.sampling.race, so the result is the same to the bit, whatever the ranges.
    """
    code = _numba_code()
    if code is None:
        raise InputError("the compiled race on CPU tensors needs numba, which cannot be imported")
    if logits_BM.stride(1) != 1:
        logits_BM = logits_BM.contiguous()
    num_rows, num_positions = logits_BM.shape
    kind, arrays = _as_arrays(code, logits_BM)
    if global_index is None:
        names, names_stride = np.empty(0, np.int64), 0
    else:
        index_BM = global_index.expand(num_rows, -1)
        if index_BM.stride(1) != 1:
            index_BM = index_BM.contiguous()
        names, names_stride = _flat(index_BM).numpy(), index_BM.stride(0)
    streams = stream_ids_B.contiguous().numpy().view(np.uint64)
    key = np.uint64(seed % (1 << 64))

    num_threads = min(torch.get_num_threads(), max(num_rows * num_positions // _MIN_VALUES_PER_TASK, 1))
    rows, columns = _ranges(num_rows, num_positions, num_threads, code.BLOCK)
    # T ranges of columns
    fields = (
        torch.empty(len(columns), num_rows, num_kept, dtype=torch.float64),
        torch.empty(len(columns), num_rows, num_kept, dtype=torch.int64),
        torch.empty(len(columns), num_rows, num_kept, dtype=torch.float64),
        torch.empty(len(columns), num_rows, dtype=torch.float64),
        torch.empty(len(columns), num_rows, NUM_LEVELS, dtype=torch.int64),
    )
    logs_2B = torch.empty(2, num_rows, dtype=torch.float64)
    out = [field.numpy() for field in fields]

    def run(task: tuple[int, range]) -> None:
        place, row = task
        code.run(
            kind,
            *arrays,
            logits_BM.stride(0),
            names,
            names_stride,
            streams,
            key,
            by_logit,
            row.start,
            columns[place].start,
            columns[place].stop,
            *(field[place, row.start : row.stop] for field in out),
        )

    tasks = [(place, row) for place in range(len(columns)) for row in rows]
    if len(tasks) == 1:
        run(tasks[0])
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(run, tasks))
    code.join(*out, logs_2B.numpy())
    # clones where other ranges would be kept alive
    key_BK, index_BK, logit_BK, peak_B, levels_BL = (
        field[0].clone() if len(columns) > 1 else field[0] for field in fields
    )
    return key_BK, index_BK, logit_BK, peak_B, levels_BL, logs_2B


def _ranges(
    num_rows: int, num_positions: int, num_threads: int, block: int
) -> tuple[list[range], list[range]]:
    """Cut rows and columns so that every thread has work; rows first, which need no merging."""
    num_row_ranges = min(num_rows, num_threads)
    if num_rows % num_threads and num_rows < 4 * num_threads:
        num_row_ranges = num_rows  # uneven shares of few rows: cut the columns as well
        num_column_ranges = num_threads
    else:
        num_column_ranges = 1
    most = max(num_positions // (4 * block), 1)
    return _cut(num_rows, num_row_ranges, 1), _cut(num_positions, min(num_column_ranges, most), block)


def _cut(size: int, num_ranges: int, unit: int) -> list[range]:
    length = -(-size // (num_ranges * unit)) * unit
    return [range(start, min(start + length, size)) for start in range(0, size, length)]


def _as_arrays(code: ModuleType, logits_BM: Tensor) -> tuple[int, list[np.ndarray[Any, Any]]]:
    """The kind of a tensor, and its storage as the one of three flat arrays that fits."""
    kinds = {
        torch.float64: (code.FLOAT64, 0),
        torch.float32: (code.FLOAT32, 1),
        torch.float16: (code.FLOAT16, 2),
        torch.bfloat16: (code.BFLOAT16, 2),
    }
    kind, place = kinds[logits_BM.dtype]
    arrays = [np.empty(0, dtype) for dtype in (np.float64, np.float32, np.int16)]
    flat = _flat(logits_BM)
    arrays[place] = (flat.view(torch.int16) if place == 2 else flat).numpy()
    return kind, arrays


def _flat(tensor: Tensor) -> Tensor:
    """One-dimensional view of rows, each contiguous, that may overlap or lie apart."""
    num_rows, num_columns = tensor.shape
    return tensor.as_strided(((num_rows - 1) * tensor.stride(0) + num_columns,), (1,))


def _numba_code() -> ModuleType | None:
    return compiled_module("ats_stream.kernels.sample_numba")

"""Sample: who arrives first in the exponential race of each row, and the mass of the others, in one pass.

Shapes: B rows, M positions, K arrivals kept, L levels of a sum, P parts of a row.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ats_stream.errors import InputError
from ats_stream.kernels.arithmetic import NUM_LEVELS
from ats_stream.kernels.checks import check_tensors
from ats_stream.kernels.launch import Launch, launch_on_current_stream, require_cupy
from ats_stream.kernels.sample_cpu import is_compiled, is_torch_forced, race_cpu

logger = logging.getLogger(__name__)

_CPP_LOGITS = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_CAPACITY = 2048  # arrivals that a block can hold, as sample.cu says
_MIN_ROOM = 256
MAX_KEPT = _CAPACITY // 2
"""Arrivals that the CUDA kernels keep at most."""
_MAX_POSITIONS = (1 << 31) - 1  # the kernels count the places of a row in 32 bits
_WARP = 32
_BLOCK = 256  # as MAX_THREADS in sample.cu says
_BLOCKS_PER_MULTIPROCESSOR = 3  # as __launch_bounds__ there says
_MIN_TILES_PER_PART = (
    4  # below, filling and merging the arrivals of a part costs more than another part saves
)
_WORDS_BESIDE = 5  # of a part, beside its arrivals: peak, levels, largest


@dataclass(frozen=True)
class Arrivals:
    """The first arrivals of each row, ascending, short rows padded with +inf, PADDING_INDEX and -inf."""

    key: Tensor
    """(B, K) float64 log E - logit, ascending; equal keys by index."""
    index: Tensor
    """(B, K) int64."""
    logit: Tensor
    """(B, K) float64."""
    peak: Tensor
    """(B,) float64, largest of the other logits; -inf if there are none."""
    levels: Tensor
    """(B, L) int64, sum of the weights of the others, see ats_stream.sampling.mass."""
    logs: Tensor
    """(2, B) float64 log-sum-exp of all logits, and of those behind the first K - 1 arrivals."""
    largest: Tensor
    """(B,) float64 the largest logit, NaN if there is one. NaN and +inf show here; they never arrive."""


def sample_race(
    logits_BM: Tensor,
    num_kept: int,
    *,
    seed: Tensor,
    stream_ids_B: Tensor,
    by_logit: bool = False,
    global_index: Tensor | None = None,
) -> Arrivals:
    """Return the ``num_kept`` first arrivals of each row, by key = log E - logit, E of Philox4x32-10.

    ``logits_BM`` is float64, float32, float16 or bfloat16; -inf never arrives. E is a unit exponential from
    53 bits of the Philox words of (index, stream id of the row) under ``seed``, an int64 tensor () on the
    device of the logits, which no host reads. ``by_logit`` ranks by logit alone, key = -logit.
    ``global_index`` (M,) or (B, M) int64 in [0, 2^34) names the positions; by default they are 0..M-1.

    A CPU tensor goes through numba, a CUDA tensor through two CuPy kernels on torch's current stream, which
    the call does not wait for; both give the same bits, whatever the grid. The operator behind is
    ``torch.ops.ats_stream.sample_race``.

    Raises InputError for a dtype, shape, device or layout other than these; on CUDA for more than
    :data:`MAX_KEPT` arrivals or 2^31 - 1 positions, and where CuPy is not installed.

    >>> found = sample_race(torch.tensor([[0.0, 2.0, 1.0]]), 2, seed=torch.tensor(0),
    ...                     stream_ids_B=torch.tensor([0]), by_logit=True)
    >>> found.index.tolist(), found.peak.tolist()
    ([[1, 2]], [0.0])
    """
    check_tensors(logits_BM=logits_BM, seed=seed, stream_ids_B=stream_ids_B)
    if global_index is not None:
        check_tensors(global_index=global_index)
    if not isinstance(num_kept, (int, torch.SymInt)):
        raise InputError(f"num_kept is {num_kept!r}, expected a whole number")
    return Arrivals(*_sample_race(logits_BM, num_kept, seed, stream_ids_B, by_logit, global_index))


def is_handled(logits_BM: Tensor, num_kept: int) -> bool:
    """Whether :func:`sample_race` is the way to handle these logits; else torch does the same, slower."""
    if logits_BM.device.type != "cuda":
        return is_compiled(logits_BM)
    fits = num_kept <= MAX_KEPT and logits_BM.shape[1] <= _MAX_POSITIONS and logits_BM.dtype in _CPP_LOGITS
    return fits and not is_torch_forced() and _has_cupy()


@functools.cache
def _has_cupy() -> bool:
    try:
        require_cupy(torch.device("cuda"))
    except InputError as error:
        logger.warning("draws on CUDA go through torch, many times slower: %s", error)
        return False
    return True


_Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _check(
    logits_BM: Tensor, num_kept: int, seed: Tensor, stream_ids_B: Tensor, global_index: Tensor | None
) -> None:
    """Raise InputError unless the race can be run on these; reads no element, so that no device waits."""
    shape = tuple(logits_BM.shape)
    if logits_BM.ndim != 2 or 0 in shape or logits_BM.dtype not in _CPP_LOGITS:
        expected = ", ".join(str(dtype) for dtype in _CPP_LOGITS)
        raise InputError(f"logits must be (B, M) of one of {expected}; got {logits_BM.dtype} {shape}")
    if num_kept < 1:
        raise InputError(f"num_kept must be at least 1, got {num_kept}")
    if logits_BM.device.type == "cuda":
        if num_kept > MAX_KEPT:
            raise InputError(f"num_kept must be at most {MAX_KEPT} on CUDA, got {num_kept}")
        if shape[1] > _MAX_POSITIONS:
            raise InputError(f"logits {shape} have more than {_MAX_POSITIONS} positions in a row")
    wanted: list[tuple[str, Tensor, tuple[tuple[int, ...], ...]]] = [
        ("seed", seed, ((),)),
        ("stream_ids_B", stream_ids_B, ((shape[0],),)),
    ]
    if global_index is not None:
        wanted.append(("global_index", global_index, ((shape[1],), shape)))
    for name, value, shapes in wanted:
        if value.dtype != torch.int64 or tuple(value.shape) not in shapes:
            got = f"{value.dtype} {tuple(value.shape)}"
            raise InputError(f"{name} must be int64 {' or '.join(map(str, shapes))}, got {got}")
        if value.device != logits_BM.device:
            raise InputError(
                f"{name} is on {value.device}, expected {logits_BM.device}, where the logits are"
            )


@torch.library.custom_op("ats_stream::sample_race", mutates_args=(), device_types="cpu")
def _sample_race(
    logits_BM: Tensor,
    num_kept: int,
    seed: Tensor,
    stream_ids_B: Tensor,
    by_logit: bool,
    global_index: Tensor | None,
) -> _Fields:
    _check(logits_BM, num_kept, seed, stream_ids_B, global_index)
    largest_B = logits_BM.amax(dim=1).double()  # NaN wins over everything
    if bool((largest_B.isnan() | largest_B.isposinf()).any()):
        logits_BM = logits_BM.masked_fill(~(logits_BM < float("inf")), float("-inf"))
    fields = race_cpu(
        logits_BM,
        num_kept,
        seed=int(seed),
        stream_ids_B=stream_ids_B,
        by_logit=by_logit,
        global_index=global_index,
    )
    return *fields, largest_B


def _empty_fields(logits_BM: Tensor, num_kept: int) -> _Fields:
    num_rows = logits_BM.shape[0]
    return (
        logits_BM.new_empty((num_rows, num_kept), dtype=torch.float64),
        logits_BM.new_empty((num_rows, num_kept), dtype=torch.int64),
        logits_BM.new_empty((num_rows, num_kept), dtype=torch.float64),
        logits_BM.new_empty(num_rows, dtype=torch.float64),
        logits_BM.new_empty((num_rows, NUM_LEVELS), dtype=torch.int64),
        logits_BM.new_empty((2, num_rows), dtype=torch.float64),
        logits_BM.new_empty(num_rows, dtype=torch.float64),
    )


@_sample_race.register_fake
def _sample_race_fake(
    logits_BM: Tensor,
    num_kept: int,
    seed: Tensor,
    stream_ids_B: Tensor,
    by_logit: bool,  # noqa: ARG001  the operator's signature
    global_index: Tensor | None,
) -> _Fields:
    _check(logits_BM, num_kept, seed, stream_ids_B, global_index)
    return _empty_fields(logits_BM, num_kept)


@_sample_race.register_kernel("cuda")
def _sample_race_cuda(
    logits_BM: Tensor,
    num_kept: int,
    seed: Tensor,
    stream_ids_B: Tensor,
    by_logit: bool,
    global_index: Tensor | None,
) -> _Fields:
    _check(logits_BM, num_kept, seed, stream_ids_B, global_index)
    multiprocessors = torch.cuda.get_device_properties(logits_BM.device).multi_processor_count
    num_rows, num_positions = logits_BM.shape
    num_blocks = multiprocessors * _BLOCKS_PER_MULTIPROCESSOR
    plan = plan_race(num_rows, num_positions, num_kept, num_blocks=num_blocks)
    race = Race.of(logits_BM, num_kept, seed, stream_ids_B, by_logit, global_index, plan)
    for launch in race.launches():
        launch_on_current_stream(launch, logits_BM.device)
    return race.fields


@dataclass(frozen=True, kw_only=True)
class RacePlan:
    """How the kernels share the work; the result does not depend on it."""

    num_parts: int
    """Parts of each row, a block each."""
    block: int
    """Threads of a block, a multiple of 32."""
    room: int
    """Arrivals that a block holds before it keeps the first K of them: more than K, less often sorted."""


def plan_race(num_rows: int, num_positions: int, num_kept: int, *, num_blocks: int) -> RacePlan:
    """Share rows among ``num_blocks`` blocks, as many as run at once; pure.

    >>> plan_race(16, 1_000_000, 65, num_blocks=396)
    RacePlan(num_parts=24, block=256, room=512)
    >>> plan_race(16, 400, 11, num_blocks=396)
    RacePlan(num_parts=1, block=128, room=256)
    """
    block = min(_BLOCK, -(-num_positions // (4 * _WARP)) * _WARP)
    num_tiles = -(-num_positions // (4 * block))
    return RacePlan(
        num_parts=max(1, min(num_blocks // num_rows, num_tiles // _MIN_TILES_PER_PART)),
        block=block,
        room=min(_CAPACITY, max(_MIN_ROOM, 1 << (4 * num_kept - 1).bit_length())),
    )


@dataclass(frozen=True, kw_only=True)
class Race:
    """A race about to be run by sample.cu: the tensors that its two launches name, kept alive."""

    logits_BM: Tensor
    seed: Tensor
    stream_ids_B: Tensor
    names_BM: Tensor | None
    by_logit: bool
    plan: RacePlan
    parts: Tensor
    """(B, P, 3 K + 5) int64, written by the first launch and read by the second."""
    fields: _Fields
    """What the operator returns, written by the second launch."""

    @classmethod
    def of(
        cls,
        logits_BM: Tensor,
        num_kept: int,
        seed: Tensor,
        stream_ids_B: Tensor,
        by_logit: bool,
        global_index: Tensor | None,
        plan: RacePlan,
    ) -> Race:
        """Allocate what is written, for tensors that the operator has accepted."""
        num_rows = logits_BM.shape[0]
        words = 3 * num_kept + _WORDS_BESIDE
        return cls(
            logits_BM=_with_rows(logits_BM),
            seed=seed,
            stream_ids_B=stream_ids_B.contiguous(),
            names_BM=None if global_index is None else _with_rows(global_index.expand(num_rows, -1)),
            by_logit=by_logit,
            plan=plan,
            parts=logits_BM.new_empty((num_rows, plan.num_parts, words), dtype=torch.int64),
            fields=_empty_fields(logits_BM, num_kept),
        )

    def launches(self) -> tuple[Launch, Launch]:
        """The race and the merging of its parts; pure."""
        num_rows, num_positions = self.logits_BM.shape
        num_kept = self.fields[0].shape[1]
        names = (0, 0) if self.names_BM is None else (self.names_BM.data_ptr(), self.names_BM.stride(0))
        sizes = (np.uint32(num_kept), np.uint32(self.plan.room), np.uint32(self.plan.num_parts))
        parts = np.uint64(self.parts.data_ptr())
        race = Launch(
            source="sample.cu",
            expression=f"sample_race<{_CPP_LOGITS[self.logits_BM.dtype]}>",
            grid=(num_rows * self.plan.num_parts, 1),
            block=(self.plan.block,),
            args=(
                np.uint64(self.logits_BM.data_ptr()),
                np.int64(self.logits_BM.stride(0)),
                np.int64(num_positions),
                np.uint64(names[0]),
                np.int64(names[1]),
                np.uint64(self.stream_ids_B.data_ptr()),
                np.uint64(self.seed.data_ptr()),
                np.int32(self.by_logit),
                *sizes,
                parts,
            ),
        )
        merge = Launch(
            source="sample.cu",
            expression="sample_merge",
            grid=(num_rows, 1),
            block=(self.plan.block,),
            args=(parts, *sizes, *(np.uint64(field.data_ptr()) for field in self.fields)),
        )
        return race, merge


def _with_rows(matrix: Tensor) -> Tensor:
    """The same values, neighbours within each row of which lie side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()

"""The arguments of the two gather operators, and what they refuse before any launch.

Shapes: N patches, C channels, S the space axes of a patch (D of them), T chunks, I images, L elements of
memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from ats_stream.errors import InputError
from ats_stream.kernels.checks import check_tensors
from ats_stream.kernels.orientation import NUM_AXES, NUM_CODES, source_size
from ats_stream.kernels.table import MAX_ENTRIES, MAX_SIDE, PIXEL_TYPES, ChunkTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OUTPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class CropsCall(NamedTuple):
    """What ``ats_stream::gather_crops`` is called with, in the order of its schema."""

    crops_NCS: torch.Tensor
    scale_C: torch.Tensor
    shift_C: torch.Tensor
    dtype: torch.dtype
    is_interleaved: bool = False
    channels_last: bool = False
    orientation_N: torch.Tensor | None = None
    intensity_N2: torch.Tensor | None = None

    @property
    def patch(self) -> tuple[int, ...]:
        """Pixels of a crop along its axes."""
        return tuple(self.crops_NCS.shape[1:-1] if self.is_interleaved else self.crops_NCS.shape[2:])

    @property
    def is_plain(self) -> bool:
        """Whether every pixel stays in its place and keeps its value."""
        return self.orientation_N is None and self.intensity_N2 is None

    def check(self) -> None:
        """Raise InputError unless the kernel may be given these; reads no element, so no device waits."""
        crops = self.crops_NCS
        _check_pixels("crops_NCS", crops)
        shape = tuple(crops.shape)
        if not 1 <= len(shape) - 2 <= NUM_AXES:
            expected = "(N, *patch, C)" if self.is_interleaved else "(N, C, *patch)"
            raise InputError(
                f"crops_NCS has shape {shape}, expected {expected} with 1 to {NUM_AXES} space axes"
            )
        if 0 in shape:
            raise InputError(f"crops_NCS has shape {shape}, expected every size to be at least 1")
        channels = shape[-1] if self.is_interleaved else shape[1]
        if shape[0] * channels > MAX_ENTRIES:
            raise InputError(
                f"crops_NCS has {shape[0]} x {channels} planes (N x C), at most {MAX_ENTRIES} are possible"
            )
        _check_patch(self.patch)
        self._check_others(crops, shape[0], channels)
        if not crops.is_contiguous():
            raise InputError(f"crops_NCS has strides {tuple(crops.stride())}, expected a contiguous tensor")

    def _check_others(self, pixels: torch.Tensor, num_crops: int, num_channels: int) -> None:
        what = f"the channels of {tuple(pixels.shape)}"
        _check_constants(self.scale_C, self.shift_C, num_channels, what)
        _check_moves(self.orientation_N, self.intensity_N2, num_crops)
        _check_output(self.dtype)
        tensors = (self.scale_C, self.shift_C, self.orientation_N, self.intensity_N2)
        names = ("scale_C", "shift_C", "orientation_N", "intensity_N2")
        _check_devices("crops_NCS", pixels, zip(names, tensors, strict=True))

    def check_values(self) -> None:
        """Raise InputError for orientations and intensities that mean nothing; for tensors on the CPU."""
        _check_values(self.orientation_N, self.intensity_N2)
        for code in _codes(self.orientation_N):
            if source_size(code, self.patch) != self.patch:
                raise InputError(
                    f"orientation {code} exchanges axes of different sizes in crops of {self.patch}"
                )

    def output(self) -> torch.Tensor:
        """Allocate the result."""
        num_channels = self.crops_NCS.shape[-1 if self.is_interleaved else 1]
        return _empty(
            (self.crops_NCS.shape[0], num_channels, *self.patch), self.dtype, self.scale_C, self.channels_last
        )


class PatchesCall(NamedTuple):
    """What ``ats_stream::gather_patches`` is called with, in the order of its schema."""

    pixels_L: torch.Tensor
    starts_T: torch.Tensor
    images_I7: torch.Tensor
    image_N: torch.Tensor
    offsets_ND: torch.Tensor
    scale_C: torch.Tensor
    shift_C: torch.Tensor
    chunk_shape: Sequence[int]
    chunk_channels: int
    is_interleaved: bool
    patch_size: Sequence[int]
    dtype: torch.dtype
    channels_last: bool = False
    orientation_N: torch.Tensor | None = None
    intensity_N2: torch.Tensor | None = None
    fill: float = 0.0
    absent: float = 0.0

    @property
    def table(self) -> ChunkTable:
        """The table in one piece."""
        return ChunkTable(
            pixels_L=self.pixels_L,
            starts_T=self.starts_T,
            images_I7=self.images_I7,
            chunk_shape=tuple(self.chunk_shape),
            num_channels=len(self.scale_C),
            chunk_channels=self.chunk_channels,
            is_interleaved=self.is_interleaved,
            absent=self.absent,
        )

    def check(self) -> None:
        """Raise InputError unless the kernel may be given these; reads no element, so no device waits."""
        _check_pixels("pixels_L", self.pixels_L)
        if self.scale_C.ndim != 1:
            raise InputError(f"scale_C has shape {tuple(self.scale_C.shape)}, expected (C,)")
        self.table.check_layout()
        num_patches, num_axes = len(self.image_N) if self.image_N.ndim else 0, len(self.chunk_shape)
        if len(self.patch_size) != num_axes:
            raise InputError(f"a patch of {tuple(self.patch_size)} does not fit chunks of {self.chunk_shape}")
        _check_patch(self.patch_size)
        if self.image_N.ndim != 1 or not 1 <= num_patches <= MAX_ENTRIES:
            raise InputError(f"image_N has shape {tuple(self.image_N.shape)}, expected (N,), N at least 1")
        _check_tensor("image_N", self.image_N, torch.int64, (num_patches,), "one per patch")
        _check_tensor("offsets_ND", self.offsets_ND, torch.int64, (num_patches, num_axes), "(N, D)")
        _check_constants(self.scale_C, self.shift_C, len(self.scale_C), "the channels")
        _check_moves(self.orientation_N, self.intensity_N2, num_patches)
        _check_output(self.dtype)
        names = ("starts_T", "images_I7", "image_N", "offsets_ND", "scale_C", "shift_C")
        tensors = [(name, getattr(self, name)) for name in (*names, "orientation_N", "intensity_N2")]
        _check_devices("pixels_L", self.pixels_L, tensors)

    def check_values(self) -> None:
        """Raise InputError for tables, images, orientations and intensities that mean nothing, on the CPU."""
        self.table.check_values()
        if not bool(((self.image_N >= 0) & (self.image_N < len(self.images_I7))).all()):
            raise InputError(f"image_N names an image beyond the {len(self.images_I7)} of the table")
        _check_values(self.orientation_N, self.intensity_N2)
        for code in _codes(self.orientation_N):
            source_size(code, tuple(self.patch_size))

    def output(self) -> torch.Tensor:
        """Allocate the result."""
        shape = (self.image_N.shape[0], self.scale_C.shape[0], *self.patch_size)
        return _empty(shape, self.dtype, self.scale_C, self.channels_last)


def beside(
    scale_C: torch.Tensor, orientation_N: torch.Tensor | None, intensity_N2: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Put small tables that came from the CPU, and are checked there, beside the constants."""
    is_elsewhere = scale_C.device.type != "cpu"
    if is_elsewhere:
        on_cpu = [
            None if value is None or value.device.type != "cpu" else value
            for value in (orientation_N, intensity_N2)
        ]
        _check_values(*on_cpu)
    return (
        orientation_N if orientation_N is None else orientation_N.to(scale_C.device, non_blocking=True),
        intensity_N2 if intensity_N2 is None else intensity_N2.to(scale_C.device, non_blocking=True),
    )


def check_kinds(
    dtype: torch.dtype,
    orientation_N: torch.Tensor | None,
    intensity_N2: torch.Tensor | None,
    **tensors: torch.Tensor,
) -> None:
    """Raise InputError for arguments of the wrong kind, which the operator would refuse in other words."""
    moves = {"orientation_N": orientation_N, "intensity_N2": intensity_N2}
    check_tensors(**tensors, **{name: value for name, value in moves.items() if value is not None})
    for name in ("scale_C", "shift_C"):
        if torch.is_grad_enabled() and tensors[name].requires_grad:
            raise InputError(f"{name} requires a gradient, expected constants: the operator has none")
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype is {dtype!r}, expected one of {_listed(OUTPUT_TYPES)}")


def _check_pixels(name: str, pixels: torch.Tensor) -> None:
    if pixels.device.type not in ("cpu", "cuda", "meta"):
        raise InputError(f"{name} is on {pixels.device}, expected cpu or cuda")
    if pixels.dtype not in PIXEL_TYPES:
        raise InputError(f"{name} is {pixels.dtype}, expected one of {_listed(PIXEL_TYPES)}")
    if pixels.requires_grad and torch.is_grad_enabled():
        raise InputError(f"{name} requires a gradient: the operator has none")


def _check_patch(patch_size: Sequence[int]) -> None:
    sizes = tuple(patch_size)
    if not all(1 <= size <= MAX_SIDE for size in sizes) or math.prod(sizes) > MAX_ENTRIES:
        raise InputError(
            f"a patch of {sizes} pixels: sides must be 1 to {MAX_SIDE}, and {MAX_ENTRIES} pixels at most"
        )


def _check_constants(scale_C: torch.Tensor, shift_C: torch.Tensor, num_channels: int, what: str) -> None:
    for name, value in (("scale_C", scale_C), ("shift_C", shift_C)):
        _check_tensor(name, value, torch.float32, (num_channels,), what)


def _check_moves(
    orientation_N: torch.Tensor | None, intensity_N2: torch.Tensor | None, num_patches: int
) -> None:
    if orientation_N is not None:
        _check_tensor("orientation_N", orientation_N, torch.uint8, (num_patches,), "one per patch")
    if intensity_N2 is not None:
        _check_tensor(
            "intensity_N2", intensity_N2, torch.float32, (num_patches, 2), "gain and offset per patch"
        )


def _check_tensor(
    name: str, value: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], what: str
) -> None:
    if value.dtype != dtype:
        raise InputError(f"{name} is {value.dtype}, expected {dtype}")
    if tuple(value.shape) != shape:
        raise InputError(f"{name} has shape {tuple(value.shape)}, expected {shape}, {what}")
    if not value.is_contiguous():
        raise InputError(f"{name} has strides {tuple(value.stride())}, expected a contiguous tensor")


def _check_output(dtype: torch.dtype) -> None:
    if dtype not in OUTPUT_TYPES:
        raise InputError(f"dtype is {dtype}, expected one of {_listed(OUTPUT_TYPES)}")


def _check_devices(
    name: str, pixels: torch.Tensor, others: Iterable[tuple[str, torch.Tensor | None]]
) -> None:
    tensors = [(other, value) for other, value in others if value is not None]
    devices = {value.device for _, value in tensors}
    is_read_from_host = pixels.device.type == "cpu" and {device.type for device in devices} == {"cuda"}
    if is_read_from_host and len(devices) == 1:
        if pixels.is_pinned():
            return
        raise InputError(
            f"{name} is on cpu, expected {devices.pop()}, where the others are, or memory that is pinned"
        )
    for other, value in tensors:
        if value.device != pixels.device:
            raise InputError(f"{other} is on {value.device}, expected {pixels.device}, where {name} is")


def _codes(orientation_N: torch.Tensor | None) -> list[int]:
    """The orientations that occur."""
    return [] if orientation_N is None else sorted(set(orientation_N.tolist()))


def _check_values(orientation_N: torch.Tensor | None, intensity_N2: torch.Tensor | None) -> None:
    if orientation_N is not None and orientation_N.numel() and int(orientation_N.max()) >= NUM_CODES:
        raise InputError(
            f"orientation_N holds {int(orientation_N.max())}, expected numbers below {NUM_CODES}"
        )
    if intensity_N2 is not None and not bool(intensity_N2.isfinite().all()):
        raise InputError("intensity_N2 holds numbers that are not finite")


def _empty(
    shape: Sequence[int], dtype: torch.dtype, beside_C: torch.Tensor, channels_last: bool
) -> torch.Tensor:
    """New memory on the device of ``beside_C``, seen as (N, C, S)."""
    num_patches, num_channels, *patch = shape
    if not channels_last:
        return torch.empty(num_patches, num_channels, *patch, dtype=dtype, device=beside_C.device)
    return torch.empty(num_patches, *patch, num_channels, dtype=dtype, device=beside_C.device).movedim(-1, 1)


def _listed(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)

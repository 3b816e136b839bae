"""The gather on a device, for benchmarks/kernels.py: 256 patches of 3 x 224 x 224 uint8.

The ways, to the same normalised batch, with the pixels on the device:

    crops      gather_crops
    last       gather_crops to channels last
    patches    gather_patches from chunks of 3 x 512 x 512 that lie in any order
    turned     the same, each patch turned by a quarter
    torch      slices of the image, stacked, to float, times scale, plus shift, to the output's dtype
    torch_crops  the same without the slices
    one_thread_per_patch  one_thread_per_patch.cu (float32 alone)
    floor      the bytes of input and output at the rate at which this device copies

and with the crops in pinned memory of the host, batch after batch:

    overlapped feeder: copy on a side stream, gather on the main one
    zero_copy  the kernel reads the pinned memory
    pinned copy  the floor: the copies alone
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from kernels_sample import median_ms

from ats_stream.kernels import ChunkTable, gather_crops, gather_patches, normalisation
from ats_stream.kernels.feeder import DeviceFeeder, Staged
from ats_stream.kernels.launch import require_cupy
from ats_stream.kernels.orientation import quarter_turn

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_PATCHES, CHANNELS, SIDE, IMAGE_SIDE, CHUNK = 256, 3, 224, 8192, 512
NUM_BATCHES = 40  # of the pipelines
COPY_SHARE_TARGET = 0.8  # of the rate of copies
TORCH_TARGET = 8.0  # times faster than torch
ONE_THREAD_TARGET = 50.0
PINNED_SHARE_TARGET = 0.9


def copy_rate() -> float:
    """Bytes read and written per second by a copy of 1 GiB on the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source)) * 1e-3)


def measure(*, bytes_per_s: float, quick: bool = False) -> list[dict[str, Any]]:
    num_patches, image_side = (8, 1024) if quick else (NUM_PATCHES, IMAGE_SIDE)
    scene = Scene(num_patches, image_side)
    cases = [on_device(scene, dtype, bytes_per_s) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    return [*cases, from_host(scene)]


class Scene:
    """An image on the device, whole and in chunks, and the crops of patches of it."""

    def __init__(self, num_patches: int, image_side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (CHANNELS, image_side, image_side)
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.offsets = torch.randint(0, image_side - SIDE, (num_patches, 2), generator=generator)
        num_side = image_side // CHUNK
        chunks = (
            image.view(CHANNELS, num_side, CHUNK, num_side, CHUNK)
            .permute(1, 3, 0, 2, 4)
            .flatten(0, 1)
            .contiguous()
        )
        order = torch.randperm(len(chunks), generator=generator)
        starts = torch.empty(len(chunks), dtype=torch.int64)
        starts[order] = torch.arange(len(chunks)) * chunks[0].numel()
        self.table = ChunkTable.of_chunks(
            chunks[order].view(-1), starts, [(image_side, image_side)], (CHUNK, CHUNK), num_channels=CHANNELS
        ).to(torch.device("cuda"))
        self.image = image.cuda()
        self.host_crops = self.cut(image)
        self.crops = self.host_crops.cuda()
        self.image_N = torch.zeros(num_patches, dtype=torch.int64, device="cuda")
        self.offsets_ND = self.offsets.cuda()
        self.turns_N = torch.full((num_patches,), quarter_turn(1), dtype=torch.uint8, device="cuda")
        constants = normalisation([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.scale_C, self.shift_C = (constant.cuda() for constant in constants)

    def cut(self, image: torch.Tensor) -> torch.Tensor:
        return torch.stack([image[:, y : y + SIDE, x : x + SIDE] for y, x in self.offsets.tolist()])

    def patches(self, dtype: torch.dtype, **options: Any) -> torch.Tensor:
        where = (self.table, self.image_N, self.offsets_ND, (SIDE, SIDE))
        return gather_patches(*where, self.scale_C, self.shift_C, dtype, **options)


def on_device(scene: Scene, dtype: torch.dtype, bytes_per_s: float) -> dict[str, Any]:
    scale_C11, shift_C11 = scene.scale_C[:, None, None], scene.shift_C[:, None, None]

    def normalised(crops_NCS: torch.Tensor) -> torch.Tensor:
        return (crops_NCS.float() * scale_C11 + shift_C11).to(dtype)

    constants = (scene.scale_C, scene.shift_C)
    ways: dict[str, Callable[[], Any]] = {
        "crops": lambda: gather_crops(scene.crops, *constants, dtype),
        "last": lambda: gather_crops(scene.crops, *constants, dtype, channels_last=True),
        "patches": lambda: scene.patches(dtype),
        "turned": lambda: scene.patches(dtype, orientation_N=scene.turns_N),
        "torch": lambda: normalised(scene.cut(scene.image)),
        "torch_crops": lambda: normalised(scene.crops),
    }
    wanted = ways["crops"]()
    assert torch.equal(wanted, ways["patches"]()), "crops and patches differ"
    assert torch.equal(wanted, ways["last"]()), "channels last differs"
    if dtype == torch.float32:
        ways["one_thread_per_patch"] = one_thread_per_patch(scene, wanted)
    times_ms = {name: median_ms(way) for name, way in ways.items()}
    floor_ms = (scene.crops.nbytes + wanted.nbytes) / bytes_per_s * 1e3
    share = floor_ms / times_ms["crops"]
    faster = times_ms["torch"] / times_ms["crops"]
    result: dict[str, Any] = {
        "case": f"{len(scene.crops)} x {CHANNELS} x {SIDE} x {SIDE} uint8 -> {dtype}".replace("torch.", ""),
        "ms": {name: round(value, 4) for name, value in {**times_ms, "floor": floor_ms}.items()},
        "share_of_copy_rate": round(share, 3),
        "share_of_copy_rate_from_chunks": round(floor_ms / times_ms["patches"], 3),
        "times_faster_than_torch": round(faster, 1),
        "targets_met": share >= COPY_SHARE_TARGET and faster >= TORCH_TARGET,
    }
    if "one_thread_per_patch" in times_ms:
        ratio = times_ms["one_thread_per_patch"] / times_ms["crops"]
        result["times_faster_than_one_thread_per_patch"] = round(ratio, 1)
        result["targets_met"] &= ratio >= ONE_THREAD_TARGET
    return result


def one_thread_per_patch(scene: Scene, wanted: torch.Tensor) -> Callable[[], None]:
    import numpy as np

    cupy = require_cupy(torch.device("cuda", 0))
    source = Path(__file__).with_name("one_thread_per_patch.cu").read_text()
    kernel = cupy.RawKernel(source, "one_thread_per_patch")
    out = torch.empty_like(wanted)
    pointers = [np.uint64(t.data_ptr()) for t in (scene.crops, scene.scale_C, scene.shift_C, out)]
    sizes = [np.int64(size) for size in (len(scene.crops), CHANNELS, SIDE * SIDE)]
    blocks = -(-len(scene.crops) // 32)

    def run() -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            kernel((blocks,), (32,), (*pointers, *sizes))

    run()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted), "one thread per patch gives something else"
    return run


def from_host(scene: Scene) -> dict[str, Any]:
    """Batches that are written into pinned memory beforehand, so that the link alone is measured."""
    kinds = [(scene.host_crops.shape, torch.uint8)]
    pinned = scene.host_crops.pin_memory()
    target = torch.empty_like(scene.crops)
    times_ms = {"floor": pipeline_ms(lambda _: target.copy_(pinned, non_blocking=True))}
    for name, feed in (("overlapped", "crops"), ("zero_copy", "zero_copy")):
        feeder = DeviceFeeder(torch.device("cuda"), feed=feed)
        for _ in range(2):  # both pieces of the ring hold crops
            reserved = feeder.reserve(kinds)
            reserved.tensors[0].copy_(scene.host_crops)
            staged = reserved.stage()
            staged.take()
            staged.release()
        ahead: list[Staged] = [feeder.reserve(kinds).stage()]

        def batch(_: int, feeder: DeviceFeeder = feeder, ahead: list[Staged] = ahead) -> None:
            ahead.append(feeder.reserve(kinds).stage())
            staged = ahead.pop(0)
            gather_crops(staged.take()[0], scene.scale_C, scene.shift_C, torch.bfloat16)
            staged.release()

        times_ms[name] = pipeline_ms(batch)
    share = times_ms["floor"] / times_ms["overlapped"]
    return {
        "case": f"{len(scene.crops)} host crops of {CHANNELS} x {SIDE} x {SIDE} uint8 -> bfloat16, a batch",
        "ms": {name: round(value, 4) for name, value in times_ms.items()},
        "pinned_copy_gb_per_s": round(scene.crops.nbytes / times_ms["floor"] / 1e6, 1),
        "share_of_pinned_copy_rate": round(share, 3),
        "targets_met": share >= PINNED_SHARE_TARGET,
    }


def pipeline_ms(batch: Callable[[int], Any]) -> float:
    """Time per batch of many that follow each other without waiting for the end of one."""
    for number in range(4):
        batch(number)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for number in range(NUM_BATCHES):
        batch(number)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / NUM_BATCHES

"""What a run takes, as computed, against enumeration and against what runs took."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tiny import MODEL, SAMPLER, make_sampler, run_config, visit, weights
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ats_stream.io.plan import plan_patches
from ats_stream.models import Batch, ModelConfig, PatchClassifier
from ats_stream.sampling import patch_offsets
from ats_stream.workers.probe import probe
from ats_stream.workers.sizing import (
    SAMPLER_PROCESS_BYTES,
    ImageFacts,
    Rates,
    Shape,
    expected_chunks,
    item_bytes,
    limits,
    sampler_work_bytes,
    size_up,
    step_work_bytes,
    touched_counts,
)

if TYPE_CHECKING:
    from ats_stream.io import Archive

TOLERANCE = 0.2
LEVELS = [
    # full, chunk, map, patch: odd sizes, a patch over every border, chunks larger than the image, fine chunks
    ((100, 70), (16, 16), (7, 5), 24),
    ((64, 64), (128, 128), (4, 4), 16),
    ((50, 90), (8, 32), (5, 3), 3),
    ((33, 33), (16, 16), (11, 11), 40),
]


def chunks_of(full: Any, chunk: Any, cells: Any, patch_px: int, positions: Any) -> set[tuple[int, ...]]:
    """What reading really plans for some positions."""
    index = torch.tensor([list(positions)])
    offsets = patch_offsets(index, cells, full, (patch_px, patch_px))[0].numpy()
    return {
        tuple(map(int, place)) for place in plan_patches(full, chunk, chunk, offsets, (patch_px,) * 2).chunks
    }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("full", "chunk", "cells", "patch_px"), LEVELS)
def test_counts_are_those_of_every_position(
    full: Any, chunk: Any, cells: Any, patch_px: int, masked: bool
) -> None:
    drawable = np.random.default_rng(0).random(cells) < 0.5 if masked else np.ones(cells, bool)
    counts = np.zeros([-(-n // c) for n, c in zip(full, chunk, strict=True)], np.int64)
    for position in np.flatnonzero(drawable):
        for place in chunks_of(full, chunk, cells, patch_px, [position]):
            counts[place] += 1
    found = touched_counts(full, chunk, cells, patch_px, drawable if masked else None)
    np.testing.assert_array_equal(found, counts)


@pytest.mark.parametrize(("num_patches", "replace"), [(1, False), (2, False), (3, False), (2, True)])
@pytest.mark.parametrize(("full", "chunk", "cells", "patch_px"), [LEVELS[1], LEVELS[2]])
def test_the_mean_is_that_over_every_possible_draw(
    full: Any, chunk: Any, cells: Any, patch_px: int, num_patches: int, replace: bool
) -> None:
    positions = range(math.prod(cells))
    draws = (
        itertools.product(positions, repeat=num_patches)
        if replace
        else itertools.combinations(positions, num_patches)
    )
    sizes = [len(chunks_of(full, chunk, cells, patch_px, drawn)) for drawn in draws]
    counts = touched_counts(full, chunk, cells, patch_px)
    found = expected_chunks(counts, len(positions), num_patches, replace=replace)
    assert found == pytest.approx(np.mean(sizes), rel=1e-12)


def test_more_patches_than_positions_read_all_that_is_drawable() -> None:
    counts = touched_counts((64, 64), (16, 16), (4, 4), 16, np.eye(4, dtype=bool))
    assert expected_chunks(counts, 4, 10) == 4


def test_what_is_read_and_sent_is_what_a_run_reads_and_sends(archive: Archive) -> None:
    train = [row for row in archive if row.split == "train"]
    config = dataclasses.replace(run_config(), model=dataclasses.replace(MODEL, attention="uniform"))
    found = probe(train, config, images_per_rank=2, on_cpu=False)
    sampler = make_sampler(archive, config.model)
    flat = weights(0, config.model)
    items = [
        sampler.sample(visit(image, epoch=epoch), flat)
        for epoch in range(5, 25)  # other draws than those that the probe looked at
        for image, row in enumerate(archive)
        if row.split == "train"
    ]
    shape = shape_of(num_images=len(train), batch_size=4)
    sizes = size_up(found.images, config.model, shape)
    assert sizes.decoded_bytes == pytest.approx(np.mean([item.decoded_bytes for item in items]), rel=0.05)
    assert sizes.stored_bytes == pytest.approx(np.mean([item.stored_bytes for item in items]), rel=TOLERANCE)
    assert sizes.step_bytes_later == 4 * sizes.stored_bytes  # the views of this archive are all kept
    assert sizes.item_bytes == {item.num_bytes for item in items}.pop()
    assert len({item.num_bytes for item in items}) == 1
    assert found.num_parameters == sum(p.numel() for p in PatchClassifier(config.model).parameters())


def shape_of(**changed: Any) -> Shape:
    given: dict[str, Any] = {
        "num_images": 10,
        "batch_size": 8,
        "num_patches": SAMPLER.num_patches,
        "patch_px": SAMPLER.patch_px,
        "lag": 1,
        "num_parameters": 1000,
        "num_nodes": 1,
        "num_ranks": 2,
        "samplers_per_rank": 1,
        "window": 16,
        "window_bytes": 1 << 40,
        "view_cache_bytes": 1 << 30,
        "use_gpu": False,
    }
    return Shape(**{**given, **changed})


def image(side: int, *, prior: bool = False) -> ImageFacts:
    return ImageFacts(
        view_shape=(3, side, side),
        pixel_bytes=1,
        has_prior=prior,
        num_chunks=10.0,
        chunk_bytes=3 * 128 * 128,
        stored_share=0.5,
        view_stored_bytes=1e5,
    )


class TensorPeak(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is open and not yet gone, and the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _forget(self, key: int, num_bytes: int) -> None:
        if key in self._known:
            self._known.discard(key)
            self.live -= num_bytes


STEPS = [
    # view, attention width, layers, images, patches, patch, feature width, prior
    (400, 8, 2, 1, 2, 32, 16, False),
    (400, 16, 3, 2, 2, 32, 16, True),
    (300, 4, 1, 4, 2, 32, 16, True),
    (16, 8, 2, 2, 8, 64, 32, False),
    (16, 8, 2, 2, 4, 96, 64, True),
    (128, 8, 2, 4, 10, 64, 32, True),
]


@pytest.mark.parametrize(
    ("side", "width", "layers", "images", "num_patches", "patch_px", "features", "prior"), STEPS
)
def test_a_training_step_holds_the_tensors_that_were_computed(
    side: int,
    width: int,
    layers: int,
    images: int,
    num_patches: int,
    patch_px: int,
    features: int,
    prior: bool,
) -> None:
    config = ModelConfig(
        num_classes=2, attention_width=width, attention_layers=layers, feature_width=features
    )
    model = PatchClassifier(config)
    optimiser = torch.optim.AdamW(model.parameters())
    facts = image(side, prior=prior)
    batch = Batch(
        views_CYX=[torch.zeros(3, side, side, dtype=torch.uint8) for _ in range(images)],
        log_priors_YX=[torch.zeros(side, side) if prior else None for _ in range(images)],
        crops_BNCPP=torch.zeros(images, num_patches, 3, patch_px, patch_px, dtype=torch.uint8),
        index_BN=torch.arange(num_patches).repeat(images, 1),
        weight_BN=torch.ones(images, num_patches),
    )
    held = sum(t.nbytes for t in [*batch.views_CYX, batch.crops_BNCPP])
    held += sum(t.nbytes for t in batch.log_priors_YX if t is not None)

    def step() -> None:
        prediction = model(batch)
        loss = F.cross_entropy(prediction.class_logits_BK, torch.zeros(images, dtype=torch.int64))
        optimiser.zero_grad()
        (loss - 0.01 * prediction.entropy_B.sum()).backward()
        optimiser.step()

    step()  # makes the optimiser's state
    gc.collect()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    with TensorPeak() as seen:
        step()
    measured = seen.peak + held + 12 * num_parameters  # values and moments were there before
    computed = step_work_bytes(
        facts,
        config,
        images=images,
        num_patches=num_patches,
        patch_px=patch_px,
        num_parameters=num_parameters,
    )
    assert computed == pytest.approx(measured, rel=TOLERANCE)


MEASURE = """
import sys
from pathlib import Path
import numpy as np
import dask.array
from ats_stream.io import open_pyramid
from ats_stream.models import AttentionNet, ModelConfig
from ats_stream.workers import AttentionWeights, PatchSampler, SamplerConfig, Visit
from ats_stream.workers.allocator import keep_freed_memory

side, width, layers = map(int, sys.argv[1:])
model = ModelConfig(num_classes=2, attention_width=width, attention_layers=layers)
# level 1 is 4 times as narrow; no pixel is stored
levels = [dask.array.zeros((3, n, n), dtype=np.uint8, chunks=(3, 128, 128)) for n in (4 * side, side)]
pyramids = {"small": open_pyramid([level[:, :256 >> 2 * k, :256 >> 2 * k] for k, level in enumerate(levels)]),
            "large": open_pyramid(levels)}
sampler = PatchSampler(list(pyramids), [0, 0], model, SamplerConfig(view_downsample=4, cache_bytes=0))
sampler._open = pyramids.__getitem__
view = np.zeros((3, side, side), np.uint8)
read = pyramids["large"].read
pyramids["large"].read = lambda level: view  # reading is not what is measured
arrays = {name: t.numpy() for name, t in AttentionNet(model).state_dict().items()}
weights = AttentionWeights.of(arrays)

def status_bytes(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])

for image in (0, 1):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_bytes("VmRSS")
    sampler.sample(Visit(image=image, step=0, stream_id=0, version=0, share=1.0), weights)
    grown = status_bytes("VmHWM") - before
print(grown)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize(
    ("side", "width", "layers"), [(1400, 16, 2), pytest.param(1400, 32, 1, marks=pytest.mark.slow)]
)
def test_a_sampler_takes_the_memory_that_was_computed(side: int, width: int, layers: int) -> None:
    # widths that are multiples of 16 take the same on processors with vectors of 8 floats
    command = [sys.executable, "-c", MEASURE, str(side), str(width), str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    config = ModelConfig(num_classes=2, attention_width=width, attention_layers=layers)
    assert sampler_work_bytes(image(side), config, 10, 64) == pytest.approx(int(done.stdout), rel=TOLERANCE)


def test_sizes_follow_the_cluster() -> None:
    config = ModelConfig(num_classes=2)
    shape = shape_of(num_images=100, num_ranks=4, num_nodes=2, window=10)
    base = size_up([image(64)], config, shape)
    assert base.store_bytes == 2 * 2 * 10 * item_bytes(image(64), shape.num_patches, shape.patch_px)
    item = base.item_bytes
    for window_bytes, items in ((5 * item, 5), (1, shape.images_per_rank)):
        bounded = size_up([image(64)], config, dataclasses.replace(shape, window_bytes=window_bytes))
        assert bounded.store_bytes == 2 * 2 * items * item
    assert base.view_bytes_later == 0
    assert base.device_bytes == 0
    # a fifth of the views fit into memory
    fifth = dataclasses.replace(shape, view_cache_bytes=100 * 3 * 64 * 64 // 5)
    assert size_up([image(64)], config, fifth).view_bytes_later == pytest.approx(0.8e5)
    # a sampler computes one item and holds three more; views that are read ahead find room in any case
    one_view = 3 * 64 * 64
    beside = SAMPLER_PROCESS_BYTES + base.sampler_work_bytes + 3 * (8 * 64 * 64 + base.item_bytes)
    assert base.sampler_bytes == beside + 100 * one_view
    assert size_up([image(64)], config, fifth).sampler_bytes == beside + 20 * one_view
    tenth = dataclasses.replace(shape, view_cache_bytes=100 * one_view // 10)
    assert size_up([image(64)], config, tenth).sampler_bytes == beside + 16 * one_view
    # an average takes 4 bytes a parameter more; accumulation holds fewer images at a time
    averaged = size_up([image(64)], config, dataclasses.replace(shape, has_average=True))
    assert averaged.step_work_bytes == base.step_work_bytes + 4 * shape.num_parameters
    assert shape.images_per_rank == 2
    halved = size_up([image(64)], config, dataclasses.replace(shape, accumulate=2))
    parameters = 16 * shape.num_parameters
    assert halved.step_work_bytes - parameters == pytest.approx(
        (base.step_work_bytes - parameters) / 2, abs=1
    )
    on_gpu = size_up([image(64)], config, dataclasses.replace(shape, use_gpu=True))
    assert on_gpu.device_bytes == base.step_work_bytes
    assert on_gpu.rank_bytes < base.rank_bytes
    # flows are means, memory is that of the largest
    mixed = size_up([image(64), dataclasses.replace(image(128), num_chunks=30.0)], config, shape)
    assert mixed.decoded_bytes == 2 * base.decoded_bytes
    assert mixed.item_bytes == item_bytes(image(128), shape.num_patches, shape.patch_px)


def test_the_tightest_part_comes_first() -> None:
    sizes = size_up([image(64)], ModelConfig(num_classes=2), shape_of())
    fast = Rates(storage_bytes_per_s=1e12, link_bytes_per_s=1e12, sampler_s=0.1, rank_s=0.01)
    assert list(limits(sizes, shape_of(), fast).items())[:2] == [("samplers", 20.0), ("ranks", 200.0)]
    assert next(iter(limits(sizes, shape_of(lag=0), fast).items())) == (
        "in turn",
        pytest.approx(1 / (1 / 20 + 1 / 200)),
    )
    assert next(iter(limits(sizes, shape_of(samplers_per_rank=40), fast))) == "ranks"
    slow_storage = dataclasses.replace(fast, storage_bytes_per_s=1e5)
    tightest = next(iter(limits(sizes, shape_of(), slow_storage).items()))
    assert tightest == ("storage", pytest.approx(1e5 / sizes.stored_bytes))
    slow_link = dataclasses.replace(fast, link_bytes_per_s=1e5)
    assert next(iter(limits(sizes, shape_of(), slow_link))) == "link"
    assert "ranks" not in limits(sizes, shape_of(), dataclasses.replace(fast, rank_s=None))


def test_gradients_travel_only_between_nodes() -> None:
    rates = Rates(storage_bytes_per_s=1e9, link_bytes_per_s=1e9, sampler_s=0.1, rank_s=0.1)
    shape = shape_of(num_parameters=10_000_000, num_ranks=4, batch_size=8)
    sizes = size_up([image(64)], ModelConfig(num_classes=2), shape)
    per_step = sizes.step_bytes_later
    assert limits(sizes, shape, rates)["link"] == pytest.approx(8e9 / per_step)
    two = dataclasses.replace(shape, num_nodes=2)
    ring = 2 * 4 * 10_000_000 * 3 / 4  # float32, there and back, in a ring of 4
    assert limits(sizes, two, rates)["link"] == pytest.approx(8e9 / (per_step / 2 + ring))

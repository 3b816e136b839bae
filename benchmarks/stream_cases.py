"""Images for the benchmark of the stream, and engines that train on them or time one image at a time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from machine import mib, peak_bytes
from synthetic_slide import tissue_block

from ats_stream.io import PyramidWriter
from ats_stream.models import ModelConfig
from ats_stream.sampling import patch_offsets
from ats_stream.workers import AttentionWeights, PatchSampler, Plan, RunConfig, SamplerConfig, TrainerConfig
from ats_stream.workers.learner import Learner
from ats_stream.workers.ranks import Alone

if TYPE_CHECKING:
    from pathlib import Path

Array = npt.NDArray[Any]
CHUNK_PX = 128
# a patch of this side lies on 2 x 2 chunks unless it begins in the first pixels of one
GROWING_PATCH_PX = 100
GROWING_PATCHES = 16
SPOTS_PER_SIDE = 8
SPOTS = "spots"


@dataclass(frozen=True, kw_only=True)
class Growing:
    """A square image of which single spots are stored, under a view of one size."""

    view_px: int
    cell_px: int
    """Side of a pixel of the view in pixels of full resolution."""

    @property
    def side_px(self) -> int:
        return self.view_px * self.cell_px

    @property
    def gigapixels(self) -> float:
        return self.side_px**2 / 1e9

    def spots(self) -> Array:
        """Cells of the view (y, x), spread over the image, on which a patch touches 2 x 2 chunks."""
        step = self.view_px / SPOTS_PER_SIDE
        good = [cell for cell in range(1, self.view_px - 1) if self._is_good(cell)]
        found = [min(good, key=lambda cell: abs(cell - (k + 0.5) * step)) for k in range(SPOTS_PER_SIDE)]
        return np.stack(np.meshgrid(found, found, indexing="ij"), axis=-1).reshape(-1, 2)

    def offsets(self, cells_N2: Array) -> Array:
        """First pixels (N, 2) of the patches on cells, as samplers have them."""
        index_1N = torch.from_numpy(cells_N2[:, 0] * self.view_px + cells_N2[:, 1])[None]
        size = (GROWING_PATCH_PX,) * 2
        found: Array = patch_offsets(index_1N, (self.view_px,) * 2, (self.side_px,) * 2, size)[0].numpy()
        return found

    def _is_good(self, cell: int) -> bool:
        first = int(self.offsets(np.array([[cell, cell]]))[0, 0])
        return first >= 0 and first % CHUNK_PX > CHUNK_PX - GROWING_PATCH_PX

    def write(self, target: Path) -> None:
        """Write the chunks under the spots' patches, a view of tissue, and a mask of the spots."""
        spots_S2 = self.spots()
        tissue = tissue_block(0, 0, 0).transpose(2, 0, 1)
        view_CYX = np.resize(tissue, (3, self.view_px, self.view_px))
        mask_YX = np.zeros((self.view_px,) * 2, np.uint8)
        mask_YX[tuple(spots_S2.T)] = 1
        shapes = [(3, self.side_px, self.side_px), (3, self.view_px, self.view_px)]
        with PyramidWriter(
            target, level_shapes=shapes, dtype="uint8", chunk_px=CHUNK_PX, fill_value=255
        ) as writer:
            for y, x in self.offsets(spots_S2) // CHUNK_PX:
                blocks = {
                    (int(y) + i, int(x) + j): tissue[:, i * CHUNK_PX :, j * CHUNK_PX :][
                        :, :CHUNK_PX, :CHUNK_PX
                    ]
                    for i in (0, 1)
                    for j in (0, 1)
                }
                writer.write_chunks(0, blocks)
            writer.write_shard(1, (0, 0), view_CYX)
            writer.write_label(SPOTS, mask_YX, downsample=self.cell_px)


class OneImage:
    """Trains on one image again and again, drawing anew each time; nothing is kept between visits."""

    def __init__(self, place: str, cell_px: int) -> None:
        torch.set_num_threads(1)
        model = ModelConfig(num_classes=2)
        sampler = SamplerConfig(
            num_patches=GROWING_PATCHES,
            patch_px=GROWING_PATCH_PX,
            view_downsample=cell_px,
            prior_label=SPOTS,
            cache_bytes=0,
        )
        config = RunConfig(
            model=model, sampler=sampler, trainer=TrainerConfig(batch_size=1), classes=("a", "b")
        )
        self._sampler = PatchSampler([place], [0], model, sampler)
        self._learner = Learner(
            config, Alone(), num_steps=10**6, target_RT=torch.zeros(1, 1), weight_R=torch.ones(1)
        )
        self._plan = Plan(images=(0,), batch_size=1, num_epochs=10**6, seed=0)
        self._step = 0

    def measure(self, num_visits: int) -> dict[str, float]:
        """Wall and processor time of so many visits, each drawn and trained on, and what they read."""
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        chunk_bytes = 0
        for _ in range(num_visits):
            (visit,) = self._plan.visits(self._step)
            weights = AttentionWeights.of(
                {name: t.numpy().copy() for name, t in self._learner.model.attention.state_dict().items()}
            )
            item = self._sampler.sample(visit, weights)
            self._learner.step([item])
            self._step += 1
            chunk_bytes += item.decoded_bytes
        return {
            "wall_s": time.perf_counter() - start_s,
            "cpu_s": time.process_time() - start_cpu_s,
            "items": num_visits,
            "decoded_bytes": chunk_bytes,
        }

    def memory(self) -> dict[str, float]:
        return {"peak_mib": mib(peak_bytes())}

    def close(self) -> None:
        pass

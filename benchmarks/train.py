"""A training step by attention sampling beside one that reads and encodes every patch of the image.

    .venv/bin/python benchmarks/train.py                    # 268 megapixels, stored in results/train.json
    .venv/bin/python benchmarks/train.py --quick            # a small version, written nowhere

One image, a pyramid of zstd chunks of a synthetic slide, and one model: attention network, feature network,
head. A step reads what it needs, computes loss and gradients, and updates the weights. The contestants:

* **ats-stream**: draws patches from the attention, reads and encodes these;
* **every patch**: the full-resolution baseline. It reads all patches of a grid without overlap, which covers
  the image, encodes each, and weighs it by the attention that lies on it: the exact expectation, for which
  all activations are kept until the gradient has come back;
* **every patch, computed twice**: the same gradient with less memory: features of one part after the other
  without gradients, then, part by part, again with them (checkpointing); pixels are kept, as bytes.

Each runs in a process of its own with one thread, and all take turns. The floor is the reading and encoding
of the drawn patches alone, without attention, gradients and update. Time is wall and processor time of a step
(of ours the mean of 20), the median of the turns; memory is the peak of the process, libraries included. 268
megapixels take some 12 GB of memory for the baseline, and 500 MB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from machine import describe_machine, mib, peak_bytes, print_contestants
from synthetic_slide import SlideConfig, make_slide, write_store
from targets import Target, print_targets
from torch import nn
from torch.nn import functional as F
from turns import Process, serve

from ats_stream.io import open_pyramid
from ats_stream.models import ModelConfig, PatchClassifier
from ats_stream.workers import AttentionWeights, PatchSampler, Plan, RunConfig, SamplerConfig, TrainerConfig
from ats_stream.workers.allocator import keep_freed_memory
from ats_stream.workers.learner import Learner
from ats_stream.workers.ranks import Alone

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path(__file__).parent / "results" / "train.json"
OURS, WHOLE, TWICE, FLOOR = "ats-stream", "every patch", "every patch, computed twice", "drawn patches alone"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    side_px: int = 16384
    patch_px: int = 64
    num_patches: int = 16
    feature_width: int = 16
    view_downsample: int = 32
    turns: int = 1
    steps: int = 20
    """Steps of ours in a turn; the baselines make one."""
    part: int = 2048
    """Patches that are computed at a time by who computes twice, and read at a time by both baselines."""

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(num_classes=2, feature_width=self.feature_width)


QUICK = Size(side_px=1024, num_patches=4, feature_width=8, view_downsample=4, turns=1, steps=2, part=100)


class Engine:
    """Trains on the image at a place; ``turn`` makes steps and says what each took."""

    def __init__(self, place: str, size: Size) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        self.place, self.size = place, size
        torch.manual_seed(0)
        self.model = PatchClassifier(size.model)
        self._optimiser = torch.optim.AdamW(self.model.parameters())

    def step(self) -> None:
        """One step."""
        raise NotImplementedError

    def warm_up(self) -> bool:
        """Load compiled code, and what else the first step brings."""
        self.step()
        return True

    def turn(self, num_steps: int) -> dict[str, float]:
        """Wall and processor time of a step."""
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for _ in range(num_steps):
            self.step()
        wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        return {"wall_s": wall_s / num_steps, "cpu_s": cpu_s / num_steps}

    def memory(self) -> dict[str, float]:
        return {"peak_mib": mib(peak_bytes())}

    def close(self) -> None:
        pass


class Sampling(Engine):
    """The package's sampler and learner."""

    def __init__(self, place: str, size: Size) -> None:
        super().__init__(place, size)
        sampler = SamplerConfig(
            num_patches=size.num_patches,
            patch_px=size.patch_px,
            view_downsample=size.view_downsample,
            cache_bytes=0,
        )
        trainer = TrainerConfig(batch_size=1)
        config = RunConfig(model=size.model, sampler=sampler, trainer=trainer, classes=("a", "b"))
        self._sampler = PatchSampler([place], [0], size.model, sampler)
        self._learner = Learner(
            config, Alone(), num_steps=10**6, target_RT=torch.zeros(1, 1), weight_R=torch.ones(1)
        )
        self._plan = Plan(images=(0,), batch_size=1, num_epochs=10**6, seed=0)
        self._number = 0

    def draw(self) -> Any:
        """The next item."""
        state = self._learner.model.attention.state_dict()
        weights = AttentionWeights.of({name: t.numpy().copy() for name, t in state.items()})
        (visit,) = self._plan.visits(self._number)
        self._number += 1
        return self._sampler.sample(visit, weights)

    def step(self) -> None:
        self._learner.step([self.draw()])


class DrawnAlone(Sampling):
    """Reads patches that were drawn once, and encodes them."""

    def __init__(self, place: str, size: Size) -> None:
        super().__init__(place, size)
        self._offsets_ND = self.draw().offsets_ND
        self._pyramid = open_pyramid(place, cache_bytes=0, num_threads=1)

    def step(self) -> None:
        crops = self._pyramid.read_patches(0, self._offsets_ND, (self.size.patch_px,) * 2)
        with torch.inference_mode():
            self.model.features(torch.from_numpy(crops))


class EveryPatch(Engine):
    """Keeps all activations until the gradient has come back."""

    def __init__(self, place: str, size: Size) -> None:
        super().__init__(place, size)
        self._pyramid = open_pyramid(place, cache_bytes=0, num_threads=1)
        first = np.arange(0, size.side_px, size.patch_px)
        self._offsets_PD = np.stack(np.meshgrid(first, first, indexing="ij"), axis=-1).reshape(-1, 2)
        self._per_side = len(first)

    def warm_up(self) -> bool:
        self.model.features(self.read(slice(0, 4))).sum().backward()
        self.attention().sum().backward()
        return True

    def parts(self) -> list[slice]:
        """Patches that are taken at a time."""
        return [slice(at, at + self.size.part) for at in range(0, len(self._offsets_PD), self.size.part)]

    def read(self, part: slice) -> torch.Tensor:
        """Patches (N, C, P, P) uint8."""
        size = (self.size.patch_px,) * 2
        return torch.from_numpy(self._pyramid.read_patches(0, self._offsets_PD[part], size))

    def attention(self) -> torch.Tensor:
        """The attention that lies on each patch (P,), with gradient."""
        level = self._pyramid.level_for(downsample=self.size.view_downsample)
        view = np.asarray(self._pyramid.read(self._pyramid.levels.index(level)))
        logits_YX = self.model.attention(torch.from_numpy(view)[None])[0]
        attention_YX = logits_YX.flatten().softmax(0).view_as(logits_YX)
        cells = logits_YX.shape[0] // self._per_side
        return F.avg_pool2d(attention_YX[None, None], cells).flatten() * cells**2

    def backward(self) -> torch.Tensor:
        """Compute gradients; the loss."""
        features_PF = torch.cat([self.model.features(self.read(part)) for part in self.parts()])
        loss = self.loss(self.attention(), features_PF)
        loss.backward()
        return loss

    def loss(self, attention_P: torch.Tensor, features_PF: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the exact expectation."""
        return F.cross_entropy(self.model.head(attention_P @ features_PF)[None], torch.tensor([0]))

    def step(self) -> None:
        self.model.train()
        self._optimiser.zero_grad()
        self.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimiser.step()

    def gradients(self) -> list[Any]:
        """Gradients of all weights as they are now, without an update."""
        self._optimiser.zero_grad()
        self.backward()
        return [parameter.grad.numpy().copy() for parameter in self.model.parameters()]


class ComputedTwice(EveryPatch):
    """Features first without gradients, then part by part with them."""

    def backward(self) -> torch.Tensor:
        pixels, features = [], []
        with torch.no_grad():
            for part in self.parts():
                pixels.append(self.read(part))
                features.append(self.model.features(pixels[-1]))
        features_PF = torch.cat(features).requires_grad_()
        loss = self.loss(self.attention(), features_PF)
        loss.backward()
        for part, crops in zip(self.parts(), pixels, strict=True):
            self.model.features(crops).backward(features_PF.grad[part])
        return loss


ENGINES: dict[str, type[Engine]] = {
    OURS: Sampling,
    WHOLE: EveryPatch,
    TWICE: ComputedTwice,
    FLOOR: DrawnAlone,
}
TARGETS = (
    *(
        Target(case="step", metric=metric, ours=WHOLE, peer=OURS, limit=limit)
        for metric, limit in (("wall_ms", 25), ("cpu_ms", 25), ("peak_mib", 10))
    ),
    *(
        Target(case="step", metric=metric, ours=TWICE, peer=OURS, limit=25)
        for metric in ("wall_ms", "cpu_ms")
    ),
)


def run_case(place: str, size: Size, engines: Sequence[str] = tuple(ENGINES)) -> dict[str, Any]:
    """The contestants in turns."""
    workers = {name: Process.begin(serve, ENGINES[name], (place, size)) for name in engines}
    short = (OURS, FLOOR)
    try:
        for worker in workers.values():
            worker.ask("warm_up")
        for _ in range(size.turns):
            for name, worker in workers.items():
                sample = worker.ask("turn", size.steps if name in short else 1)
                if sample is not None:
                    worker.samples.append(sample)
        contestants = [_summary(name, worker) for name, worker in workers.items()]
    finally:
        for worker in workers.values():
            worker.stop()
    megapixels = size.side_px**2 / 1e6
    what = (
        f"a step on an image of {megapixels:.0f} megapixels, {size.num_patches} patches of {size.patch_px} px"
    )
    return {"case": "step", "what": what, "contestants": contestants}


def _summary(name: str, worker: Process) -> dict[str, Any]:
    if worker.problem is not None:
        return {"name": name, "not_available": worker.problem}
    found: dict[str, Any] = {"name": name}
    for metric, key in (("wall_ms", "wall_s"), ("cpu_ms", "cpu_s")):
        found[metric] = round(1e3 * statistics.median(sample[key] for sample in worker.samples), 2)
        found[f"{metric}_min"] = round(1e3 * min(sample[key] for sample in worker.samples), 2)
    return {**found, **worker.ask("memory"), "turns": len(worker.samples)}


def run(size: Size, folder: Path) -> dict[str, Any]:
    """Make the image and measure."""
    place = folder / "slide.ome.zarr"
    write_store(make_slide(folder, SlideConfig(side_px=size.side_px)), place, 128)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "load_before": [round(n, 1) for n in os.getloadavg()],
        "parameters": asdict(size),
    }
    found = run_case(str(place), size)
    print(f"\n{found['what']}")
    heads = ("wall_ms", "wall_ms_min", "cpu_ms", "peak_mib")
    shown = {head: head.replace("_", " ") for head in heads}
    print_contestants(found["contestants"], shown, name_width=30, width=14)
    result["load_after"] = [round(n, 1) for n in os.getloadavg()]
    result["cases"] = [found]
    result["targets"] = [target.check(result["cases"]) for target in TARGETS]
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small version, written nowhere")
    parser.add_argument("--side", type=int, help="side of the image in pixels")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else Size()
    if options.side is not None:
        size = Size(**{**asdict(size), "side_px": options.side})
    with tempfile.TemporaryDirectory(prefix="ats-stream-") as folder:
        result = run(size, Path(folder))
    print_targets(result["targets"])
    if not options.quick:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

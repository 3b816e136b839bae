"""From a slide to an item: read the view, compute attention, draw, fetch the drawn patches.

A sampler is a plain object without memory of earlier visits (its caches never change an item), so it runs
as well in the training process as in an actor, and a lost call can be repeated.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ats_stream.errors import InputError, SlideError
from ats_stream.io import VIEW_CACHE_BYTES, StorageOptions
from ats_stream.io.storage.remote import shown
from ats_stream.models import AttentionNet, ModelConfig
from ats_stream.sampling import SCHEMES, draw, log_attention, patch_offsets
from ats_stream.workers.batch import log_prior_of, tensor_of
from ats_stream.workers.pixel_size import NO_SIZES, full_level
from ats_stream.workers.protocol import Array, AttentionWeights, Item

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ats_stream.io import Level, Pyramid
    from ats_stream.workers.plan import Visit

# one thread whatever the process around it uses: the sums of a convolution then have one order everywhere
SAMPLER_THREADS = 1
MAX_OPEN_PYRAMIDS = 1024
READING_LOCKS = 64
LOOKS_KEPT = 2
"""Images whose attention waits for their further draws, which other samplers may have made meanwhile."""
PIXEL_TYPES = ("uint8", "uint16")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """What is looked at and how positions are drawn."""

    num_patches: int = 10
    """Patches drawn from each image (N)."""
    patch_px: int = 64
    """Side of a patch in full-resolution pixels."""
    view_downsample: float = 32.0
    """Downsampling factor of the low-resolution view; the nearest level is taken."""
    scheme: str = "murthy"
    """How positions are drawn and weighed: see ats_stream.sampling.draw."""
    prior_label: str | None = None
    """Name of a label image (``tissue``, ``foreground``) outside which nothing is drawn."""
    pixel_size_um: float = 0.0
    """Pixel size of what counts as full resolution: patches and view are read at the level nearest to it, and
    an image without such a level is refused. 0: level 0 of every image, whatever its size."""
    assumed_pixel_um: float = 0.0
    """Pixel size that images are taken to have at level 0, but for those that the table gives one; 0: what
    they say."""
    seed: int = 0
    """Seed of all draws."""
    cache_bytes: int = VIEW_CACHE_BYTES
    """Low-resolution views kept in memory by each process that samples, for all its samplers; 0: none."""

    def __post_init__(self) -> None:
        for name in ("num_patches", "patch_px"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.view_downsample >= 1:
            raise ValueError(f"view_downsample must be at least 1, got {self.view_downsample}")
        for name in ("pixel_size_um", "assumed_pixel_um"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {self.scheme!r}")
        if self.cache_bytes < 0:
            raise ValueError(f"cache_bytes must not be negative, got {self.cache_bytes}")

    def of_image(self, pixel_size_um: float | None) -> SamplerConfig:
        """What holds for an image of this pixel size at level 0, as a table gives it; None if it does not."""
        return self if pixel_size_um is None else replace(self, assumed_pixel_um=pixel_size_um)


@dataclass(frozen=True)
class View:
    """The low-resolution side of one image, read-only."""

    pixels_CYX: Array
    prior_YX: Array | None


@dataclass(frozen=True)
class _Look:
    """What all draws of an image by the same weights share."""

    pyramid: Pyramid
    view: View
    log_a_1M: torch.Tensor
    """Log-probabilities of all positions."""


class PatchSampler:
    """Turn visits into items; safe between threads, of which one draws at a time.

    ``slides`` and ``labels`` are the rows of the archive table that ``Visit.image`` points into, and
    ``pixel_sizes`` the micrometres per pixel of level 0 that it gives for some of them, in place of what
    they say. ``storage_options`` are for the URLs among the slides; the attention network and the draw run
    on ``device``, whose rounding is its own: items are the same on devices of one kind.
    """

    def __init__(
        self,
        slides: Sequence[str] | Mapping[int, str],
        labels: Sequence[int] | Mapping[int, int],
        model: ModelConfig,
        config: SamplerConfig,
        storage_options: StorageOptions | Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        *,
        pixel_sizes: Mapping[int, float | None] = NO_SIZES,
    ) -> None:
        self.slides = slides
        self.labels = labels
        self.pixel_sizes = pixel_sizes
        self.config = config
        self.device = device or torch.device("cpu")
        self.attention = AttentionNet(model).requires_grad_(False).to(self.device)
        self.num_channels = model.num_channels
        self._attention_key: str | None = None
        self._drawing = threading.Lock()
        # a stripe for each few images: what a visit reads is counted by image
        self._reading = [threading.Lock() for _ in range(READING_LOCKS)]
        self._looking = [threading.Lock() for _ in range(READING_LOCKS)]
        self._looks: OrderedDict[tuple[int, int, str], tuple[_Look, int]] = OrderedDict()
        """Attention of images whose visits say that they are met once, and how many draws are to come."""
        self._keeping = threading.Lock()
        self._open_anew = StorageOptions.of(storage_options).open
        self._open = lru_cache(MAX_OPEN_PYRAMIDS)(self._open_anew)

    def read_view(self, image: int) -> View:
        """The low-resolution side of an image, which no weights are needed for; SlideError as in sample."""
        return self._view(self._open(self.slides[image]), self._config_of(image))

    def _config_of(self, image: int) -> SamplerConfig:
        return self.config.of_image(self.pixel_sizes.get(image))

    def _view(self, pyramid: Pyramid, config: SamplerConfig) -> View:
        level, prior = check_image(pyramid, config, num_channels=self.num_channels)
        return View(pyramid.view(level, cache_bytes=config.cache_bytes), prior)

    def sample(self, visit: Visit, weights: AttentionWeights, view: View | None = None) -> Item:
        """One item; the same for the same visit and weights, whatever was sampled before.

        ``view`` is what :meth:`read_view` gave for the image, if that was read already. Raises SlideError,
        naming the slide, if it cannot be read or has no drawable position.
        """
        start_s = time.perf_counter()
        config, slide = self._config_of(visit.image), self.slides[visit.image]
        look = self._look_once(visit, weights) if visit.num_draws else self._look(visit, weights, view)
        pyramid, view = look.pyramid, look.view
        map_shape = view.pixels_CYX.shape[1:]
        with self._computing(pyramid):
            drawn = draw(
                look.log_a_1M,
                config.num_patches + visit.extra_patches,
                scheme=config.scheme,
                seed=config.seed,
                stream_ids=[visit.stream_id],
                map_shape=map_shape,
            )
        # a draw of the CPU is not copied
        index_N, log_q_N, weight_N = (t[0].cpu() for t in (drawn.index, drawn.log_prob, drawn.weight))
        full, _ = read_levels(pyramid, config)
        size = (config.patch_px,) * len(map_shape)
        offsets_ND = patch_offsets(index_N[None], map_shape, full.shape[1:], size)[0].numpy()
        with self._reading[visit.image % READING_LOCKS]:
            before = pyramid.read_stats(full)
            crops = pyramid.read_patches(full, offsets_ND, size)
            after = pyramid.read_stats(full)
        return Item(
            visit=visit,
            slide=shown(slide),
            label=self.labels[visit.image],
            view_CYX=view.pixels_CYX,
            prior_YX=view.prior_YX,
            index_N=index_N.numpy(),
            log_q_N=log_q_N.numpy(),
            weight_N=weight_N.float().numpy(),
            num_drawn=int(drawn.num_drawn[0]),
            offsets_ND=offsets_ND,
            crops_NCPP=crops,
            attention_key=weights.key,
            stored_bytes=after.stored_bytes - before.stored_bytes,
            decoded_bytes=after.decoded_bytes - before.decoded_bytes,
            seconds=time.perf_counter() - start_s,
        )

    def _look(self, visit: Visit, weights: AttentionWeights, view: View | None) -> _Look:
        config = self._config_of(visit.image)
        if visit.num_draws:
            pyramid = self._open_anew(self.slides[visit.image])
            view = self._view(pyramid, replace(config, cache_bytes=0))
        else:
            pyramid = self._open(self.slides[visit.image])
            view = view or self._view(pyramid, config)
        with self._computing(pyramid):
            self._load(weights)
            logits_1M = self.attention(tensor_of(view.pixels_CYX)[None].to(self.device)).flatten(1)
            log_prior = log_prior_of(view.prior_YX)
            if log_prior is not None:
                log_prior = log_prior.reshape(1, -1).to(self.device)
            return _Look(pyramid, view, log_attention(logits_1M, log_prior))

    def _look_once(self, visit: Visit, weights: AttentionWeights) -> _Look:
        """The look of all visits of the image at this step; forgotten with the last of them."""
        key = (visit.image, visit.step, weights.key)
        with self._looking[visit.image % READING_LOCKS]:
            with self._keeping:
                look, num_left = self._looks.pop(key, (None, visit.num_draws))
            look = look or self._look(visit, weights, None)
            with self._keeping:
                if num_left > 1:
                    self._looks[key] = look, num_left - 1
                while len(self._looks) > LOOKS_KEPT:
                    self._looks.popitem(last=False)
        return look

    @contextmanager
    def _computing(self, pyramid: Pyramid) -> Iterator[None]:
        """One image at a time, with a fixed number of threads; SlideError where nothing can be drawn."""
        with self._drawing, _threads(SAMPLER_THREADS), torch.inference_mode():
            try:
                yield
            except InputError as error:
                raise SlideError(pyramid.slide, f"nothing can be drawn: {error}") from error

    def _load(self, weights: AttentionWeights) -> None:
        if weights.key != self._attention_key:
            self.attention.load_state_dict(
                {k: torch.from_numpy(np.array(v)) for k, v in weights.arrays.items()}
            )
            self._attention_key = weights.key


def check_image(pyramid: Pyramid, config: SamplerConfig, *, num_channels: int) -> tuple[Level, Array | None]:
    """The level of the view and the prior of an image; SlideError if these are not what a sampler reads."""
    slide, (_, level) = pyramid.slide, read_levels(pyramid, config)
    if level.shape[0] != num_channels:
        raise SlideError(slide, f"has {level.shape[0]} channels, the model reads {num_channels}")
    if pyramid.axes != ("c", "y", "x") or level.dtype.name not in PIXEL_TYPES:
        found = f"{level.dtype} pixels over {' '.join(pyramid.axes[1:])}"
        raise SlideError(slide, f"has {found}, the model reads {' or '.join(PIXEL_TYPES)} over y x")
    if config.prior_label is None:
        return level, None
    prior = read_prior(pyramid, config.prior_label, level.shape[1:], cache_bytes=config.cache_bytes)
    return level, prior


def read_levels(pyramid: Pyramid, config: SamplerConfig) -> tuple[Level, Level]:
    """The level that patches are read from and the one that serves as view; SlideError if there is none."""
    full = full_level(pyramid, config.pixel_size_um, config.assumed_pixel_um)
    return full, view_level(pyramid, config.view_downsample * max(full.downsample))


def view_level(pyramid: Pyramid, downsample: float) -> Level:
    """The level that serves as low-resolution view; SlideError if none is within a factor of 2."""
    level = pyramid.level_for(downsample=downsample)
    found = max(level.downsample)
    if not downsample / 2 <= found <= downsample * 2:
        there = ", ".join(f"{max(one.downsample):g}" for one in pyramid.levels)
        raise SlideError(pyramid.slide, f"no level near downsampling {downsample:g}; there are {there}")
    return level


def read_prior(
    pyramid: Pyramid, label: str, map_shape: Sequence[int], *, cache_bytes: int = VIEW_CACHE_BYTES
) -> Array:
    """A label image on the grid of the attention map: True where any pixel of the label touches the cell.

    Read-only, kept as views are. Raises SlideError if the label is absent or empty.
    """
    if label not in pyramid.label_names:
        there = ", ".join(pyramid.label_names) or "none"
        raise SlideError(pyramid.slide, f"no label {label!r} to draw within; labels there: {there}")

    def touched(pixels_CYX: Array) -> Array:
        mask: Array = pixels_CYX[0] != 0
        for axis, size in enumerate(map_shape):
            mask = _touched(mask, axis, size)
        return mask

    kept = ("touched", tuple(map_shape))
    mask = pyramid.label(label).view(0, cache_bytes=cache_bytes, derived=(kept, touched))
    if not mask.any():
        raise SlideError(pyramid.slide, f"label {label!r} is empty: no position can be drawn")
    return mask


def _touched(mask: Array, axis: int, size: int) -> Array:
    """``size`` cells along an axis, each True where a True pixel overlaps it, be it by a part of a pixel.

    >>> _touched(np.array([False, True, False]), 0, 2), _touched(np.array([False, True]), 0, 3)
    (array([ True,  True]), array([False,  True,  True]))
    """
    pixels = mask.shape[axis]
    cell = np.arange(size)
    first, past = cell * pixels // size, -(-(cell + 1) * pixels // size)
    # reduceat takes [first, past) from every other entry and cannot name the end: one empty pixel behind it
    behind = [(0, int(along == axis)) for along in range(mask.ndim)]
    both = np.stack([first, past], axis=1).ravel()
    touched: Array = np.logical_or.reduceat(np.pad(mask, behind), both, axis=axis)
    return touched.take(np.arange(0, 2 * size, 2), axis=axis)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""What a run takes from storage, memory and network, computed before it runs. Pure: nothing is opened here.

Shape letters: N patches of P x P pixels, C channels, M = Y * X positions of the view, B images of a rank's
step, W channels inside a network, L convolutions of the attention network, K chunks, Q items that a
sampler has under way at once, Q_V views that it reads ahead.

**Reading.** A patch at a position touches the chunks that its box overlaps. Let ``n_k`` be the number of
drawable positions whose patch touches chunk k, of A drawable positions. While attention is even, N positions
drawn without replacement leave the chunk untouched with the hypergeometric probability
``C(A - n_k, N) / C(A, N)``, and N independent ones with ``(1 - n_k / A)^N``, so that an image costs

    E[chunks] = sum_k (1 - P(k untouched))

chunks. This is exact for even attention; attention that has gathered on few places reads fewer.

**An item** is ``M C s + [M] + N C P^2 s + 16 N`` bytes with s bytes a pixel: the view, the mask if there is a
prior, the patches, and index, log q and R of each draw.

**A sampler** holds, beside its process and the views kept, at its highest point: a copy of the view, the view
in float32, and at one convolution its input, its output, and the output in the layout that oneDNN computes
in, whose channels are rounded up to a vector's 16 floats; then the patches:

    M (C s + 4 C + 4 W_in + 4 W + 4 ceil16(W)) + N C P^2 s,    W_in = W if L > 1 else 0

That is while one item is computed; the others that it has under way at once hold their log-probabilities and
their arrays, and views that were read ahead wait beside those that are kept:

    V + (Q - 1) (8 M + item),    V = max(views kept, Q_V views)

**A rank's step** keeps for the backward pass, of each image, the view in float32, every layer's output and 11
bytes a position around the softmax and the entropy. It is at its highest in the backward pass, either while
the feature network's two float32 copies of each patch and its layers' outputs are there, or, when these are
gone, while two outputs of the attention network are:

    B (M (C s + 4 [prior] + 4 C + 4 W L + 11) + N P^2 C s) + 16 parameters
    + B max(M (8 W - 8), N P^2 (8 C + 1.55 W_f))

with W_f channels in the feature network, 16 bytes a parameter for value, gradient and AdamW's two moments,
and 4 more where an average of the weights is kept. B is a part of the rank's images if gradients are
accumulated. Mixed precision is not reckoned with. All that is in device memory where the rank has a GPU, else
in that of its process; what CUDA itself takes is not in it.

**The object store** of a node holds the windows of its ranks; to leave room for what Ray itself keeps, they
may fill half of it: ``2 * ranks on the node * window``, a window being ``window * item`` bytes, or
``window_bytes`` if that is less, or a step's items if these are more than that. Items of samplers on the
rank's own node lie in memory that both share, which takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ats_stream.sampling import patch_offsets
from ats_stream.workers.ray_executor import ITEMS_AT_ONCE, VIEWS_AHEAD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.models import ModelConfig

# resident memory of the processes with all that they import, and nothing to do: measured on Linux
SAMPLER_PROCESS_BYTES = 330 << 20
RANK_PROCESS_BYTES = 500 << 20
DRIVER_PROCESS_BYTES = 800 << 20  # the command, and the controller of Ray Train
# floats of a vector of the widest kind (AVX-512), to which oneDNN rounds channels up
VECTOR_FLOATS = 16
STORE_SHARE = 0.5
"""The part of an object store that windows may fill."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What is known of one image, or the mean over some."""

    view_shape: tuple[int, int, int]
    """(C, Y, X) of the low-resolution view."""
    pixel_bytes: int
    """Bytes of one channel of one pixel."""
    has_prior: bool
    num_chunks: float
    """Chunks of full resolution that a visit touches: :func:`expected_chunks`."""
    chunk_bytes: int
    """Bytes of one chunk, all channels, decoded."""
    stored_share: float
    """Stored bytes over decoded ones, of chunks that patches touch."""
    view_stored_bytes: float
    """Stored bytes of the view, and of the prior."""

    @property
    def num_positions(self) -> int:
        """M."""
        return self.view_shape[1] * self.view_shape[2]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is computed, and on what."""

    num_images: int
    """Images of an epoch."""
    batch_size: int
    """Images of a step, over all ranks."""
    num_patches: int
    patch_px: int
    lag: int
    num_parameters: int
    num_nodes: int
    num_ranks: int
    samplers_per_rank: int
    window: int
    window_bytes: int
    view_cache_bytes: int
    """Views that a process with samplers keeps at most."""
    use_gpu: bool
    accumulate: int = 1
    """Parts in which a rank computes its images of a step."""
    has_average: bool = False
    """Whether an average of the weights is kept."""

    @property
    def ranks_per_node(self) -> int:
        """Ranks on the fullest node."""
        return -(-self.num_ranks // self.num_nodes)

    @property
    def images_per_rank(self) -> int:
        """Images of a step of one rank."""
        return self.batch_size // self.num_ranks

    @property
    def images_at_once(self) -> int:
        """B."""
        return -(-self.images_per_rank // self.accumulate)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a run takes; bytes, and means over images where images differ."""

    decoded_bytes: float
    """Full resolution decoded for one image."""
    stored_bytes: float
    """Full resolution fetched from storage for one image."""
    view_bytes_first: float
    """View and prior fetched for one image in the first epoch."""
    view_bytes_later: float
    """The same in later epochs, where some are kept in memory."""
    step_bytes_first: float
    """Fetched from storage for a step of the first epoch, over all ranks."""
    step_bytes_later: float
    item_bytes: int
    """Largest item."""
    sampler_work_bytes: int
    """Memory of a sampler at its highest, beside its process and the views it keeps."""
    sampler_bytes: int
    """Memory of a sampler's process."""
    step_work_bytes: int
    """Tensors of a rank's training step at their most."""
    rank_bytes: int
    """Host memory of a rank's process."""
    device_bytes: int
    """Device memory of a rank; 0 without a GPU."""
    store_bytes: int
    """Object store that a node needs."""
    node_bytes: int
    """Host memory of the fullest node, its object store included, without what Ray and the system take."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast things are."""

    storage_bytes_per_s: float
    """From storage, for all nodes together."""
    link_bytes_per_s: float
    """In or out of one node."""
    sampler_s: float
    """Time of a sampler for one image."""
    rank_s: float | None
    """Time of a rank for one image of a training step; None if it is not known."""


def touched_counts(
    full_shape: Sequence[int],
    chunk_shape: Sequence[int],
    map_shape: Sequence[int],
    patch_px: int,
    drawable_YX: npt.NDArray[np.bool_] | None = None,
) -> Counts:
    """n_k: how many drawable positions have a patch that touches chunk k, over the chunk grid (Ky, Kx).

    All shapes are (y, x). A patch that reaches over the border touches the chunks that it overlaps.

    >>> touched_counts((8, 8), (4, 4), (2, 2), 4).tolist()
    [[1, 1], [1, 1]]
    >>> touched_counts((8, 8), (4, 4), (2, 2), 6).tolist()
    [[4, 4], [4, 4]]
    """
    first, past = zip(
        *(
            _touching_cells(axis, full_shape, chunk_shape, map_shape, patch_px)
            for axis in range(len(map_shape))
        ),
        strict=True,
    )
    if drawable_YX is None:
        even: Counts = (past[0] - first[0])[:, None] * (past[1] - first[1])[None, :]
        return even
    # sums of boxes of the mask from its summed-area table
    table = np.zeros((map_shape[0] + 1, map_shape[1] + 1), np.int64)
    np.cumsum(np.cumsum(drawable_YX, axis=0, dtype=np.int64), axis=1, out=table[1:, 1:])
    top, bottom = first[0][:, None], past[0][:, None]
    left, right = first[1][None, :], past[1][None, :]
    counts: Counts = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
    return counts


def _touching_cells(
    axis: int, full_shape: Sequence[int], chunk_shape: Sequence[int], map_shape: Sequence[int], patch_px: int
) -> tuple[Counts, Counts]:
    """For each chunk along an axis the cells ``first .. past`` whose patches touch it; starts never fall."""
    import torch

    length, chunk, cells = full_shape[axis], chunk_shape[axis], map_shape[axis]
    start = patch_offsets(torch.arange(cells)[None], (cells,), (length,), (patch_px,))[0, :, 0].numpy()
    chunk_start = np.arange(0, length, chunk)
    chunk_stop = np.minimum(chunk_start + chunk, length)
    first = np.searchsorted(start + patch_px, chunk_start, side="right")
    past = np.searchsorted(start, chunk_stop, side="left")
    return first, np.maximum(past, first)


def expected_chunks(counts_K: Counts, num_drawable: int, num_patches: int, *, replace: bool = False) -> float:
    """E[chunks] of one visit under even attention, from :func:`touched_counts`.

    >>> expected_chunks(np.array([1, 1, 1, 1]), 4, 2), expected_chunks(np.array([1, 1, 1, 1]), 4, 1)
    (2.0, 1.0)
    """
    count, times = np.unique(counts_K[counts_K > 0], return_counts=True)
    if num_drawable <= num_patches and not replace:
        return float(times.sum())
    untouched = np.ones(len(count))
    for drawn in range(num_patches):
        left = num_drawable - (0 if replace else drawn)
        untouched *= np.maximum(left - count, 0) / left
    return float((times * (1 - untouched)).sum())


def item_bytes(image: ImageFacts, num_patches: int, patch_px: int) -> int:
    """Bytes of an item's arrays (``Item.num_bytes``)."""
    channels, positions = image.view_shape[0], image.num_positions
    crops = num_patches * channels * patch_px**2 * image.pixel_bytes
    return positions * channels * image.pixel_bytes + positions * image.has_prior + crops + 16 * num_patches


def sampler_work_bytes(image: ImageFacts, model: ModelConfig, num_patches: int, patch_px: int) -> int:
    """Memory of a sampler at its highest, beside its process and the views that it keeps."""
    channels = image.view_shape[0]
    crops = num_patches * channels * patch_px**2 * image.pixel_bytes
    if model.attention == "uniform":
        return image.num_positions * (channels * image.pixel_bytes + 12) + crops
    width = model.attention_width
    computed = -(-width // VECTOR_FLOATS) * VECTOR_FLOATS
    before = width if model.attention_layers > 1 else 0
    of_position = channels * (image.pixel_bytes + 4) + 4 * (before + width + computed)
    return image.num_positions * of_position + crops


def step_work_bytes(
    image: ImageFacts,
    model: ModelConfig,
    *,
    images: int,
    num_patches: int,
    patch_px: int,
    num_parameters: int,
) -> int:
    """Tensors of a rank's training step at their most: batch, what backward needs, parameters, optimiser."""
    channels, width = image.view_shape[0], model.attention_width
    pixels = num_patches * patch_px**2
    of_position = channels * image.pixel_bytes + 4 * image.has_prior
    backward = pixels * (8 * channels + 1.55 * model.feature_width)
    if model.attention != "uniform":
        of_position += 4 * channels + 4 * width * model.attention_layers + 11
        backward = max(backward, image.num_positions * (8 * width - 8))
    kept = image.num_positions * of_position + pixels * channels * image.pixel_bytes
    return int(images * (kept + backward)) + 16 * num_parameters


def size_up(images: Sequence[ImageFacts], model: ModelConfig, shape: Shape) -> Sizes:
    """What a run takes: means over images for what flows, the largest image for memory."""
    num_patches, patch_px = shape.num_patches, shape.patch_px
    decoded = float(np.mean([one.num_chunks * one.chunk_bytes for one in images]))
    stored = float(np.mean([one.num_chunks * one.chunk_bytes * one.stored_share for one in images]))
    view_stored = float(np.mean([one.view_stored_bytes for one in images]))
    kept = [one.num_positions * (one.view_shape[0] * one.pixel_bytes + one.has_prior) for one in images]
    all_views = float(np.mean(kept)) * shape.num_images
    # any sampler may get any image, so each keeps the share of all views that its memory holds
    kept_share = min(1.0, shape.view_cache_bytes / all_views)
    item = max(item_bytes(one, num_patches, patch_px) for one in images)
    sampler_work = max(sampler_work_bytes(one, model, num_patches, patch_px) for one in images)
    step_work = max(
        step_work_bytes(
            one,
            model,
            images=shape.images_at_once,
            num_patches=num_patches,
            patch_px=patch_px,
            num_parameters=shape.num_parameters,
        )
        for one in images
    )
    step_work += 4 * shape.num_parameters * shape.has_average
    views = max(min(shape.view_cache_bytes, all_views), min(VIEWS_AHEAD, shape.num_images) * max(kept))
    positions = max(one.num_positions for one in images)
    others = (ITEMS_AT_ONCE - 1) * (8 * positions + item)
    sampler = SAMPLER_PROCESS_BYTES + int(views) + sampler_work + others
    # a step's items are copied out of the object store into tensors; without a GPU all the rest is there too
    on_host = shape.images_per_rank * item if shape.use_gpu else step_work
    rank = RANK_PROCESS_BYTES + on_host
    window = min(shape.window * item, max(shape.window_bytes, shape.images_per_rank * item))
    store = int(shape.ranks_per_node * window / STORE_SHARE)
    return Sizes(
        decoded_bytes=decoded,
        stored_bytes=stored,
        view_bytes_first=view_stored,
        view_bytes_later=view_stored * (1 - kept_share),
        step_bytes_first=shape.batch_size * (stored + view_stored),
        step_bytes_later=shape.batch_size * (stored + view_stored * (1 - kept_share)),
        item_bytes=item,
        sampler_work_bytes=sampler_work,
        sampler_bytes=sampler,
        step_work_bytes=step_work,
        rank_bytes=rank,
        device_bytes=step_work if shape.use_gpu else 0,
        store_bytes=store,
        node_bytes=shape.ranks_per_node * (rank + shape.samplers_per_rank * sampler)
        + store
        + DRIVER_PROCESS_BYTES,
    )


def limits(sizes: Sizes, shape: Shape, rates: Rates) -> dict[str, float]:
    """Images a second that each part allows, the tightest first; an unknown rank is left out.

    With lag 0 samplers and ranks take turns, so the two are one part; with a lag they overlap. The link of a
    node carries what its samplers fetch and, among ranks, the gradients of a step, all-reduced in a ring.
    """
    fetched = sizes.step_bytes_later * shape.ranks_per_node / shape.num_ranks
    reduced = 8 * shape.num_parameters * (shape.num_ranks - 1) / shape.num_ranks * (shape.num_nodes > 1)
    samplers = shape.num_ranks * shape.samplers_per_rank / rates.sampler_s
    found = {
        "storage": rates.storage_bytes_per_s * shape.batch_size / sizes.step_bytes_later,
        "link": rates.link_bytes_per_s * shape.batch_size / (fetched + reduced),
    }
    if rates.rank_s is None:
        found["samplers"] = samplers
    elif shape.lag:
        found |= {"samplers": samplers, "ranks": shape.num_ranks / rates.rank_s}
    else:
        found["in turn"] = 1 / (1 / samplers + rates.rank_s / shape.num_ranks)
    return dict(sorted(found.items(), key=lambda pair: pair[1]))

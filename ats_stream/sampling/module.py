"""The method as torch modules: cut what the attention draws, look at it, and estimate the whole.

Shapes: B rows (images), M positions of the flattened map, N draws, C channels, F features, D axes of space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ats_stream.errors import InputError
from ats_stream.sampling.attention import attention_logits, log_attention
from ats_stream.sampling.draw import draw
from ats_stream.sampling.drawn import Draw
from ats_stream.sampling.expectation import expectation
from ats_stream.sampling.geometry import Geometry, geometry_from_receptive_field, patch_offsets
from ats_stream.sampling.patches import (
    HighResolution,
    check_high_resolution,
    check_view,
    cut_patches,
    image_shape,
)
from ats_stream.sampling.streams import Seeded
from ats_stream.sampling.tracing import geometry_of
from ats_stream.sampling.weights import check_scheme, estimator_weights

if TYPE_CHECKING:
    from ats_stream.sampling.layers import Regularizer

INFERENCES = ("sample", "top", "average")


class SamplePatches(Seeded):
    """Draw positions from an attention map and cut their patches from the full-resolution image.

    Args:
        n_patches: N.
        patch_size: pixels per axis, or one number for all.
        receptive_field: 0 for a "same"-padded attention network, a positive number for a valid one (see
            :func:`geometry_from_receptive_field`), or the exact :class:`Geometry`.
        replace: draw with replacement.
        use_logits: the attention given is logits, not probabilities.
        scheme: see :func:`draw`.
        fill: value of pixels outside the image.
        seed: key of the noise. In training the stream id of a row is (step, rank, row), and the step
            counter, a buffer, advances with each call; in evaluation the id is the row alone, so the same
            input gives the same draw.
    """

    def __init__(
        self,
        n_patches: int,
        patch_size: int | Sequence[int],
        receptive_field: int | Geometry = 0,
        replace: bool = False,
        use_logits: bool = False,
        *,
        scheme: str = "murthy",
        fill: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.n_patches = _check_count("n_patches", n_patches)
        self.patch_size = patch_size if isinstance(patch_size, int) else tuple(patch_size)
        sizes = self.patch_size if isinstance(self.patch_size, tuple) else (self.patch_size,)
        if not 1 <= len(sizes) <= 3 or not all(isinstance(size, int) and size >= 1 for size in sizes):
            expected = "an integer of at least 1 pixel, or one for each of 1 to 3 axes"
            raise InputError(f"patch_size must be {expected}, got {patch_size!r}")
        self.receptive_field = receptive_field
        self.scheme = check_scheme("with_replacement" if replace else scheme)
        self.use_logits = use_logits
        self.fill = fill

    def forward(self, x_low: Tensor, x_high: HighResolution, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Return patches (B, N, C, *patch_size) and the attention probabilities (B, N) there.

        ``x_low`` (B, C, *view) is the low-resolution view, of which only the shape matters; ``x_high`` (B,
        C, *space) or a list of B sources; ``attention`` (B, *map) or (B, 1, *map). Padding (fewer drawable
        positions than N) has probability 0.
        """
        map_shape = map_shape_of(attention, x_low)
        log_attention_BM = log_attention(attention_logits(attention, use_logits=self.use_logits))
        drawn, patches = self.sample(x_low, x_high, log_attention_BM, map_shape)
        return patches, attention_at(log_attention_BM, drawn)

    def sample(
        self,
        x_low: Tensor,
        x_high: HighResolution,
        log_attention_BM: Tensor,
        map_shape: tuple[int, ...],
        *,
        scheme: str | None = None,
        receptive_field: int | Geometry | None = None,
        number: int = 0,
        dtype: torch.dtype | None = None,
    ) -> tuple[Draw, Tensor]:
        """Draw from given log-probabilities; return the draw and its patches.

        Integer pixels are converted to ``dtype``, if given. In evaluation each
        ``number`` gives a draw of its own, independent of the others.
        """
        check_high_resolution(x_high, len(x_low), len(map_shape))
        num_axes = len(map_shape)
        sizes = self.patch_size if isinstance(self.patch_size, tuple) else (self.patch_size,) * num_axes
        drawn = draw(
            log_attention_BM.detach(),
            self.n_patches,
            scheme=scheme or self.scheme,
            seed=self.seed,
            stream_ids=self.next_streams(len(log_attention_BM), number=number),
            map_shape=map_shape,
        )
        geometry = self.receptive_field if receptive_field is None else receptive_field
        if isinstance(geometry, int):
            geometry = geometry_from_receptive_field(geometry, map_shape, tuple(x_low.shape[2:]))
        offsets_BND = _offsets(drawn.index, map_shape, x_high, sizes, geometry)
        return drawn, cut_patches(x_high, offsets_BND, sizes, fill=self.fill, dtype=dtype)


class Expectation(nn.Module):
    """Estimate the attention-weighted sum over the whole map from patch features.

    ``scheme`` must be the one the patches were drawn with; by default "with_replacement" if ``replace``,
    else "murthy".
    """

    def __init__(self, replace: bool = False, scheme: str | None = None) -> None:
        super().__init__()
        self.scheme = check_scheme(scheme or ("with_replacement" if replace else "murthy"))

    def forward(
        self, patch_features: Tensor, sampled_attention: Tensor | Draw, attention_BN: Tensor | None = None
    ) -> Tensor:
        """Return (B, F) from features (B, N, F).

        ``sampled_attention`` is the attention (B, N) at the drawn positions, which they were also drawn
        from; or a :class:`Draw`, maybe an old one, along with the present attention there as
        ``attention_BN`` (by default that of the draw). "balanced" needs the Draw.
        """
        if isinstance(sampled_attention, Draw):
            if attention_BN is None:
                attention_BN = sampled_attention.log_prob.exp()
            return expectation(patch_features, attention_BN, sampled_attention.weight)
        weight_BN = estimator_weights(sampled_attention.detach(), self.scheme)
        return expectation(patch_features, sampled_attention, weight_BN)


class AttentionSampling(nn.Module):
    """Attention sampling from end to end; built by :func:`attention_sampling`.

    After each forward, ``.regularization`` holds the scaled value of the attention regulariser (to be added
    to the loss), ``.last_draws`` the :class:`Draw` that was made (r of them for an average of r draws), and
    ``.last_standard_error`` the standard error (B, F) of an average of at least two draws, else None.
    """

    regularization: Tensor
    last_draws: tuple[Draw, ...]
    last_standard_error: Tensor | None

    def __init__(
        self,
        attention: nn.Module,
        feature: nn.Module,
        sampler: SamplePatches,
        *,
        attention_regularizer: Regularizer | None = None,
        trace_geometry: bool = False,
        inference: str = "sample",
        num_draws: int = 1,
        centred: bool = False,
    ) -> None:
        super().__init__()
        if inference not in INFERENCES:
            raise InputError(f"inference must be one of {', '.join(INFERENCES)}, got {inference!r}")
        self.attention = attention
        self.feature = feature
        self.sampler = sampler
        self.attention_regularizer = attention_regularizer
        self.trace_geometry = trace_geometry
        self.inference = inference
        self.num_draws = _check_count("num_draws", num_draws)
        self.centred = centred
        self.regularization = torch.zeros(())
        self.last_draws = ()
        self.last_standard_error = None
        self._geometries: dict[tuple[int, ...], Geometry] = {}

    @property
    def last_draw(self) -> Draw | None:
        """The draw of the last forward (the first one of an average); None before any forward."""
        return self.last_draws[0] if self.last_draws else None

    def forward(
        self, x_low: Tensor, x_high: HighResolution, log_prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return features (B, F), attention (B, *map) and patches (B, N, C, *patch_size).

        ``x_low`` (B, C, *view); ``x_high`` (B, C, *space) or a list of B sources; ``log_prior`` (B, *map),
        added before the softmax. Integer patches reach the feature network in the dtype of ``x_low``,
        unscaled. An average of r draws returns the patches of all of them, draw after draw: (B, r N, C,
        *patch_size).
        """
        num_axes = check_view(x_low)
        check_high_resolution(x_high, len(x_low), num_axes)
        output = self.attention(x_low)
        map_shape = map_shape_of(output, x_low)
        logits_BM = attention_logits(output, use_logits=self.sampler.use_logits)
        log_attention_BM = log_attention(logits_BM, _flat_prior(log_prior, len(x_low), map_shape))
        attention = log_attention_BM.exp().view(-1, *map_shape)
        if self.attention_regularizer is None:
            self.regularization = attention.new_zeros(())
        else:
            self.regularization = self.attention_regularizer(attention)
        receptive_field = self._geometry(x_low) if self.trace_geometry else None
        scheme = "top" if self.inference == "top" and not self.training else None
        draws, values, cuts = [], [], []
        averaging = self.inference == "average" and not self.training
        for number in range(self.num_draws if averaging else 1):
            drawn, patches = self.sampler.sample(
                x_low,
                x_high,
                log_attention_BM,
                map_shape,
                scheme=scheme,
                receptive_field=receptive_field,
                number=number,
                dtype=x_low.dtype,
            )
            draws.append(drawn)
            values.append(self._estimate(patches, log_attention_BM, drawn))
            cuts.append(patches)
        self.last_draws = tuple(draws)
        self.last_standard_error = None
        if len(draws) == 1:
            return values[0], attention, cuts[0]
        values_RBF = torch.stack(values)
        self.last_standard_error = values_RBF.detach().std(dim=0) / len(draws) ** 0.5
        return values_RBF.mean(dim=0), attention, torch.cat(cuts, dim=1)

    def _estimate(self, patches: Tensor, log_attention_BM: Tensor, drawn: Draw) -> Tensor:
        features = self.feature(patches.flatten(0, 1))
        if features.ndim != 2 or len(features) != patches.shape[0] * patches.shape[1]:
            raise InputError(f"the feature network must return (B * N, F), got {tuple(features.shape)}")
        features_BNF = features.view(*patches.shape[:2], -1)
        attention_BN = attention_at(log_attention_BM, drawn)
        return expectation(features_BNF, attention_BN, drawn.weight, centred=self.centred)

    def _geometry(self, x_low: Tensor) -> Geometry:
        shape = tuple(x_low.shape[1:])
        if shape not in self._geometries:
            self._geometries[shape] = geometry_of(self.attention, shape)
        return self._geometries[shape]


def attention_sampling(
    attention: nn.Module,
    feature: nn.Module,
    patch_size: int | Sequence[int] | None = None,
    n_patches: int = 10,
    replace: bool = False,
    attention_regularizer: Regularizer | None = None,
    receptive_field: int | Geometry | None = 0,
    *,
    scheme: str = "murthy",
    inference: str = "sample",
    num_draws: int = 8,
    use_logits: bool = False,
    centred: bool = False,
    fill: float = 0.0,
    seed: int = 0,
) -> AttentionSampling:
    """Build the module (x_low, x_high, log_prior=None) -> (features (B, F), attention (B, *map), patches).

    ``attention`` maps the low-resolution view to probabilities (B, *map) or (B, 1, *map) (end it in
    :class:`SampleSoftmax`), or to logits with ``use_logits``. ``feature`` maps patches (B * N, C,
    *patch_size) to (B * N, F). Without ``patch_size`` it is taken from ``feature.patch_size``.
    ``receptive_field=None`` reads the exact geometry off the attention network; other values as in
    :class:`SamplePatches`. ``inference="top"`` takes the N most probable positions in evaluation,
    renormalised: deterministic, biased. ``inference="average"`` takes, in evaluation, the mean over
    ``num_draws`` independent draws of each row: unbiased, with 1 / num_draws of the variance, at num_draws
    times the cost; training draws once all the same. ``centred`` as in :func:`expectation`.

    Raises InputError for a patch size that is missing, an unknown scheme or inference, and numbers out of
    range.
    """
    if patch_size is None:
        patch_size = getattr(feature, "patch_size", None)
    if not isinstance(patch_size, int | Sequence):
        raise InputError("patch_size is missing, and the feature network has no attribute patch_size")
    sampler = SamplePatches(
        n_patches,
        patch_size,
        receptive_field or 0,
        replace,
        use_logits,
        scheme=scheme,
        fill=fill,
        seed=seed,
    )
    return AttentionSampling(
        attention,
        feature,
        sampler,
        attention_regularizer=attention_regularizer,
        trace_geometry=receptive_field is None,
        inference=inference,
        num_draws=num_draws,
        centred=centred,
    )


def map_shape_of(attention: Tensor, x_low: Tensor) -> tuple[int, ...]:
    """Shape of the map in attention (B, *map) or (B, 1, *map) that belongs to ``x_low`` (B, C, *view)."""
    num_axes = check_view(x_low)
    shape = tuple(attention.shape)
    if len(shape) >= 2 and shape[0] == len(x_low):
        if len(shape) == num_axes + 1:
            return shape[1:]
        if len(shape) == num_axes + 2 and shape[1] == 1:
            return shape[2:]
    expected = f"(B, *map) or (B, 1, *map) for x_low {tuple(x_low.shape)} (B, C, *view)"
    raise InputError(f"attention must be {expected}, got {shape}")


def _offsets(
    index_BN: Tensor,
    map_shape: tuple[int, ...],
    x_high: HighResolution,
    sizes: tuple[int, ...],
    geometry: Geometry,
) -> Tensor:
    if isinstance(x_high, Tensor):
        return patch_offsets(index_BN, map_shape, tuple(x_high.shape[2:]), sizes, geometry=geometry)
    rows = zip(index_BN.unsqueeze(1), x_high, strict=True)
    return torch.cat(
        [
            patch_offsets(index_1N, map_shape, image_shape(source), sizes, geometry=geometry)
            for index_1N, source in rows
        ]
    )


def attention_at(log_attention_BM: Tensor, drawn: Draw) -> Tensor:
    """Attention (B, N) at the drawn positions, with gradient; 0 at padding."""
    padding_BN = torch.arange(drawn.index.shape[1], device=drawn.index.device) >= drawn.num_drawn[:, None]
    return log_attention_BM.gather(1, drawn.index).exp().masked_fill(padding_BN, 0.0)


def _flat_prior(log_prior: Tensor | None, num_rows: int, map_shape: tuple[int, ...]) -> Tensor | None:
    if log_prior is None:
        return None
    if tuple(log_prior.shape) not in ((num_rows, *map_shape), (num_rows, 1, *map_shape)):
        expected = f"(B, *map) = {(num_rows, *map_shape)}"
        raise InputError(f"log_prior must be {expected}, got {tuple(log_prior.shape)}")
    return log_prior.flatten(1)


def _check_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be an integer of at least 1, got {value!r}")
    return value

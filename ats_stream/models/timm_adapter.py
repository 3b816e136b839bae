"""Any model of the package timm as a feature network or as an attention network.

timm is an optional extra and is imported when a model is built. Nothing is downloaded: weights come from a
local file. timm itself needs torchvision; the user picks the build that fits the installed torch.

Shapes: B images, P patches, C channels, F features.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ats_stream.errors import InputError
from ats_stream.models.pixels import Standardize
from ats_stream.models.weights import load_weights

if TYPE_CHECKING:
    import os


class TimmFeature(nn.Module):
    """Patches (P, C, Y, X) in floating point -> features (P, F), as timm pools them; built by
    :func:`timm_feature`."""

    def __init__(self, network: nn.Module, standardize: Standardize, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.network = network
        self.standardize = standardize
        self.patch_size = patch_size
        self.num_features = int(getattr(network, "head_hidden_size", None) or network.num_features)  # type: ignore[arg-type]  # an int, which Module does not know

    def forward(self, patches: Tensor) -> Tensor:
        """Features (P, F)."""
        features: Tensor = self.network(self.standardize(patches))
        return features


class TimmAttention(nn.Module):
    """Views (B, C, Y, X) in floating point -> attention logits (B, y, x); built by :func:`timm_attention`."""

    def __init__(self, network: nn.Module, standardize: Standardize, index: int, num_maps: int) -> None:
        super().__init__()
        self.network = network
        self.standardize = standardize
        self.index = index
        # no bias: it would shift all logits alike
        self.to_logit = nn.Conv2d(num_maps, 1, 1, bias=False)
        # transformers cut the view into equal patches; every position then sees them all
        self.even_grid = any(name.endswith("patch_embed") for name, _ in network.named_modules())

    def forward(self, views: Tensor) -> Tensor:
        """Logits (B, y, x)."""
        (maps,) = self.network.forward_intermediates(  # type: ignore[operator]  # a method of timm's models
            self.standardize(views), indices=[self.index], output_fmt="NCHW", intermediates_only=True
        )
        logits: Tensor = self.to_logit(maps)
        return logits.squeeze(1)


def timm_feature(
    name: str,
    *,
    num_channels: int = 3,
    patch_size: tuple[int, int] | None = None,
    path: str | os.PathLike[str] | None = None,
    max_value: float = 1.0,
    **options: Any,
) -> TimmFeature:
    """Build a timm model without its classifier as a feature network.

    ``path`` is a local file of weights (see :func:`ats_stream.models.load_weights`); without it they are
    random. Pixels are divided by ``max_value`` and standardised as the model expects. ``patch_size``, by
    default the size the model was trained with, is what ``attention_sampling(patch_size=None)`` takes.
    ``options`` go to ``timm.create_model``; a transformer wants ``img_size=`` the patch size.

    Raises InputError if timm or the model is unknown, CheckpointError if the weights do not fit.
    """
    network, standardize = _build(name, num_channels, path, max_value, options)
    trained: tuple[int, int] = tuple(_config(network)["input_size"][1:])
    return TimmFeature(network, standardize, patch_size or trained)


def timm_attention(
    name: str,
    *,
    stride: int = 8,
    num_channels: int = 3,
    path: str | os.PathLike[str] | None = None,
    max_value: float = 1.0,
    **options: Any,
) -> TimmAttention:
    """Build the trunk of a timm model, up to the last map of a stride, and a 1x1 convolution to logits.

    Give it to ``attention_sampling(..., use_logits=True, receptive_field=None)``, or end it in
    :class:`ats_stream.sampling.SampleSoftmax`. The geometry is read off convolutional networks and is an even
    grid for transformers, which see the whole view from everywhere; those want ``img_size=`` the view's size
    or, where they can, ``dynamic_img_size=True``. Other arguments and errors as for :func:`timm_feature`;
    InputError also for a stride that the model does not have.
    """
    network, standardize = _build(name, num_channels, path, max_value, options)
    if not hasattr(network, "forward_intermediates"):
        raise InputError(f"timm model {name!r} gives no maps from inside, and cannot be an attention network")
    stages: list[dict[str, Any]] = list(network.feature_info)  # type: ignore[arg-type]  # a list in timm
    fitting = [index for index, stage in enumerate(stages) if stage["reduction"] == stride]
    if not fitting:
        strides = ", ".join(str(one) for one in sorted({stage["reduction"] for stage in stages}))
        raise InputError(f"timm model {name!r} has maps of stride {strides}, got {stride}")
    index = fitting[-1]
    network.prune_intermediate_layers([index], prune_norm=True, prune_head=True)  # type: ignore[operator]  # see above
    return TimmAttention(network, standardize, index, stages[index]["num_chs"])


def _build(
    name: str,
    num_channels: int,
    path: str | os.PathLike[str] | None,
    max_value: float,
    options: dict[str, Any],
) -> tuple[nn.Module, Standardize]:
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # torchvision of another build raises RuntimeError
        reason = str(error).splitlines()[0]
        raise InputError(
            f"timm model {name!r} needs the packages timm and torchvision, the latter built for this torch: "
            f"pip install 'ats-stream[timm]' ({reason})"
        ) from error
    if ":" in name:
        raise InputError(
            f"timm model {name!r}: give a name of timm.list_models() and weights as a local file"
        )
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=0, in_chans=num_channels, **options
        )
    except RuntimeError as error:
        raise InputError(f"timm model {name!r} cannot be built: {error}") from error
    config = _config(network)
    if path is not None:
        classifier = config.get("classifier") or ()
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        load_weights(network, path, ignore=tuple(f"{one}." for one in names))
    mean, std = config["mean"], config["std"]
    if len(mean) != num_channels:
        mean, std = (0.0,) * num_channels, (1.0,) * num_channels
    return network, Standardize(mean, std, max_value=max_value)


def _config(network: nn.Module) -> dict[str, Any]:
    config: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]  # a dict in timm
    return config

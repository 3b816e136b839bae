"""Residual networks as feature networks, with the names of weights that published checkpoints use.

He, Zhang, Ren & Sun, "Deep residual learning for image recognition", CVPR 2016; the bottleneck strides in its
3x3 convolution, as the common checkpoints do.

Shapes: P patches, C channels, F features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ats_stream.errors import InputError
from ats_stream.models.pixels import IMAGENET_MEAN, IMAGENET_STD, Standardize

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTHS = (64, 128, 256, 512)


class ResNet(nn.Module):
    """Patches (P, C, Y, X) in floating point -> features (P, F), the mean over the last map.

    Checkpoints of the same depth load by :func:`ats_stream.models.load_weights`, without their classifier.

    Args:
        depth: 18, 34 or 50; F is 512, 512 or 2048.
        num_channels: C.
        mean: per channel, of pixels divided by ``max_value``; by default those of ImageNet for three
            channels, and 0 otherwise.
        std: the same; by default those of ImageNet, or 1.
        max_value: the pixel value that counts as 1: 255 for patches of uint8 images, which reach the network
            unscaled.

    Raises InputError for another depth, and for constants that do not fit.
    """

    ignored_weights = ("fc.",)

    def __init__(
        self,
        depth: int,
        *,
        num_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        max_value: float = 1.0,
    ) -> None:
        super().__init__()
        if depth not in _DEPTHS:
            raise InputError(f"depth must be one of {', '.join(map(str, _DEPTHS))}, got {depth!r}")
        block, num_blocks = _DEPTHS[depth]
        colour = num_channels == len(IMAGENET_MEAN)
        if mean is None:
            mean = IMAGENET_MEAN if colour else (0.0,) * num_channels
        if std is None:
            std = IMAGENET_STD if colour else (1.0,) * num_channels
        if len(mean) != num_channels:
            raise InputError(
                f"mean and std must have {num_channels} values, one per channel, got {len(mean)}"
            )
        self.standardize = Standardize(mean, std, max_value=max_value)
        self.conv1 = nn.Conv2d(num_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = []
        channels = 64
        for stage, (width, count) in enumerate(zip(_WIDTHS, num_blocks, strict=True)):
            blocks = []
            for number in range(count):
                blocks.append(block(channels, width, stride=2 if stage > 0 and number == 0 else 1))
                channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.num_features = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, patches: Tensor) -> Tensor:
        """Features (P, F)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.standardize(patches)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        features: Tensor = self.avgpool(x).flatten(1)
        return features


class _Residual(nn.Module):
    """relu(body(x) + x), where a 1x1 convolution makes x fit if it must."""

    expansion: int

    def __init__(self, channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != width * self.expansion:
            out = width * self.expansion
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.downsample is None else self.downsample(x)
        joined: Tensor = self.relu(self.body(x) + short)
        return joined

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _Basic(_Residual):
    expansion = 1

    def __init__(self, channels: int, width: int, *, stride: int) -> None:
        super().__init__(channels, width, stride=stride)
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def body(self, x: Tensor) -> Tensor:
        result: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return result


class _Bottleneck(_Residual):
    expansion = 4

    def __init__(self, channels: int, width: int, *, stride: int) -> None:
        super().__init__(channels, width, stride=stride)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)

    def body(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        result: Tensor = self.bn3(self.conv3(x))
        return result


_DEPTHS: dict[int, tuple[type[_Residual], tuple[int, ...]]] = {
    18: (_Basic, (2, 2, 2, 2)),
    34: (_Basic, (3, 4, 6, 3)),
    50: (_Bottleneck, (3, 4, 6, 3)),
}


def resnet18(**options: Any) -> ResNet:
    """Residual network of 18 layers, F = 512; options as in :class:`ResNet`."""
    return ResNet(18, **options)


def resnet34(**options: Any) -> ResNet:
    """Residual network of 34 layers, F = 512; options as in :class:`ResNet`."""
    return ResNet(34, **options)


def resnet50(**options: Any) -> ResNet:
    """Residual network of 50 layers, F = 2048; options as in :class:`ResNet`."""
    return ResNet(50, **options)

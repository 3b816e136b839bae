"""The geometry read off a network against brute force: which pixels have a gradient for one cell."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ats_stream.errors import InputError
from ats_stream.sampling import (
    SampleSoftmax,
    geometry_from_receptive_field,
    geometry_of,
    receptive_field,
)


class Residual(nn.Module):
    """Two branches of one geometry, a gate, and functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 5, stride=2, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.gate = nn.Conv2d(4, 4, 1)
        self.head = nn.Conv2d(8, 1, 3, padding="same", dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.gelu(self.body(x)) + x
        y = y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        return self.head(F.avg_pool2d(torch.cat([x, y], dim=1), kernel_size=3, stride=1, padding=1))


NETWORKS = {
    "1-D": (nn.Sequential(nn.Conv1d(2, 3, 4, stride=3, padding=2), nn.Conv1d(3, 1, 3, dilation=2)), (2, 61)),
    "tanh": (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Conv2d(4, 1, 3)),
        (2, 20, 23),
    ),
    "remainder": (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, (3, 5)), nn.AvgPool2d(8), nn.Conv2d(4, 1, 1)),
        (2, 52, 47),
    ),
    "padded": (
        nn.Sequential(
            nn.ZeroPad2d((3, 1, 2, 0)), nn.Conv2d(2, 4, 4, stride=2), nn.Conv2d(4, 1, 3, padding=1)
        ),
        (2, 30, 31),
    ),
    "same, even kernel": (nn.Sequential(nn.Conv1d(2, 1, 4, padding="same")), (2, 25)),
    "transposed": (
        nn.Sequential(nn.Conv2d(2, 3, 3, stride=4), nn.ConvTranspose2d(3, 1, 4, stride=2, padding=1)),
        (2, 43, 43),
    ),
    "nearest": (nn.Sequential(nn.AvgPool2d(4), nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 1)), (2, 40, 40)),
    "max pooling": (
        nn.Sequential(nn.Conv2d(2, 2, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(2, 1, 1)),
        (2, 33, 30),
    ),
    "ceiling": (nn.Sequential(nn.AvgPool2d(3, stride=2, ceil_mode=True), nn.Conv2d(2, 1, 1)), (2, 32, 30)),
    "3-D": (
        nn.Sequential(nn.Conv3d(2, 3, (1, 3, 3)), nn.AvgPool3d((1, 2, 4)), nn.Conv3d(3, 1, 1)),
        (2, 4, 20, 26),
    ),
    "adaptive": (nn.Sequential(nn.AdaptiveAvgPool2d((5, 4)), nn.Conv2d(2, 1, 1)), (2, 20, 20)),
    "residual": (Residual(), (2, 45, 40)),
}


def footprint(
    network: nn.Module, input_shape: tuple[int, ...], cell: tuple[int, ...]
) -> list[tuple[int, int]]:
    """First and last pixel per axis that a cell depends on: gradients over many random inputs."""
    seen = torch.zeros(input_shape[1:], dtype=torch.bool)
    for seed in range(30):
        view = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        network(view)[(0, 0, *cell)].backward()
        # a gate sees the whole view, weakly; the cell's own field stands far above it
        strength = view.grad[0].abs().amax(dim=0)
        seen |= strength > 1e-2 * strength.max()
    pixels = seen.nonzero()
    return list(zip(pixels.amin(dim=0).tolist(), pixels.amax(dim=0).tolist(), strict=True))


# torch warns of the copy it makes for an even kernel
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_against_brute_force(name):
    network, input_shape = NETWORKS[name]
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.uniform_(parameter, 0.5, 1.0)
    geometry = geometry_of(network, input_shape)
    assert geometry.map_shape == tuple(network(torch.zeros(1, *input_shape)).shape[2:])
    assert geometry.input_shape == input_shape[1:]
    middle = tuple(cells // 2 for cells in geometry.map_shape)
    for cell in (middle, tuple(place - 1 for place in middle)):
        for axis, (first, last) in enumerate(footprint(network, input_shape, cell)):
            centre = geometry.offset[axis] + geometry.stride[axis] * (cell[axis] + 0.5)
            width = geometry.receptive_field[axis]
            if name in (
                "transposed",
                "nearest",
            ):  # the field differs from cell to cell: it holds what is seen
                assert centre - width / 2 - 1 <= first
                assert last + 1 <= centre + width / 2 + 1
            else:
                assert (first + last + 1) / 2 == pytest.approx(centre)
                assert last + 1 - first == width


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_upsampling_keeps_the_image_covered(mode):
    network = nn.Sequential(nn.AvgPool2d(4), nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(1, 1, 1))
    geometry = geometry_of(network, (1, 40, 40))
    assert (geometry.offset, geometry.stride) == ((0.0, 0.0), (2.0, 2.0))


def test_softmax_and_squeezing_keep_the_places():
    body = nn.Sequential(nn.Conv2d(1, 1, 3), nn.MaxPool2d(2))
    plain = geometry_of(body, (1, 21, 22))
    assert geometry_of(nn.Sequential(body, SampleSoftmax(squeeze_channels=True)), (1, 21, 22)) == plain
    assert receptive_field(body, (1, 21, 22)) == (4, 4)


def test_network_is_left_as_it_was():
    network = nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Dropout(), nn.Conv1d(2, 1, 1))
    network[2].eval()
    geometry_of(network, (1, 9))
    assert [module.training for module in network] == [True, True, False, True]
    assert int(network[1].num_batches_tracked) == 0


class Crop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., 1:-1]


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.valid, self.shifted = nn.Conv1d(1, 1, 3), nn.Conv1d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.valid(x) + self.shifted(x)[..., :-2]


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(1, 1, 4)


@pytest.mark.parametrize(
    ("network", "input_shape", "message"),
    [
        (nn.Sequential(nn.Conv1d(1, 1, 3), Crop()), (1, 20), "describe such a network by a Geometry"),
        (nn.Conv1d(1, 3, 3), (1, 20), "describe such a network by a Geometry"),
        (Skip(), (1, 20), "different places"),
        (Constant(), (1, 20), "cannot be traced"),
        (nn.Conv1d(1, 1, 30), (1, 20), "cannot run"),
        (nn.Conv1d(2, 1, 3), (1, 20), "cannot run"),
        (nn.AdaptiveAvgPool1d(7), (1, 20), "no single stride"),
        (nn.Upsample(size=50, mode="linear", align_corners=True), (1, 20), "align_corners"),
        (nn.Identity(), (20,), "1 to 3 axes"),
        (nn.Identity(), (1, 0), "1 to 3 axes"),
    ],
)
def test_bad_input(network, input_shape, message):
    with pytest.raises(InputError, match=message):
        geometry_of(network, input_shape)


class Shuffled(nn.Module):
    """Cells of 4 x 4 pixels that all see the whole view, by a way that cannot be followed."""

    even_grid = True

    def forward(self, x: Tensor) -> Tensor:
        cells = x.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(4, 5))
        return torch.roll(cells.flatten(2), 1, dims=2).reshape(cells.shape) + cells.mean()


def test_a_module_that_says_so_covers_its_input_evenly():
    whole = geometry_of(Shuffled(), (1, 24, 32))
    assert whole == replace(geometry_from_receptive_field(0, (6, 8), (24, 32)), receptive_field=(24, 32))
    inside = geometry_of(
        nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), Shuffled(), nn.Conv2d(2, 1, 3)), (1, 25, 33)
    )
    # 12 x 16 cells of 2 pixels from 0.5 on, 3 x 4 cells of 8, less a border of one
    assert inside.map_shape == (1, 2)
    assert inside.stride == (8.0, 8.0)
    assert inside.offset == (8.5, 8.5)
    plain = Shuffled()
    plain.even_grid = False
    with pytest.raises(InputError):
        geometry_of(plain, (1, 24, 32))

"""The patch of a cell is what the cell sees: every cell of small networks in 1-D to 3-D, by gradients.

The field of a cell is found by brute force, as the pixels its output has a gradient for. A patch of the size
of the field, cut where the geometry says from an image that is the view itself, must be that field.
"""

import itertools

import pytest
import torch
from torch import Tensor, nn

from ats_stream.sampling import cut_patches, geometry_of, patch_offsets

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAXIMUM = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def valid(num_axes: int) -> nn.Module:
    return nn.Sequential(CONV[num_axes](1, 2, 3), nn.Tanh(), CONV[num_axes](2, 1, 3))


def same(num_axes: int) -> nn.Module:
    return nn.Sequential(
        CONV[num_axes](1, 2, 3, padding="same"), nn.Tanh(), CONV[num_axes](2, 1, 5, padding="same")
    )


def strided(num_axes: int) -> nn.Module:
    return nn.Sequential(CONV[num_axes](1, 2, 3, stride=2), nn.Tanh(), CONV[num_axes](2, 1, 2))


def strided_same(num_axes: int) -> nn.Module:
    return nn.Sequential(
        CONV[num_axes](1, 2, 3, stride=2, padding=1), nn.Tanh(), CONV[num_axes](2, 1, 3, padding=1)
    )


def pooled(num_axes: int) -> nn.Module:
    return nn.Sequential(CONV[num_axes](1, 2, 3), nn.Tanh(), AVERAGE[num_axes](3), CONV[num_axes](2, 1, 1))


def pooled_same(num_axes: int) -> nn.Module:
    return nn.Sequential(
        CONV[num_axes](1, 2, 3, padding=1), nn.Tanh(), MAXIMUM[num_axes](2), CONV[num_axes](2, 1, 1)
    )


def dilated(num_axes: int) -> nn.Module:
    return nn.Sequential(CONV[num_axes](1, 2, 3, dilation=2), nn.Tanh(), CONV[num_axes](2, 1, 2, stride=2))


NETWORKS = (valid, same, strided, strided_same, pooled, pooled_same, dilated)
VIEWS = {1: (17,), 2: (14, 17), 3: (8, 9, 10)}  # pooling and strides leave remainders


def brute_force_boxes(
    network: nn.Module, views: Tensor
) -> tuple[tuple[int, ...], list[tuple[Tensor, Tensor]]]:
    """Map shape, and of every cell the first and last pixel per axis with a gradient in any of the views."""
    views = views.requires_grad_()
    maps = network(views).sum(dim=(0, 1))
    boxes = []
    for cell in itertools.product(*(range(size) for size in maps.shape)):
        (gradient,) = torch.autograd.grad(maps[cell], views, retain_graph=True)
        pixels = (gradient.abs().amax(dim=(0, 1)) > 0).nonzero()
        boxes.append((pixels.amin(dim=0), pixels.amax(dim=0)))
    return tuple(maps.shape), boxes


@pytest.mark.parametrize("num_axes", [1, 2, 3])
@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_patch_of_the_size_of_the_field_is_the_field(build, num_axes):
    torch.manual_seed(0)
    network, view = build(num_axes).double(), VIEWS[num_axes]
    # a maximum picks one pixel of its window: many views, to meet them all
    num_views = 40 if build is pooled_same else 1
    views = torch.randn(num_views, 1, *view, dtype=torch.float64)
    map_shape, boxes = brute_force_boxes(network, views)
    geometry = geometry_of(network, (1, *view))
    assert geometry.map_shape == map_shape
    sizes = geometry.receptive_field
    offsets_ND = patch_offsets(torch.arange(len(boxes))[None], map_shape, view, sizes, geometry=geometry)[0]
    last_pixel = torch.tensor(view) - 1
    num_inside = 0
    for start, (first, last) in zip(offsets_ND, boxes, strict=True):
        end = start + torch.tensor(sizes) - 1
        # padding has no pixels: there the field stops at the border of the view
        assert torch.equal(first, start.clamp(min=0))
        assert torch.equal(last, torch.minimum(end, last_pixel))
        num_inside += bool((start >= 0).all() and (end <= last_pixel).all())
    assert num_inside >= 2


@pytest.mark.parametrize("num_axes", [1, 2, 3])
@pytest.mark.parametrize("build", [valid, strided, pooled, dilated], ids=lambda build: build.__name__)
def test_network_says_the_same_of_the_patch_alone(build, num_axes):
    torch.manual_seed(0)
    network, view = build(num_axes), VIEWS[num_axes]
    x_low = torch.randn(1, 1, *view)
    geometry = geometry_of(network, (1, *view))
    whole = network(x_low).flatten()
    sizes = geometry.receptive_field
    offsets_BND = patch_offsets(
        torch.arange(len(whole))[None], geometry.map_shape, view, sizes, geometry=geometry
    )
    alone = network(cut_patches(x_low, offsets_BND, sizes).flatten(0, 1)).flatten()
    assert torch.allclose(alone, whole, atol=1e-6)

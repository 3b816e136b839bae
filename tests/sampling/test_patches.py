import numpy as np
import pytest
import torch

from ats_stream.errors import InputError
from ats_stream.kernels.gather_cpu import compiled_path
from ats_stream.sampling import cut_patches


class ArraySource:
    """A lazy source over an array (C, *space) that notes what it was asked for."""

    def __init__(self, array):
        self.array = np.asarray(array)
        self.levels = (self.array,)  # an array has a shape, as a level must
        self.calls = []

    def read_patches(self, level, offsets, size, *, fill=0):
        self.calls.append((level, offsets.dtype, tuple(size), fill))
        out = np.full((len(offsets), self.array.shape[0], *size), fill, self.array.dtype)
        for patch, start in zip(out, offsets, strict=True):
            for pixel in np.ndindex(*size):
                place = tuple(int(a) + b for a, b in zip(start, pixel, strict=True))
                if all(0 <= p < n for p, n in zip(place, self.array.shape[1:], strict=True)):
                    patch[(slice(None), *pixel)] = self.array[(slice(None), *place)]
        return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.uint32])
@pytest.mark.parametrize("space", [(9,), (7, 8), (5, 6, 5)])
def test_tensor_and_lazy_source_agree_with_plain_indexing(space, dtype):
    generator = torch.Generator().manual_seed(0)
    largest = min(torch.iinfo(dtype).max, 2**32 - 1)
    x_high = torch.randint(0, largest + 1, (2, 3, *space), generator=generator).to(dtype)
    size = tuple(range(3, 3 + len(space)))
    # some inside, some over each border, some wholly outside
    offsets_BND = torch.randint(-12, 14, (2, 40, len(space)), generator=generator)
    sources = [ArraySource(row.numpy()) for row in x_high]
    patches = cut_patches(x_high, offsets_BND, size, fill=7)
    assert patches.dtype == dtype
    assert patches.shape == (2, 40, 3, *size)
    assert torch.equal(patches, cut_patches(sources, offsets_BND, size, fill=7))
    assert sources[0].calls == [(0, np.dtype("int64"), size, 7)]
    assert isinstance(sources[0].calls[0][3], int)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.uint16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("space", [(90,), (40, 50), (12, 14, 16)])
def test_the_kernel_gives_the_bits_of_plain_indexing(space, pixels, dtype):
    generator = torch.Generator().manual_seed(1)
    x_high = torch.randint(0, 256, (2, 3, *space), generator=generator).to(pixels)
    if pixels.is_floating_point:
        x_high = x_high * -0.0  # both zeros, and -0 stays -0
        x_high[:, :, 0] = 0.0
    size = tuple(min(side, 32) for side in space)
    offsets_BND = torch.randint(-40, 60, (2, 9, len(space)), generator=generator)
    with compiled_path(False):
        plain = cut_patches(x_high, offsets_BND, size, fill=7, dtype=dtype)
    with compiled_path(True):
        got = cut_patches(x_high, offsets_BND, size, fill=7, dtype=dtype)
    assert got.dtype == plain.dtype == (pixels if dtype is None or pixels.is_floating_point else dtype)
    assert torch.equal(got.view(torch.uint8), plain.view(torch.uint8))


def test_gradient_returns_to_the_pixels_it_came_from():
    x_high = torch.zeros(1, 1, 6, requires_grad=True)
    cut_patches(x_high, torch.tensor([[[-1], [1], [2]]]), (3,)).sum().backward()
    assert x_high.grad.flatten().tolist() == [1, 2, 2, 2, 1, 0]


def test_bad_input():
    offsets_BND = torch.zeros(2, 3, 2, dtype=torch.int64)
    with pytest.raises(InputError, match="do not fit"):
        cut_patches(torch.zeros(2, 1, 4, 4), offsets_BND, (3,))
    with pytest.raises(InputError, match="x_high has 1 rows, but 2"):
        cut_patches(torch.zeros(1, 1, 4, 4), offsets_BND, (3, 3))
    with pytest.raises(InputError, match=r"\(2, 1, 4\)"):
        cut_patches(torch.zeros(2, 1, 4), offsets_BND, (3, 3))
    gray, colour = ArraySource(np.zeros((1, 4, 4), np.uint8)), ArraySource(np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(InputError, match="agree in dtype and channels"):
        cut_patches([gray, colour], offsets_BND, (3, 3))
    with pytest.raises(InputError, match=r"2 axes of space, got \(1, 4\) .* row 1"):
        cut_patches([gray, ArraySource(np.zeros((1, 4), np.uint8))], offsets_BND, (3, 3))
    with pytest.raises(InputError, match=r"list of B sources.*ndarray"):
        cut_patches(np.zeros((2, 1, 4, 4)), offsets_BND, (3, 3))
    with pytest.raises(InputError, match=r"list of B sources.*'ndarray', 'ndarray'"):
        cut_patches([np.zeros((1, 4, 4))] * 2, offsets_BND, (3, 3))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("size", [(5, 4), (4, 6)])
def test_a_patch_may_fill_its_image_but_not_exceed_it(size, lazy):
    x_high = torch.arange(20.0).view(1, 1, 4, 5)
    images = [ArraySource(x_high[0].numpy())] if lazy else x_high
    origin = torch.zeros(1, 1, 2, dtype=torch.int64)
    assert torch.equal(cut_patches(images, origin, (4, 5))[0], x_high)
    with pytest.raises(InputError, match=rf"patch of \({size[0]}, {size[1]}\) .* larger than .*\(4, 5\)"):
        cut_patches(images, origin, size)

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ats_stream.errors import InputError
from ats_stream.sampling import Geometry, geometry_from_receptive_field, patch_offsets

LINE = Geometry(offset=(4.0,), stride=(8.0,), input_shape=(288,), map_shape=(35,), receptive_field=(16,))


def test_even_map_tiles_the_image():
    index_BN = torch.arange(16)[None]
    offsets = patch_offsets(index_BN, (4, 4), (400, 800), (100, 200))
    expected = [[100 * y, 200 * x] for y in range(4) for x in range(4)]
    assert offsets.dtype == torch.int64
    assert offsets.tolist() == [expected]


def test_strided_network_by_hand():
    # view 288 of an image 960: centre of cell s is (4 + 8 (s + 1/2)) 960 / 288
    offsets = patch_offsets(torch.tensor([[0, 34]]), (35,), (960,), (100,), geometry=LINE)
    assert offsets.tolist() == [[[round(8 * 960 / 288 - 50)], [round(280 * 960 / 288 - 50)]]]


def test_halves_round_to_even_and_patches_reach_over_the_border():
    # cells of one pixel: centres 0.5, 1.5, ...; starts -1.5, -0.5, 0.5, 1.5 round to -2, 0, 0, 2
    offsets = patch_offsets(torch.arange(4)[None], (4,), (4,), (4,))
    assert offsets.flatten().tolist() == [-2, 0, 0, 2]


@given(
    cells=st.integers(1, 3000),
    position=st.integers(0, 10**9),
    image=st.integers(1, 10**6),
    size=st.integers(1, 2000),
    stride=st.sampled_from([1, 2, 4, 8, 16]),
    halves=st.integers(0, 60),
    lost=st.integers(0, 40),
)
@settings(max_examples=100, deadline=None)
def test_centre_lies_within_half_a_pixel_of_the_exact_one(cells, position, image, size, stride, halves, lost):
    cell = position % cells
    view = cells * stride + halves + lost
    geometry = Geometry(
        offset=(halves / 2,),
        stride=(float(stride),),
        input_shape=(view,),
        map_shape=(cells,),
        receptive_field=(1,),
    )
    start = int(patch_offsets(torch.tensor([[cell]]), (cells,), (image,), (size,), geometry=geometry))
    centre = (Fraction(halves, 2) + stride * (cell + Fraction(1, 2))) * Fraction(image, view)
    assert abs(start - (centre - Fraction(size, 2))) <= Fraction(1, 2) + Fraction(1, 10**6)


def test_one_number_for_the_receptive_field():
    assert geometry_from_receptive_field(0, (30, 50), (300, 400)).stride == (10.0, 8.0)
    # four valid 3 x 3 convolutions and a pooling by 8 that leaves a remainder of 4
    valid = geometry_from_receptive_field(9, (36,), (300,))
    assert (valid.offset, valid.stride) == ((4.0,), (8.0,))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.tensor([[16]]), (4, 4), (40, 40), (4, 4)), {}, r"\[0, 16\)"),
        ((torch.tensor([[-1]]), (4, 4), (40, 40), (4, 4)), {}, r"\[0, 16\)"),
        ((torch.tensor([[0.0]]), (4, 4), (40, 40), (4, 4)), {}, "float32"),
        ((torch.tensor([[0]]), (4, 4), (40, 40), (4,)), {}, "do not fit"),
        ((torch.tensor([[0]]), (4, 4), (40,), (4, 4)), {}, "cannot relate"),
        ((torch.tensor([[0]]), (4,), (40,), (0,)), {}, "at least 1 pixel"),
        ((torch.tensor([[0]]), (4,), (40,), (4,)), {"geometry": LINE}, "do not fit"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(InputError, match=message):
        patch_offsets(*arguments, **options)


def test_bad_geometries():
    with pytest.raises(InputError, match="no stride"):
        geometry_from_receptive_field(30, (4,), (29,))
    with pytest.raises(InputError, match="cannot relate"):
        geometry_from_receptive_field(-1, (4,), (29,))
    with pytest.raises(InputError, match="one value for each"):
        Geometry(offset=(0.0,), stride=(1.0, 1.0), input_shape=(4,), map_shape=(4,), receptive_field=(1,))
    with pytest.raises(InputError, match="positive"):
        Geometry(offset=(0.0,), stride=(0.0,), input_shape=(4,), map_shape=(4,), receptive_field=(1,))

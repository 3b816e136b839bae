"""Methods that find tissue: by name, as functions, in conversions, and what is wrong with them."""

from __future__ import annotations

import sys
import textwrap

import numpy as np
import pytest

from ats_stream.errors import SlideError
from ats_stream.io import ConvertConfig, convert, open_pyramid, tissue_mask, write_pyramid
from ats_stream.io.conversion.manifest import read_manifest
from ats_stream.io.tissue_method import find_method, method_name

METHODS = """
import numpy as np

seen = []

def left_half(image_CYX, pixel_size_um):
    seen.append((image_CYX.shape, image_CYX.dtype.name, pixel_size_um))
    mask_YX = np.zeros(image_CYX.shape[1:], np.int32)
    mask_YX[:, : mask_YX.shape[1] // 2] = 7
    return mask_YX

def fails(image_CYX, pixel_size_um):
    raise RuntimeError("no model\\nhere")

def too_small(image_CYX, pixel_size_um):
    return np.ones((2, 2), bool)

def floats(image_CYX, pixel_size_um):
    return np.ones(image_CYX.shape[1:])

class Holder:
    @staticmethod
    def inner(image_CYX, pixel_size_um):
        return np.ones(image_CYX.shape[1:], bool)

number = 3
"""


@pytest.fixture
def methods(tmp_path, monkeypatch):
    """A module of methods that can be imported."""
    name = "methods_of_a_user"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(METHODS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)


def config(method, **changed):
    return ConvertConfig(chunk_px=16, shard_px=32, coarsest_px=64, tissue_method=method, **changed)


@pytest.mark.parametrize("as_function", [False, True])
def test_the_mask_of_a_pyramid_is_the_method_s(tmp_path, picture, methods, as_function):
    target = tmp_path / "a.ome.zarr"
    method = methods.left_half if as_function else "methods_of_a_user:left_half"
    summary = write_pyramid(picture((3, 150, 260)), target, config(method), pixel_size_um=4.0)
    assert methods.seen == [((3, 75, 130), "uint8", [8.0, 8.0])]
    mask = open_pyramid(target).label("tissue").read(0)[0]
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, np.broadcast_to(np.arange(130) < 65, (75, 130)))
    assert summary.tissue_share == 0.5


def test_the_default_is_otsu(tmp_path, slide_path):
    convert(slide_path, tmp_path / "a", ConvertConfig(levels=5))
    pyramid = open_pyramid(tmp_path / "a")
    level = pyramid.level_for(pixel_size_um=8.0)
    np.testing.assert_array_equal(pyramid.label("tissue").read(0)[0], tissue_mask(pyramid.read(level)))


def test_methods_are_known_by_name(methods):
    assert method_name(methods.left_half) == "methods_of_a_user:left_half"
    assert method_name(methods.Holder.inner) == "methods_of_a_user:Holder.inner"
    assert find_method("methods_of_a_user:Holder.inner") is methods.Holder.inner
    one, other = (config(m) for m in (methods.left_half, "methods_of_a_user:left_half"))
    assert one == other
    assert isinstance(one.tissue_method, str)


def test_another_method_is_another_pyramid(tmp_path, picture, methods):
    plans = []
    for number, method in enumerate(("otsu", methods.left_half)):
        target = tmp_path / f"{number}.zarr"
        write_pyramid(picture((3, 90, 90)), target, config(method))
        plans.append(read_manifest(target).header.plan)
    assert plans[0] != plans[1]


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("ostu", "'ostu' is neither 'otsu' nor 'module:function'"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        ("methods_of_a_user:none", "cannot be imported: AttributeError"),
        ("methods_of_a_user:number", "is no function but int"),
        (lambda image_CYX, pixel_size_um: image_CYX[0], "is not found under its name"),
    ],
)
def test_methods_that_are_none_are_refused_at_once(methods, method, says):
    with pytest.raises(ValueError, match=f"tissue_method: .*{says}"):
        config(method)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fails", "tissue method 'methods_of_a_user:fails' failed: RuntimeError: no model"),
        ("too_small", r"must give a mask \(90, 90\) of bool or integers, got bool \(2, 2\)"),
        ("floats", r"must give a mask \(90, 90\) of bool or integers, got float64 \(90, 90\)"),
    ],
)
def test_a_method_that_fails_is_named_with_the_slide_and_leaves_nothing(
    tmp_path, picture, methods, name, says
):
    np.save(tmp_path / "a.npy", picture((3, 90, 90)))
    with pytest.raises(SlideError, match=says):
        write_pyramid(picture((3, 90, 90)), tmp_path / "out" / "a", config(f"methods_of_a_user:{name}"))
    left = [path.name for path in (tmp_path / "out").iterdir()] if (tmp_path / "out").exists() else []
    assert "a" not in left

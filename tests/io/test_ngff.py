from __future__ import annotations

import copy

import pytest

from ats_stream.io import ngff


def image(**changes):
    arguments = {
        "name": "s",
        "axes": "cyx",
        "paths": ["0", "1", "2"],
        "downsamples": [(1, 1), (2, 2), (32, 32)],
        "pixel_size_um": (0.25, 0.5),
        "channels": ngff.default_channels(3),
        "metadata": {"vendor": "v"},
    }
    return ngff.build_image(**{**arguments, **changes})


def test_what_is_built_is_read_back():
    parsed = ngff.parse_image(image())
    assert (parsed.version, parsed.name, parsed.axes) == ("0.5", "s", ("c", "y", "x"))
    assert parsed.axis_types == ("channel", "space", "space")
    assert parsed.channels == tuple(
        ngff.Channel(label=n, color=c, window=(0.0, 255.0))
        for n, c in zip("RGB", ngff.RGB_COLORS, strict=True)
    )
    assert parsed.metadata == {"vendor": "v"}
    assert [d.scale for d in parsed.datasets] == [(1, 0.25, 0.5), (1, 0.5, 1.0), (1, 8.0, 16.0)]


@pytest.mark.parametrize("factor", [1, 2, 3, 32])
def test_the_translation_is_that_of_means(factor):
    """The centre of a coarse pixel is the mean of the centres of the pixels under it."""
    size = 0.25
    dataset = ngff.parse_image(
        image(paths=["0"], downsamples=[(factor, factor)], pixel_size_um=(size, size))
    ).datasets[0]
    for number in range(3):
        under = [size * i for i in range(number * factor, (number + 1) * factor)]
        assert dataset.scale[1] * number + dataset.translation[1] == pytest.approx(sum(under) / len(under))


def test_pixel_size_is_none_without_a_unit():
    parsed = ngff.parse_image(image(pixel_size_um=None))
    assert ngff.pixel_size_um(parsed, parsed.datasets[1], [1, 2]) is None
    assert parsed.datasets[1].scale == (1, 2, 2)


@pytest.mark.parametrize(("unit", "factor"), [("micrometer", 1), ("nanometer", 1e-3), ("millimeter", 1e3)])
def test_units_become_micrometres(unit, factor):
    attributes = image()
    for axis in attributes["ome"]["multiscales"][0]["axes"][1:]:
        axis["unit"] = unit
    parsed = ngff.parse_image(attributes)
    assert ngff.pixel_size_um(parsed, parsed.datasets[0], [1, 2]) == pytest.approx(
        (0.25 * factor, 0.5 * factor)
    )


def test_transformations_of_the_whole_image_come_last():
    attributes = image()
    attributes["ome"]["multiscales"][0]["coordinateTransformations"] = [
        {"type": "scale", "scale": [1, 2, 10]},
        {"type": "translation", "translation": [0, 5, 7]},
    ]
    dataset = ngff.parse_image(attributes).datasets[1]
    assert dataset.scale == (1, 1.0, 10.0)
    assert dataset.translation == (0, 0.125 * 2 + 5, 0.25 * 10 + 7)


def test_version_0_4_is_read():
    attributes = image()["ome"]
    attributes["multiscales"][0]["version"] = "0.4"
    del attributes["version"]
    assert ngff.parse_image(attributes).version == "0.4"


def _broken(path, value):
    attributes = copy.deepcopy(image())
    target = attributes["ome"]
    for key in path[:-1]:
        target = target[key]
    if value is None:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return attributes


FIRST = ("multiscales", 0, "datasets", 0, "coordinateTransformations")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("multiscales",), None, "no 'multiscales'"),
        (("multiscales",), [], "no 'multiscales'"),
        (("multiscales",), [3], "no 'multiscales'"),
        (("version",), "0.9", "'0.9' is not supported"),
        (("multiscales", 0, "axes"), None, "broken multiscales"),
        (("multiscales", 0, "axes"), [{}], "broken multiscales"),
        (("multiscales", 0, "datasets"), [], "no datasets"),
        (("multiscales", 0, "datasets", 1, "path"), None, "broken multiscales"),
        ((*FIRST, 0, "scale"), [1, 1], "2 numbers for 3 axes"),
        ((*FIRST, 0, "scale"), [1, 0, 1], "must be positive"),
        ((*FIRST, 0, "scale"), [1, float("nan"), 1], "must be positive"),
    ],
)
def test_broken_metadata_say_what_is_wrong(path, value, says):
    with pytest.raises(ValueError, match=says):
        ngff.parse_image(_broken(path, value))


@pytest.mark.parametrize("omero", [3, {}, {"channels": 3}, {"channels": [4, {"window": {"start": "x"}}]}])
def test_broken_display_settings_do_not_spoil_an_image(omero):
    channels = ngff.parse_image(_broken(("omero",), omero)).channels
    assert all(c.color == "FFFFFF" and c.window is None for c in channels)


def test_labels_group():
    assert ngff.parse_labels(ngff.build_labels_group(["a", "b"])) == ("a", "b")
    assert ngff.parse_labels({"labels": ["a"]}) == ("a",)
    assert ngff.parse_labels({}) == ()

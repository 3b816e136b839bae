"""OME-Zarr (NGFF) metadata as plain dictionaries: building 0.5, parsing 0.4 and 0.5.

Nothing here touches a file. Rules followed: time axes come first, then channel, then space; every dataset has
one ``scale`` and at most one ``translation`` after it; a level made by means of ``f`` x ``f`` pixels is
shifted by ``(s_l - s_0) / 2`` because the centre of its first pixel is the mean of the centres of the pixels
under it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

VERSION = "0.5"

# how many micrometres one unit is; pixel sizes are in micrometres everywhere in this package
MICROMETRES = {
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
    "inch": 25400.0,
}
RGB_COLORS = ("FF0000", "00FF00", "0000FF")
AXIS_TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One channel of an image: its name and the colour (six hexadecimal digits) in which viewers show it."""

    label: str
    color: str = "FFFFFF"
    window: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One level: the path of its array inside the group, and pixel size and origin per axis."""

    path: str
    scale: tuple[float, ...]
    translation: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Multiscale:
    """What the metadata of one image group say; ``axes`` are one-letter or longer names in array order."""

    version: str
    name: str
    axes: tuple[str, ...]
    axis_types: tuple[str, ...]
    units: tuple[str | None, ...]
    datasets: tuple[Dataset, ...]
    channels: tuple[Channel, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


def default_channels(num_channels: int) -> tuple[Channel, ...]:
    """Red, green, blue for three channels, white numbered channels for any other number."""
    if num_channels == 3:
        return tuple(Channel(label=name, color=color) for name, color in zip("RGB", RGB_COLORS, strict=True))
    return tuple(Channel(label=f"channel {i}") for i in range(num_channels))


def named_channels(given: Sequence[Channel | str], num_channels: int) -> tuple[Channel, ...]:
    """Channels by name, in the default colours; ValueError unless there is one for each."""
    if len(given) != num_channels:
        raise ValueError(f"{len(given)} channel names for {num_channels} channels")
    return tuple(
        c if isinstance(c, Channel) else Channel(label=c, color=d.color)
        for c, d in zip(given, default_channels(num_channels), strict=True)
    )


def build_image(
    *,
    name: str,
    axes: str,
    paths: Sequence[str],
    downsamples: Sequence[Sequence[float]],
    pixel_size_um: Sequence[float] | None,
    channels: Sequence[Channel] = (),
    value_range: tuple[float, float] = (0, 255),
    metadata: Mapping[str, Any] | None = None,
    image_label: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Attributes of an OME-Zarr 0.5 image group.

    ``downsamples`` holds, for each level, one factor per axis but ``c`` against the finest pixels;
    ``pixel_size_um`` the size of those finest pixels per axis but ``c``, ``None`` or NaN where it is unknown
    or the axis is time (then scales are in pixels, without a unit). ``metadata`` goes beside the ``ome`` key
    under ``ats_stream``.

    >>> levels = {"paths": ["0", "1"], "downsamples": [(1, 1), (2, 2)]}
    >>> a = build_image(name="s", axes="cyx", pixel_size_um=(0.5, 0.5), **levels)
    >>> a["ome"]["multiscales"][0]["datasets"][1]["coordinateTransformations"]
    [{'type': 'scale', 'scale': [1.0, 1.0, 1.0]}, {'type': 'translation', 'translation': [0.0, 0.25, 0.25]}]
    """
    sampled = [a for a in axes if a != "c"]
    given = tuple(pixel_size_um) if pixel_size_um is not None else (math.nan,) * len(sampled)
    size_um = tuple(1.0 if math.isnan(v) else float(v) for v in given)
    datasets = []
    for path, factors in zip(paths, downsamples, strict=True):
        if len(factors) != len(sampled) or len(size_um) != len(sampled):
            raise ValueError(
                f"axes {axes!r} need {len(sampled)} numbers each: got factors {factors}, sizes {size_um}"
            )
        scale = iter([float(f * s) for f, s in zip(factors, size_um, strict=True)])
        shift = iter([float((f - 1) * s / 2) for f, s in zip(factors, size_um, strict=True)])
        transforms: list[dict[str, Any]] = [
            {"type": "scale", "scale": [1.0 if a == "c" else next(scale) for a in axes]}
        ]
        translation = [0.0 if a == "c" else next(shift) for a in axes]
        if any(translation):
            transforms.append({"type": "translation", "translation": translation})
        datasets.append({"path": path, "coordinateTransformations": transforms})
    known = {a for a, v in zip(sampled, given, strict=True) if not math.isnan(v)}
    multiscale = {"name": name, "axes": [_axis(a, a in known) for a in axes], "datasets": datasets}
    ome: dict[str, Any] = {"version": VERSION, "multiscales": [multiscale]}
    if channels:
        ome["omero"] = {"channels": [_omero_channel(c, value_range) for c in channels]}
    if image_label is not None:
        ome["image-label"] = dict(image_label)
    attributes: dict[str, Any] = {"ome": ome}
    if metadata:
        attributes["ats_stream"] = dict(metadata)
    return attributes


def _axis(name: str, has_unit: bool) -> dict[str, str]:
    axis = {"name": name, "type": AXIS_TYPES[name]}
    if has_unit and axis["type"] == "space":
        axis["unit"] = "micrometer"
    return axis


def _omero_channel(channel: Channel, value_range: tuple[float, float]) -> dict[str, Any]:
    start, end = channel.window if channel.window is not None else value_range
    return {
        "label": channel.label,
        "color": channel.color,
        "active": True,
        "window": {"min": value_range[0], "max": value_range[1], "start": start, "end": end},
    }


def build_picture(name: str, num_channels: int) -> dict[str, Any]:
    """Attributes of the group of a picture (c, y, x) beside a pyramid: one level of unknown pixel size."""
    return build_image(
        name=name,
        axes="cyx",
        paths=["0"],
        downsamples=[(1, 1)],
        pixel_size_um=None,
        channels=default_channels(num_channels),
    )


def build_labels_group(names: Sequence[str]) -> dict[str, Any]:
    """Attributes of the ``labels`` group that lists the label images of an image."""
    return {"ome": {"version": VERSION, "labels": list(names)}}


def build_associated_group(names: Sequence[str]) -> dict[str, Any]:
    """Attributes of the ``associated`` group that lists the pictures kept beside an image; NGFF has none."""
    return {"ats_stream": {"associated": list(names)}}


def group_json(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The ``zarr.json`` of a zarr v3 group with these attributes."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def parse_image(attributes: Mapping[str, Any]) -> Multiscale:
    """Read the first multiscale image of a group's attributes, version 0.4 or 0.5; ValueError says what is
    wrong.
    """
    ome = attributes.get("ome", attributes)
    if not isinstance(ome, Mapping):
        raise ValueError("attributes 'ome' is no object")
    multiscales = ome.get("multiscales")
    if not isinstance(multiscales, list) or not multiscales or not isinstance(multiscales[0], Mapping):
        raise ValueError("no OME-Zarr image: attributes have no 'multiscales'")
    first = multiscales[0]
    version = str(ome.get("version", first.get("version", "")) or "unstated")
    if version not in {"0.4", "0.5", "unstated"}:
        raise ValueError(f"OME-Zarr version {version!r} is not supported, expected 0.4 or 0.5")
    try:
        axes = tuple(str(a["name"]) for a in first["axes"])
        types = tuple(str(a.get("type", AXIS_TYPES.get(a["name"], "space"))) for a in first["axes"])
        units = tuple(u if isinstance(u := a.get("unit"), str) else None for a in first["axes"])
        datasets = tuple(_parse_dataset(d, len(axes), first) for d in first["datasets"])
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"broken multiscales metadata: {type(error).__name__}: {error}") from error
    if not datasets:
        raise ValueError("multiscales metadata list no datasets")
    metadata = attributes.get("ats_stream", {})
    return Multiscale(
        version=version,
        name=str(first.get("name") or ""),
        axes=axes,
        axis_types=types,
        units=units,
        datasets=datasets,
        channels=_parse_channels(ome.get("omero")),
        metadata=metadata if isinstance(metadata, Mapping) else {},
    )


def _parse_dataset(dataset: Mapping[str, Any], num_axes: int, multiscale: Mapping[str, Any]) -> Dataset:
    scale, translation = [1.0] * num_axes, [0.0] * num_axes
    # the transformations of the whole image apply after those of the dataset
    for transform in [
        *dataset["coordinateTransformations"],
        *multiscale.get("coordinateTransformations", []),
    ]:
        kind = transform["type"]
        if kind not in {"scale", "translation"}:
            continue
        values = [float(v) for v in transform[kind]]
        if len(values) != num_axes:
            raise ValueError(f"{kind} {values} has {len(values)} numbers for {num_axes} axes")
        if kind == "scale":
            scale = [s * v for s, v in zip(scale, values, strict=True)]
            translation = [t * v for t, v in zip(translation, values, strict=True)]
        else:
            translation = [t + v for t, v in zip(translation, values, strict=True)]
    if not all(0 < s < float("inf") for s in scale):
        raise ValueError(f"scale {scale} must be positive")
    return Dataset(path=str(dataset["path"]), scale=tuple(scale), translation=tuple(translation))


def _parse_channels(omero: Any) -> tuple[Channel, ...]:
    """Channels are for display alone, so a broken entry falls back to its defaults instead of failing the
    image.
    """
    entries = omero.get("channels") if isinstance(omero, Mapping) else None
    if not isinstance(entries, list):
        return ()
    channels = []
    for i, entry in enumerate(entries):
        entry = entry if isinstance(entry, Mapping) else {}
        window = entry.get("window")
        try:
            limits = (float(window["start"]), float(window["end"])) if isinstance(window, Mapping) else None
        except (KeyError, TypeError, ValueError, ArithmeticError):
            limits = None
        label = str(entry.get("label", f"channel {i}"))
        channels.append(Channel(label=label, color=str(entry.get("color", "FFFFFF")), window=limits))
    return tuple(channels)


def parse_labels(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the label images that a ``labels`` group lists (0.4 and 0.5)."""
    ome = attributes.get("ome", attributes)
    labels = ome.get("labels", []) if isinstance(ome, Mapping) else []
    return tuple(str(n) for n in labels) if isinstance(labels, list) else ()


def parse_associated(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the pictures that an ``associated`` group lists."""
    ours = attributes.get("ats_stream")
    names = ours.get("associated") if isinstance(ours, dict) else None
    return tuple(str(n) for n in names) if isinstance(names, list) else ()


def pixel_size_um(
    multiscale: Multiscale, dataset: Dataset, space_axes: Sequence[int]
) -> tuple[float, ...] | None:
    """Pixel size in micrometres along the given axes; ``None`` unless every one of them has a known unit of
    length and a sensible size.
    """
    sizes = []
    for axis in space_axes:
        factor = MICROMETRES.get(multiscale.units[axis] or "")
        if factor is None:
            return None
        sizes.append(dataset.scale[axis] * factor)
    # from atoms to planets; beyond, products of sizes would overflow
    return tuple(sizes) if all(1e-9 < s < 1e12 for s in sizes) else None

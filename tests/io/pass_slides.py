"""Slides of JPEG tiles in many formats, made for the tests of copying."""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
import pydicom
import tifffile
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import JPEGBaseline8Bit, generate_uid

SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
PHILIPS = """<?xml version="1.0" encoding="UTF-8" ?>
<DataObject ObjectType="DPUfsImport"><Attribute Name="PIM_DP_SCANNED_IMAGES" PMSVR="IDataObjectArray"><Array>
<DataObject ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE" PMSVR="IString">WSI</Attribute>
<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" PMSVR="IDataObjectArray"><Array>{}
</Array></Attribute></DataObject></Array></Attribute>
<Attribute Name="DICOM_PIXEL_SPACING" PMSVR="IDoubleArray">"0.00025" "0.00025"</Attribute></DataObject>"""
PHILIPS_LEVEL = """<DataObject ObjectType="PixelDataRepresentation">
<Attribute Name="DICOM_PIXEL_SPACING" PMSVR="IDoubleArray">&quot;{0}&quot; &quot;{0}&quot;</Attribute>
<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_NUMBER" PMSVR="IUInt16">{1}</Attribute></DataObject>"""


def half(image_CYX):
    return np.ascontiguousarray(image_CYX[:, ::2, ::2])


def cut(image_YXS, side, quality=80, **options):
    """Tiles of JPEG, row by row, their padding a repetition of the edge."""
    tiles = []
    for y in range(0, image_YXS.shape[0], side):
        for x in range(0, image_YXS.shape[1], side):
            tile = image_YXS[y : y + side, x : x + side]
            missing = [(0, side - n) for n in tile.shape[:2]] + [(0, 0)] * (tile.ndim - 2)
            padded = np.pad(tile, missing, mode="edge")
            tiles.append(bytes(imagecodecs.jpeg8_encode(padded, quality, **options)))
    return tiles


def write_tiff(path, image_CYX, *, side=64, levels=2, space="YCBCR", subsampling="420", quality=80, ome=False,
               tiles=None, **options):  # fmt: skip
    """A tiled TIFF; as OME-TIFF the coarse levels are SubIFDs. ``tiles`` changes those of level 0."""
    photometric = "ycbcr" if space == "YCBCR" else "rgb"
    image = image_CYX
    with tifffile.TiffWriter(path, ome=ome) as writer:
        for level in range(levels):
            pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
            data = cut(
                pixels, side, quality, colorspace="RGB", outcolorspace=space,
                subsampling=subsampling if space == "YCBCR" else None,
            )  # fmt: skip
            if level == 0 and tiles is not None:
                data = tiles(data)
            more = {"subifds": levels - 1} if ome and level == 0 else {"subfiletype": int(level > 0)}
            writer.write(
                iter(data),
                shape=pixels.shape,
                dtype=np.uint8,
                tile=(side, side),
                compression="jpeg",
                photometric=photometric,
                subsampling=(2, 2) if subsampling == "420" and space == "YCBCR" else (1, 1),
                metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5} if ome else None,
                resolution=(1e4 / 0.5, 1e4 / 0.5),
                resolutionunit="CENTIMETER",
                **more,
                **options,
            )
            image = half(image)
    return path


def write_mixed(path, image_CYX):
    """A tiled TIFF of three levels, of which the second is not JPEG."""
    with tifffile.TiffWriter(path) as writer:
        for level, compression in enumerate(["jpeg", "adobe_deflate", "jpeg"]):
            pixels = np.ascontiguousarray(image_CYX[:, :: 2**level, :: 2**level].transpose(1, 2, 0))
            writer.write(pixels, tile=(64, 64), compression=compression, photometric="rgb",
                         subfiletype=int(level > 0), metadata=None)  # fmt: skip
    return path


def write_philips(path, image_CYX, *, side=64, levels=3, missing=()):
    """A Philips TIFF: levels of whole tiles, some of them not stored in the finest one."""
    pixels = image_CYX.transpose(1, 2, 0)
    spacings = "".join(PHILIPS_LEVEL.format(2.5e-4 * 2**i, i) for i in range(levels))
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level in range(levels):
            # every level is padded to whole tiles
            height, width = (-(-n // side) * side for n in pixels.shape[:2])
            tiles = cut(pixels, side, colorspace="RGB", outcolorspace="YCBCR", subsampling="420")
            if level == 0:
                tiles = [b"" if i in missing else tile for i, tile in enumerate(tiles)]
            writer.write(
                iter(tiles),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(side, side),
                compression="jpeg",
                photometric="ycbcr",
                subsampling=(2, 2),
                subfiletype=int(level > 0),
                description=PHILIPS.format(spacings) if level == 0 else f"level={level}",
                software="Philips DP v1.0",
                metadata=None,
            )
            pixels = np.ascontiguousarray(pixels[::2, ::2])
    return path


def encapsulate(frames, table):
    """Pixel data of DICOM and, for an extended table of offsets, its two attributes."""
    frames = [f + bytes(len(f) % 2) for f in frames]
    items = [b"\xfe\xff\x00\xe0" + struct.pack("<I", len(f)) + f for f in frames]
    starts = np.cumsum([0, *map(len, items)])[:-1]
    basic = starts.astype("<u4").tobytes() if table == "basic" else b""
    data = b"\xfe\xff\x00\xe0" + struct.pack("<I", len(basic)) + basic + b"".join(items)
    extended = (starts.astype("<u8").tobytes(), np.array([len(f) for f in frames], "<u8").tobytes())
    return data, extended if table == "extended" else None


def write_dicom(folder, image_CYX, *, side=64, levels=2, table="basic", frames=None, change=None):
    """A slide of one DICOM file per level, and its label; returns the file of level 0.

    ``frames`` changes the JPEG data and ``change`` the attributes of level 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series, image = generate_uid(), image_CYX
    for level in range(levels + 1):
        is_label = level == levels
        data = cut(image.transpose(1, 2, 0), side, colorspace="RGB", outcolorspace="YCBCR", subsampling="422")
        data = cut(255 - image[:, :side, :side].transpose(1, 2, 0), side) if is_label else data
        if level == 0 and frames is not None:
            data = frames(data)
        facts = Dataset()
        facts.SOPClassUID, facts.SOPInstanceUID = SLIDE_CLASS, generate_uid()
        facts.SeriesInstanceUID = series
        facts.PatientName, facts.PatientID = "Doe^Jane", "secret-42"
        kind = "NONE" if level in (0, levels) else "RESAMPLED"
        facts.ImageType = [
            "DERIVED" if level and not is_label else "ORIGINAL",
            "PRIMARY",
            "LABEL" if is_label else "VOLUME",
            kind,
        ]
        facts.Modality = "SM"
        facts.SamplesPerPixel, facts.PhotometricInterpretation = 3, "YBR_FULL_422"
        facts.PlanarConfiguration, facts.PixelRepresentation = 0, 0
        facts.BitsAllocated, facts.BitsStored, facts.HighBit = 8, 8, 7
        facts.Rows, facts.Columns = side, side
        facts.TotalPixelMatrixRows, facts.TotalPixelMatrixColumns = (
            (side, side) if is_label else image.shape[1:]
        )
        facts.DimensionOrganizationType = "TILED_FULL"
        facts.NumberOfFrames = len(data)
        measures = Dataset()
        measures.PixelSpacing = [2.5e-4 * 2**level] * 2
        shared = Dataset()
        shared.PixelMeasuresSequence = [measures]
        facts.SharedFunctionalGroupsSequence = [shared]
        content, extended = encapsulate(data, table)
        if extended is not None:
            facts.ExtendedOffsetTable, facts.ExtendedOffsetTableLengths = extended
        facts.PixelData = content
        facts["PixelData"].VR = "OB"
        facts["PixelData"].is_undefined_length = True
        if level == 0 and change is not None:
            change(facts)
        facts.file_meta = FileMetaDataset()
        facts.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        facts.file_meta.MediaStorageSOPClassUID = SLIDE_CLASS
        facts.file_meta.MediaStorageSOPInstanceUID = facts.SOPInstanceUID
        name = "label" if is_label else str(level)
        pydicom.dcmwrite(folder / f"{name}.dcm", facts, enforce_file_format=True)
        if level + 1 < levels:
            image = half(image)
    return folder / "0.dcm"

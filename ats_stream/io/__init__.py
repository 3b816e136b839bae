"""Pyramids, slides and archive tables: reading patches of gigapixel images, and writing OME-Zarr."""

from ats_stream.io.fetch import ReadStats
from ats_stream.io.ngff import Channel
from ats_stream.io.opening import open_pyramid
from ats_stream.io.plan import PatchPlan, plan_patches
from ats_stream.io.pyramid import Level, Pyramid, read_batch
from ats_stream.io.writer import PyramidWriter

__all__ = [
    "Channel",
    "Level",
    "PatchPlan",
    "Pyramid",
    "PyramidWriter",
    "ReadStats",
    "open_pyramid",
    "plan_patches",
    "read_batch",
]

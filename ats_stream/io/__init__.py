"""Pyramids, slides and archive tables: reading patches of gigapixel images, and writing OME-Zarr."""

from ats_stream.io.archive import Archive, ArchiveRow, read_archive, write_archive
from ats_stream.io.conversion.config import PROFILES, ConvertConfig, ConvertFailure, ConvertSummary
from ats_stream.io.conversion.convert import convert, is_done, preprocess, target_path, write_pyramid
from ats_stream.io.conversion.plan import working_memory_bytes
from ats_stream.io.conversion.slides import open_slide
from ats_stream.io.conversion.writer import PyramidWriter
from ats_stream.io.fetch import ReadStats
from ats_stream.io.ngff import Channel
from ats_stream.io.opening import open_pyramid
from ats_stream.io.plan import PatchPlan, plan_patches
from ats_stream.io.pyramid import Pyramid, read_batch
from ats_stream.io.pyramid_info import Level
from ats_stream.io.storage.storage_options import StorageOptions
from ats_stream.io.tissue import tissue_mask
from ats_stream.io.verification.report import Finding, Report
from ats_stream.io.verification.verify import verify
from ats_stream.io.views import VIEW_CACHE_BYTES

__all__ = [
    "PROFILES",
    "VIEW_CACHE_BYTES",
    "Archive",
    "ArchiveRow",
    "Channel",
    "ConvertConfig",
    "ConvertFailure",
    "ConvertSummary",
    "Finding",
    "Level",
    "PatchPlan",
    "Pyramid",
    "PyramidWriter",
    "ReadStats",
    "Report",
    "StorageOptions",
    "convert",
    "is_done",
    "open_pyramid",
    "open_slide",
    "plan_patches",
    "preprocess",
    "read_archive",
    "read_batch",
    "target_path",
    "tissue_mask",
    "verify",
    "working_memory_bytes",
    "write_archive",
    "write_pyramid",
]

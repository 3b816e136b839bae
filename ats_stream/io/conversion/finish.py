"""What makes stored shards a pyramid: metadata, the mask of the tissue, associated pictures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.errors import SlideError
from ats_stream.io import ngff
from ats_stream.io.codecs import ChunkCodec
from ats_stream.io.conversion.array_writer import ArraySpec, encode_block
from ats_stream.io.conversion.label_image import label_image
from ats_stream.io.conversion.layout import BLOCKS
from ats_stream.io.conversion.manifest import ManifestEntry, entry_of
from ats_stream.io.conversion.slides import associated_images
from ats_stream.io.conversion.targets import GROUP_KEY
from ats_stream.io.layout import grid_shape
from ats_stream.io.shard import encode_shard_parts
from ats_stream.io.tissue_method import mask_by

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ats_stream.io.conversion.tree import ShardBuilder

Array = npt.NDArray[Any]
TISSUE_COLORS = {1: (0, 200, 0, 128)}


def finish(builder: ShardBuilder) -> tuple[list[ManifestEntry], float | None]:
    """Store everything but the shards, the metadata of the group last; return what was stored, and the share
    of tissue.
    """
    return _Finishing(builder).run()


class _Finishing:
    def __init__(self, builder: ShardBuilder) -> None:
        self.builder, self.plan = builder, builder.plan
        self.entries: list[ManifestEntry] = []
        self.share: float | None = None

    def run(self) -> tuple[list[ManifestEntry], float | None]:
        for index, level in enumerate(self.plan.levels):
            self._put_json(f"{index}/zarr.json", level.spec.metadata())
        if self.plan.tissue_level is not None:
            self._put_tissue(self.plan.tissue_level)
        if self.plan.associated_names:
            for name, picture in associated_images(self.builder.source):
                self._put_picture(name, picture)
            attributes = ngff.build_associated_group(self.plan.associated_names)
            self._put_json("associated/zarr.json", ngff.group_json(attributes))
        self._put_json(GROUP_KEY, ngff.group_json(self.plan.attributes))
        return self.entries, self.share

    def _put_tissue(self, index: int) -> None:
        sizes, factors = self.plan.pixel_size_um, self.plan.levels[index].downsample
        view_um = None if sizes is None else [s * f for s, f in zip(sizes, factors, strict=True)]
        try:
            mask_YX = mask_by(self.plan.tissue_method, self.builder.read_back(index), view_um)
        except ValueError as error:
            raise SlideError(self.builder.source.path, str(error)) from error
        self.share = float(mask_YX.mean())
        levels, attributes = label_image(
            "tissue",
            mask_YX,
            len(self.plan.levels),
            factors=factors,
            pixel_size_um=sizes,
            colors=TISSUE_COLORS,
        )
        for number, level_YX in enumerate(levels):
            self._put_array(f"labels/tissue/{number}", "yx", level_YX)
        self._put_json("labels/tissue/zarr.json", ngff.group_json(attributes))
        self._put_json("labels/zarr.json", ngff.group_json(ngff.build_labels_group(["tissue"])))

    def _put_picture(self, name: str, picture_CYX: Array) -> None:
        folder = f"associated/{name}"
        self._put_array(f"{folder}/0", "cyx", picture_CYX)
        attributes = ngff.build_picture(name, picture_CYX.shape[0])
        self._put_json(f"{folder}/zarr.json", ngff.group_json(attributes))

    def _put_array(self, folder: str, axes: str, array: Array) -> None:
        """A small array, as the levels are cut by default."""
        codec = self.plan.levels[0].spec.codec
        (chunk_px, _), (shard_px, _) = BLOCKS["y", "x"]
        spec = ArraySpec.square(
            shape=array.shape,
            dtype=array.dtype,
            axes=axes,
            chunk_px=chunk_px,
            shard_px=shard_px,
            fill_value=0,
            codec=codec if codec.jpeg is None else ChunkCodec(name="zstd"),
        )
        for place in np.ndindex(*grid_shape(spec.shape, spec.shard)):
            box = tuple(slice(p * s, (p + 1) * s) for p, s in zip(place, spec.shard, strict=True))
            chunks = encode_block(spec, array[box])
            parts = encode_shard_parts(chunks, spec.grid) if chunks else []
            self._put("/".join((folder, "c", *map(str, place))), parts)
        self._put_json(f"{folder}/zarr.json", spec.metadata())

    def _put_json(self, key: str, content: Mapping[str, Any]) -> None:
        self._put(key, [json.dumps(content, indent=1).encode()])

    def _put(self, key: str, parts: list[bytes]) -> None:
        if parts:
            self.builder.target.put(key, parts)
        self.entries.append(entry_of(key, parts))

"""The examples of docs/reading.md run, and its numbers are those of the code."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ats_stream.io import PyramidWriter, gather, layout, open_pyramid, reader
from ats_stream.io.storage import client_options, documents, remote, retry, zip_store

if TYPE_CHECKING:
    import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reading.md").read_text()


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with PyramidWriter(
        "slide.ome.zarr", level_shapes=[(3, 64, 64)], dtype="uint8", shard_px=64, chunk_px=32
    ) as out:
        out.write_shard(0, (0, 0), np.full((3, 64, 64), 7, np.uint8))
    shutil.make_archive("slide", "zip", "slide.ome.zarr")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "reading.md", "exec"), names)
    assert names["patches"].shape == names["both"].shape == (2, 3, 64, 64)
    assert (names["patches"][1, :, :10] == 255).all()
    assert (names["both"][0] == 7).all()
    assert remote.ObjectStore("s3://bucket/slide.ome.zarr", names["options"]).timeout_s == 10
    assert open_pyramid("slide.zip").read(0).all()


def test_the_limits_of_the_page_are_those_of_the_code() -> None:
    config, mib = gather.DEFAULT_CONFIG, 1 << 20
    assert f"At most {config.max_requests} requests" in PAGE
    assert f"{config.max_inflight_bytes // mib} MiB asked for and not yet decoded" in PAGE
    assert f"no more than {config.gap_bytes >> 10} KiB apart" in PAGE
    assert f"one request of at most {config.max_request_bytes // mib} MiB" in PAGE
    assert re.search(
        rf"`timeout_s` .* {client_options.MAX_CONNECT_S:g} s of it .*\| {remote.DEFAULT_TIMEOUT_S:g} \|", PAGE
    )
    assert re.search(rf"`max_retries` .*\| {retry.RetryPolicy.max_retries} \|", PAGE)
    rows = dict(re.findall(r"^\| (.+?) \| (\S+?(?: MiB)?) \|$", PAGE, re.MULTILINE))
    assert rows["a JSON document of metadata"] == f"{documents.MAX_JSON_BYTES // mib} MiB"
    assert rows["a decoded chunk"] == f"{layout.MAX_CHUNK_BYTES // mib} MiB"
    assert rows["directory of a zip file"] == f"{zip_store.MAX_DIRECTORY_BYTES // mib} MiB"
    assert f"as a whole, {zip_store.MAX_DEFLATED_BYTES // mib} MiB at most" in PAGE.replace("\n", " ")
    for what, number in {
        "pixels, or chunks, of a level": layout.MAX_LEVEL_PX,
        "chunks in a shard": layout.MAX_CHUNKS_PER_SHARD,
        "pieces of chunks in one read": reader.MAX_PIECES,
    }.items():
        base, power = rows[what].split("^")
        assert int(base) ** int(power) == number

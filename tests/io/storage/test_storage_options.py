"""Storage options as the command line takes them: what they become, and what is said of wrong ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ats_stream.errors import AtsStreamError
from ats_stream.io import PyramidWriter, StorageOptions, open_pyramid, read_archive
from ats_stream.io.storage.storage_options import parse_storage_options

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["hush"], "storage options are KEY=VALUE, or a file that ends in .yaml or .yml"),
        (["=hush"], "storage options are KEY=VALUE, or a file that ends in .yaml or .yml"),
        (["timeout_s=hush"], "storage option timeout_s must be a number"),
        (["none.yaml"], "none.yaml: cannot read the storage options: No such file or directory"),
        (["list.yaml"], "list.yaml: the storage options are no mapping of names to values"),
        (["broken.yml"], "broken.yml: the storage options are not YAML"),
        (["bytes.yml"], "bytes.yml: the storage options are not YAML"),
    ],
)
def test_options_that_cannot_be_understood_are_told_without_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("- hush")
    (tmp_path / "broken.yml").write_text("secret: {hush")
    (tmp_path / "bytes.yml").write_bytes(b"\xff\xfehush\x81")
    with pytest.raises(AtsStreamError) as caught:
        parse_storage_options(words)
    assert str(caught.value) == complaint
    chain: BaseException | None = caught.value
    while chain is not None and not chain.__suppress_context__:
        chain = chain.__context__
        assert "hush" not in str(chain)


def test_words_come_after_files_and_stay_text(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text("key: 0123\nflag: no\ntimeout_s: 5\nclient_options:\n  user_agent: me\n")
    options = parse_storage_options([str(tmp_path / "o.yaml"), "key=a=b", "other=x"])
    assert options._values == {
        "key": "a=b", "flag": "no", "timeout_s": 5.0, "client_options": {"user_agent": "me"}, "other": "x"
    }  # fmt: skip


def test_a_login_in_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("slide,label,split\nhttps://me:hush@host/a.zarr,0,train\n")
    with pytest.raises(AtsStreamError, match=r"a\.csv:2: a user or password stands in the URL") as caught:
        read_archive(tmp_path / "a.csv")
    assert "hush" not in f"{caught.value!r}"


def test_options_are_for_the_urls_of_a_list_alone(tmp_path: Path, serve: Any) -> None:
    with PyramidWriter(tmp_path / "a.zarr", level_shapes=[(1, 20, 20)], dtype="uint8") as writer:
        writer.write_shard(0, (0, 0), np.ones((1, 20, 20), np.uint8))
    server = serve(tmp_path)
    options = StorageOptions({"user": "me@home", "password": "hush"})
    for place in (tmp_path / "a.zarr", f"{server.url}/a.zarr"):
        np.testing.assert_array_equal(options.open(str(place)).read(0), open_pyramid(place).read(0))


def test_a_login_in_the_options_reaches_a_web_server(tmp_path: Path, serve: Any) -> None:
    with PyramidWriter(tmp_path / "a.zarr", level_shapes=[(1, 20, 20)], dtype="uint8") as writer:
        writer.write_shard(0, (0, 0), np.ones((1, 20, 20), np.uint8))
    server = serve(tmp_path / "a.zarr")
    pyramid = open_pyramid(server.url, storage_options={"user": "me@home", "password": "hush"})
    assert server.headers["authorization"] == "Basic bWVAaG9tZTpodXNo"
    assert "hush" not in repr(pyramid._reader.sources[0].store)

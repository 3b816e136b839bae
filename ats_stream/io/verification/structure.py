"""Verifying the metadata of a store: by two validators of OME-Zarr, and by rules of our own.

The validators, ``yaozarrs`` and ``ome-zarr-models``, are an extra (``verify``): each finds violations that
the other misses. They read a copy of the metadata alone, so that they work for every kind of store.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats_stream.io.ngff import parse_image
from ats_stream.io.storage.documents import MAX_JSON_BYTES, is_inside
from ats_stream.io.storage.retry import with_retries
from ats_stream.io.storage.store_error import StoreError
from ats_stream.io.verification.objects import METADATA_FILES
from ats_stream.io.verification.report import Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ats_stream.io.storage.stores import Store

VALIDATORS = ("yaozarrs", "ome-zarr-models")
INSTALL = "pip install 'ats-stream[verify]'"
MAX_REASON = 400


def read_metadata(store: Store, keys: Iterable[str]) -> tuple[dict[str, bytes], list[Finding]]:
    """The metadata documents among the keys, those that are there, and what cannot be read."""
    documents, findings = {}, []
    for key in keys:
        if key.rpartition("/")[2] not in METADATA_FILES or not is_inside(key):
            continue
        try:
            data = with_retries(lambda k=key: store.get(k, MAX_JSON_BYTES), store.policy)  # type: ignore[misc]
        except StoreError as error:
            findings.append(Finding(key, str(error).removeprefix(f"{key} ")))
            continue
        if data is not None:
            documents[key] = data
    return documents, findings


def attributes_of(documents: Mapping[str, bytes], prefix: str) -> Mapping[str, Any] | None:
    """The attributes of a group, None when there is none or it is broken."""
    for name in ("zarr.json", ".zattrs"):
        content = _parsed(documents.get(prefix + name))
        if content is None:
            continue
        if name == ".zattrs":
            return content
        if content.get("node_type") != "group":
            return None
        attributes = content.get("attributes", {})
        return attributes if isinstance(attributes, dict) else None
    return None


def image_prefixes(documents: Mapping[str, bytes]) -> list[str]:
    """Where in the store images lie, in order, each as the prefix of its keys."""
    folders = {key[: len(key) - len(key.rpartition("/")[2])] for key in documents}
    found = []
    for prefix in sorted(folders):
        attributes = attributes_of(documents, prefix) or {}
        ome = attributes.get("ome", attributes)
        if isinstance(ome, dict) and "multiscales" in ome:
            found.append(prefix)
    return found


def _parsed(data: bytes | None) -> dict[str, Any] | None:
    try:
        content = None if data is None else json.loads(data)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def check_documents(documents: Mapping[str, bytes]) -> list[Finding]:
    """Rules of our own: documents are JSON, and dimensions are called as the image's axes."""
    findings = [Finding(key, "is no JSON object") for key, data in documents.items() if _parsed(data) is None]
    for prefix in image_prefixes(documents):
        try:
            image = parse_image(attributes_of(documents, prefix) or {})
        except ValueError as error:
            findings.append(Finding(metadata_key(documents, prefix), str(error)))
            continue
        for dataset in image.datasets:
            key = f"{prefix}{dataset.path.strip('/')}/zarr.json"
            names = (_parsed(documents.get(key)) or {}).get("dimension_names")
            if names is not None and names != list(image.axes):
                findings.append(
                    Finding(key, f"dimension_names are {names}, the image's axes {list(image.axes)}")
                )
    return findings


def metadata_key(documents: Mapping[str, bytes], prefix: str) -> str:
    """The document that describes a group."""
    return next(
        (prefix + name for name in METADATA_FILES if prefix + name in documents), prefix + "zarr.json"
    )


def validate(documents: Mapping[str, bytes]) -> tuple[list[Finding], tuple[str, ...]]:
    """What the validators that are installed complain of, and the names of those that are not."""
    attributes = attributes_of(documents, "") or {}
    is_v05 = "ome" in attributes
    findings, missing = [], []
    with tempfile.TemporaryDirectory(prefix="ats-stream-verify-") as name:
        folder = Path(name)
        for key, data in documents.items():
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        for validator, check in (("yaozarrs", _yaozarrs), ("ome-zarr-models", _ome_zarr_models)):
            if validator == "yaozarrs" and not is_v05:
                continue  # it validates 0.5 alone
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of what the validators import
                    check(folder)
            except ImportError:
                missing.append(validator)
            except Exception as error:  # each has its own kinds of errors
                text = re.sub(r"For further information visit \S+", "", str(error).replace(str(folder), ""))
                reason = " ".join(text.split())[:MAX_REASON]
                findings.append(Finding(metadata_key(documents, ""), f"{validator}: {reason}"))
    return findings, tuple(missing)


def _yaozarrs(folder: Path) -> None:
    import yaozarrs

    yaozarrs.validate_zarr_store(str(folder))


def _ome_zarr_models(folder: Path) -> None:
    import zarr
    from ome_zarr_models import v04, v05

    group = zarr.open_group(str(folder), mode="r")
    attributes: Any = dict(group.attrs)
    is_v05 = "ome" in attributes
    names: Any = attributes["ome"] if is_v05 else attributes
    versions: Any = v05 if is_v05 else v04
    kinds = {"plate": "HCS", "well": "Well", "image-label": "ImageLabel", "multiscales": "Image"}
    kinds |= {"labels": "Labels", "bioformats2raw.layout": "BioFormats2Raw"}
    kind = next((model for name, model in kinds.items() if name in names), "Image")
    getattr(versions, kind).from_zarr(group)

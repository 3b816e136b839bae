"""Try things in a process of its own and tell what happened, a line of JSON each.

python -m ats_stream.doctor.probe torch gpu        run by ats_stream.doctor.ask

A word is the name of a probe below, or else of a module that is imported. Before each a line
``{"begin": word}`` is written, so that whoever reads knows what the process died of.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

CODECS = ("jpeg8", "jpeg2k", "webp", "png", "zstd", "lz4", "blosc", "deflate", "lzw", "lzma")
"""Codecs of imagecodecs that slides and pyramids use."""
_LOSSY_LEVEL = 90


def codecs() -> dict[str, list[str]]:
    """Encode and decode a small picture by every codec; which of them can, and which cannot."""
    import imagecodecs
    import numpy as np

    picture = np.arange(16 * 16 * 3, dtype=np.uint32).astype(np.uint8).reshape(16, 16, 3)
    found: dict[str, list[str]] = {"works": [], "fails": []}
    for name in CODECS:
        is_picture = name in ("jpeg8", "jpeg2k", "webp", "png")
        content = picture if is_picture else picture.tobytes()
        try:
            options = {"level": _LOSSY_LEVEL} if name in ("jpeg8", "webp") else {}
            coded = getattr(imagecodecs, f"{name}_encode")(content, **options)
            decoded = getattr(imagecodecs, f"{name}_decode")(coded)
            same = (
                decoded.shape == picture.shape if is_picture else bytes(decoded)[: picture.nbytes] == content
            )
        except Exception:  # whatever it is, the codec does not work
            same = False
        found["works" if same else "fails"].append(name)
    return found


def gpu() -> dict[str, Any]:
    """What torch sees of the devices, after a sum on each."""
    import torch

    found: dict[str, Any] = {"built_for": torch.version.cuda, "devices": []}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            total = float(torch.ones(1024, device=f"cuda:{index}").sum())
            found["devices"].append(
                {"name": device.name, "memory_bytes": device.total_memory, "adds": total == 1024}
            )
    return found


def cupy_device() -> dict[str, Any]:
    """What CuPy sees of the devices."""
    import cupy

    available = bool(cupy.is_available())
    return {
        "version": cupy.__version__,
        "available": available,
        "runtime": int(cupy.cuda.runtime.runtimeGetVersion()) if available else None,
    }


def openslide_library() -> dict[str, str]:
    """The version of OpenSlide's library, which is loaded with its package."""
    import openslide

    return {"version": str(openslide.__library_version__)}


def video() -> dict[str, list[str]]:
    """Decoders of video that PyAV brings."""
    import av.codec

    wanted = ("h264", "hevc", "vp9", "av1", "mjpeg", "mpeg4")
    return {"decoders": [name for name in wanted if name in av.codec.codecs_available]}


def object_stores() -> dict[str, list[str]]:
    """The kinds of object store that obstore can open."""
    import obstore.store

    kinds = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore", "http": "HTTPStore"}
    return {"schemes": [scheme for scheme, name in kinds.items() if hasattr(obstore.store, name)]}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "gpu": gpu,
    "cupy-device": cupy_device,
    "codecs": codecs,
    "openslide-library": openslide_library,
    "video": video,
    "object-stores": object_stores,
}


def main(words: list[str]) -> None:
    """Try each word in turn; results go where standard output went, anything printed meanwhile nowhere."""
    results = os.fdopen(os.dup(1), "w", encoding="ascii")
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  a device, not a path of ours
        os.dup2(nowhere.fileno(), 1)
    warnings.simplefilter("ignore")
    for word in words:
        print(json.dumps({"begin": word}), file=results, flush=True)
        try:
            facts = PROBES[word]() if word in PROBES else _imported(word)
            answer: dict[str, Any] = {"end": word, "facts": facts}
        except BaseException as error:  # a package may raise anything, SystemExit too
            answer = {"end": word, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
        print(json.dumps(answer), file=results, flush=True)


def _imported(name: str) -> dict[str, Any]:
    importlib.import_module(name)
    return {}


if __name__ == "__main__":
    main(sys.argv[1:])

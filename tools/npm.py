"""Packages of the npm registry, fetched with its own client and checked; used by the other tools here."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


class FetchError(Exception):
    """A package cannot be had, or is not the one expected; one line."""


def fetch(package: str, version: str, *, integrity: str | None = None) -> tuple[dict[str, bytes], str]:
    """The files of a package by their path inside of it, and its integrity as npm writes it (sha512-...).

    Raises FetchError when npm is absent or refuses, or when the integrity is another than the one given.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError("npm is not installed (it comes with Node.js)")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", "--pack-destination", folder, f"{package}@{version}"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        except (subprocess.SubprocessError, OSError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            raise FetchError(f"{package}@{version}: {said[-1] if said else 'npm pack failed'}") from error
        archive = next(Path(folder).glob("*.tgz"))
        found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if integrity is not None and found != integrity:
            raise FetchError(f"{package}@{version}: its integrity is {found}, expected {integrity}")
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.isfile()]
            files = {m.name.removeprefix("package/"): tar.extractfile(m).read() for m in members}
    return files, found


def run(action: object, *arguments: object) -> int:
    """Call a tool's function; a FetchError becomes one line and exit code 1."""
    try:
        action(*arguments)  # type: ignore[operator]
    except FetchError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    return 0


def sha256_of(data: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()

"""Renew the OpenSeadragon that the viewer ships.

    python tools/fetch_openseadragon.py [VERSION]

Writes the minified script, its licence, and a note of version and checksums into ats_stream/viewer/static.
Without VERSION the one of the note is fetched again and must be the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import npm

PACKAGE = "openseadragon"
STATIC = Path(__file__).parent.parent / "ats_stream" / "viewer" / "static"
NOTE = STATIC / "openseadragon.json"
FILES = {
    "build/openseadragon/openseadragon.min.js": "openseadragon.min.js",
    "LICENSE.txt": "openseadragon.LICENSE.txt",
}


def renew(version: str | None) -> None:
    """Fetch a version, and write files and note."""
    known = json.loads(NOTE.read_text()) if NOTE.exists() else {}
    same = version in (None, known.get("version"))
    files, integrity = npm.fetch(
        PACKAGE, version or known["version"], integrity=known.get("integrity") if same else None
    )
    stated = json.loads(files["package.json"])
    for inside, name in FILES.items():
        (STATIC / name).write_bytes(files[inside])
    note = {
        "package": PACKAGE,
        "version": stated["version"],
        "license": stated["license"],
        "source": stated["homepage"],
        "integrity": integrity,
        "sha256": {name: npm.sha256_of(files[inside]) for inside, name in FILES.items()},
    }
    NOTE.write_text(json.dumps(note, indent=1) + "\n")
    print(f"{PACKAGE} {stated['version']}: {', '.join(FILES.values())}")


if __name__ == "__main__":
    sys.exit(npm.run(renew, sys.argv[1] if len(sys.argv) > 1 else None))

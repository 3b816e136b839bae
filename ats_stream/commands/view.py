"""Look at pyramids and slides in a browser, with attention, drawn patches and the mask of tissue on top.

  ats-stream view slides/a.svs
  ats-stream view pyramids --open
  ats-stream view pyramids/*.ome.zarr --predictions predictions
  ats-stream view --predictions predictions

TARGET is whatever 'ats-stream info' describes: an OME-Zarr folder, a zip file of one, a URL, a slide or
picture file, or a folder of pyramids. Without TARGET all images of the predictions are shown. Prints an
address to open; Ctrl-C ends it, with exit code 0.

In the browser: drag and scroll, or arrow keys, + and -; 0 shows all, n and p go to the next and the previous
patch, a switches the attention map, b the boxes. A click on a box, or in the list, goes to the patch.

On a machine far away, forward the port and open the same address here:
  ssh -L 8000:localhost:8000 user@machine     and there: ats-stream view TARGET --port 8000

Only this machine can reach the server, and only with the secret in the address. --host lets others in who
have the address; nothing is encrypted.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats_stream.errors import AtsStreamError, InputError

if TYPE_CHECKING:
    import argparse

    from ats_stream.io import StorageOptions
    from ats_stream.viewer.server import ViewerServer
    from ats_stream.viewer.targets import Target

USAGE = "TARGET [TARGET ...] [options]"
LOOPBACK = "127.0.0.1"
MAX_PORT = 65535
# decoded chunks kept of each open image: tiles share the chunks at their borders
CHUNK_CACHE_BYTES = 32 << 20  # 32 MiB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ats-stream view``."""
    from ats_stream.commands.options import add_storage_options
    from ats_stream.viewer.image import FORMATS

    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help="pyramid, slide, picture, URL, or folder"
    )
    parser.add_argument(
        "--predictions",
        metavar="DIR",
        help="a folder that 'ats-stream predict' wrote: attention, patches and predictions of its images",
    )
    parser.add_argument(
        "--attention",
        metavar="IMAGE",
        help="an attention map of one TARGET: OME-Zarr (y, x) or (c, y, x) with scale and translation",
    )
    parser.add_argument(
        "--patches", metavar="FILE", help="patches of one TARGET: GeoJSON in pixels of level 0"
    )
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        default="jpeg",
        help="format of tiles; png is exact and slower (jpeg)",
    )
    parser.add_argument("--port", type=int, default=0, metavar="N", help="port (a free one)")
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        metavar="ADDRESS",
        help=f"address to listen on; any other than {LOOPBACK} can be reached over the network",
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    add_storage_options(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve until Ctrl-C; an image that cannot be read is reported and the rest is shown."""
    from ats_stream.commands.options import storage_options_from
    from ats_stream.viewer.answers import Viewer
    from ats_stream.viewer.server import ViewerServer, serve
    from ats_stream.viewer.targets import Targets

    storage_options = storage_options_from(arguments)
    if not 0 <= arguments.port <= MAX_PORT:
        raise InputError(f"--port must lie in 0 to {MAX_PORT}, got {arguments.port}")
    asked = wanted(arguments)
    good, code = readable(asked, storage_options)
    if not good:
        return {"images": 0, "exit_code": code}

    def open_image(place: str) -> Any:
        from ats_stream.io import open_pyramid

        options = storage_options.values_for(place)
        return open_pyramid(place, storage_options=options, cache_bytes=CHUNK_CACHE_BYTES)

    viewer = Viewer(
        Targets(good, open_image, tell=_tell),
        token=secrets.token_urlsafe(16),
        tell=_tell,
        tile_format=arguments.format,
    )
    server = ViewerServer(viewer, host=arguments.host, port=arguments.port)
    serve(server, lambda: _announce(server, len(good), open_browser=arguments.open))
    print("ats-stream: stopped", file=sys.stderr, flush=True)
    return {"images": len(good)}


def wanted(arguments: argparse.Namespace) -> list[Target]:
    """The images that the arguments ask for, with what predictions have for them."""
    from ats_stream.commands.verify import expand
    from ats_stream.viewer.predictions import Prediction, Predictions
    from ats_stream.viewer.targets import Target

    predictions = Predictions(Path(arguments.predictions)) if arguments.predictions else None
    places = list(expand(arguments.targets)) or list(predictions.slides if predictions else ())
    if not places:
        raise InputError("view needs a TARGET, or --predictions with a table of images")
    given = {"attention": arguments.attention, "patches": arguments.patches}
    files = {name: Path(value) for name, value in given.items() if value}
    if files and len(places) > 1:
        raise InputError(f"--{next(iter(files))} is for one image, got {len(places)}")
    for name, path in files.items():
        if not path.exists():
            raise InputError(f"--{name} {path}: no such file or folder")
    if files:
        found = predictions.of(places[0]) if predictions else Prediction()
        parts = {"attention": found.attention, "patches": found.patches} | files
        return [Target(place=places[0], facts=found.facts, **parts)]
    return [Target.of(place, predictions.of(place) if predictions else None) for place in places]


def readable(targets: list[Target], storage_options: StorageOptions) -> tuple[list[Target], int]:
    """Those that can be opened, and the exit code of the last that cannot, each of which is a line."""
    good, code = [], 0
    for target in targets:
        try:
            storage_options.open(target.place)
        except AtsStreamError as error:
            _tell(str(error))
            code = error.exit_code
        else:
            good.append(target)
    return good, code


def _announce(server: ViewerServer, num_images: int, *, open_browser: bool) -> None:
    if not server.is_loopback:
        print(
            f"ats-stream: warning: --host {server.host} lets everyone who has the address see the images, "
            "and nothing is encrypted",
            file=sys.stderr,
            flush=True,
        )
    images = f"{num_images} image{'s' * (num_images != 1)}"
    print(f"{images} at {server.url}  (Ctrl-C ends)", flush=True)
    if open_browser:
        import webbrowser

        if not webbrowser.open(server.url):
            print("ats-stream: no browser could be opened here", file=sys.stderr, flush=True)


def _tell(line: str) -> None:
    print(f"ats-stream: error: {' '.join(line.split())}", file=sys.stderr, flush=True)

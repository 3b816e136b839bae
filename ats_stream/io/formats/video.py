"""Video files as images (C, t, y, x): frames by number, each exactly as a decoding from the start gives it.

PyAV (the extra ``video``) reads them. Opening walks through the packets without decoding: the time stamps
tell which frame is which, and where decoding may begin. A chunk is a run of whole frames.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.errors import SlideError
from ats_stream.io.formats.kept import Kept
from ats_stream.io.formats.parts import (
    FileParts,
    Stamp,
    box_of,
    describe,
    file_stamp,
    places_alone,
    whole_grid,
)
from ats_stream.io.layout import check_bounds
from ats_stream.io.ngff import default_channels
from ats_stream.io.sources import ChunkError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ats_stream.io.sources import Place, RawChunk

Array = npt.NDArray[Any]
SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})
# brands of still pictures that share the head of MP4
STILL_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"heif", b"mif1", b"msf1"})
# frames of one chunk: no more than this many, nor than fit here
CHUNK_FRAMES = 32
CHUNK_BYTES = 32 << 20  # 32 MiB
MAX_FRAMES = 1 << 26
MAX_OPEN_VIDEOS = 16


@dataclass(frozen=True, kw_only=True)
class FrameIndex:
    """The frames of a video in the order in which they are shown."""

    pts_T: npt.NDArray[np.int64]
    """Time stamp of each frame; its number where the file states none."""
    is_key_T: npt.NDArray[np.bool_]
    """Frames from which decoding may begin."""
    has_times: bool
    """Whether the file states time stamps; without them decoding begins at the start."""


def is_video(path: Path) -> bool:
    """Whether a file begins like a video, or is named like one."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp":
        return head[8:12] not in STILL_BRANDS
    is_avi = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    return is_avi or head[:4] == b"\x1a\x45\xdf\xa3" or path.suffix.lower() in SUFFIXES


def read_video(path: Path) -> FileParts:
    """A video file as an image of one level; SlideError when it has no frames or cannot be read."""
    stamp = file_stamp(path)
    with _open(str(path)) as container:
        stream = _stream(str(path), container)
        facts = describe(
            container.format.name.split(",")[0], None, compression=str(stream.codec_context.name).upper()
        )
        if stream.average_rate:
            facts["frame_rate"] = float(stream.average_rate)
        width, height = stream.codec_context.width, stream.codec_context.height
        layout = "gray" if stream.codec_context.pix_fmt == "gray" else "rgb24"
        index = _index(str(path), container, stream)
    channels = 1 if layout == "gray" else 3
    try:
        source = VideoSource(str(path), stamp, (channels, len(index.pts_T), height, width), layout, index)
    except ValueError as error:
        raise SlideError(str(path), str(error)) from error
    return FileParts(
        path=str(path),
        name=path.stem,
        axes=("c", "t", "y", "x"),
        sources=(source,),
        pixel_size_um=None,
        metadata=facts,
        stamp=stamp,
        channels=default_channels(channels),
    )


def _open(path: str) -> Any:
    try:
        import av
    except ImportError as error:
        reason = "reading video needs PyAV: install it with pip install 'ats-stream[video]'"
        raise SlideError(path, reason) from error
    try:
        return av.open(path)
    except (OSError, ValueError, av.FFmpegError) as error:
        raise SlideError(path, f"not a video that FFmpeg can open: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__)


def _stream(path: str, container: Any) -> Any:
    if not container.streams.video:
        raise SlideError(path, "the file has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise SlideError(path, "the video has a codec that FFmpeg does not know")
    stream.codec_context.thread_count = 1  # threads of the reader decode side by side already
    return stream


def _index(path: str, container: Any, stream: Any) -> FrameIndex:
    """All frames, from their packets; by decoding all of them where packets state no times of their own."""
    import av

    times: list[int | None] = []
    keys: list[bool] = []
    try:
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:
                continue  # the last one is empty: it flushes a decoder
            times.append(packet.pts)
            keys.append(bool(packet.is_keyframe))
            if len(times) > MAX_FRAMES:
                raise SlideError(path, f"too many frames: more than {MAX_FRAMES}")
        known = [pts for pts in times if pts is not None]
        if known and len(set(known)) == len(times):
            pts_T, is_key_T = np.array(known, np.int64), np.array(keys, np.bool_)
            order = np.argsort(pts_T)
            return FrameIndex(pts_T=pts_T[order], is_key_T=is_key_T[order], has_times=True)
    except av.FFmpegError as error:
        raise SlideError(path, f"damaged video: {_line(error)}") from error
    with _open(path) as again:
        try:
            count = sum(1 for _ in again.decode(_stream(path, again)))
        except av.FFmpegError as error:
            raise SlideError(path, f"damaged video: {_line(error)}") from error
    if count == 0:
        raise SlideError(path, "the video has no frames")
    return FrameIndex(pts_T=np.arange(count), is_key_T=np.arange(count) == 0, has_times=False)


class VideoSource:
    """Chunks (C, frames, y, x) of a video: runs of whole frames."""

    def __init__(
        self, path: str, stamp: Stamp, shape: tuple[int, ...], layout: str, index: FrameIndex
    ) -> None:
        """ValueError when the video has no pixels, or more than images have."""
        if min(shape) < 1:
            raise ValueError(f"a video without pixels: {shape}")
        self.path, self.stamp, self.layout, self.index = path, stamp, layout, index
        self.shape: tuple[int, ...] = shape
        self.dtype: np.dtype[Any] = np.dtype(np.uint8)
        channels, num_frames, height, width = shape
        frames = max(1, min(CHUNK_FRAMES, num_frames, CHUNK_BYTES // (channels * height * width)))
        self.chunk_shape: tuple[int, ...] = (channels, frames, height, width)
        self.shard_shape = whole_grid(self.shape, self.chunk_shape)
        self.fill_value = np.uint8(0)
        check_bounds(self.shape, self.chunk_shape, self.chunk_shape, self.dtype)

    def fetch(self, _shard: Place, /, places: Sequence[Place]) -> Iterator[RawChunk]:
        """Hand over the places alone: FFmpeg reads and decodes in one go."""
        return places_alone(self.path, self.stamp, places)

    def decode(self, raw: RawChunk) -> Array:
        """Decode the frames of a chunk."""
        (_, first, _, _), (_, count, _, _) = box_of(self, raw.place)
        key = (self.path, self.stamp)
        try:
            reader = _readers.get(key, partial(_Reader, self))
        except SlideError as error:
            raise ChunkError(error.reason) from error
        try:
            return reader.read(first, count)
        except ChunkError:
            _readers.drop(key)
            raise


class _Reader:
    """An open video and how far it is decoded; one thread decodes at a time."""

    def __init__(self, source: VideoSource) -> None:
        self._path, self._shape = source.path, source.shape
        self._index, self._layout = source.index, source.layout
        self._keys = np.flatnonzero(source.index.is_key_T)
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._container = _open(self._path)
        self._stream = _stream(self._path, self._container)
        self._frames = self._container.decode(self._stream)
        self._next = 0

    def read(self, first: int, count: int) -> Array:
        """Frames (C, count, y, x); ChunkError when one of them does not come out of the decoder."""
        with self._lock:
            self._go_to(first)
            out = np.empty((count, *self._shape[2:], self._shape[0]), np.uint8)
            missing = self._decode(first, out)
            if missing:
                # a place to begin that was none: what stands before it is needed
                self._start()
                missing = self._decode(first, out)
            if missing:
                raise ChunkError(f"damaged video: frame {min(missing)} cannot be decoded")
        return out.transpose(3, 0, 1, 2)

    def _go_to(self, first: int) -> None:
        """Seek to the last frame before ``first`` where decoding may begin, unless going on is shorter."""
        import av

        at = int(np.searchsorted(self._keys, first, side="right")) - 1
        key = int(self._keys[at]) if at >= 0 else 0
        if key <= self._next <= first:
            return
        if not self._index.has_times or at < 0:
            self._start()
            return
        try:
            self._container.seek(int(self._index.pts_T[key]), stream=self._stream, backward=True)
        except av.FFmpegError:
            self._start()
            return
        self._frames = self._container.decode(self._stream)
        self._next = key

    def _decode(self, first: int, out: Array) -> set[int]:
        """Fill ``out`` with the frames from ``first`` on; return the numbers of those that did not come."""
        import av

        missing = set(range(first, first + len(out)))
        try:
            while missing:
                frame = next(self._frames, None)
                if frame is None:
                    break
                number = self._number(frame)
                if number is None:
                    continue
                self._next = number + 1
                if number >= first + len(out):
                    break
                if number in missing:
                    out[number - first] = self._pixels(frame, number)
                    missing.remove(number)
        except (av.FFmpegError, ValueError, EOFError, MemoryError) as error:
            raise ChunkError(
                f"damaged video: frame {min(missing)} cannot be decoded: {_line(error)}"
            ) from error
        return missing

    def _number(self, frame: Any) -> int | None:
        """Which frame this is; None for one that is not shown."""
        if not self._index.has_times:
            return self._next
        if frame.pts is None:
            return None
        number = int(np.searchsorted(self._index.pts_T, frame.pts))
        is_there = number < len(self._index.pts_T) and self._index.pts_T[number] == frame.pts
        return number if is_there else None

    def _pixels(self, frame: Any, number: int) -> Array:
        if frame.is_corrupt:
            raise ChunkError(f"damaged video: frame {number} is corrupt")
        if (frame.height, frame.width) != self._shape[2:]:
            size = f"{frame.width} x {frame.height}"
            raise ChunkError(f"frame {number} is {size}, the video {self._shape[3]} x {self._shape[2]}")
        pixels: Array = frame.to_ndarray(format=self._layout)
        return pixels.reshape(*self._shape[2:], self._shape[0])


_readers: Kept[_Reader] = Kept(MAX_OPEN_VIDEOS)

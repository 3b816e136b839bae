"""Videos read in place: every frame is the one that a decoding from the start gives."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest

from ats_stream.errors import SlideError
from ats_stream.io import open_pyramid
from ats_stream.io.formats import video
from ats_stream.io.formats.kept import Kept


def straight(path, layout="rgb24"):
    """All frames (C, t, y, x) by one decoding from the start."""
    av = pytest.importorskip("av", reason="needs the extra video")
    with av.open(str(path)) as container:
        frames = np.stack([f.to_ndarray(format=layout) for f in container.decode(video=0)])
    return frames[None] if frames.ndim == 3 else frames.transpose(3, 0, 1, 2)


def encode(path, frames_TYXC, codec, **options):
    av = pytest.importorskip("av", reason="needs the extra video")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = frames_TYXC.shape[1:3]
        stream.pix_fmt = {"mjpeg": "yuvj420p", "rawvideo": "gray", "ffv1": "gray"}.get(codec, "yuv420p")
        for pixels in frames_TYXC:
            kind = "gray" if pixels.shape[-1] == 1 else "rgb24"
            frame = av.VideoFrame.from_ndarray(pixels[..., 0] if kind == "gray" else pixels, format=kind)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def moving(count, channels=3):
    rng = np.random.default_rng(0)
    field = rng.integers(0, 255, (48, 64 + count, channels)).repeat(2, 0).repeat(2, 1).astype(np.uint8)
    return np.stack([field[:96, 2 * i : 2 * i + 128] for i in range(count)])


def assert_frames(path, expected, *, num_single=20):
    """Chunks in any order, single frames in any order, patches over the ends."""
    pyramid = open_pyramid(path)
    assert pyramid.axes == ("c", "t", "y", "x")
    assert pyramid.levels[0].shape == expected.shape
    np.testing.assert_array_equal(pyramid.read(0), expected)
    rng = np.random.default_rng(0)
    _, count, height, width = expected.shape
    for t in rng.permutation(count)[:num_single]:
        box = pyramid.read(0, (0, t, 5, 7), (expected.shape[0], t + 1, 25, 37))
        np.testing.assert_array_equal(box, expected[:, t : t + 1, 5:25, 7:37])
    offsets = [[-2, -3, -4], [count - 2, height - 8, width - 9], [count // 2, 3, 4]]
    first, last, middle = pyramid.read_patches(0, offsets, (4, 16, 16), fill=3)
    np.testing.assert_array_equal(first[:, 2:, 3:, 4:], expected[:, :2, :13, :12])
    assert (first[:, :2] == 3).all()
    np.testing.assert_array_equal(last[:, :2, :8, :9], expected[:, -2:, -8:, -9:])
    inside = slice(count // 2, count // 2 + 4)
    np.testing.assert_array_equal(middle, expected[:, inside, 3:19, 4:20])
    return pyramid


def test_a_real_video_is_read_frame_by_frame(test_data):
    path = test_data / "nd" / "bikes.mp4"
    expected = straight(path)
    pyramid = assert_frames(path, expected, num_single=5)
    assert pyramid.levels[0].shape == (3, 250, 272, 640)
    assert dict(pyramid.metadata) == {"vendor": "mov", "compression": "H264", "frame_rate": 25.0}
    assert pyramid.levels[0].pixel_size_um is None
    np.testing.assert_array_equal(np.asarray(pyramid.dask(0)[:, 100:103]), expected[:, 100:103])
    assert pyramid.thumbnail(64).shape == (3, 28, 64)
    copy = pickle.loads(pickle.dumps(pyramid))
    np.testing.assert_array_equal(copy.read(0, (0, 200, 0, 0), (3, 203, 9, 9)), expected[:, 200:203, :9, :9])
    threaded = open_pyramid(path, num_threads=3)
    box = threaded.read(0, (0, 0, 0, 0), (3, 250, 8, 8))
    np.testing.assert_array_equal(box, expected[..., :8, :8])


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"g": "7", "bf": "3"}),
        ("open.mkv", "libx264", {"g": "9", "bf": "2", "x264-params": "open-gop=1"}),
        ("one.mp4", "libx264", {"g": "1000", "bf": "2"}),
        ("a.avi", "mpeg4", {"g": "5"}),
        ("b.avi", "mpeg4", {"g": "6", "bf": "2"}),
        ("j.avi", "mjpeg", {}),
        ("p.mpg", "mpeg2video", {"g": "8", "bf": "2"}),
    ],
)
def test_every_frame_is_exact_whatever_the_group_of_pictures(tmp_path, monkeypatch, name, codec, options):
    monkeypatch.setattr(video, "CHUNK_FRAMES", 4)
    path = encode(tmp_path / name, moving(50), codec, **options)
    assert_frames(path, straight(path))


def test_grey_video_has_one_channel_and_keeps_its_values(tmp_path):
    frames = moving(9, channels=1)
    path = encode(tmp_path / "a.mkv", frames, "ffv1")
    assert_frames(path, frames.transpose(3, 0, 1, 2))


def test_seeking_decodes_no_more_than_one_group(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "CHUNK_FRAMES", 1)
    monkeypatch.setattr(video, "_readers", Kept(4))
    path = encode(tmp_path / "a.mp4", moving(40), "libx264", g="10", bf="0", sc_threshold="0")
    pyramid = open_pyramid(path)
    pyramid.read(0, (0, 0, 0, 0), (3, 1, 1, 1))
    numbers = []
    number_of = video._Reader._number

    def count(self, frame):
        numbers.append(number_of(self, frame))
        return numbers[-1]

    monkeypatch.setattr(video._Reader, "_number", count)
    pyramid.read(0, (0, 33, 0, 0), (3, 34, 1, 1))
    assert numbers == [30, 31, 32, 33]
    numbers.clear()
    pyramid.read(0, (0, 36, 0, 0), (3, 37, 1, 1))
    assert numbers == [34, 35, 36]


def test_damaged_videos_are_refused_in_one_line(tmp_path):
    good = encode(tmp_path / "a.mp4", moving(12), "libx264", g="4").read_bytes()
    for name, data, says in [
        ("text.mp4", b"hello " * 40, "not a video that FFmpeg can open"),
        ("empty.avi", b"", "not a video that FFmpeg can open"),
        ("cut.mp4", good[: len(good) // 2], "not a video that FFmpeg can open"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SlideError, match=rf"{name}: {says}[^\n]*$"):
            open_pyramid(tmp_path / name)


def test_a_video_without_frames_is_refused(tmp_path):
    av = pytest.importorskip("av", reason="needs the extra video")
    # the head of a raw video, whatever the file is called
    (tmp_path / "a.avi").write_bytes(b"YUV4MPEG2 W16 H16 F10:1 Cmono\n")
    with pytest.raises(SlideError, match=r"a\.avi: the video has no frames"):
        open_pyramid(tmp_path / "a.avi")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with pytest.raises(SlideError, match=r"sound\.mp4: the file has no video stream"):
        open_pyramid(tmp_path / "sound.mp4")


def test_without_the_extra_the_error_says_what_to_install(test_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SlideError, match=r"bikes\.mp4: reading video needs PyAV: .*'ats-stream\[video\]'$"):
        open_pyramid(test_data / "nd" / "bikes.mp4")


@pytest.mark.parametrize(
    ("head", "name", "expected"),
    [
        (b"\0\0\0\x20ftypisom", "a", True),
        (b"\0\0\0\x20ftypavif", "a.avif", False),
        (b"RIFF\0\0\0\0AVI ", "a", True),
        (b"RIFF\0\0\0\0WEBP", "a.webp", False),
        (b"\x1a\x45\xdf\xa3", "a", True),
        (b"hello", "a.MP4", True),
        (b"hello", "a.png", False),
    ],
)
def test_videos_are_known_by_head_or_name(tmp_path, head, name, expected):
    (tmp_path / name).write_bytes(head)
    assert video.is_video(tmp_path / name) is expected

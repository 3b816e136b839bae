"""The sampler: items depend on the visit and the weights alone, and hold what the pyramid holds."""

from __future__ import annotations

import dataclasses
import gc
import math
import shutil
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import MODEL, SAMPLER, assert_same_item, make_sampler, table, visit, weights

from ats_stream.errors import SlideError
from ats_stream.io import PyramidWriter, StorageOptions, open_pyramid
from ats_stream.io.storage import stores
from ats_stream.io.views import VIEWS
from ats_stream.models import AttentionNet
from ats_stream.sampling import SCHEMES, draw
from ats_stream.workers import PatchSampler, SamplerConfig
from ats_stream.workers.sampler import LOOKS_KEPT, read_prior, view_level

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ats_stream.io import Archive, Pyramid
    from ats_stream.models import ModelConfig
    from ats_stream.workers import Item

VISITS = [visit(0), visit(3), visit(0, epoch=1), visit(1)]


@pytest.fixture(scope="module")
def items(archive: Archive) -> list[Item]:
    """What a fresh sampler makes of each visit, one sampler for each."""
    return [make_sampler(archive).sample(one, weights()) for one in VISITS]


def test_an_item_does_not_depend_on_what_was_sampled_before(archive: Archive, items: list[Item]) -> None:
    sampler = make_sampler(archive)
    for number in (3, 0, 2, 1, 0, 0, 3):
        sampler.sample(VISITS[number], weights(seed=9))  # other weights in between
        assert_same_item(sampler.sample(VISITS[number], weights()), items[number])


def test_extra_patches_come_after_those_drawn_anyway(archive: Archive, items: list[Item]) -> None:
    more = make_sampler(archive).sample(dataclasses.replace(VISITS[0], extra_patches=3), weights())
    num_patches = len(items[0].index_N)
    assert len(more.index_N) == num_patches + 3
    assert more.index_N[:num_patches].tolist() == items[0].index_N.tolist()
    assert more.crops_NCPP[:num_patches].tobytes() == items[0].crops_NCPP.tobytes()


@pytest.mark.parametrize("cache_bytes", [0, 1 << 12, 1 << 30])
def test_an_item_does_not_depend_on_the_cache(archive: Archive, items: list[Item], cache_bytes: int) -> None:
    sampler = make_sampler(archive, cache_bytes=cache_bytes)
    for one, item in [*zip(VISITS, items, strict=True)] * 2:
        assert_same_item(sampler.sample(one, weights()), item)


@pytest.mark.usefixtures("empty_cache")
def test_draws_of_images_met_once_share_one_look_and_leave_nothing(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = [visit(image, epoch=epoch) for image in (0, 3, 1) for epoch in range(3)]
    apart = [make_sampler(archive).sample(one, weights()) for one in visits]
    VIEWS.clear()
    computed: list[int] = []
    opened: list[weakref.ref[Pyramid]] = []
    forward, open_ = AttentionNet.forward, StorageOptions.open

    def counted(net: AttentionNet, view_BCYX: torch.Tensor) -> torch.Tensor:
        computed.append(len(view_BCYX))
        return forward(net, view_BCYX)

    def followed(options: StorageOptions, source: str) -> Pyramid:
        pyramid = open_(options, source)
        opened.append(weakref.ref(pyramid))
        return pyramid

    monkeypatch.setattr(AttentionNet, "forward", counted)
    monkeypatch.setattr(StorageOptions, "open", followed)
    sampler = make_sampler(archive)
    for one, item in zip(visits, apart, strict=True):
        # the draws of an image are one step of a prediction
        once = dataclasses.replace(one, step=one.image, num_draws=3)
        got = sampler.sample(once, weights())
        assert_same_item(dataclasses.replace(got, visit=one), item)
    assert len(computed) == len(opened) == 3
    gc.collect()
    assert [pyramid() for pyramid in opened] == [None] * 3
    assert VIEWS.num_bytes == 0


@pytest.mark.usefixtures("empty_cache")
def test_draws_that_others_made_are_waited_for_by_few(archive: Archive) -> None:
    sampler = make_sampler(archive)
    for image in range(5):  # the second draw of each is asked of another sampler
        sampler.sample(dataclasses.replace(visit(image), num_draws=2), weights())
        assert len(sampler._looks) <= LOOKS_KEPT


def chunks_read(samplers: Sequence[PatchSampler], images: Sequence[int]) -> int:
    """Chunks of the views of images that the samplers have read."""
    slides = [(sampler, sampler._open(sampler.slides[image])) for sampler in samplers for image in images]
    return sum(one.read_stats(view_level(one, s.config.view_downsample)).num_chunks for s, one in slides)


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of this test alone, that trusts files however young."""
    monkeypatch.setattr(stores, "YOUNG_NS", 0)
    VIEWS.clear()
    yield
    VIEWS.clear()


@pytest.mark.usefixtures("empty_cache")
def test_views_are_read_again_only_when_the_cache_forgot_them(archive: Archive) -> None:
    item = make_sampler(archive).sample(visit(0), weights())
    one_view = item.view_CYX.nbytes + item.prior_YX.nbytes
    sampler = make_sampler(archive, cache_bytes=0)
    sampler.sample(visit(0), weights())
    one_read = chunks_read([sampler], [0])
    assert one_read > 0
    for cache_bytes, misses in ((0, 6), (2 * one_view, 4), (3 * one_view, 3)):
        VIEWS.clear()
        sampler = make_sampler(archive, cache_bytes=cache_bytes)
        for image in (0, 1, 0, 2, 0, 1):  # with room for two: 1 is the one used longest ago when 2 comes
            sampler.sample(visit(image), weights())
            assert VIEWS.num_bytes <= cache_bytes
        assert chunks_read([sampler], range(3)) == misses * one_read


@pytest.mark.usefixtures("empty_cache")
def test_samplers_of_a_process_read_a_view_once(archive: Archive) -> None:
    images = range(5)
    first = make_sampler(archive)
    for image in images:
        first.sample(visit(image), weights())
    once = chunks_read([first], images)
    samplers = [first, *(make_sampler(archive, num_patches=n) for n in (1, 2))]
    for epoch in range(2):
        for sampler in samplers:
            for image in images:
                sampler.sample(visit(image, epoch=epoch), weights(seed=epoch))
    assert chunks_read(samplers, images) == once > 0


def test_a_consumer_cannot_write_into_the_cache(archive: Archive) -> None:
    item = make_sampler(archive).sample(visit(0), weights())
    for array in (item.view_CYX, item.prior_YX):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_item_does_not_depend_on_the_threads_around_it(
    archive: Archive, items: list[Item], threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sampler = make_sampler(archive)
        for one, item in zip(VISITS, items, strict=True):
            assert_same_item(sampler.sample(one, weights()), item)
        assert torch.get_num_threads() == threads  # and it leaves them as they were
        assert not torch.is_inference_mode_enabled()
    finally:
        torch.set_num_threads(before)


def test_weights_and_stream_ids_and_seeds_all_change_the_draw(archive: Archive, items: list[Item]) -> None:
    first = items[0].index_N.tolist()
    others = [
        make_sampler(archive).sample(visit(0), weights(seed=1)),
        make_sampler(archive, seed=4).sample(visit(0), weights()),
        items[2],
    ]
    assert all(other.index_N.tolist() != first for other in others)
    assert others[0].attention_key != items[0].attention_key


def test_crops_are_boxes_of_the_pyramid_with_zeros_outside(archive: Archive) -> None:
    patch_px = 200  # wide enough to reach over the border of 512 px from many cells
    sampler = make_sampler(archive, patch_px=patch_px, num_patches=8)
    outside = 0
    for image in range(4):
        item = sampler.sample(visit(image), weights())
        pyramid = open_pyramid(item.slide)
        full_CYX = pyramid.read(0)
        padded = np.pad(full_CYX, ((0, 0), (patch_px, patch_px), (patch_px, patch_px)))
        for (y, x), crop_CPP in zip(item.offsets_ND.tolist(), item.crops_NCPP, strict=True):
            box = padded[:, y + patch_px : y + 2 * patch_px, x + patch_px : x + 2 * patch_px]
            np.testing.assert_array_equal(crop_CPP, box)
            inside = 0 <= y <= 512 - patch_px and 0 <= x <= 512 - patch_px
            outside += not inside
            if inside:
                box = pyramid.read(0, (0, y, x), (3, y + patch_px, x + patch_px))
                np.testing.assert_array_equal(crop_CPP, box)
    assert 0 < outside < 32


@pytest.mark.parametrize("patch_px", [48, 63])
def test_a_patch_is_centred_on_the_cell_that_was_drawn(archive: Archive, patch_px: int) -> None:
    item = make_sampler(archive, patch_px=patch_px).sample(visit(2), weights())
    height, width = item.view_CYX.shape[1:]
    scale = 512 / width
    assert (height, width) == (16, 16)
    for index, (y, x) in zip(item.index_N.tolist(), item.offsets_ND.tolist(), strict=True):
        centre = ((index // width + 0.5) * scale, (index % width + 0.5) * scale)
        assert abs(y + patch_px / 2 - centre[0]) <= 0.5
        assert abs(x + patch_px / 2 - centre[1]) <= 0.5


def test_positions_are_drawn_inside_the_prior_only_and_as_the_attention_says(archive: Archive) -> None:
    net = make_sampler(archive).attention
    sampler = make_sampler(archive)
    for image in range(5):
        item = sampler.sample(visit(image), weights())
        assert item.prior_YX is not None
        assert item.prior_YX.ravel()[item.index_N].all()
        assert (item.prior_YX == (item.view_CYX.max(axis=0) > 0)).all()
        net.load_state_dict({k: torch.from_numpy(v) for k, v in weights().arrays.items()})
        logits_1M = net(torch.from_numpy(item.view_CYX.copy())[None]).flatten(1)
        logits_1M = logits_1M.masked_fill(~torch.from_numpy(item.prior_YX.copy()).flatten(), -math.inf)
        drawn = draw(logits_1M.log_softmax(1), 4, seed=SAMPLER.seed, stream_ids=[image])
        np.testing.assert_array_equal(item.index_N, drawn.index[0])
        np.testing.assert_array_equal(item.weight_N, drawn.weight[0])
        np.testing.assert_array_equal(item.log_q_N, drawn.log_prob[0])


def test_without_a_prior_everything_may_be_drawn(archive: Archive) -> None:
    uniform = dataclasses.replace(MODEL, attention="uniform")
    sampler = make_sampler(archive, uniform, prior_label=None, num_patches=256)
    item = sampler.sample(visit(0), weights(model=uniform))
    assert item.prior_YX is None
    assert sorted(item.index_N.tolist()) == list(range(256))
    assert item.num_drawn == 256


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_with_fewer_positions_than_patches_are_padded_with_weight_zero(
    archive: Archive, scheme: str
) -> None:
    item = make_sampler(archive, num_patches=60, scheme=scheme).sample(visit(0), weights())
    assert item.prior_YX is not None
    drawable = int(item.prior_YX.sum())
    assert drawable < 60
    num = 60 if scheme == "with_replacement" else drawable
    assert item.num_drawn == num
    assert (item.weight_N[:num] > 0).all()
    assert (item.weight_N[num:] == 0).all()
    assert item.crops_NCPP.shape == (60, 3, 48, 48)
    assert np.isfinite(item.weight_N).all()


def test_bytes_are_those_of_the_chunks_that_were_read(archive: Archive) -> None:
    item = make_sampler(archive).sample(visit(0), weights())
    level = open_pyramid(item.slide).levels[0]
    chunk = level.chunk_shape[1]
    touched = {
        (row, column)
        for y, x in item.offsets_ND.tolist()
        for row in range(max(y, 0) // chunk, -(-min(y + 48, 512) // chunk))
        for column in range(max(x, 0) // chunk, -(-min(x + 48, 512) // chunk))
    }
    assert item.decoded_bytes == len(touched) * math.prod(level.chunk_shape)
    assert 0 < item.stored_bytes < item.decoded_bytes
    assert item.num_bytes == sum(
        a.nbytes
        for a in (item.view_CYX, item.prior_YX, item.crops_NCPP, item.index_N, item.log_q_N, item.weight_N)
        if a is not None
    )


# --- priors on other grids than the view


def write_pyramid_with(folder: Path, label_YX: np.ndarray | None, **changed: Any) -> Path:
    """A pyramid of 64 px and a view of 8, with a label image of any size."""
    given: dict[str, Any] = {"level_shapes": [(3, 64, 64), (3, 8, 8)], "dtype": "uint8", **changed}
    target = folder / "one.ome.zarr"
    with PyramidWriter(target, **given) as writer:
        for level, shape in enumerate(given["level_shapes"]):
            writer.write_shard(level, (0, 0), np.full(shape, 7, given["dtype"]))
        if label_YX is not None:
            writer.write_label("tissue", label_YX)
    return target


def touched_by_hand(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Each cell is True if a True pixel of the mask overlaps it, by comparing all of them in integers."""
    cells = np.zeros(shape, bool)
    for (y, x), value in np.ndenumerate(mask):
        for r, c in np.ndindex(shape):
            over_y = r * mask.shape[0] < (y + 1) * shape[0] and y * shape[0] < (r + 1) * mask.shape[0]
            over_x = c * mask.shape[1] < (x + 1) * shape[1] and x * shape[1] < (c + 1) * mask.shape[1]
            cells[r, c] |= bool(value) and over_y and over_x
    return cells


class LabelOnly:
    """A pyramid of which only a label image is there."""

    slide, label_names = "a", ("tissue",)

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask

    def label(self, name: str) -> Pyramid:
        return open_pyramid(self.mask[None].astype(np.uint8))


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 2**32),
)
def test_a_cell_is_drawable_where_any_pixel_of_the_label_touches_it(
    label_shape: tuple[int, int], map_shape: tuple[int, int], seed: int
) -> None:
    mask = np.random.default_rng(seed).random(label_shape) < 0.3
    mask.flat[seed % mask.size] = True
    prior: Any = LabelOnly(mask)
    np.testing.assert_array_equal(read_prior(prior, "tissue", map_shape), touched_by_hand(mask, map_shape))


@pytest.mark.parametrize("side", [3, 8, 21, 64])
def test_labels_of_any_resolution_are_priors(tmp_path: Path, side: int) -> None:
    mask = np.zeros((side, side), np.uint8)
    mask[side // 2, -1] = 5
    path = write_pyramid_with(tmp_path, mask)
    config = dataclasses.replace(SAMPLER, prior_label="tissue", view_downsample=8.0)
    item = PatchSampler([str(path)], [0], MODEL, config).sample(visit(0), weights())
    np.testing.assert_array_equal(item.prior_YX, touched_by_hand(mask, (8, 8)))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("side", [5, 8, 64])
def test_no_draw_of_any_scheme_leaves_the_mask(tmp_path: Path, scheme: str, side: int) -> None:
    share = min(0.3, 24 / side**2)  # so that some cells stay empty
    mask = np.random.default_rng(side).random((side, side)) < share
    path = write_pyramid_with(tmp_path, mask.astype(np.uint8))
    drawable = touched_by_hand(mask, (8, 8))
    assert 0 < drawable.sum() < 64
    config = dataclasses.replace(
        SAMPLER, prior_label="tissue", view_downsample=8.0, scheme=scheme, num_patches=12
    )
    sampler = PatchSampler([str(path)], [0], MODEL, config)
    drawn = set()
    for stream_id in range(20):
        item = sampler.sample(dataclasses.replace(visit(0), stream_id=stream_id), weights())
        drawn |= set(item.index_N[: item.num_drawn].tolist())
    assert drawn <= set(np.flatnonzero(drawable).tolist())


# --- what cannot be read


def reason(path: Path, model: ModelConfig = MODEL, **changed: Any) -> str:
    """The reason of the SlideError that a slide raises, which names it."""
    config = dataclasses.replace(SAMPLER, **{"prior_label": None, "view_downsample": 8.0, **changed})
    sampler = PatchSampler([str(path)], [0], model, config)
    with pytest.raises(SlideError) as caught:
        sampler.sample(visit(0), weights(model=model))
    assert caught.value.slide == str(path)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_slides_without_the_prior_are_named(tmp_path: Path) -> None:
    path = write_pyramid_with(tmp_path, np.ones((8, 8), np.uint8))
    assert reason(path, prior_label="tumour") == "no label 'tumour' to draw within; labels there: tissue"


def test_slides_without_any_label_are_named(tmp_path: Path) -> None:
    assert "labels there: none" in reason(write_pyramid_with(tmp_path, None), prior_label="tissue")


def test_slides_with_an_empty_prior_are_named(tmp_path: Path) -> None:
    path = write_pyramid_with(tmp_path, np.zeros((8, 8), np.uint8))
    assert reason(path, prior_label="tissue") == "label 'tissue' is empty: no position can be drawn"


def test_slides_with_other_channels_are_named(tmp_path: Path) -> None:
    shapes = [(2, 64, 64), (2, 8, 8)]
    path = write_pyramid_with(tmp_path, None, level_shapes=shapes)
    assert reason(path) == "has 2 channels, the model reads 3"


def test_slides_with_other_pixels_are_named(tmp_path: Path) -> None:
    path = write_pyramid_with(tmp_path, None, dtype="float32")
    assert reason(path) == "has float32 pixels over y x, the model reads uint8 or uint16 over y x"


def test_volumes_are_named(tmp_path: Path) -> None:
    import zarr

    root = zarr.open_group(str(tmp_path / "volume.zarr"), mode="w", zarr_format=2)
    for path, side in (("0", 64), ("1", 8)):
        root.create_array(path, shape=(3, side, side, side), chunks=(1, 8, 8, 8), dtype="uint8")
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space"} for n in "zyx")]
    scales = [
        {"path": p, "coordinateTransformations": [{"type": "scale", "scale": [1, s, s, s]}]}
        for p, s in (("0", 1), ("1", 8))
    ]
    root.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": scales}]
    expected = "has uint8 pixels over z y x, the model reads uint8 or uint16 over y x"
    assert reason(tmp_path / "volume.zarr") == expected


def test_slides_without_a_level_near_the_view_are_named(tmp_path: Path) -> None:
    path = write_pyramid_with(tmp_path, None)
    assert reason(path, view_downsample=32.0) == "no level near downsampling 32; there are 1, 8"


@pytest.mark.parametrize(("downsample", "index"), [(4.0, 1), (8.0, 1), (16.0, 1), (1.0, 0), (2.0, 0)])
def test_the_view_may_be_coarser_or_finer_by_two(tmp_path: Path, downsample: float, index: int) -> None:
    assert view_level(open_pyramid(write_pyramid_with(tmp_path, None)), downsample).index == index


def test_missing_slides_are_named(tmp_path: Path) -> None:
    assert reason(tmp_path / "none.ome.zarr") == "no such file or folder"


def test_damaged_slides_are_named_and_do_not_poison_the_sampler(archive: Archive, tmp_path: Path) -> None:
    slides, labels = table(archive)
    broken = tmp_path / "broken.ome.zarr"
    shutil.copytree(slides[0], broken)
    for shard in (broken / "0" / "c").rglob("*"):
        if shard.is_file():
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    sampler = PatchSampler([str(broken), slides[1]], labels[:2], MODEL, SAMPLER)
    for _ in range(2):
        with pytest.raises(SlideError) as caught:
            sampler.sample(visit(0), weights())
        assert caught.value.slide == str(broken)
        assert caught.value.reason.startswith("level 0")
    sound = make_sampler(archive).sample(visit(1), weights())
    assert_same_item(sampler.sample(visit(1), weights()), sound)


def test_attention_that_is_not_a_number_draws_nothing(archive: Archive) -> None:
    broken = weights()
    arrays = {name: np.full_like(array, np.nan) for name, array in broken.arrays.items()}
    sampler = make_sampler(archive)
    with pytest.raises(SlideError, match=r"nothing can be drawn: .*nan"):
        sampler.sample(visit(0), dataclasses.replace(broken, key="nan", arrays=arrays))
    sampler.sample(visit(0), broken)  # the sampler goes on with sound weights


def test_16_bit_slides_are_read(tmp_path: Path) -> None:
    path = write_pyramid_with(tmp_path, None, dtype="uint16")
    config = dataclasses.replace(SAMPLER, prior_label=None, view_downsample=8.0)
    item = PatchSampler([str(path)], [1], dataclasses.replace(MODEL, max_value=65535.0), config).sample(
        visit(0), weights()
    )
    assert item.crops_NCPP.dtype == item.view_CYX.dtype == np.uint16
    assert item.label == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_patches", 0),
        ("patch_px", 0),
        ("view_downsample", 0.5),
        ("view_downsample", math.nan),
        ("scheme", "best"),
        ("cache_bytes", -1),
    ],
)
def test_impossible_configurations_name_the_field_and_the_value(field: str, value: object) -> None:
    changed: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"{field} must .*{value}"):
        SamplerConfig(**changed)

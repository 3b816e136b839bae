"""Inference: what a run folder predicts, the same every time and on every executor."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tiny import run_config

from ats_stream.errors import CheckpointError, SlideError
from ats_stream.io import open_pyramid
from ats_stream.workers import AttentionWeights, ClusterConfig, PatchSampler, Plan, train
from ats_stream.workers.batch import collate
from ats_stream.workers.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from ats_stream.workers.predict import Predicted, Predictor, Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import ModuleType

    from ats_stream.io import Archive


@pytest.fixture(scope="module")
def run_dir(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(archive, tmp_path_factory.mktemp("predict") / "run", run_config(num_epochs=1)).run_dir


@pytest.fixture(scope="module")
def predicted(archive: Archive, run_dir: Path) -> list[Predicted]:
    return list(Predictor.load(run_dir).predict(archive.split("test").rows))


def assert_same(some: Iterable[Predicted], others: Iterable[Predicted]) -> None:
    """Field by field and bit for bit; only the clock may differ."""
    for one, other in zip(some, others, strict=True):
        for field in dataclasses.fields(Predicted):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if isinstance(a, np.ndarray):
                assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
                assert a.tobytes() == b.tobytes(), field.name
            elif field.name != "seconds":
                assert a == b, field.name


def test_a_prediction_tells_what_was_looked_at(archive: Archive, predicted: list[Predicted]) -> None:
    rows = archive.split("test").rows
    assert [(one.slide, one.label, one.split, one.name) for one in predicted] == [
        (row.slide, row.label, "test", row.name) for row in rows
    ]
    for one in predicted:
        pyramid = open_pyramid(one.slide)
        assert one.classes == ("0", "1")
        assert float(one.probability_K.sum()) == pytest.approx(1, abs=1e-6)
        assert one.predicted == one.classes[int(one.probability_K.argmax())]
        assert one.is_right == (one.predicted == one.label)
        assert float(one.attention_YX.sum()) == pytest.approx(1, abs=1e-5)
        assert one.attention_YX.shape == pyramid.levels[1].shape[1:]
        cells = ((one.offsets_ND + 24) * 16 // 512).T  # the patches are 48 px wide, the map 16 cells
        np.testing.assert_allclose(one.attention_YX[tuple(cells)], one.attention_N, rtol=1e-5)
        np.testing.assert_array_equal(one.crops_NCPP, pyramid.read_patches(0, one.offsets_ND, (48, 48)))
        assert (one.weight_N > 0).all()
        assert (one.full_shape, one.full_bytes) == ((3, 512, 512), 3 * 512 * 512)
        assert 0 < one.stored_bytes < one.decoded_bytes


def test_it_is_the_same_every_time_and_from_a_file(
    archive: Archive, run_dir: Path, predicted: list[Predicted]
) -> None:
    predictor = Predictor.load(find_checkpoint(run_dir))
    for _ in range(2):
        assert_same(predictor.predict(archive.split("test").rows), predicted)


def test_the_model_is_that_of_the_checkpoint(run_dir: Path) -> None:
    predictor = Predictor.load(run_dir)
    assert predictor.config == run_config(num_epochs=1)
    state = load_checkpoint(find_checkpoint(run_dir))["model"]
    assert all(torch.equal(weight, state[name]) for name, weight in predictor.model.state_dict().items())
    assert not predictor.model.training
    assert not any(parameter.requires_grad for parameter in predictor.model.parameters())


def test_top_looks_where_attention_is_highest(archive: Archive, run_dir: Path) -> None:
    for one in Predictor.load(run_dir).predict(archive.rows, scheme="top"):
        highest = np.sort(one.attention_YX.ravel())[::-1][: len(one.attention_N)]
        np.testing.assert_allclose(one.attention_N, highest, rtol=1e-5)
        # what was seen counts for everything, so that the shares of the patches sum to 1
        assert float((one.attention_N * one.weight_N).sum()) == pytest.approx(1, abs=1e-5)


def test_an_unknown_scheme_is_refused(archive: Archive, run_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"scheme must be one of .*, got 'best'"):
        next(Predictor.load(run_dir).predict(archive.rows, scheme="best"))


def test_rows_without_a_label_are_predicted(
    archive: Archive, run_dir: Path, predicted: list[Predicted]
) -> None:
    unlabelled = [dataclasses.replace(row, label="") for row in archive.split("test").rows]
    for one, known in zip(Predictor.load(run_dir).predict(unlabelled), predicted, strict=True):
        assert one.is_right is None
        assert one.predicted == known.predicted


def test_a_slide_that_cannot_be_read_is_named_after_those_before_it(
    archive: Archive, run_dir: Path, predicted: list[Predicted]
) -> None:
    rows = archive.split("test").rows
    gone = dataclasses.replace(rows[1], slide="/nowhere/gone.ome.zarr")
    found = Predictor.load(run_dir).predict([rows[0], gone])
    assert_same([next(found)], predicted[:1])
    with pytest.raises(SlideError, match=r"/nowhere/gone\.ome\.zarr: no such file or folder"):
        next(found)


def test_the_callers_autograd_is_left_alone(archive: Archive, run_dir: Path) -> None:
    for _ in Predictor.load(run_dir).predict(archive.split("test").rows):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def spoil(state: dict[str, Any], kind: str) -> None:
    if kind == "weights":
        state["model"]["head.weight"] = torch.ones(3, 3)
    elif kind == "no weights":
        state["model"] = {}
    elif kind == "no tensor":
        state["model"]["head.bias"] = 1
    elif kind == "model":
        state["config"]["model"]["num_classes"] = -1
    else:
        del state["config"]["sampler"]


@pytest.mark.parametrize("kind", ["weights", "no weights", "no tensor", "model", "sampler"])
def test_checkpoints_that_do_not_fit_are_refused_in_one_line(
    run_dir: Path, tmp_path: Path, kind: str
) -> None:
    state = load_checkpoint(find_checkpoint(run_dir))
    spoil(state, kind)
    save_checkpoint(tmp_path, 1, {k: v for k, v in state.items() if k not in ("format", "step")})
    with pytest.raises(CheckpointError, match="fit") as caught:
        Predictor.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert not str(caught.value).rstrip().endswith(":")  # a reason follows


def test_without_a_checkpoint_there_is_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Predictor.load(tmp_path)


def test_draws_are_independent_and_their_mean_is_given(
    archive: Archive, run_dir: Path, predicted: list[Predicted]
) -> None:
    rows, predictor = archive.split("test").rows, Predictor.load(run_dir)
    threes = list(predictor.predict(rows, draws=3))
    # draw k of a row is the visit that a training makes of it in epoch k
    plan = Plan(images=tuple(range(len(rows))), batch_size=1, num_epochs=3, seed=0, shuffle=False, lag=None)
    sampler = PatchSampler(
        [row.slide for row in rows], [0] * len(rows), predictor.config.model, predictor.config.sampler
    )
    state = predictor.model.attention.state_dict()
    weights = AttentionWeights.of({name: t.numpy() for name, t in state.items()})
    for row, (one, once) in enumerate(zip(threes, predicted, strict=True)):
        visits = [plan.visits(epoch * len(rows) + row)[0] for epoch in range(3)]
        items = [sampler.sample(visit, weights) for visit in visits]
        values = np.stack(
            [predictor.model(collate([i])).class_logits_BK.softmax(1)[0].numpy() for i in items]
        )
        np.testing.assert_array_equal(values[0], once.probability_K)
        np.testing.assert_array_equal(one.probability_K, values.mean(0))
        error = values.astype(np.float64).std(0, ddof=1) / np.sqrt(3)
        np.testing.assert_allclose(one.standard_error_K, error, rtol=1e-9)
        assert once.standard_error_K is None
        assert one.draw_N.tolist() == np.repeat([0, 1, 2], 4).tolist()
        np.testing.assert_array_equal(one.offsets_ND, np.concatenate([i.offsets_ND for i in items]))
        np.testing.assert_array_equal(
            one.weight_N, np.concatenate([i.weight_N for i in items]) / np.float32(3)
        )
        assert one.decoded_bytes == sum(item.decoded_bytes for item in items)
        assert one.features_NF.shape == (12, 16)


def test_rows_that_are_left_out_change_nothing(
    archive: Archive, run_dir: Path, predicted: list[Predicted]
) -> None:
    found = Predictor.load(run_dir).predict_each(archive.split("test").rows, only=[1])
    assert_same([one for one in found if isinstance(one, Predicted)], predicted[1:])


def test_an_unreadable_row_is_told_and_the_others_go_on(
    archive: Archive, run_dir: Path, predicted: list[Predicted]
) -> None:
    rows = archive.split("test").rows
    gone = dataclasses.replace(rows[1], slide="/nowhere/gone.ome.zarr")
    for window in (1, 16):
        cluster = ClusterConfig(window=window)
        first, second, third = Predictor.load(run_dir).predict_each([rows[0], gone, rows[1]], cluster)
        assert_same([first], predicted[:1])
        assert isinstance(second, Unreadable)
        assert "no such file or folder" in second.record().error
        assert isinstance(third, Predicted)


def test_the_key_is_that_of_weights_and_configuration(run_dir: Path) -> None:
    predictor, again = Predictor.load(run_dir), Predictor.load(run_dir)
    assert predictor.key == again.key
    again.model.head.bias += 1
    assert predictor.key != again.key
    sampler = dataclasses.replace(predictor.config.sampler, num_patches=5)
    other = Predictor(predictor.model, dataclasses.replace(predictor.config, sampler=sampler))
    assert predictor.key != other.key


@pytest.mark.slow
def test_actors_predict_what_this_process_does(
    archive: Archive, run_dir: Path, predicted: list[Predicted], ray_local: ModuleType
) -> None:
    cluster = ClusterConfig(executor="ray", num_ranks=1, samplers_per_rank=2, cpus_per_sampler=0.1)
    predictor, rows = Predictor.load(run_dir), archive.split("test").rows
    assert_same(predictor.predict(rows, cluster), predicted)
    assert_same(predictor.predict(rows, cluster, draws=3), predictor.predict(rows, draws=3))

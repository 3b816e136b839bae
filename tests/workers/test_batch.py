"""From items to batches, and models over streams."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tiny import MODEL, attention, make_sampler, visit, weights

from ats_stream.models import PatchClassifier
from ats_stream.workers import Item, Plan, Stream
from ats_stream.workers.batch import collate, effective_share, evaluate
from ats_stream.workers.executors import SerialExecutor

if TYPE_CHECKING:
    from ats_stream.io import Archive


def frozen(item: Item) -> Item:
    """The item as Ray's object store gives it: every array read-only."""
    arrays: dict[str, Any] = {}
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = value.copy()
            arrays[field.name].setflags(write=False)
    return dataclasses.replace(item, **arrays)


def test_a_batch_holds_copies_of_the_items_arrays(archive: Archive) -> None:
    sampler = make_sampler(archive)
    items = [frozen(sampler.sample(visit(image), weights())) for image in (0, 4, 2)]
    batch = collate(items)
    for number, item in enumerate(items):
        np.testing.assert_array_equal(batch.views_CYX[number], item.view_CYX)
        np.testing.assert_array_equal(batch.crops_BNCPP[number], item.crops_NCPP)
        np.testing.assert_array_equal(batch.index_BN[number], item.index_N)
        np.testing.assert_array_equal(batch.weight_BN[number], item.weight_N)
        prior = batch.log_priors_YX[number]
        assert prior is not None
        assert item.prior_YX is not None
        np.testing.assert_array_equal(prior.exp(), item.prior_YX.astype(np.float32))
    for tensor in (*batch.views_CYX, batch.crops_BNCPP, batch.index_BN, batch.weight_BN):
        tensor.zero_()  # the items do not notice
    assert all(item.view_CYX.any() and item.crops_NCPP.any() for item in items)


def test_fresh_draws_are_worth_all_they_can_be_and_stale_ones_less(archive: Archive) -> None:
    model = PatchClassifier(MODEL)
    model.attention.load_state_dict(attention(1).state_dict())
    sampler = make_sampler(archive)
    key = {name: t.numpy() for name, t in attention(1).state_dict().items()}
    for arrays, is_fresh in ((key, True), (weights(2).arrays, False)):
        drawn = dataclasses.replace(weights(0), key=str(is_fresh), arrays=arrays)
        items = [sampler.sample(visit(image), drawn) for image in (0, 1)]
        with torch.no_grad():
            share_B = effective_share(items, model(collate(items)))
        if is_fresh:
            torch.testing.assert_close(share_B, torch.ones(2), rtol=1e-4, atol=1e-4)
        else:
            assert bool((share_B < 0.99).all())


def evaluation(archive: Archive) -> tuple[PatchClassifier, Stream]:
    plan = Plan(images=(0, 1, 2), batch_size=2, num_epochs=1, seed=0, shuffle=False, lag=None)
    stream = Stream(plan, SerialExecutor(make_sampler(archive)))
    torch.manual_seed(0)
    model = PatchClassifier(MODEL)
    stream.publish(0, model.attention)
    return model, stream


def test_each_image_is_evaluated_once_as_the_model_sees_it(archive: Archive) -> None:
    model, stream = evaluation(archive)
    seen = list(evaluate(model, stream, torch.device("cpu")))
    assert [one.item.visit.image for one in seen] == [0, 1, 2]  # the one that filled up the batch is left out
    with torch.no_grad():
        for one in seen:
            prediction = model(collate([one.item]))
            wanted = prediction.class_logits_BK[0]
            torch.testing.assert_close(torch.from_numpy(one.outputs_K), wanted)
            torch.testing.assert_close(torch.from_numpy(one.attention_N), prediction.attention_BN[0])


def test_evaluation_leaves_the_callers_autograd_alone(archive: Archive) -> None:
    model, stream = evaluation(archive)
    for _ in evaluate(model, stream, torch.device("cpu")):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        x = torch.ones(1, requires_grad=True)
        (x * 2).sum().backward()
        assert x.grad == pytest.approx(2)

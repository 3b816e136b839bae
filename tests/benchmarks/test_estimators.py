"""The benchmark of the estimators on few draws, and its stored result."""

import json
import math

import estimators
import pytest
import torch


def test_random_fields_have_unit_variance_and_the_correlation_asked_for():
    generator = torch.Generator().manual_seed(0)
    fields_FM = estimators.random_field(40, (64, 64), 4.0, generator)
    assert torch.allclose(fields_FM.mean(dim=1), torch.zeros(40, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(fields_FM.std(dim=1), torch.ones(40, dtype=torch.float64))
    fields = fields_FM.view(40, 64, 64)
    for distance in (2, 4, 8):
        correlation = float((fields * fields.roll(distance, dims=2)).mean())
        assert correlation == pytest.approx(math.exp(-(distance**2) / 32), abs=0.06)


def test_stale_logits_are_at_the_distance_asked_for():
    generator = torch.Generator().manual_seed(1)
    old_M, step_M = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    new_M = estimators.stale_logits(old_M, step_M, 0.156)
    a_M, q_M = new_M.softmax(dim=0), old_M.softmax(dim=0)
    assert float((a_M * (a_M / q_M).log()).sum()) == pytest.approx(0.156, abs=1e-6)


@pytest.mark.torture
def test_estimators_share_what_they_must():
    generator = torch.Generator().manual_seed(2)
    num_positions = math.prod(estimators.MAP_SHAPE)
    logits_M, step_M = torch.randn(2, num_positions, generator=generator, dtype=torch.float64)
    features = {"some": torch.randn(num_positions, 4, generator=generator, dtype=torch.float64)}
    figures = estimators.measure_map(4 * logits_M, step_M, features, 30)
    names = {(divergence, name) for _, divergence, name in figures}
    assert names == {
        (divergence, name)
        for divergence in estimators.DIVERGENCES
        for name in (estimators.STALE if divergence else estimators.FRESH)
    }
    fresh = {name: one for (_, divergence, name), one in figures.items() if not divergence}
    # the same values, other gradients
    assert fresh["murthy, centred"]["variance"] == pytest.approx(fresh["murthy"]["variance"])
    assert fresh["gradient of the original"]["variance"] == pytest.approx(
        fresh["des_raj"]["variance"], rel=1e-5
    )
    assert fresh["gradient of the original"]["gradient_rmse"] != fresh["des_raj"]["gradient_rmse"]
    # nothing is random about the most probable positions
    assert fresh["top"]["gradient_bias_square"] == pytest.approx(fresh["top"]["gradient_rmse"] ** 2)


def test_stored_result_is_complete_and_says_what_the_targets_say():
    result = json.loads(estimators.RESULTS.read_text())
    assert estimators.FIGURE.is_file()
    for divergence in estimators.DIVERGENCES:
        for name in estimators.STALE if divergence else estimators.FRESH:
            for mass in estimators.SAMPLED_MASSES:
                for kind in estimators.FEATURES:
                    case = {"mass": mass, "features": kind, "divergence": divergence}
                    assert estimators.find(result, estimator=name, **case)["variance"] > 0
    again = estimators.check_targets(result)
    assert [check["holds"] for check in again] == [check["holds"] for check in result["targets"]]
    # around 0 the gradient's ratio of murthy to des_raj is .71, above the target of .70
    assert all(check["holds"] for check in again if "around 0" not in check["what"])

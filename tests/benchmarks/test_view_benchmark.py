"""The viewer's benchmark: it runs, and its numbers are what they are called."""

import json

import pytest
import view
from synthetic_slide import SlideConfig


@pytest.mark.slow
def test_all_cases_run_at_a_small_size(tmp_path, capsys):
    data = view.Data(tmp_path, SlideConfig(side_px=1024), None)
    data.sparse = lambda _: data.zstd(128)  # of gigapixels would take long
    result = view.run(data, num_cold=1, num_tiles=1, num_requests=12)
    json.dumps(result, allow_nan=False)
    assert [one["case"] for one in result["cases"]] == [*view.SOURCES, "memory"]
    for one in result["cases"][:-1]:
        assert [row["name"] for row in one["contestants"]] == ["cold", "warm", "again", "six"]
        for row in one["contestants"]:
            assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["worst_ms"] + 0.1
        warm, again = one["contestants"][1:3]
        assert warm["kb"] == again["kb"]  # the same tiles
    (memory,) = result["cases"][-1]["contestants"]
    assert memory["num"] == 12
    assert memory["growth_mib"] == pytest.approx(memory["peak_mib"] - memory["early_mib"], abs=0.2)
    checks = {check["what"]: check for check in result["targets"]}
    assert all(check["holds"] is not None for check in checks.values())
    assert "warm" in capsys.readouterr().out


def test_targets_name_what_is_measured():
    names = {(target.case, target.ours, target.metric) for target in view.TARGETS}
    expected = {(s, n, m) for s in view.SOURCES for n in ("warm", "again") for m in ("p50_ms", "p99_ms")}
    assert names == expected | {("memory", "pyramid", "growth_mib")}
    assert all(not target.at_least for target in view.TARGETS)

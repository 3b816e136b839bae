"""Variance of the estimates and error of their gradients, for every scheme, fresh and stale; one figure.

    .venv/bin/python benchmarks/estimators.py               # measure, print, store, draw the figure
    .venv/bin/python benchmarks/estimators.py --figure-only # draw it from the stored result

A map of M = 2000 cells, N = 10 draws. The logits are a random field (half of it clustered over 4 cells, half
independent from cell to cell) times a temperature, set so that N draws without replacement hold a given share
of the attention on average, the sampled mass: at .006 attention is nearly uniform, at .999 it sits on a few
cells. Features are random fields of unit variance around 1 or, where so called, around 0; "smooth" over 8
cells or "rough", independent in every cell. The loss is a fixed linear function of the estimate. On a map of
128 x 128 cells with N = 32, balanced draws are compared with Des Raj's estimator.

    variance        E |F - Phi|^2
    gradient RMSE   sqrt(E |d - d*|^2) / |d*|        d the gradient to the logits, d* that of Phi
    gradient bias   |E d - d*| / |d*|
    slope           <E d, d*> / |d*|^2: 1 if unbiased, negative if it leads the wrong way on average

Stale: drawn from q, estimated under a, KL(a, q) given. Variance and RMSE are geometric means over random
maps, bias and slope medians.
Needs matplotlib for the figure (pip install "ats-stream[bench]").

Shapes: R repetitions of a draw, as rows; M positions, N draws, F features.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from biased_original import original_expectation
from machine import describe_machine
from torch import Tensor

from ats_stream.sampling import Draw, draw, expectation

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results" / "estimators.json"
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "estimators.svg"

FEATURES = ("smooth", "rough", "smooth around 0", "rough around 0")
SAMPLED_MASSES = (0.006, 0.17, 0.79, 0.999)
DIVERGENCES = (0.0, 0.025, 0.156)  # KL(a, q) of the fresh and two stale draws
MAP_SHAPE = (40, 50)
NUM_DRAWS = 10
NUM_FEATURES = 4
SMOOTH_CELLS = 8.0
ATTENTION_CELLS = 4.0
CHUNK_ROWS = 500

WIDE_MAP_SHAPE = (128, 128)
WIDE_NUM_DRAWS = 32
WIDE_NUM_FEATURES = 8
WIDE_FEATURE_CELLS = (16.0, 4.0, 0.0)
WIDE_ATTENTION = {  # correlation length in cells, temperature
    "uniform": (0.0, 0.0),
    "white, temperature 1": (0.0, 1.0),
    "over 4 cells, temperature 1": (4.0, 1.0),
    "over 4 cells, temperature 3": (4.0, 3.0),
    "over 16 cells, temperature 2": (16.0, 2.0),
}
WIDE_CHUNK_ROWS = 100

# estimator -> the scheme whose draws it is made from
FRESH = {
    "with_replacement": "with_replacement",
    "des_raj": "des_raj",
    "murthy": "murthy",
    "murthy, centred": "murthy",
    "balanced": "balanced",
    "top": "top",
    "gradient of the original": "des_raj",
}
STALE = {
    **{name: scheme for name, scheme in FRESH.items() if name != "gradient of the original"},
    "staleness ignored": "murthy",
    "fresh a in the des_raj formula": "des_raj",
}

TARGET_GRADIENT_RATIO = 0.70
TARGET_SMOOTH_VARIANCE_RATIO = 0.50
TARGET_ROUGH_VARIANCE_RATIO = 1.05


@dataclass
class Tally:
    """Sums over repetitions, from which variance, RMSE and bias follow."""

    count: int = 0
    square_of_value: float = 0.0
    square_of_gradient: float = 0.0
    value_F: Tensor = field(default_factory=lambda: torch.zeros(()))
    gradient_M: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, value_RF: Tensor, gradient_RM: Tensor) -> None:
        """Add errors of repetitions: estimate minus truth."""
        self.count += len(value_RF)
        self.square_of_value += float(value_RF.square().sum())
        self.square_of_gradient += float(gradient_RM.square().sum())
        self.value_F = self.value_F + value_RF.sum(dim=0)
        self.gradient_M = self.gradient_M + gradient_RM.sum(dim=0)

    def figures(self, true_gradient_M: Tensor) -> dict[str, float]:
        norm = float(true_gradient_M.norm())
        mean_M = self.gradient_M / self.count
        mean_square = self.square_of_gradient / self.count
        bias_square = float(mean_M.square().sum())
        noise_square = (mean_square - bias_square) / max(self.count - 1, 1)
        return {
            "variance": self.square_of_value / self.count,
            "gradient_rmse": math.sqrt(mean_square) / norm,
            # what the noise of a finite number of repetitions adds to the square is taken off
            "gradient_bias_square": (bias_square - noise_square) / norm**2,
            "gradient_noise_square": noise_square / norm**2,
            "slope": 1 + float(mean_M @ true_gradient_M) / norm**2,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maps", type=int, default=16, help="random maps of 2000 cells (%(default)s)")
    parser.add_argument("--draws", type=int, default=1000, help="draws from each (%(default)s)")
    parser.add_argument("--wide-maps", type=int, default=3, help="random maps of 128^2 cells (%(default)s)")
    parser.add_argument("--wide-draws", type=int, default=1500, help="draws from each (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    parser.add_argument("--figure-only", action="store_true", help="draw the figure of the stored result")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result goes (%(default)s)")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where the figure goes (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.figure_only:
        began, cpu_began = time.perf_counter(), time.process_time()
        result = {
            "machine": describe_machine(),
            "settings": {
                "map_shape": MAP_SHAPE,
                "num_draws": NUM_DRAWS,
                "maps": arguments.maps,
                "draws": arguments.draws,
                "wide_map_shape": WIDE_MAP_SHAPE,
                "wide_num_draws": WIDE_NUM_DRAWS,
                "wide_maps": arguments.wide_maps,
                "wide_draws": arguments.wide_draws,
                "threads": arguments.threads,
            },
            "schemes": measure_schemes(arguments.maps, arguments.draws),
            "wide": measure_wide(arguments.wide_maps, arguments.wide_draws),
        }
        result["targets"] = check_targets(result)
        result["wall_s"] = round(time.perf_counter() - began, 1)
        result["cpu_s"] = round(time.process_time() - cpu_began, 1)
        result["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rounded(result), indent=1) + "\n")
    result = json.loads(arguments.out.read_text())
    print_tables(result)
    draw_figure(result, arguments.figure)


# ---- random maps ----


def random_field(num_fields: int, shape: tuple[int, int], cells: float, generator: torch.Generator) -> Tensor:
    """Fields (num_fields, M) of mean 0, variance 1 and correlation exp(-d^2 / 2 cells^2) at distance d."""
    white = torch.randn(num_fields, *shape, generator=generator, dtype=torch.float64)
    square = sum(
        torch.fft.fftfreq(size, dtype=torch.float64).square().view(-1, *[1] * (1 - axis))
        for axis, size in enumerate(shape)
    )
    amplitude = torch.exp(-((math.pi * cells) ** 2) * square)
    values_FM = torch.fft.ifft2(torch.fft.fft2(white) * amplitude).real.flatten(1)
    values_FM = values_FM - values_FM.mean(dim=1, keepdim=True)
    return values_FM / values_FM.std(dim=1, keepdim=True)


def sampled_mass(logits_M: Tensor, num_draws: int) -> float:
    """Mean share of the attention that draws without replacement hold."""
    drawn = draw(logits_M.expand(CHUNK_ROWS, -1), num_draws, scheme="des_raj", seed=1)
    return float(drawn.log_prob.double().exp().sum(dim=1).mean())


def bisect(function: Callable[[float], float], target: float, high: float) -> float:
    """Where a rising function takes the value ``target``, between 0 and ``high``."""
    low = 0.0
    for _ in range(30):
        middle = (low + high) / 2
        if function(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def stale_logits(logits_M: Tensor, step_M: Tensor, divergence: float) -> Tensor:
    """Logits of a network that has moved on in direction ``step_M``, until KL(a, q) = ``divergence``."""
    if divergence == 0:
        return logits_M
    log_q_M = logits_M.log_softmax(dim=0)

    def divergence_at(size: float) -> float:
        log_a_M = (logits_M + size * step_M).log_softmax(dim=0)
        return float((log_a_M.exp() * (log_a_M - log_q_M)).sum())

    return logits_M + bisect(divergence_at, divergence, 20.0) * step_M


# ---- schemes ----


def measure_schemes(num_maps: int, num_repetitions: int) -> list[dict[str, object]]:
    """One record for each sampled mass, kind of features, divergence and estimator: means over maps."""
    per_map: dict[tuple[float, str, float, str], list[dict[str, float]]] = {}
    for seed in range(num_maps):
        generator = torch.Generator().manual_seed(seed)
        white_1M = random_field(1, MAP_SHAPE, 0.0, generator)
        clustered_1M = random_field(1, MAP_SHAPE, ATTENTION_CELLS, generator)
        field_M = (white_1M + clustered_1M)[0] / math.sqrt(2)
        step_M = random_field(1, MAP_SHAPE, 0.0, generator)[0]
        rough_MF = random_field(NUM_FEATURES, MAP_SHAPE, 0.0, generator).T
        smooth_MF = random_field(NUM_FEATURES, MAP_SHAPE, SMOOTH_CELLS, generator).T
        features = {
            "smooth": smooth_MF + 1,
            "rough": rough_MF + 1,
            "smooth around 0": smooth_MF,
            "rough around 0": rough_MF,
        }
        for mass in SAMPLED_MASSES:
            temperature = bisect(lambda t, z=field_M: sampled_mass(t * z, NUM_DRAWS), mass, 100.0)
            logits_M = temperature * field_M
            for case, figures in measure_map(logits_M, step_M, features, num_repetitions).items():
                per_map.setdefault((mass, *case), []).append(figures)
        print(f"map {seed + 1} of {num_maps} done", flush=True)
    return [
        {"mass": mass, "features": kind, "divergence": divergence, "estimator": name, **summary(figures)}
        for (mass, kind, divergence, name), figures in per_map.items()
    ]


def measure_map(
    logits_M: Tensor, step_M: Tensor, features: dict[str, Tensor], num_repetitions: int
) -> dict[tuple[str, float, str], dict[str, float]]:
    """Draws from ``logits_M`` serve all features and divergences."""
    upstream_F = torch.ones(NUM_FEATURES, dtype=torch.float64)
    fresh_M = {divergence: stale_logits(logits_M, step_M, divergence) for divergence in DIVERGENCES}
    truth = {}
    for divergence, now_M in fresh_M.items():
        for kind, f_MF in features.items():
            a_M = now_M.softmax(dim=0)
            phi_F = a_M @ f_MF
            truth[kind, divergence] = phi_F, a_M * ((f_MF - phi_F) @ upstream_F)
    tallies: dict[tuple[str, float, str], Tally] = {}
    for scheme in dict.fromkeys(FRESH.values()):
        repetitions = 1 if scheme == "top" else num_repetitions
        for start in range(0, repetitions, CHUNK_ROWS):
            stream_R = torch.arange(start, min(start + CHUNK_ROWS, repetitions))
            rows_RM = logits_M.expand(len(stream_R), -1)
            drawn = draw(rows_RM, NUM_DRAWS, scheme=scheme, stream_ids=stream_R, map_shape=MAP_SHAPE)
            for divergence, now_M in fresh_M.items():
                estimators = STALE if divergence else FRESH
                now_RM = now_M.expand(len(stream_R), -1).clone().requires_grad_()
                attention_RN = now_RM.log_softmax(dim=1).gather(1, drawn.index).exp()
                for name, needs in estimators.items():
                    if needs != scheme:
                        continue
                    for kind, f_MF in features.items():
                        phi_F, gradient_M = truth[kind, divergence]
                        value_RF = estimate(name, f_MF[drawn.index], attention_RN, drawn)
                        (gradient_RM,) = torch.autograd.grad(
                            (value_RF @ upstream_F).sum(), now_RM, retain_graph=True
                        )
                        tally = tallies.setdefault((kind, divergence, name), Tally())
                        tally.add(value_RF.detach() - phi_F, gradient_RM - gradient_M)
    return {case: tally.figures(truth[case[:2]][1]) for case, tally in tallies.items()}


def estimate(name: str, features_RNF: Tensor, attention_RN: Tensor, drawn: Draw) -> Tensor:
    """The estimate (R, F) that goes by ``name``."""
    weight_RN = drawn.weight.double()
    if name == "gradient of the original":
        return original_expectation(features_RNF, attention_RN)
    if name == "staleness ignored":
        # the value of the old attention, pulled by the gradient of the present network
        old_over_new_RN = drawn.log_prob.double().exp() / attention_RN.detach()
        return expectation(features_RNF, attention_RN * old_over_new_RN, weight_RN)
    if name == "fresh a in the des_raj formula":
        a_RN = attention_RN.detach()
        later_N = torch.arange(NUM_DRAWS - 1, -1, -1)
        left_RN = 1 - (a_RN.cumsum(dim=1) - a_RN)
        return expectation(features_RNF, attention_RN, (left_RN / a_RN + later_N) / NUM_DRAWS)
    return expectation(features_RNF, attention_RN, weight_RN, centred=name == "murthy, centred")


def summary(figures: list[dict[str, float]]) -> dict[str, object]:
    """Geometric means and medians over maps; of a bias, what an unbiased estimate would seem to have too."""

    def of(key: str) -> list[float]:
        return [one[key] for one in figures]

    def median_root(squares: list[float]) -> float:
        return math.sqrt(max(0.0, statistics.median(squares)))

    return {
        "variance": geometric_mean(of("variance")),
        "gradient_rmse": geometric_mean(of("gradient_rmse")),
        "gradient_bias": median_root(of("gradient_bias_square")),
        "gradient_bias_noise": median_root(of("gradient_noise_square")),
        "slope": statistics.median(of("slope")),
    }


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


# ---- balanced draws on a wide map ----


def measure_wide(num_maps: int, num_repetitions: int) -> list[dict[str, object]]:
    """Variance of balanced draws over that of Des Raj's, by the roughness of attention and features."""
    records = []
    for name, (attention_cells, temperature) in WIDE_ATTENTION.items():
        ratios: dict[float, list[float]] = {cells: [] for cells in WIDE_FEATURE_CELLS}
        for seed in range(num_maps):
            generator = torch.Generator().manual_seed(seed)
            logits_M = temperature * random_field(1, WIDE_MAP_SHAPE, attention_cells, generator)[0]
            features = {
                cells: random_field(WIDE_NUM_FEATURES, WIDE_MAP_SHAPE, cells, generator).T
                for cells in WIDE_FEATURE_CELLS
            }
            balanced = wide_variances("balanced", logits_M, features, num_repetitions)
            des_raj = wide_variances("des_raj", logits_M, features, num_repetitions)
            for cells in WIDE_FEATURE_CELLS:
                ratios[cells].append(balanced[cells] / des_raj[cells])
        records += [
            {
                "attention": name,
                "feature_cells": cells,
                "variance_ratio": geometric_mean(ratios[cells]),
                "by_map": ratios[cells],
            }
            for cells in WIDE_FEATURE_CELLS
        ]
        print(f"128 x 128, attention {name}: done", flush=True)
    return records


def wide_variances(
    scheme: str, logits_M: Tensor, features: dict[float, Tensor], num_repetitions: int
) -> dict[float, float]:
    a_M = logits_M.softmax(dim=0)
    squares = dict.fromkeys(features, 0.0)
    for start in range(0, num_repetitions, WIDE_CHUNK_ROWS):
        stream_R = torch.arange(start, min(start + WIDE_CHUNK_ROWS, num_repetitions))
        rows_RM = logits_M.expand(len(stream_R), -1)
        drawn = draw(rows_RM, WIDE_NUM_DRAWS, scheme=scheme, stream_ids=stream_R, map_shape=WIDE_MAP_SHAPE)
        for cells, f_MF in features.items():
            value_RF = expectation(f_MF[drawn.index], a_M[drawn.index], drawn.weight.double())
            squares[cells] += float((value_RF - a_M @ f_MF).square().sum())
    return {cells: square / num_repetitions for cells, square in squares.items()}


# ---- what came out ----


def find(result: dict[str, Any], **wanted: object) -> dict[str, Any]:
    """The record of ``result["schemes"]`` with these entries."""
    (found,) = (one for one in result["schemes"] if all(one[key] == value for key, value in wanted.items()))
    return found


def check_targets(result: dict[str, Any]) -> list[dict[str, object]]:
    """The promises, what was measured, whether they hold."""
    checks = []
    for kind in FEATURES:
        case = {"mass": 0.79, "features": kind, "divergence": 0.0}
        murthy, des_raj = (find(result, estimator=name, **case) for name in ("murthy", "des_raj"))
        ratio = murthy["gradient_rmse"] / des_raj["gradient_rmse"]
        what = f"gradient RMSE, murthy / des_raj, sampled mass .79, {kind} features"
        checks.append({"what": what, "value": ratio, "at_most": TARGET_GRADIENT_RATIO})
    for one in result["wide"]:
        limits = {16.0: TARGET_SMOOTH_VARIANCE_RATIO, 0.0: TARGET_ROUGH_VARIANCE_RATIO}
        if one["feature_cells"] in limits:
            kind = f"features over {one['feature_cells']:.0f} cells" if one["feature_cells"] else "rough"
            what = f"variance, balanced / des_raj, 128 x 128, attention {one['attention']}, {kind}"
            limit = limits[one["feature_cells"]]
            checks.append({"what": what, "value": one["variance_ratio"], "at_most": limit})
    for check in checks:
        check["holds"] = check["value"] <= check["at_most"]
    return checks


def rounded(value: Any) -> Any:
    """The same with floats of five digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def print_tables(result: dict[str, Any]) -> None:
    for divergence in DIVERGENCES:
        title = f"stale, KL(a, q) = {divergence}" if divergence else "fresh"
        for kind in FEATURES:
            print(
                f"\n{title}, {kind} features: variance / gradient RMSE (both / des_raj), bias +- noise, slope"
            )
            print(" " * 31 + "".join(f"sampled mass {mass:<35}" for mass in SAMPLED_MASSES))
            for name in STALE if divergence else FRESH:
                cells = []
                for mass in SAMPLED_MASSES:
                    case = {"mass": mass, "features": kind, "divergence": divergence}
                    one, base = (
                        find(result, estimator=name, **case),
                        find(result, estimator="des_raj", **case),
                    )
                    variance = one["variance"] / base["variance"]
                    rmse, rmse_ratio = one["gradient_rmse"], one["gradient_rmse"] / base["gradient_rmse"]
                    bias = f"{one['gradient_bias']:.3f}+-{one['gradient_bias_noise']:.3f}"
                    cells.append(
                        f"{variance:8.4f} {rmse:8.4f} ({rmse_ratio:6.3f}) {bias:13} {one['slope']:6.2f}"
                    )
                print(f"{name:31}" + "   ".join(cells))
    print("\nvariance of balanced over des_raj, 128 x 128, N = 32; features over")
    print(" " * 32 + "".join(f"{cells:>5.0f} cells " for cells in WIDE_FEATURE_CELLS))
    for name in WIDE_ATTENTION:
        row = [one for one in result["wide"] if one["attention"] == name]
        print(f"{name:31} " + " ".join(f"{one['variance_ratio']:11.3f}" for one in row))
    print()
    for check in result["targets"]:
        holds = "holds" if check["holds"] else "FAILS"
        print(f"{holds}: {check['what']}: {check['value']:.3f}, at most {check['at_most']}")
    print(f"{result['wall_s']} s, {result['cpu_s']} s of CPU, peak memory {result['peak_memory_mib']} MiB")


# ---- the figure ----

COLOURS = {
    "with_replacement": "#7a7a7a",
    "des_raj": "#1f5fa8",
    "murthy": "#b5410f",
    "murthy, centred": "#e0912f",
    "balanced": "#2b8a4b",
    "top": "#8a5fb0",
    "gradient of the original": "#111111",
    "staleness ignored": "#7a7a7a",
    "fresh a in the des_raj formula": "#1f5fa8",
}


def draw_figure(result: dict[str, Any], path: Path) -> None:
    """Six panels: variance and gradient error by sampled mass, direction, staleness, balanced draws."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update(
        {
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "svg.hashsalt": "estimators",
        }
    )
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    schemes = ["with_replacement", "des_raj", "murthy", "balanced"]
    with_centred = [*schemes, "murthy, centred"]
    for panel, kind in zip(panels[0, :2], ("smooth", "rough"), strict=True):
        title = f"Variance, {kind} features (des_raj = 1)"
        draw_by_mass(panel, title, ratios_by_mass(result, schemes, kind, "variance"))
    draw_wide(panels[0, 2], result["wide"])
    title = "Gradient RMSE, rough features (des_raj = 1)"
    draw_by_mass(panels[1, 0], title, ratios_by_mass(result, with_centred, "rough", "gradient_rmse"))
    draw_slope(panels[1, 1], result)
    draw_staleness(panels[1, 2], result)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(
        path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white", dpi=110
    )


def ratios_by_mass(result: dict[str, Any], names: list[str], kind: str, key: str) -> dict[str, list[float]]:
    curves = {}
    for name in names:
        fresh = [{"mass": mass, "features": kind, "divergence": 0.0} for mass in SAMPLED_MASSES]
        curves[name] = [
            find(result, estimator=name, **case)[key] / find(result, estimator="des_raj", **case)[key]
            for case in fresh
        ]
    return curves


def draw_by_mass(panel: Any, title: str, curves: dict[str, list[float]]) -> None:
    panel.set_title(title)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for name, values in curves.items():
        panel.plot(values, marker="o", markersize=4, color=COLOURS[name], label=name)
    label_ends(panel, {name: values[-1] for name, values in curves.items()})
    mass_axis(panel)


def mass_axis(panel: Any) -> None:
    panel.set_xticks(range(len(SAMPLED_MASSES)), [f"{mass:g}".removeprefix("0") for mass in SAMPLED_MASSES])
    panel.set_xlabel("attention held by the 10 draws")
    panel.set_xlim(-0.15, 4.5)
    panel.spines["bottom"].set_bounds(0, 3)


def label_ends(panel: Any, ends: dict[str, float], gap: float = 0.075) -> None:
    """Write each curve's name beside its end, pushed apart by ``gap`` of the panel's height."""
    panel.autoscale_view()
    to_share = panel.transLimits.transform
    scale = panel.yaxis.get_transform().transform
    height = -math.inf
    for name, value in sorted(ends.items(), key=lambda item: item[1]):
        height = max(height + gap, float(to_share((0, float(scale(value))))[1]))
        panel.annotate(
            name,
            xy=(3, value),
            xytext=(3.18, height),
            textcoords=("data", "axes fraction"),
            color=COLOURS[name],
            va="center",
        )


def draw_wide(panel: Any, records: list[dict[str, Any]]) -> None:
    panel.set_title("Variance, balanced / des_raj, 128 x 128, N = 32")
    spots = {0.0: 0, 4.0: 1, 16.0: 2}
    for name in WIDE_ATTENTION:
        ratio_at = {
            one["feature_cells"]: one["variance_ratio"] for one in records if one["attention"] == name
        }
        panel.plot(
            [spots[cells] for cells in ratio_at],
            list(ratio_at.values()),
            "o-",
            color=COLOURS["balanced"],
            alpha=0.6,
        )
    panel.axhline(1, color=COLOURS["des_raj"], linewidth=1)
    panel.text(2.05, 1.02, "des_raj", color=COLOURS["des_raj"], ha="right", va="bottom")
    panel.text(0, 0.12, "balanced, five\nkinds of attention", color=COLOURS["balanced"])
    panel.set_ylim(0, 1.15)
    panel.set_xticks(range(3), ["rough", "4 cells", "16 cells"])
    panel.set_xlabel("distance over which features vary")


def draw_slope(panel: Any, result: dict[str, Any]) -> None:
    panel.set_title("Share of the true gradient in the mean one")
    for kind, style in (("rough around 0", "o-"), ("rough", "o--")):
        for name in ("murthy", "gradient of the original"):
            slopes = [
                find(result, estimator=name, mass=mass, features=kind, divergence=0.0)["slope"]
                for mass in SAMPLED_MASSES
            ]
            panel.plot(slopes, style, markersize=4, color=COLOURS[name])
    panel.axhline(0, color="#999999", linewidth=0.8)
    panel.text(3.18, 1.0, "murthy", color=COLOURS["murthy"], va="center")
    panel.text(3.18, 0.1, "gradient of\nthe original", color=COLOURS["gradient of the original"])
    panel.set_ylim(-0.25, 1.1)
    panel.text(0, -0.21, "below 0: leads the wrong way", color="#666666")
    panel.text(3.18, 0.5, "rough features\naround 0: solid\naround 1: dashed", color="#666666")
    mass_axis(panel)


def draw_staleness(panel: Any, result: dict[str, Any]) -> None:
    panel.set_title("Gradient bias by staleness, sampled mass .79")
    names = {
        "staleness ignored": "staleness ignored",
        "fresh a in the des_raj formula": "fresh a in the des_raj formula",
        "murthy": "R from q times fresh a",
    }
    for row, (name, label) in enumerate(names.items()):
        for column, divergence in enumerate(DIVERGENCES[1:]):
            case = {"mass": 0.79, "features": "rough", "divergence": divergence}
            bias = find(result, estimator=name, **case)["gradient_bias"]
            spot = column * 4 + row
            panel.barh(spot, bias, color=COLOURS[name], height=0.8)
            panel.text(bias + 0.008, spot, f"{bias:.2f}  {label}", color=COLOURS[name], va="center")
    panel.set_yticks([1, 5], [f"KL {divergence}" for divergence in DIVERGENCES[1:]])
    panel.tick_params(axis="y", length=0)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.65)
    panel.set_xlabel("bias / norm of the true gradient")


if __name__ == "__main__":
    main()

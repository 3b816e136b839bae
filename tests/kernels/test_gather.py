"""The gather operator on the CPU: its values, its checks, its standing with torch.compile."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from exact import bits, exact_gather
from gather_cases import CASES, Case

from ats_stream.errors import InputError
from ats_stream.kernels import gather_crops, normalisation
from ats_stream.kernels.gather_calls import OUTPUT_TYPES
from ats_stream.kernels.gather_cpu import compiled_path
from ats_stream.kernels.table import PIXEL_TYPES

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_exact_arithmetic(case: Case) -> None:
    expected_NCS = exact_gather(*case.inputs(), case.output)
    for is_compiled in (False, True):
        with compiled_path(is_compiled):
            out_NCS = gather_crops(*case.inputs(), case.output)
        assert out_NCS.dtype == case.output
        assert out_NCS.is_contiguous()
        assert torch.equal(bits(out_NCS), bits(expected_NCS)), is_compiled


@pytest.mark.parametrize("pixels", [torch.uint8, torch.uint16], ids=str)
def test_every_pixel_value(pixels: torch.dtype) -> None:
    count = torch.iinfo(pixels).max + 1
    crops_NCS = torch.arange(count, dtype=torch.int32).to(pixels).view(1, 1, count)
    # the red channel of ImageNet: the sum is exact in float64, so the conversion by numpy alone rounds
    scale_C, shift_C = normalisation([0.485], [0.229], max_value=count - 1)
    expected = np.arange(count) * np.float64(scale_C.item()) + np.float64(shift_C.item())
    got = gather_crops(crops_NCS, scale_C, shift_C)[0, 0]
    assert np.array_equal(got.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("shape", [(3, 1, 400, 400), (9, 2, 150, 150), (150, 2, 30, 30)], ids=str)
def test_more_crops_than_the_cpu_path_converts_at_once(shape: tuple[int, ...]) -> None:
    # chunks of one, two and 72 crops
    crops_NCS = torch.from_numpy(np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8))
    scale_C, shift_C = normalisation([0.5, 0.4][: shape[1]], [0.3, 0.2][: shape[1]])
    expected = exact_gather(crops_NCS, scale_C, shift_C, torch.float32)
    for is_compiled in (False, True):
        with compiled_path(is_compiled):
            assert torch.equal(gather_crops(crops_NCS, scale_C, shift_C), expected)


def test_inputs_stay_as_they_are_and_the_default_is_float32() -> None:
    crops_NCS, scale_C, shift_C = CASES[0].inputs()
    copies = [tensor.clone() for tensor in (crops_NCS, scale_C, shift_C)]
    assert gather_crops(crops_NCS, scale_C, shift_C).dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(copies, (crops_NCS, scale_C, shift_C), strict=True))


# ---- torch's own checks of an operator ----


@pytest.mark.parametrize("output", OUTPUT_TYPES, ids=str)
@pytest.mark.parametrize("pixels", PIXEL_TYPES, ids=str)
def test_opcheck(pixels: torch.dtype, output: torch.dtype) -> None:
    crops_NCS, scale_C, shift_C = Case(pixels=pixels, output=output, shape=(2, 3, 5, 6), start=0).inputs()
    results = torch.library.opcheck(
        torch.ops.ats_stream.gather_crops.default, (crops_NCS, scale_C, shift_C, output)
    )
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_into_one_graph_for_any_number_of_crops() -> None:
    compiled = torch.compile(
        lambda *args: gather_crops(*args) * 2, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for num_crops in (2, 3, 5):
        inputs = Case(pixels=torch.uint8, output=torch.float32, shape=(num_crops, 3, 8, 8), start=0).inputs()
        assert torch.equal(compiled(*inputs), gather_crops(*inputs) * 2)


def test_meta_tensors_give_the_shape_alone() -> None:
    crops_NCS = torch.empty(4, 3, 6, 5, dtype=torch.uint8, device="meta")
    constant = torch.empty(3, device="meta")
    out_NCS = gather_crops(crops_NCS, constant, constant, torch.bfloat16)
    assert (out_NCS.shape, out_NCS.dtype, out_NCS.device.type) == (crops_NCS.shape, torch.bfloat16, "meta")


# ---- what is refused ----

CROPS = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
SCALE = torch.ones(3)

BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "crops-list": (([[1]], SCALE, SCALE), "crops_NCS is a list, expected a torch.Tensor"),
    "crops-numpy": ((CROPS.numpy(), SCALE, SCALE), "crops_NCS is a ndarray, expected a torch.Tensor"),
    "scale-float": ((CROPS, 1.0, SCALE), "scale_C is a float"),
    "shift-none": ((CROPS, SCALE, None), "shift_C is a NoneType"),
    "crops-float64": (
        (CROPS.double(), SCALE, SCALE),
        "crops_NCS is torch.float64, expected one of torch.uint8, torch.uint16, torch.float32",
    ),
    "crops-trained": (
        (CROPS.float().requires_grad_(), SCALE, SCALE),
        "crops_NCS requires a gradient: the operator has none",
    ),
    "crops-int16": ((CROPS.short(), SCALE, SCALE), "crops_NCS is torch.int16"),
    "crops-bool": ((CROPS.bool(), SCALE, SCALE), "crops_NCS is torch.bool"),
    "scale-float64": ((CROPS, SCALE.double(), SCALE), "scale_C is torch.float64, expected torch.float32"),
    "shift-int": ((CROPS, SCALE, SCALE.int()), "shift_C is torch.int32, expected torch.float32"),
    "output-float64": (
        (CROPS, SCALE, SCALE, torch.float64),
        "dtype is torch.float64, expected one of torch.float32",
    ),
    "output-uint8": ((CROPS, SCALE, SCALE, torch.uint8), "dtype is torch.uint8"),
    "output-string": ((CROPS, SCALE, SCALE, "float32"), "dtype is 'float32'"),
    "no-space-axis": (
        (CROPS[:, :, 0, 0].contiguous(), SCALE, SCALE),
        r"shape \(2, 3\), expected \(N, C, \*patch\)",
    ),
    "four-space-axes": (
        (torch.zeros(1, 3, 2, 2, 2, 2, dtype=torch.uint8), SCALE, SCALE),
        r"shape \(1, 3, 2, 2, 2, 2\)",
    ),
    "no-crops": ((CROPS[:0], SCALE, SCALE), r"shape \(0, 3, 4, 4\), expected every size to be at least 1"),
    "no-channels": ((CROPS[:, :0], SCALE[:0], SCALE[:0]), r"shape \(2, 0, 4, 4\), expected every size"),
    "no-rows": ((CROPS[:, :, :0], SCALE, SCALE), r"shape \(2, 3, 0, 4\), expected every size"),
    "scale-short": ((CROPS, SCALE[:2], SCALE), r"scale_C has shape \(2,\), expected \(3,\)"),
    "shift-long": ((CROPS, SCALE, torch.ones(4)), r"shift_C has shape \(4,\), expected \(3,\)"),
    "scale-matrix": ((CROPS, torch.ones(3, 1), SCALE), r"scale_C has shape \(3, 1\), expected \(3,\)"),
    "scale-scalar": ((CROPS, torch.tensor(1.0), SCALE), r"scale_C has shape \(\), expected \(3,\)"),
    "channels-last": ((CROPS.to(memory_format=torch.channels_last), SCALE, SCALE), "crops_NCS has strides"),
    "cropped-view": (
        (CROPS[..., :3], SCALE, SCALE),
        r"crops_NCS has strides \(48, 16, 4, 1\), expected a contiguous",
    ),
    "permuted-view": ((CROPS.permute(0, 1, 3, 2), SCALE, SCALE), "crops_NCS has strides"),
    "scale-strided": ((CROPS, torch.ones(6)[::2], SCALE), r"scale_C has strides \(2,\)"),
    "shift-expanded": ((CROPS, SCALE, torch.ones(1).expand(3)), r"shift_C has strides \(0,\)"),
    "crops-sparse": (
        (CROPS.to_sparse(), SCALE, SCALE),
        "crops_NCS has layout torch.sparse_coo, expected torch.strided",
    ),
    "scale-elsewhere": (
        (CROPS, SCALE.to("meta"), SCALE),
        "scale_C is on meta, expected cpu, where crops_NCS is",
    ),
    "crops-elsewhere": (
        (CROPS.to("meta"), SCALE, SCALE),
        "scale_C is on cpu, expected meta, where crops_NCS is",
    ),
    "scale-trained": (
        (CROPS, torch.ones(3, requires_grad=True), SCALE),
        "requires a gradient, expected constants",
    ),
    "too-many-planes": (
        (
            torch.empty(2**30, 2, 1, dtype=torch.uint8, device="meta"),
            SCALE[:2].to("meta"),
            SCALE[:2].to("meta"),
        ),
        "1073741824 x 2 planes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name: str) -> None:
    args, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        gather_crops(*args)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    "name", ["crops-float64", "no-crops", "scale-short", "cropped-view", "scale-strided"]
)
def test_the_operator_itself_checks_too(name: str) -> None:
    args, message = BAD[name]
    with pytest.raises(InputError, match=message):
        torch.ops.ats_stream.gather_crops(*args, torch.float32)


def test_a_constant_that_wants_a_gradient_is_fine_where_none_is_recorded() -> None:
    scale_C = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(gather_crops(CROPS, scale_C, SCALE), torch.ones(2, 3, 4, 4))


# ---- normalisation ----


def test_normalisation_is_that_of_scaled_pixels() -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    scale_C, shift_C = normalisation(mean, std)
    assert scale_C.tolist() == [float(np.float32(1 / (255 * s))) for s in std]
    assert shift_C.tolist() == [float(np.float32(-m / s)) for m, s in zip(mean, std, strict=True)]
    pixels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 256).contiguous()
    expected = (pixels.double() / 255 - torch.tensor(mean).view(3, 1)) / torch.tensor(std).view(3, 1)
    torch.testing.assert_close(gather_crops(pixels, scale_C, shift_C).double(), expected, rtol=0, atol=1e-6)


def test_normalisation_takes_tensors_and_other_ranges() -> None:
    scale_C, shift_C = normalisation(torch.zeros(2, dtype=torch.float64), torch.ones(2), max_value=4095)
    assert scale_C.tolist() == [float(np.float32(1 / 4095))] * 2
    assert shift_C.tolist() == [0.0, 0.0]
    assert not shift_C.signbit().any()
    assert (scale_C.dtype, scale_C.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: normalisation([0.5, 0.5], [1.0]), "mean_C has 2 channels and std_C 1"),
        (lambda: normalisation([0.5], [0.0]), "positive standard deviation"),
        (lambda: normalisation([0.5], [-1.0]), "positive standard deviation"),
        (lambda: normalisation([0.5], [float("nan")]), "positive standard deviation"),
        (lambda: normalisation([float("nan")], [1.0]), "do not fit float32"),
        (lambda: normalisation([float("inf")], [1.0]), "do not fit float32"),
        (lambda: normalisation([0.5], [float("inf")]), "do not fit float32"),
        (lambda: normalisation([0.5], [1e-44]), "do not fit float32"),
        (lambda: normalisation([0.5], [1e300]), "do not fit float32"),
        (lambda: normalisation([0.5], [1.0], max_value=0), "max_value=0 is not positive"),
        (lambda: normalisation([0.5], [1.0], max_value=float("nan")), "max_value=nan is not positive"),
        (lambda: normalisation([], []), r"mean_C has shape \(0,\), expected \(C,\)"),
        (lambda: normalisation([[0.5]], [[1.0]]), r"mean_C has shape \(1, 1\), expected \(C,\)"),
        (lambda: normalisation(0.5, 1.0), r"mean_C has shape \(\), expected \(C,\)"),  # type: ignore[arg-type]  # the test
        (lambda: normalisation("0.5", [1.0]), "mean_C must be numbers, one per channel"),  # type: ignore[arg-type]  # the test
        (lambda: normalisation([0.5], ["a"]), "std_C must be numbers, one per channel"),  # type: ignore[list-item]  # the test
    ],
)
def test_bad_normalisation_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_the_import_loads_torch_and_numpy_alone() -> None:
    code = (
        "import sys, ats_stream.kernels\n"
        "heavy = {'cupy', 'numba', 'ray', 'zarr', 'dask', 'scipy'} & set(sys.modules)\n"
        "parts = {name.split('.')[1] for name in sys.modules if name.startswith('ats_stream.')}\n"
        "print(sorted(heavy), sorted(parts))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['compiled', 'errors', 'kernels']"

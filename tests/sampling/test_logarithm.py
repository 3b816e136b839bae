import math
from decimal import Decimal, localcontext

import torch

from ats_stream.sampling.logarithm import log, minus_log1m


def relative_error(value: float, exact: Decimal) -> float:
    return abs(float((Decimal(value) - exact) / exact)) if exact else abs(value)


def samples() -> list[float]:
    generator = torch.Generator().manual_seed(0)
    exponent = -16 * torch.rand(300, generator=generator, dtype=torch.float64)
    spread = torch.rand(300, generator=generator, dtype=torch.float64) * 10**exponent
    return [*spread.tolist(), 2.0**-54, 0.25, math.nextafter(0.25, 0), 0.5, math.sqrt(0.5), 1 - 2.0**-53]


def test_log_is_good_to_the_last_places():
    values = [*samples(), *(1 / x for x in samples()), math.nextafter(1, 0), math.nextafter(1, 2)]
    results = log(torch.tensor(values, dtype=torch.float64)).tolist()
    with localcontext() as context:
        context.prec = 50
        assert max(relative_error(r, Decimal(v).ln()) for r, v in zip(results, values, strict=True)) < 5e-16


def test_exponential_of_a_uniform_is_good_to_the_last_places():
    values = samples()
    results = minus_log1m(torch.tensor(values, dtype=torch.float64)).tolist()
    with localcontext() as context:
        context.prec = 50
        exact = [-(1 - Decimal(v)).ln() for v in values]
    assert max(relative_error(r, e) for r, e in zip(results, exact, strict=True)) < 6e-16

import decimal
import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch

from ats_stream.sampling.logarithm import exp, exp_parts
from ats_stream.sampling.mass import Mass

NEVER = float("-inf")
LOGITS = {
    "narrow": (0.0, 1.0),
    "wide": (-40.0, 30.0),
    "very wide": (1e3, 500.0),
    "tiny": (-1e6, 1e-3),
    "at the lower end": (-(2.0**30), 60.0),
    "at the upper end": (2.0**30, 60.0),
    "beyond": (0.0, 1e30),
}


def values(name: str, *shape: int) -> torch.Tensor:
    middle, spread = LOGITS[name]
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return middle + spread * noise


def same(one: Mass, other: Mass) -> bool:
    bits = [mass.log().view(torch.int64) for mass in (one, other)]
    levels = torch.equal(one.levels, other.levels)
    return levels and torch.equal(one.peak, other.peak) and torch.equal(*bits)


@pytest.mark.parametrize("name", LOGITS)
def test_neither_order_nor_pieces_show(name):
    logits_BP = values(name, 3, 5000)
    logits_BP[1, ::3] = NEVER
    whole = Mass.of(logits_BP)
    for seed in range(4):
        order = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))
        pieces = [Mass.of(logits_BP[:, part]) for part in order.split([1, 2, 300, 4000, 697])]
        for direction in (1, -1):
            total = Mass.of(torch.full((3, 1), NEVER, dtype=torch.float64))
            for piece in pieces[::direction]:
                total = total.plus(piece)
            assert same(total, whole)
    rising_BP = logits_BP.sort(dim=1).values
    total = Mass.of(rising_BP[:, :1])
    for place in range(1, 400):
        total = total.plus(Mass.of(rising_BP[:, place : place + 1]))
    assert same(total, Mass.of(rising_BP[:, :400]))


@pytest.mark.parametrize("unit", [-3, -1, 0, 2])
def test_weights_next_to_their_unit_sink_as_if_they_had_been_summed_later(unit):
    # 19 is at the upper end of its unit: three units up, nothing or something would be left of each
    below_BP = torch.full((1, 100_000), 19.0 + 28 * unit * math.log(2), dtype=torch.float64)
    for steps in (1, 2, 3, 4):
        peak_B1 = below_BP[:, :1] + (28 * steps + 0.5) * math.log(2)
        together = Mass.of(torch.cat([below_BP, peak_B1], dim=1))
        assert same(Mass.of(below_BP).plus(Mass.of(peak_B1)), together)


@pytest.mark.parametrize("name", [name for name in LOGITS if name not in ("beyond", "at the upper end")])
def test_it_is_the_sum(name):
    logits_BP = values(name, 4, 3000)
    log_B = Mass.of(logits_BP).log()
    assert torch.allclose(log_B, logits_BP.logsumexp(dim=1), rtol=4e-16, atol=4e-15)


def test_it_is_better_than_adding_floats():
    # one large weight and many small ones, which floats lose one by one
    small = math.log(2.0**-54)
    logits_1P = torch.cat([torch.zeros(1, 1), torch.full((1, 1 << 16), small)], dim=1).double()
    exact = math.log1p(float(Fraction(1, 1 << 38)))
    assert float(Mass.of(logits_1P).log()) == pytest.approx(exact, rel=1e-4)


def test_what_equals_the_peak_counts_at_any_size():
    for peak in (3e38, -3e38, 1.7e308, -1.7e308, 0.0):
        logits_1P = torch.tensor([[peak, peak, -1.7976e308, NEVER]], dtype=torch.float64)
        assert float(Mass.of(logits_1P).log()) == pytest.approx(peak + math.log(2))


def test_nothing_weighs_nothing():
    empty = Mass.of(torch.full((1, 3), NEVER, dtype=torch.float64))
    assert empty.log().tolist() == [NEVER]
    one = Mass.of(torch.tensor([[1.25]], dtype=torch.float64))
    assert one.log().tolist() == [1.25]
    assert same(empty.plus(one), one)
    assert same(one.plus(empty), one)


def test_exponentials_of_large_logits_are_as_good():
    with decimal.localcontext(prec=50):
        for value in (1e3, -1e6, 12345678.9, 2.0**30 - 0.3, -(2.0**30) - 40):
            factor, exponent = exp_parts(torch.tensor([value], dtype=torch.float64))
            exact = (Decimal(value) - Decimal(int(exponent)) * Decimal(2).ln()).exp()
            assert abs(Decimal(float(factor)) / exact - 1) < 6e-16


def test_exponential_is_good_to_the_last_places():
    x = torch.linspace(-690, 690, 200_001, dtype=torch.float64)
    assert float((exp(x) / x.exp() - 1).abs().max()) < 6e-16
    assert exp(torch.tensor([0.0, NEVER, -701.0], dtype=torch.float64)).tolist() == [1, 0, 0]

"""The compiled CPU path is held to the torch path: every field of a Draw, bit for bit.

Not compared: draws of "balanced", which know no compiled path.
"""

import hashlib
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ats_stream.kernels import arithmetic, sample_cpu
from ats_stream.kernels.sample_cpu import compiled_path
from ats_stream.sampling import SCHEMES, draw, merge_draws

NEVER = float("-inf")
RACES = [scheme for scheme in SCHEMES if scheme != "balanced"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 2, 5, 1023, 1025, 4099, 20_001]
FIELDS = ("index", "log_prob", "weight", "num_drawn", "log_normaliser", "keys", "threshold")
RACE_FIELDS = ("key", "index", "logit", "log_rest")

pytestmark = pytest.mark.skipif(sample_cpu._numba_code() is None, reason="needs numba")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    whole = {8: torch.int64, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(whole)


def assert_same_bits(one, other) -> None:
    for name in FIELDS:
        assert torch.equal(bits(getattr(one, name)), bits(getattr(other, name))), name
    for name in RACE_FIELDS:
        assert torch.equal(bits(getattr(one.race, name)), bits(getattr(other.race, name))), name


def both(logits_BM, num_samples, **options):
    with compiled_path(True):
        compiled = draw(logits_BM, num_samples, **options)
    with compiled_path(False):
        plain = draw(logits_BM, num_samples, **options)
    assert_same_bits(compiled, plain)
    return compiled


def normal(seed: int, *shape: int, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("num_positions", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", RACES)
def test_every_scheme_dtype_and_size(scheme, dtype, num_positions):
    for num_rows, num_samples in ((1, 1), (3, 10), (2, 64)):
        logits_BM = normal(num_positions, num_rows, num_positions).to(dtype)
        both(logits_BM, num_samples, scheme=scheme, seed=-5, stream_ids=[(1 << 63) - 7] * num_rows)


@pytest.mark.parametrize("scheme", RACES)
def test_more_samples_than_positions_or_all_of_them(scheme):
    for num_positions, num_samples in itertools.product((1, 7, 1500), (7, 1499, 1500, 1501)):
        if scheme != "with_replacement" or num_samples == 7:
            both(normal(1, 2, num_positions), num_samples, scheme=scheme)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.7])
@pytest.mark.parametrize("scheme", RACES)
def test_impossible_positions(scheme, share):
    logits_BM = normal(2, 4, 9001).float()
    logits_BM[torch.rand(4, 9001, generator=torch.Generator().manual_seed(3)) >= share] = NEVER
    logits_BM[:, 4000] = -3.0
    drawn = both(logits_BM, 12, scheme=scheme)
    real_BN = torch.arange(12) < drawn.num_drawn[:, None]
    assert bool((logits_BM.gather(1, drawn.index) > NEVER)[real_BN].all())


@pytest.mark.parametrize("scheme", RACES)
def test_global_index(scheme):
    logits_BM = normal(4, 2, 5003).float()
    shuffled_M = torch.randperm(1 << 20, generator=torch.Generator().manual_seed(0))[:5003]
    # runs, runs that begin inside a group of four, scattered ones, beyond 32 bits, and one per row
    for index in (
        torch.arange(5003) + 4096,
        torch.arange(5003) + 4099,
        torch.arange(5003).flip(0),
        shuffled_M,
        shuffled_M + (1 << 33),
        torch.stack([shuffled_M, shuffled_M.flip(0)]),
        torch.stack([shuffled_M, shuffled_M + 1], dim=1).T,
    ):
        both(logits_BM, 9, scheme=scheme, global_index=index)


EXTREME = {
    "equal": torch.zeros(2, 3000),
    "subnormal": normal(5, 2, 3000, spread=1e-310),
    "subnormal float32": normal(5, 2, 3000, spread=1e-41).float(),
    "subnormal float16": normal(5, 2, 3000, spread=1e-6).half(),
    "signed zeros": torch.tensor([0.0, -0.0]).repeat(2, 1500),
    "wide": normal(6, 2, 3000, spread=1e4),
    "wider": normal(6, 2, 3000, spread=1e7),
    "around 2^30": normal(6, 2, 3000, spread=50.0) - 2.0**30,
    "around 2^30 + 120": normal(6, 2, 3000, spread=50.0) - 2.0**30 + 120,
    "around -2^30": normal(6, 2, 3000, spread=50.0) + 2.0**30,
    "far apart": normal(6, 2, 3000, spread=1e30),
    "the ends of float64": normal(6, 2, 3000).sign() * 1.7e308,
    "the ends of float32": normal(6, 2, 3000).sign().float() * 3.4e38,
    "the ends of float16": (normal(6, 2, 3000).half() * 1e4).clamp(-65504, 65504),
    "a finite mask": torch.where(normal(6, 2, 3000) > 7, 1.0, torch.finfo(torch.float32).min),
    "rising": torch.linspace(-3e4, 3e4, 3000).expand(2, -1),
    "falling": torch.linspace(3e4, -3e4, 3000).expand(2, -1),
    "one winner": torch.cat([torch.zeros(2, 2999), torch.full((2, 1), 500.0)], dim=1),
}


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("scheme", RACES)
def test_extreme_logits(scheme, name):
    for num_samples in (1, 20):
        drawn = both(EXTREME[name], num_samples, scheme=scheme)
        assert not bool(drawn.log_normaliser.isnan().any())
        assert bool((drawn.log_prob <= 1e-6).all())


@pytest.mark.parametrize("scheme", RACES)
def test_layouts(scheme):
    whole = normal(7, 6, 7000).float()
    for logits_BM in (
        whole[::2, 100:6500],
        whole[:, ::3],
        whole[:1].expand(4, -1),
        whole[:, :2000].T[:6],
        whole[1:, 1:],
    ):
        both(logits_BM, 5, scheme=scheme)


def test_threads_do_not_show(monkeypatch):
    monkeypatch.setattr(sample_cpu, "_MIN_VALUES_PER_TASK", 1)
    for num_rows in (1, 2, 3, 9):
        logits_BM = normal(8, num_rows, 40_001).float()
        index_M = torch.randperm(40_001, generator=torch.Generator().manual_seed(1))
        for index in (None, index_M):
            one = both(logits_BM, 17, global_index=index)
            for num_threads in (2, 3, 5):
                monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
                assert_same_bits(both(logits_BM, 17, global_index=index), one)
            monkeypatch.undo()
            monkeypatch.setattr(sample_cpu, "_MIN_VALUES_PER_TASK", 1)


def test_callers_on_several_threads_do_not_meet():
    logits = [normal(seed, 2, 50_000).float() for seed in range(4)]
    alone = [draw(one, 16) for one in logits]
    together: list = [None] * 4

    def work(place: int) -> None:
        for _ in range(5):
            together[place] = draw(logits[place], 16)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("scheme", RACES)
def test_tiles_merge_bit_for_bit_whoever_drew_them(scheme):
    logits_BM = normal(9, 3, 30_000).float()
    logits_BM[0, 3000:9000] = NEVER
    whole = both(logits_BM, 10, scheme=scheme)
    tiles = []
    order = torch.randperm(30_000, generator=torch.Generator().manual_seed(1))
    for number, part in enumerate(order.split([200, 30, 770, 9000, 20_000])):
        with compiled_path(number % 2 == 0):
            tiles.append(draw(logits_BM[:, part], 10, scheme=scheme, global_index=part))
    assert_same_bits(merge_draws(tiles, 10), whole)


def test_a_row_has_the_same_bits_in_any_batch():
    logits_BM = normal(9, 40, 3000).float()
    logits_BM[5, 100:] = NEVER  # packed alone, but not in company
    together = both(logits_BM, 10)
    for row in (0, 5, 39):
        alone = both(logits_BM[row : row + 1], 10, stream_ids=[row])
        for name in FIELDS:
            assert torch.equal(bits(getattr(together, name))[row : row + 1], bits(getattr(alone, name))), name


def test_compiled_code_is_not_kept_when_its_constants_change():
    content = Path(arithmetic.__file__).read_bytes()
    assert hashlib.sha256(content).hexdigest()[:16] == sample_cpu._numba_code().ARITHMETIC


def test_small_inputs_do_not_load_numba_and_its_absence_is_no_error():
    program = """
import sys, torch
from ats_stream.sampling import draw
draw(torch.zeros(2, 100), 5)
assert "numba" not in sys.modules
sys.modules["numba"] = None  # any import of it fails from here on
print(draw(torch.zeros(1, 100_000), 5).index.tolist())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(draw(torch.zeros(1, 100_000), 5).index.tolist())


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    program = """
import torch
from ats_stream.kernels.sample_cpu import is_compiled
from ats_stream.sampling import draw
assert is_compiled(torch.zeros(1, 100_000))
print(draw(torch.zeros(1, 100_000), 5).index.tolist())
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NUMBA_CACHE_DIR": str(blocked / "folder")},
    )
    assert result.stdout.strip() == str(draw(torch.zeros(1, 100_000), 5).index.tolist())

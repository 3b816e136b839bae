import torch

from ats_stream.kernels.arithmetic import PADDING_INDEX
from ats_stream.sampling import race as race_module
from ats_stream.sampling.logarithm import log
from ats_stream.sampling.philox import Noise
from ats_stream.sampling.race import exponentials, run_race


def plain_race(logits_BM: torch.Tensor, num_kept: int, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, with all 53 bits at every position."""
    index_M = torch.arange(logits_BM.shape[1])
    key_BM = log(exponentials(index_M[None], noise)) - logits_BM.double()
    key_BM = torch.where(logits_BM == float("-inf"), float("inf"), key_BM)
    sorted_BM = key_BM.sort(dim=1, stable=True)
    return sorted_BM.values[:, :num_kept], sorted_BM.indices[:, :num_kept]


def assert_is_plain_race(logits_BM, num_kept, noise):
    race = run_race(logits_BM, num_kept, noise)
    key_BK, index_BK = plain_race(logits_BM, num_kept, noise)
    assert torch.equal(race.key, key_BK)
    assert torch.equal(race.index, index_BK)
    kept_BK = logits_BM.double().gather(1, index_BK)
    assert torch.equal(race.logit, kept_BK)
    rest_B = logits_BM.double().scatter(1, index_BK, float("-inf")).logsumexp(dim=1)
    assert torch.allclose(race.log_rest, rest_B, atol=1e-12)


def test_fast_path_is_the_definition_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    noise = Noise(seed=1, stream_ids=torch.tensor([4, 9, 2]))
    for spread in (0.0, 1.0, 5.0, 50.0, 1e4):
        logits_BM = spread * torch.randn(3, 20_000, generator=generator)
        logits_BM[1, torch.rand(20_000, generator=generator) < 0.3] = float("-inf")
        assert_is_plain_race(logits_BM, 13, noise)


def test_blocks_do_not_show(monkeypatch):
    logits_BM = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    noise = Noise(seed=1, stream_ids=torch.tensor([4, 9]))
    monkeypatch.setattr(race_module, "_BLOCK_VALUES", 1)
    assert_is_plain_race(logits_BM, 13, noise)


def test_doubtful_candidates_fall_back_to_all_positions(monkeypatch):
    # without spare candidates the bound never lies above the last key kept
    logits_BM = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    noise = Noise(seed=1, stream_ids=torch.tensor([4, 9]))
    monkeypatch.setattr(race_module, "_SPARE_CANDIDATES", 0)
    assert (
        race_module._run_candidates(logits_BM.double(), torch.arange(5000).expand(2, -1), 0, 13, noise)
        is None
    )
    assert_is_plain_race(logits_BM, 13, noise)


def test_equal_keys_go_to_the_lower_index(monkeypatch):
    monkeypatch.setattr(race_module, "exponentials", lambda index, noise: torch.ones(index.shape).double())
    noise = Noise(seed=0, stream_ids=torch.tensor([0]))
    race = run_race(torch.zeros(1, 40), 5, noise, global_index=torch.arange(40).flip(0))
    assert race.index.tolist() == [[0, 1, 2, 3, 4]]


def test_short_rows_are_padded():
    noise = Noise(seed=0, stream_ids=torch.tensor([0, 1]))
    logits_BM = torch.full((2, 900), float("-inf"))
    logits_BM[0, 5] = 0
    logits_BM[1, [6, 800]] = torch.tensor([1.0, 2.0])
    race = run_race(logits_BM, 3, noise)
    assert race.index[0].tolist() == [5, PADDING_INDEX, PADDING_INDEX]
    assert sorted(race.index[1].tolist()) == [6, 800, PADDING_INDEX]
    assert race.key[:, 2].tolist() == [float("inf")] * 2
    assert race.log_rest.tolist() == [float("-inf")] * 2

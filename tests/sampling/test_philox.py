import pytest
import torch

from ats_stream.sampling.philox import Noise, philox4x32, unit_from_words

# Known answers of the Random123 distribution (kat_vectors): counter, key, result
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_position_takes_its_lane_of_the_counter_of_four():
    noise = Noise(seed=(7 << 32) | 5, stream_ids=torch.tensor([(3 << 32) | 2]))
    for index in (0, 1, 6, 11):
        counter = tuple(torch.tensor(word) for word in (index // 4, 2, 3, 9))
        expected = philox4x32(counter, (5, 7))[index % 4]
        assert int(noise.words(torch.tensor([index]), 9)) == int(expected)


def test_runs_and_single_positions_agree():
    noise = Noise(seed=-1, stream_ids=torch.tensor([3, -(1 << 40)]))
    for start, stop in ((0, 1), (3, 18), (1 << 33, (1 << 33) + 7)):
        run_BP = noise.range_words(start, stop, 4)
        assert torch.equal(run_BP, noise.words(torch.arange(start, stop), 4))
        assert run_BP.shape == (2, stop - start)


def test_words_broadcast_over_purposes():
    noise = Noise(seed=1, stream_ids=torch.tensor([5, 6]))
    index_BP = torch.tensor([[1, 2, 3], [40, 50, 60]])
    together_BPQ = noise.words(index_BP[:, :, None], torch.arange(4))
    for purpose in range(4):
        assert torch.equal(together_BPQ[..., purpose], noise.words(index_BP, purpose))


def test_every_ingredient_changes_the_words():
    def words(seed=0, stream=0, index=0, purpose=0):
        return int(Noise(seed=seed, stream_ids=torch.tensor([stream])).words(torch.tensor([index]), purpose))

    variants = [{}, {"seed": 1}, {"seed": 1 << 32}, {"stream": 1}, {"stream": 1 << 32}, {"index": 1}]
    variants += [{"index": 4}, {"purpose": 1}]
    assert len({words(**variant) for variant in variants}) == len(variants)


def test_unit_interval_is_open_at_both_ends():
    ends = torch.tensor([0, 0xFFFFFFFF])
    u = unit_from_words(ends, ends)
    assert u[0] == 2.0**-54
    assert u[1] == 1 - 2.0**-53


def test_unit_values_are_uniform():
    noise = Noise(seed=11, stream_ids=torch.tensor([0]))
    u = unit_from_words(noise.range_words(0, 1 << 16, 0), noise.range_words(0, 1 << 16, 1)).flatten()
    counts = torch.histc(u.float(), bins=64, min=0, max=1)
    expected = u.numel() / 64
    assert (
        float(((counts - expected) ** 2 / expected).sum()) < 130
    )  # 63 degrees of freedom: mean 63, p = 1e-6

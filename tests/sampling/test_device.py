import pytest
import torch

from ats_stream.sampling import SCHEMES, draw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_logits_give_the_same_draw_on_any_device(scheme):
    logits_BM = 3 * torch.randn(4, 128 * 96, generator=torch.Generator().manual_seed(0))
    logits_BM[1, 500:] = float("-inf")
    on_cpu = draw(logits_BM, 16, scheme=scheme, seed=7, map_shape=(128, 96))
    on_cuda = draw(logits_BM.cuda(), 16, scheme=scheme, seed=7, map_shape=(128, 96))
    assert torch.equal(on_cpu.index, on_cuda.index.cpu())
    assert torch.allclose(on_cpu.weight, on_cuda.weight.cpu(), rtol=1e-6)
    if on_cpu.keys is not None:
        assert torch.equal(on_cpu.keys, on_cuda.keys.cpu())

"""What a draw needs beside the logits, measured as the growth of a process's largest resident size."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from ats_stream.kernels.sample_cpu import compiled_path
from ats_stream.sampling import draw
scheme, path, dtype, share = sys.argv[1:]
dtype, share, side = getattr(torch, dtype), float(share), 3000
logits = torch.empty(1, side * side, dtype=dtype)
generator = torch.Generator().manual_seed(0)
for part in logits.split(1 << 18, dim=1):
    part.normal_(generator=generator)
    part.masked_fill_(torch.rand(part.shape, generator=generator) >= share, float("-inf"))
with compiled_path(path == "compiled"):
    draw(logits[:, : 300 * side], 64, scheme=scheme, map_shape=(300, side))  # loads and compiles
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    draw(logits, 64, scheme=scheme, map_shape=(side, side))
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown_bytes / (logits.numel() * logits.element_size()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
@pytest.mark.parametrize(
    ("scheme", "path", "dtype", "share"),
    [
        ("murthy", "compiled", "float32", 1.0),
        ("murthy", "torch", "float32", 1.0),
        ("murthy", "torch", "bfloat16", 0.2),
        ("top", "torch", "float32", 0.2),
        ("balanced", "compiled", "float32", 1.0),
        ("balanced", "torch", "float32", 0.2),
    ],
)
def test_no_more_than_two_copies_of_the_logits(scheme, path, dtype, share):
    arguments = [sys.executable, "-c", PROGRAM, scheme, path, dtype, str(share)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert 0 <= float(result.stdout) < 2

"""Raw CUDA kernels behind torch operators, each with a CPU path that gives the same bits.

A kernel is a pair: ``name.py`` (checks, the operator, the CPU path, the launch plan) and ``name.cu`` (the
source, compiled by CuPy on the first CUDA tensor). CPU paths that torch is too slow for are compiled by
numba. This package needs numpy and torch; CuPy is imported only when a CUDA tensor arrives, numba only when
a CPU tensor is worth it.
"""

from ats_stream.kernels.gather import gather_crops, gather_patches
from ats_stream.kernels.normalise import normalisation
from ats_stream.kernels.table import ChunkTable

__all__ = ["ChunkTable", "gather_crops", "gather_patches", "normalisation"]

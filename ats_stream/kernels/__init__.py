"""Raw CUDA kernels behind torch operators, each with a CPU path that gives the same bits.

A kernel is a pair: ``name.py`` (checks, the operator, the CPU path, the launch plan) and ``name.cu`` (the
source, compiled by CuPy on the first CUDA tensor). This package needs numpy and torch; CuPy is imported
only when a CUDA tensor arrives.
"""

from ats_stream.kernels.gather import gather_crops, normalisation

__all__ = ["gather_crops", "normalisation"]

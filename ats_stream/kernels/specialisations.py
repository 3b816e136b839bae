"""Every instance of a kernel template that can be launched, as data: what is compiled is what is tested."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Specialisation:
    """One kernel, or one instance of a kernel template."""

    expression: str
    """As C++ spells it: ``gather_crops<unsigned char, float>``."""
    max_registers: int
    """Registers per thread that the compiler may take on any architecture, one of :data:`REGISTER_STEPS`; it
    may never spill."""
    has_wide_stores: bool
    """Whether its fast path stores 16 bytes at once."""


REGISTER_STEPS = (32, 40, 48, 56, 64, 72, 80, 96, 128, 168, 255)
"""Where the number of warps that fit on a multiprocessor (of 64Ki registers) changes."""

GATHER = tuple(
    Specialisation(
        expression=f"gather_crops<{pixels}, {output}>", max_registers=registers, has_wide_stores=True
    )
    for pixels, output, registers in (
        ("unsigned char", "float", 32),
        ("unsigned char", "bfloat16", 32),
        ("unsigned char", "float16", 32),
        ("unsigned short", "float", 32),
        ("unsigned short", "bfloat16", 32),
        ("unsigned short", "float16", 40),
    )
)

BY_SOURCE: dict[str, tuple[Specialisation, ...]] = {"gather.cu": GATHER}
"""File name of a kernel source -> all that may be launched from it."""

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten, that every specialisation is compiled for in the tests."""

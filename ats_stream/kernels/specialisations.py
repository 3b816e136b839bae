"""Every instance of a kernel template that can be launched, as data: what is compiled is what is tested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


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

_PIXELS = ("unsigned char", "unsigned short", "float")
_OUTPUTS = ("float", "bfloat16", "float16")


def _gather() -> Iterator[Specialisation]:
    for pixels in _PIXELS:
        for output in _OUTPUTS:
            types = f"{pixels}, {output}"
            yield Specialisation(expression=f"gather_crops<{types}>", max_registers=40, has_wide_stores=True)
            kinds = {"false, PLANAR": 64, "false, LAST": 64}
            if pixels == "unsigned char":  # three channels, known to the compiler
                kinds |= {"false, LAST_OF_3": 80, "true, PLANAR": 80, "true, LAST_OF_3": 80}
            for kind, registers in kinds.items():
                yield Specialisation(
                    expression=f"gather_patches<{types}, {kind}>",
                    max_registers=registers,
                    has_wide_stores=True,
                )


GATHER = tuple(_gather())

SAMPLE = (
    *(
        Specialisation(expression=f"sample_race<{logits}>", max_registers=registers, has_wide_stores=False)
        for logits, registers in (("double", 128), ("float", 80), ("float16", 80), ("bfloat16", 80))
    ),
    Specialisation(expression="sample_merge", max_registers=72, has_wide_stores=False),
)

BY_SOURCE: dict[str, tuple[Specialisation, ...]] = {"gather.cu": GATHER, "sample.cu": SAMPLE}
"""File name of a kernel source -> all that may be launched from it."""

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten, that every specialisation is compiled for in the tests."""

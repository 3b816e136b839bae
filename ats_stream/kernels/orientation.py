"""How the pixels of a patch are moved as they are read: a flip of any axes after an exchange of any axes.

One number from 0 to 47 names a move, 0 none at all. With axes z, y, x of a patch (of two dimensions y, x, of
one x)::

    code = 8 * permutation + 4 * (z is flipped) + 2 * (y is flipped) + (x is flipped)
    out[o] = image[begin + s],   s[source(a)] = size_a - 1 - o_a if a is flipped else o_a,   for each axis a

``permutation`` counts the sources of z, y, x in the order of :data:`SOURCES`; gather.cu reads the same.

>>> flip(-1), flip(-2, -1), transpose(-2, -1), [quarter_turn(k) for k in range(4)]
(1, 3, 8, [0, 10, 3, 9])
"""

from __future__ import annotations

from ats_stream.errors import InputError

SOURCES = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
"""Axis of the image, 0 for z, that each of z, y, x of the patch runs along."""
NUM_CODES = 8 * len(SOURCES)
NUM_AXES = 3


def flip(*axes: int) -> int:
    """Mirror the axes, counted from the end: -1 is x."""
    code = 0
    for axis in {_from_end(axis) for axis in axes}:
        code |= 1 << (-1 - axis)
    return code


def transpose(first: int, second: int) -> int:
    """Exchange two axes, counted from the end."""
    order = [0, 1, 2]
    a, b = NUM_AXES + _from_end(first), NUM_AXES + _from_end(second)
    order[a], order[b] = order[b], order[a]
    return 8 * SOURCES.index((order[0], order[1], order[2]))


def quarter_turn(number: int, axes: tuple[int, int] = (-2, -1)) -> int:
    """Turn as ``torch.rot90(x, number, axes)`` does."""
    first, second = (_from_end(axis) for axis in axes)
    if first == second:
        raise InputError(f"axes {axes} of a turn must be different ones")
    exchange = transpose(first, second)
    return (0, then(exchange, flip(first)), flip(first, second), then(exchange, flip(second)))[number % 4]


def then(first: int, second: int) -> int:
    """The move that makes ``first`` and after it ``second``.

    >>> then(quarter_turn(1), quarter_turn(3)), then(quarter_turn(1), quarter_turn(1)) == quarter_turn(2)
    (0, True)
    """
    sources_1, flips_1 = parts(first)
    sources_2, flips_2 = parts(second)
    sources = tuple(sources_1[axis] for axis in sources_2)
    flips = [flipped != flips_1[axis] for axis, flipped in zip(sources_2, flips_2, strict=True)]
    permutation = SOURCES.index((sources[0], sources[1], sources[2]))
    return 8 * permutation + sum(4 >> axis for axis in range(NUM_AXES) if flips[axis])


def parts(code: int) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """For each of z, y, x of the patch: the axis of the image that it runs along, and whether backwards."""
    if not 0 <= code < NUM_CODES:
        raise InputError(f"an orientation is a number from 0 to {NUM_CODES - 1}, got {code}")
    return SOURCES[code // 8], (bool(code & 4), bool(code & 2), bool(code & 1))


def source_size(code: int, size: tuple[int, ...]) -> tuple[int, ...]:
    """Pixels of the image, per axis, that a patch of ``size`` moved by ``code`` shows.

    >>> source_size(quarter_turn(1), (2, 3)), source_size(flip(-1), (2, 3))
    ((3, 2), (2, 3))
    """
    missing = NUM_AXES - len(size)
    sources, flips = parts(code)
    if sources[:missing] != tuple(range(missing)) or any(flips[:missing]):
        raise InputError(f"orientation {code} moves an axis that a patch of {len(size)} axes does not have")
    there = [0] * NUM_AXES
    for axis in range(missing, NUM_AXES):
        there[sources[axis]] = size[axis - missing]
    return tuple(there[missing:])


def _from_end(axis: int) -> int:
    if not -NUM_AXES <= axis <= -1:
        raise InputError(f"axes are counted from the end, -1 to -{NUM_AXES}, got {axis}")
    return axis

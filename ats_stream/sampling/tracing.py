"""Reading the geometry of an attention network off one forward pass.

Every convolution, pooling, padding or resizing call that the pass makes moves the centres of the cells:

    kernel k, stride t, padding p, dilation d:     offset += S (d (k-1) / 2 - p - (t-1) / 2),     S *= t

where S is the stride so far. Any other function keeps places as they are; if it changed the size of the map,
the end result does not fit the arithmetic, and that is an error rather than a wrong answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ats_stream.errors import InputError
from ats_stream.sampling.geometry import Geometry


def geometry_of(network: nn.Module, input_shape: Sequence[int]) -> Geometry:
    """True offset, stride and receptive field of a convolutional attention network for views of one shape.

    ``input_shape`` is (C, *space), 1 to 3 axes of space, as the network sees it without the batch. The
    network runs once, in eval mode, on zeros; it may branch and join, and end in any layers that keep the
    places of the map (softmax, squeezing the channel). A module with a true attribute ``even_grid`` is not
    looked into: its map covers its input evenly, and each cell sees all of it, as in a transformer. Raises
    InputError where branches disagree or the map cannot be followed.

    >>> geometry_of(nn.Sequential(nn.Conv1d(1, 1, 3), nn.MaxPool1d(8)), (1, 83)).offset
    (1.0,)
    """
    shape = tuple(int(size) for size in input_shape)
    if not 2 <= len(shape) <= 4 or min(shape) < 1:
        raise InputError(f"input_shape must be (C, *space) with 1 to 3 axes of space, got {shape}")
    space = shape[1:]
    like = next(iter(network.parameters()), torch.zeros(()))
    view = torch.zeros(1, *shape, dtype=like.dtype, device=like.device)
    tracer = _Tracer(len(space))
    tracer.places[view] = _Place.identity(space)
    modes = {module: module.training for module in network.modules()}
    hooks = []
    for module in modes:
        if getattr(module, "even_grid", False):
            hooks.append(module.register_forward_pre_hook(tracer.look_away))
            hooks.append(module.register_forward_hook(tracer.look_again))
    try:
        network.eval()
        with torch.no_grad(), tracer:
            attention = network(view)
    except RuntimeError as error:
        raise InputError(f"the attention network cannot run on a view of shape {shape}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    place: _Place | None = None
    if isinstance(attention, Tensor) and attention in tracer.places:
        place = tracer.places[attention]
    if place is None:
        raise InputError(f"the output of {type(network).__name__} cannot be traced back to its input")
    map_shape = tuple(attention.shape[-len(space) :])
    if place.size != map_shape or attention.numel() != math.prod(map_shape):
        raise InputError(
            f"the attention map has shape {tuple(attention.shape)}, but its convolutions and poolings give "
            f"(1, *{place.size}); describe such a network by a Geometry"
        )
    return Geometry(
        offset=place.offset,
        stride=place.stride,
        input_shape=space,
        map_shape=map_shape,
        receptive_field=tuple(math.ceil(width) for width in place.receptive_field),
    )


def receptive_field(network: nn.Module, input_shape: Sequence[int]) -> tuple[int, ...]:
    """Pixels that one cell of the network's map sees, per axis; arguments and errors of :func:`geometry_of`.

    >>> receptive_field(nn.Sequential(nn.Conv1d(1, 1, 3), nn.MaxPool1d(8)), (1, 83))
    (10,)
    """
    return geometry_of(network, input_shape).receptive_field


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the cells of one intermediate tensor lie in the input."""

    offset: tuple[float, ...]
    stride: tuple[float, ...]
    receptive_field: tuple[float, ...]
    size: tuple[int, ...]

    @staticmethod
    def identity(size: tuple[int, ...]) -> _Place:
        ones = (1.0,) * len(size)
        return _Place(offset=(0.0,) * len(size), stride=ones, receptive_field=ones, size=size)

    def slide(
        self, *, kernel: _Axes, stride: _Axes, padding: _Axes, dilation: _Axes, size: tuple[int, ...]
    ) -> _Place:
        """Apply a sliding window."""
        axes = range(len(size))
        span = [dilation[i] * (kernel[i] - 1) for i in axes]
        return _Place(
            offset=tuple(
                self.offset[i] + self.stride[i] * (span[i] / 2 - padding[i] - (stride[i] - 1) / 2)
                for i in axes
            ),
            stride=tuple(self.stride[i] * stride[i] for i in axes),
            receptive_field=tuple(self.receptive_field[i] + self.stride[i] * span[i] for i in axes),
            size=size,
        )


_Axes = Sequence[float]
_Rule = Callable[[_Place, dict[str, Any], tuple[int, ...]], _Place]


def _per_axis(value: Any, num_axes: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return tuple(int(one) for one in (values * num_axes if len(values) == 1 else values))


def _convolution(place: _Place, call: dict[str, Any], size: tuple[int, ...]) -> _Place:
    num_axes = len(size)
    kernel = tuple(call["weight"].shape[2:])
    dilation = _per_axis(call.get("dilation", 1), num_axes)
    padding = call.get("padding", 0)
    if padding == "same":  # an odd total puts the larger half behind
        before = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    else:
        before = _per_axis(0 if padding == "valid" else padding, num_axes)
    stride = _per_axis(call.get("stride", 1), num_axes)
    return place.slide(kernel=kernel, stride=stride, padding=before, dilation=dilation, size=size)


def _pooling(place: _Place, call: dict[str, Any], size: tuple[int, ...]) -> _Place:
    num_axes = len(size)
    kernel = _per_axis(call["kernel_size"], num_axes)
    return place.slide(
        kernel=kernel,
        stride=_per_axis(call.get("stride") or kernel, num_axes),  # None and () stand for the kernel
        padding=_per_axis(call.get("padding", 0), num_axes),
        dilation=_per_axis(call.get("dilation", 1), num_axes),
        size=size,
    )


def _adaptive_pooling(place: _Place, call: dict[str, Any], size: tuple[int, ...]) -> _Place:
    del call
    if any(before % after for before, after in zip(place.size, size, strict=True)):
        raise InputError(f"adaptive pooling from {place.size} to {size} has no single stride")
    kernel = tuple(before // after for before, after in zip(place.size, size, strict=True))
    nothing, ones = (0,) * len(size), (1,) * len(size)
    return place.slide(kernel=kernel, stride=kernel, padding=nothing, dilation=ones, size=size)


def _transposed(place: _Place, call: dict[str, Any], size: tuple[int, ...]) -> _Place:
    num_axes = len(size)
    axes = range(num_axes)
    stride = _per_axis(call.get("stride", 1), num_axes)
    padding = _per_axis(call.get("padding", 0), num_axes)
    dilation = _per_axis(call.get("dilation", 1), num_axes)
    span = [d * (k - 1) for d, k in zip(dilation, call["weight"].shape[2:], strict=True)]
    # input cell i writes output cells i t - p ... i t - p + span
    return _Place(
        offset=tuple(
            place.offset[i] + place.stride[i] * (0.5 + (padding[i] - span[i] / 2 - 0.5) / stride[i])
            for i in axes
        ),
        stride=tuple(place.stride[i] / stride[i] for i in axes),
        receptive_field=tuple(
            place.receptive_field[i] + place.stride[i] * (span[i] // stride[i]) for i in axes
        ),
        size=size,
    )


def _padding(place: _Place, call: dict[str, Any], size: tuple[int, ...]) -> _Place:
    num_axes = len(size)
    before = list(call["pad"])[0 : 2 * num_axes : 2][::-1]  # pairs, last axis first
    before = [0] * (num_axes - len(before)) + before
    offset = tuple(place.offset[i] - place.stride[i] * before[i] for i in range(num_axes))
    return replace(place, offset=offset, size=size)


def _resizing(place: _Place, call: dict[str, Any], size: tuple[int, ...]) -> _Place:
    if call.get("align_corners"):
        raise InputError("resizing with align_corners=True cannot be followed; use align_corners=False")
    ratio = [before / after for before, after in zip(place.size, size, strict=True)]
    stride = tuple(step * one for step, one in zip(place.stride, ratio, strict=True))
    # linear weights reach one cell further to each side at most
    reach = 0 if call.get("mode", "nearest").startswith("nearest") else 1
    width = tuple(w + reach * s for w, s in zip(place.receptive_field, place.stride, strict=True))
    return replace(place, stride=stride, receptive_field=width, size=size)


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_MAX_POOLING = ("input", "kernel_size", "stride", "padding", "dilation")
_AVERAGE_POOLING = ("input", "kernel_size", "stride", "padding")
_RULES: dict[str, tuple[_Rule, tuple[str, ...]]] = {
    "conv{}d": (_convolution, _CONVOLUTION),
    "conv_transpose{}d": (_transposed, _TRANSPOSED),
    "max_pool{}d": (_pooling, _MAX_POOLING),
    "max_pool{}d_with_indices": (_pooling, _MAX_POOLING),
    "avg_pool{}d": (_pooling, _AVERAGE_POOLING),
    "adaptive_avg_pool{}d": (_adaptive_pooling, ("input",)),
    "adaptive_max_pool{}d": (_adaptive_pooling, ("input",)),
    "adaptive_max_pool{}d_with_indices": (_adaptive_pooling, ("input",)),
    "pad": (_padding, ("input", "pad")),
    "interpolate": (_resizing, ("input", "size", "scale_factor", "mode", "align_corners")),
}


class _Tracer(TorchFunctionMode):
    """Follows tensors through the calls of one forward pass."""

    def __init__(self, num_axes: int) -> None:
        super().__init__()
        self.places: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._num_axes = num_axes
        self._rules = {name.format(num_axes): rule for name, rule in _RULES.items()}
        self._depth_away = 0

    def look_away(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Follow nothing inside of a module that covers its input evenly."""
        del module, inputs
        self._depth_away += 1

    def look_again(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Place the output of such a module."""
        del module
        self._depth_away -= 1
        if inputs and isinstance(output, Tensor) and inputs[0] in self.places:
            before = self.places[inputs[0]]
            size = tuple(output.shape[-self._num_axes :])
            ratio = [old / new for old, new in zip(before.size, size, strict=True)]
            self.places[output] = replace(
                before,
                stride=tuple(step * one for step, one in zip(before.stride, ratio, strict=True)),
                receptive_field=tuple(
                    width + step * (old - 1)
                    for width, step, old in zip(
                        before.receptive_field, before.stride, before.size, strict=True
                    )
                ),
                size=size,
            )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._depth_away > 0:
            return result
        name = getattr(func, "__name__", "")
        before = self._join(name, [*args, *kwargs.values()])
        if before is None:
            return result
        outputs = [
            one
            for one in (result if isinstance(result, tuple | list) else (result,))
            if isinstance(one, Tensor)
        ]
        if name in self._rules and outputs:
            rule, parameters = self._rules[name]
            call = dict(zip(parameters, args, strict=False)) | kwargs
            before = rule(before, call, tuple(outputs[0].shape[-self._num_axes :]))
        for one in outputs:
            self.places[one] = before
        return result

    def _join(self, name: str, values: Sequence[Any]) -> _Place | None:
        """Place shared by all followed tensors among the arguments; a gate of one cell takes no part."""
        nested = [one for value in values for one in (value if isinstance(value, tuple | list) else (value,))]
        places = [self.places[one] for one in nested if isinstance(one, Tensor) and one in self.places]
        wide = [place for place in places if max(place.size) > 1] or places
        if not wide:
            return None
        for place in wide[1:]:
            same_places = (place.offset, place.stride, place.size) == (
                wide[0].offset,
                wide[0].stride,
                wide[0].size,
            )
            if not same_places:
                raise InputError(
                    f"{name} joins branches whose cells lie in different places: {wide[0]} and {place}"
                )
        widest = tuple(max(widths) for widths in zip(*(place.receptive_field for place in wide), strict=True))
        result: _Place = replace(wide[0], receptive_field=widest)
        return result

"""Reading weights from local files without running any code from them, and loading them by name."""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ats_stream.errors import CheckpointError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PARALLEL = "module."
_COUNTER = "num_batches_tracked"
_NUM_NAMED = 5
_FOLDER = 0x10  # the attribute of DOS


def load_weights(
    module: nn.Module, path: str | os.PathLike[str], *, ignore: Sequence[str] | None = None
) -> None:
    """Load a state dict from a local ``.pt``, ``.pth`` or ``.safetensors`` file by name, all of it.

    A state dict inside of a checkpoint (as ``state_dict``, ``model_state_dict`` or ``model``) is found, and
    the prefix of data-parallel training is dropped. ``ignore`` names the prefixes of weights in the file to
    be left out, such as the head of a classifier; by default those of ``module.ignored_weights``, if any.

    Raises CheckpointError (a ValueError) for a file that is absent, damaged or holds no state dict, and for
    names that are missing or unexpected and sizes or dtypes that differ, all in one message; the module is
    then as before.
    """
    path = Path(path)
    if ignore is None:
        ignore = getattr(module, "ignored_weights", ())
    prefixes = tuple(ignore)
    state = {name: value for name, value in read_weights(path).items() if not name.startswith(prefixes)}
    wanted = module.state_dict()
    problems = [
        # batch norms of old checkpoints have no counter
        _listing("missing", [n for n in wanted if n not in state and not n.endswith(_COUNTER)]),
        _listing("unexpected", [n for n in state if n not in wanted]),
        _listing(
            "of another size or dtype",
            [
                f"{name} ({_kind(state[name])}, expected {_kind(value)})"
                for name, value in wanted.items()
                if name in state and _kind(state[name]) != _kind(value)
            ],
        ),
    ]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        raise CheckpointError(f"{path}: does not fit {type(module).__name__}: {found}")
    module.load_state_dict(state, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict onto the CPU; CheckpointError if the file is absent, damaged or holds none."""
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path, legacy=True)
    for name in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    ):
        raise CheckpointError(f"{path}: holds no state dict, a dict from names to tensors")
    return _without_prefix(content)


def read_torch_file(path: Path, *, legacy: bool) -> Any:
    """Read what ``torch.save`` wrote, onto the CPU, without running any code from it.

    ``legacy`` admits the format before torch 1.6, which has no checksums. Raises CheckpointError if the file
    is absent or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if not legacy or zipfile.is_zipfile(path):
            _check_bytes(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, down to those of zip and pickle
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {_reason(error)}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        load_file = importlib.import_module("safetensors.torch").load_file
    except ImportError as error:
        raise CheckpointError(f"{path}: needs the package safetensors: pip install safetensors") from error
    try:
        content: dict[str, Tensor] = load_file(path)
    except Exception as error:  # its own kinds, OSError, and errors of the header's JSON
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {_reason(error)}") from error
    return content


def _check_bytes(path: Path) -> None:
    """Raise ValueError if a checksum does not hold: torch writes them and never looks at them.

    What is marked as a folder torch would not read at all, and return whatever was in memory.
    """
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
        folders = [one.filename for one in archive.infolist() if one.external_attr & _FOLDER or one.is_dir()]
    if folders:
        raise ValueError(f"{folders[0]} is marked as a folder")
    if broken is not None:
        raise ValueError(f"the checksum of {broken} does not hold")


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefixed = all(name.startswith(_PARALLEL) for name in state)
    return {name.removeprefix(_PARALLEL) if prefixed else name: value for name, value in state.items()}


def _kind(value: Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _listing(what: str, names: Iterable[str]) -> str:
    """Name the first few.

    >>> _listing("missing", ["a", "b"]), _listing("missing", [])
    ('2 missing: a, b', '')
    """
    all_names = list(names)
    more = ", ..." if len(all_names) > _NUM_NAMED else ""
    return f"{len(all_names)} {what}: {', '.join(all_names[:_NUM_NAMED])}{more}" if all_names else ""


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

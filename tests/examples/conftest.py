"""timm without torchvision, as the tests of the models have it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parent.parent / "models" / "conftest.py"
_spec = importlib.util.spec_from_file_location("models_conftest", _PATH)
assert _spec is not None
assert _spec.loader is not None
_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_models)
timm = _models.timm

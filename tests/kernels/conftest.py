"""Makes the instruments beside the kernel tests importable: cuda_on_cpu and gather_cases."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

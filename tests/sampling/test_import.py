import subprocess
import sys

import ats_stream.sampling

HEAVY = ("ray", "zarr", "dask", "cupy", "numba", "ats_stream.io", "ats_stream.workers")


def test_import_loads_torch_alone():
    program = f"import sys, ats_stream.sampling; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_exists_and_is_documented():
    for name in ats_stream.sampling.__all__:
        assert getattr(ats_stream.sampling, name).__doc__ or name in ("SCHEMES", "Scheme")

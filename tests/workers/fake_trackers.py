"""Stand-ins for the packages of MLflow and W&B, as strict as these are where the loggers call them."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    key: str
    value: float
    timestamp: int
    step: int

    def __post_init__(self) -> None:
        assert isinstance(self.value, (int, float))
        assert isinstance(self.timestamp, int)
        assert isinstance(self.step, int)


@dataclass(frozen=True)
class Param:
    key: str
    value: str

    def __post_init__(self) -> None:
        assert len(self.value) <= 500


def make_mlflow() -> dict[str, types.ModuleType]:
    """Modules by name, whose clients share one store."""
    experiments: dict[str, str] = {}
    runs: dict[str, Any] = {}

    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> Any:
            return types.SimpleNamespace(experiment_id=experiments[name]) if name in experiments else None

        def create_experiment(self, name: str) -> str:
            assert name not in experiments
            experiments[name] = str(len(experiments))
            return experiments[name]

        def create_run(self, experiment_id: str, run_name: str | None = None) -> Any:
            assert experiment_id in experiments.values()
            info = types.SimpleNamespace(run_id=f"run{len(runs)}", run_name=run_name, status="RUNNING")
            data = types.SimpleNamespace(params={}, tags={})
            runs[info.run_id] = types.SimpleNamespace(info=info, data=data, history=[])
            return runs[info.run_id]

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            runs[run_id].history += metrics
            for param in params:
                assert param.key not in runs[run_id].data.params
                runs[run_id].data.params[param.key] = param.value

        def update_run(self, run_id: str, status: str | None = None) -> None:
            runs[run_id].info.status = status

        set_terminated = update_run

        def get_run(self, run_id: str) -> Any:
            return runs[run_id]

        def get_metric_history(self, run_id: str, key: str) -> list[Metric]:
            return [metric for metric in runs[run_id].history if metric.key == key]

    mlflow, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    vars(mlflow).update(MlflowClient=MlflowClient, entities=entities)
    vars(entities).update(Metric=Metric, Param=Param)
    return {"mlflow": mlflow, "mlflow.entities": entities}


SETTINGS = {
    "console", "silent", "disable_git", "disable_job_creation", "save_code", "x_disable_machine_info",
    "x_disable_meta", "x_disable_stats", "x_save_requirements",
}  # fmt: skip


def make_wandb(*, is_logged_in: bool = True) -> types.ModuleType:
    """The module; what its runs were told is in its list ``runs``."""
    wandb = types.ModuleType("wandb")
    runs: list[Any] = []

    def make_settings(**values: Any) -> dict[str, Any]:
        assert set(values) <= SETTINGS
        return values

    def init(*, project: str, name: str, id: str | None, resume: str | None, **given: Any) -> Any:  # noqa: A002  # theirs
        assert given.keys() == {"dir", "config", "settings"}
        assert resume in (None, "allow")
        run = types.SimpleNamespace(id=id or f"id{len(runs)}", project=project, name=name, **given)
        run.logged, run.exit_code = [], None

        def log(numbers: dict[str, float], step: int) -> None:
            assert all(earlier <= step for earlier, _ in run.logged)
            run.logged.append((step, numbers))

        run.log, run.finish = log, lambda exit_code: setattr(run, "exit_code", exit_code)
        runs.append(run)
        return run

    vars(wandb).update(Settings=make_settings, init=init, login=lambda prompt: is_logged_in, runs=runs)
    return wandb

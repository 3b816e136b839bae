"""Ray: joining or starting a cluster, and Ray Train around the training loop."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ats_stream.errors import AtsStreamError, ClusterError, InputError, PreemptedError
from ats_stream.workers.allocator import keep_freed_memory
from ats_stream.workers.checkpoint import latest_step
from ats_stream.workers.elastic import RankNeeds, WorldChoice
from ats_stream.workers.elastic_fit import Failed, NotStarted, Stopped, fit_elastic, nodes_that_answer
from ats_stream.workers.metrics import MetricsFollower, read_progress
from ats_stream.workers.preemption import keep_sigterm
from ats_stream.workers.trainer import TrainJob, train_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from ats_stream.models import PatchClassifier
    from ats_stream.workers.config import ClusterConfig
    from ats_stream.workers.elastic_fit import Outcome
    from ats_stream.workers.metrics import Record
    from ats_stream.workers.preemption import StopRequest
    from ats_stream.workers.progress import Progress
    from ats_stream.workers.ray_backend import StopSign

POLL_INTERVAL_S = 0.3
CONNECT_TIMEOUT_S = 10.0
START_TRIES = 3
# where Ray Train keeps its own notes in the run folder; our checkpoints stand beside them
RAY_TRAIN_NAME = "ray-train"


@contextmanager
def ray_cluster(config: ClusterConfig, *, cpus_needed: float, gpus_needed: float = 0.0) -> Iterator[None]:
    """Be connected to Ray: the running one, that of ``address`` or $RAY_ADDRESS, or one started here.

    A cluster started here is shut down at the end. Raises ClusterError when the cluster cannot be reached, or
    has fewer CPUs or GPUs than the run needs.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    owned = not ray.is_initialized()
    if owned:
        with keep_sigterm():
            _connect(config, cpus_needed)
    elif config.address:
        _check_answers(config.address)
    try:
        # that of the fewest ranks is enough to begin with
        share = config.least_ranks / config.num_ranks
        _check_resources(share * cpus_needed, share * gpus_needed)
        yield
    finally:
        if owned:
            ray.shutdown()


_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # a report waits for the next health check of the ranks, by default up to 2 s at each epoch's end
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Ray's workers would otherwise warn about a variable that only matters with accelerators
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def _connect(config: ClusterConfig, cpus_needed: float) -> None:
    import ray

    address = config.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address:
            _knock(address)
            ray.init(address=address, **quiet)
        else:
            # one machine is not preempted under us, and the watcher for it is a process of 100 MB
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            # CPUs are only bookkeeping here: small machines share their cores
            start_local_ray(
                num_cpus=max(os.cpu_count() or 1, int(-(-cpus_needed // 1))),
                object_store_memory=config.object_store_bytes,
                **quiet,
            )
    except (OSError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "a local Ray cluster"
        raise _unreachable(where, error) from error


def start_local_ray(**settings: Any) -> None:
    """``ray.init`` for a cluster of this machine alone; RuntimeError if it cannot be started.

    Its daemon gives up when the agents that it starts are not there after 15 s
    (https://github.com/ray-project/ray/issues/65983), as happens on a busy machine: then it is tried again.
    """
    import ray

    for tries_left in reversed(range(START_TRIES)):
        try:
            ray.init(address="local", include_dashboard=False, **settings)
            return
        except (OSError, ValueError):
            raise
        except Exception as error:  # Ray has no class of its own for it
            if not tries_left:
                raise RuntimeError(f"it did not start: {_first_line(error)}") from error


def _check_answers(address: str) -> None:
    """Raise ClusterError if nobody listens at an address that was given although Ray runs here already."""
    try:
        _knock(address)
    except OSError as error:
        raise _unreachable(f"the Ray cluster at {address}", error) from error


def _unreachable(where: str, error: BaseException) -> ClusterError:
    return ClusterError(f"cannot reach {where}: {_first_line(error)}")


def _knock(address: str) -> None:
    """Raise OSError if nobody listens at host:port: Ray itself would go on trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _check_resources(cpus_needed: float, gpus_needed: float) -> None:
    import ray

    there = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray types it partly
    if there.get("CPU", 0) + 1e-6 < cpus_needed:
        raise ClusterError(
            f"the Ray cluster has {there.get('CPU', 0):g} CPUs, the run needs {cpus_needed:g}; "
            "lower --ranks, --cpus-per-rank or --cpus-per-sampler"
        )
    if there.get("GPU", 0) + 1e-6 < gpus_needed:
        raise ClusterError(f"the Ray cluster has {there.get('GPU', 0):g} GPUs, the run needs {gpus_needed:g}")


class RayRanks:
    """This process as a rank of Ray Train."""

    def __init__(self, stop_sign: str) -> None:
        import ray.train
        import ray.train.torch

        from ats_stream.workers.ray_backend import RANK_STOP, StopSign

        self._sign, self._stop = StopSign(stop_sign), RANK_STOP

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()

    def wrap(self, model: PatchClassifier) -> nn.Module:
        """DistributedDataParallel around the model."""
        import ray.train.torch

        wrapped: nn.Module = ray.train.torch.prepare_model(model)
        return wrapped

    def total(self, values: Tensor) -> Tensor:
        """All-reduce; in float64 on the CPU, in float32 where the backend is nccl."""
        summed = values.to(self.device, copy=True)
        torch.distributed.all_reduce(summed)
        return summed.cpu()

    def gather(self, values: Tensor) -> Tensor:
        """All-gather; what others computed comes without gradients."""
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, values.detach().contiguous())
        parts[self.rank] = values
        return torch.cat(parts)

    def collect(self, values: Tensor) -> Tensor:
        """All-gather of tensors whose lengths differ."""
        lengths = self.gather(torch.tensor([len(values)], device=self.device)).tolist()
        padded = torch.zeros(max(lengths), *values.shape[1:], dtype=values.dtype, device=self.device)
        padded[: len(values)] = values.detach()
        parts = self.gather(padded).cpu().chunk(self.world_size)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def report(self, numbers: dict[str, float]) -> None:
        """A barrier over the ranks, which also tells Ray Train that they live."""
        import ray.train

        ray.train.report(numbers)

    def must_stop(self) -> bool:
        """Whether any rank got SIGTERM, or the driver did, which tells the first one."""
        asked = self._stop.asked or (self.rank == 0 and self._sign.is_up())
        return bool(self.total(torch.tensor([float(asked)])) > 0)


def _ray_rank(loop_config: dict[str, Any]) -> tuple[int, int] | None:
    """Train; a stop comes back as (step, number of steps): an exception would have Ray Train start again."""
    job: TrainJob = loop_config["job"]
    torch.set_num_threads(job.cluster.threads_per_rank)
    keep_freed_memory()
    try:
        train_rank(job, RayRanks(loop_config["stop_sign"]))
    except PreemptedError as stopped:
        return stopped.step, stopped.num_steps
    return None


def fit_with_ray(
    job: TrainJob,
    run_dir: Path,
    on_record: Callable[[Record], None],
    on_step: Callable[[Progress], None],
    stop: StopRequest,
) -> None:
    """Run the training loop in ``num_ranks`` processes of Ray Train, and follow its metrics.

    With ``min_ranks`` as many of them as there is room for, again after a failure and when there is room for
    more. Raises what a rank raised, if that is one of our errors, else ClusterError. KeyboardInterrupt ends
    the ranks.
    """
    follower = MetricsFollower(run_dir)

    def listen() -> None:
        for record in follower.new_records():
            on_record(record)
        progress = read_progress(run_dir)
        if progress is not None:
            on_step(progress)

    def fit(num_ranks: int, is_outgrown: Callable[[], bool]) -> Outcome:
        return _fit(job, run_dir, num_ranks, listen, lambda: stop.asked or is_outgrown())

    cluster = job.cluster
    if cluster.min_ranks:
        choice = WorldChoice(job.config.trainer.batch_size, cluster)
        outcome = fit_elastic(fit, choice, nodes_that_answer, stop, max_failures=cluster.max_failures)
    else:
        outcome = fit(cluster.num_ranks, lambda: False)
    if isinstance(outcome, Failed):
        raise outcome.error from outcome.error.__cause__
    if isinstance(outcome, NotStarted):
        raise ClusterError(f"training failed: {outcome.reason}")
    if isinstance(outcome, Stopped):
        # a stop between two fits finds all saved
        step = outcome.step if outcome.step >= 0 else latest_step(run_dir)
        raise PreemptedError(job.run_dir, step, job.plan.num_steps)


def _fit(
    job: TrainJob,
    run_dir: Path,
    num_ranks: int,
    listen: Callable[[], None],
    must_stop: Callable[[], bool],
) -> Outcome:
    """Start so many ranks and wait for their end."""
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from ats_stream.workers.ray_backend import StoppableTorchConfig, StopSign

    cluster = job.cluster
    name = f"{RAY_TRAIN_NAME}-{time.time_ns()}"
    # an elastic run starts again itself, with another number of ranks
    limits: dict[str, Any] = {"controller_failure_limit": 0, "max_preemption_failures": 0}
    failures = {"max_failures": 0, **limits} if cluster.min_ranks else {"max_failures": cluster.max_failures}
    trainer = TorchTrainer(
        _ray_rank,  # type: ignore[arg-type]  # Ray hands back what it returns, and types it as returning nothing
        train_loop_config={"job": job, "stop_sign": name},
        torch_config=StoppableTorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_ranks,
            use_gpu=cluster.use_gpu,
            resources_per_worker=dict(RankNeeds.of(cluster).rank),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(run_dir.absolute()),  # a relative one is taken for a URL
            failure_config=FailureConfig(**failures),
        ),
    )
    outcome = _fit_in_thread(trainer, listen, must_stop, StopSign(name))
    if isinstance(outcome, ControllerError):
        return NotStarted(_first_line(outcome))
    if isinstance(outcome, BaseException):
        error = _in_our_words(outcome)
        error.__cause__ = outcome
        return Failed(error, may_recur=isinstance(error, InputError))
    return None if outcome is None else Stopped(*outcome)


def _fit_in_thread(
    trainer: Any, listen: Callable[[], None], must_stop: Callable[[], bool], sign: StopSign
) -> tuple[int, int] | BaseException | None:
    """Fit beside the main thread, which shows the metrics and stays open to Ctrl-C and SIGTERM.

    In the main thread Ray Train would put a handler of its own on Ctrl-C that ends in exit code 0.
    """
    outcomes: list[tuple[int, int] | BaseException | None] = []

    def fit() -> None:
        try:
            outcomes.append(trainer.fit().return_value)
        except BaseException as error:
            outcomes.append(error)

    thread = threading.Thread(target=fit, name="ray-train-fit", daemon=True)
    thread.start()
    told = False
    while True:
        thread.join(POLL_INTERVAL_S)
        if not told and must_stop():
            sign.put_up()
            told = True
        has_ended = not thread.is_alive()  # asked before reading, so that no record is missed
        listen()
        if has_ended:
            if told:
                sign.take_down()
            return outcomes[0]


def _in_our_words(failure: BaseException) -> AtsStreamError:
    """The first of our own errors behind a failure of Ray Train, or its first line."""
    for error in _causes(failure):
        if isinstance(error, AtsStreamError):
            return error
    ranks = getattr(failure, "worker_failures", {})
    reasons = "; ".join(f"rank {rank}: {_first_line(error)}" for rank, error in ranks.items())
    return ClusterError(f"training failed: {reasons or _first_line(failure)}")


def _causes(failure: BaseException) -> Iterator[BaseException]:
    waiting: list[BaseException | None] = [failure]
    while waiting:
        error = waiting.pop(0)
        if error is None:
            continue
        yield error
        waiting += getattr(error, "worker_failures", {}).values()
        waiting += [getattr(error, "cause", None), getattr(error, "_exception", None), error.__cause__]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

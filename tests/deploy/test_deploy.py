"""The files of deploy/ and jobs/ against the parsers of those who read them."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import time
import types
import typing
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from ats_stream import cli
from ats_stream.commands.options import cluster_from, config_from
from ats_stream.workers import ClusterConfig, TrainerConfig
from ats_stream.workers.config import check_world

if TYPE_CHECKING:
    import argparse

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SCRIPT = DEPLOY / "slurm" / "train.sbatch"
INSTALLED = "/opt/ats-stream"
RAY = Path(sys.executable).absolute().with_name("ray")


def ray_version() -> str:
    from importlib.metadata import version

    return version("ray")


def job_arguments(entrypoint: str) -> argparse.Namespace:
    """What a job's entrypoint becomes; the parser leaves with code 2 where it does not understand."""
    python, script, *words = shlex.split(entrypoint)
    path = Path(script).relative_to(INSTALLED) if script.startswith(INSTALLED) else Path(script)
    assert python == "python"
    assert (ROOT / path).is_file()
    defaults = {"executor": "ray"} if path.stem == "train" else {}
    return parse(path.stem, words, **defaults)


def parse(command: str, words: list[str], **defaults: Any) -> argparse.Namespace:
    parser = cli.Parser()
    cli._add_command(parser, command)
    parser.set_defaults(**defaults)
    return parser.parse_args(words)


def checked_cluster(arguments: argparse.Namespace) -> ClusterConfig:
    """The cluster that training asks for, after the checks that it makes before it starts."""
    cluster, trainer = cluster_from(arguments), config_from(arguments, TrainerConfig)
    assert cluster.executor == "ray"
    check_world(trainer.batch_size, cluster.world_size)
    return cluster


# --- jobs


def test_the_runtime_environment_is_one_that_ray_accepts() -> None:
    from ray.dashboard.modules.dashboard_sdk import parse_runtime_env_args
    from ray.runtime_env import RuntimeEnv

    values = parse_runtime_env_args(runtime_env=str(ROOT / "jobs" / "runtime_env.yaml"))
    environment = RuntimeEnv(**values)  # raises for unknown fields and wrong types
    assert environment.working_dir() == "."
    assert environment["config"]["setup_timeout_seconds"] == 900
    with pytest.raises(TypeError):
        RuntimeEnv(**{**values, "env_vars": {"A": 1}})


def test_what_a_job_uploads_is_the_code_and_no_data(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = {name for name in tracked.split() if name.startswith(("ats_stream/", "jobs/"))}
    slides = {
        "a.svs",
        "a.ndpi",
        "a.tiff",
        "a.ome.zarr/c/0",
        "deep/b.ome.zarr/zarr.json",
        "b.zarr.zip",
        "c.dcm",
    }
    results = {"runs/a/config.yaml", "demo-output/report.html", "x/step-1.pt", "predictions/p.csv", "v.npy"}
    others = {
        ".git/config",
        ".venv/bin/python",
        "docs/a.md",
        "tests/a.py",
        "benchmarks/a.py",
        "deploy/a.yaml",
    }
    for name in wanted | slides | results | others | {"pyproject.toml", "archive.csv"}:
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(name)
    for name in (".rayignore", ".gitignore"):
        (tmp_path / "checkout" / name).write_bytes((ROOT / name).read_bytes())
    create_package(str(tmp_path / "checkout"), tmp_path / "package.zip", include_gitignore=True)
    found = {name for name in zipfile.ZipFile(tmp_path / "package.zip").namelist() if not name.endswith("/")}
    assert found == wanted | {"pyproject.toml", "archive.csv", ".rayignore", ".gitignore"}


# --- Ray clusters


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("cluster/*.yaml")), ids=lambda path: path.stem)
def test_clusters_are_ones_that_ray_up_accepts(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text())
    prepared = prepare_config(config)
    validate_config(prepared)  # against the JSON schema that Ray carries
    with pytest.raises(Exception, match="workers_max"):
        validate_config({**prepared, "workers_max": 1})
    for line in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        *settings, ray, verb, options = _command(line)
        assert all(re.fullmatch(r"RAY_\w+=\w+", word) for word in settings)
        assert Path(ray).name == "ray"
        assert verb in {"start", "stop"}
        assert_ray_start(options) if verb == "start" else None
    for line in re.findall(r"^#   ray job submit .* -- (.*) \.\.\.$", path.read_text(), re.MULTILINE):
        assert job_arguments(f"{line} a.csv --out b").archive == "a.csv"


def _command(line: str) -> tuple[Any, ...]:
    words = shlex.split(line)
    place = next(i for i, word in enumerate(words) if Path(word).name == "ray")
    return (*words[:place], words[place], words[place + 1], words[place + 2 :])


def assert_ray_start(options: list[str]) -> None:
    """Ray's own parser takes the options of ``ray start``; it exits for others."""
    from ray.scripts.scripts import start

    start.make_context("start", list(options))


# --- Kubernetes

# The fields of KubeRay's ray.io/v1 API that are used here, with their types; PodTemplateSpec is Kubernetes'.
FIELDS: dict[str, dict[str, Any]] = {
    "RayJob": {"apiVersion": str, "kind": str, "metadata": dict, "spec": "RayJobSpec"},
    "RayJobSpec": {
        "entrypoint": str,
        "backoffLimit": int,
        "submitterConfig": "SubmitterConfig",
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": "RayClusterSpec",
    },
    "SubmitterConfig": {"backoffLimit": int},
    "RayClusterSpec": {
        "rayVersion": str,
        "authOptions": "AuthOptions",
        "headGroupSpec": "HeadGroupSpec",
        "workerGroupSpecs": ["WorkerGroupSpec"],
    },
    "AuthOptions": {"mode": str},
    "HeadGroupSpec": {"rayStartParams": dict, "template": "PodTemplateSpec"},
    "WorkerGroupSpec": {
        "groupName": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "rayStartParams": dict,
        "template": "PodTemplateSpec",
    },
}


def check_kuberay(value: Any, kind: Any, where: str) -> None:
    """Raise AssertionError naming the field that KubeRay does not have, or has with another type."""
    if kind == "PodTemplateSpec":
        check_kubernetes(value, kubernetes_models().PodTemplateSpec, where)
    elif isinstance(kind, list):
        for number, one in enumerate(value):
            check_kuberay(one, kind[0], f"{where}[{number}]")
    elif isinstance(kind, str):
        for name, inner in value.items():
            assert name in FIELDS[kind], f"{where}: {kind} has no {name}"
            check_kuberay(inner, FIELDS[kind][name], f"{where}.{name}")
    else:
        assert type(value) is kind, f"{where} is {value!r}, not {kind.__name__}"


def kubernetes_models() -> Any:
    """Kubernetes' API as dataclasses. Of the client that they belong to they need three names alone."""
    core = types.ModuleType("lightkube.core")
    schema = types.ModuleType("lightkube.core.schema")
    names = {"dataclass": dataclasses.dataclass, "field": dataclasses.field, "DictMixin": object}
    vars(schema).update(names)
    sys.modules.setdefault(core.__name__, core)
    sys.modules.setdefault(schema.__name__, schema)
    return importlib.import_module("lightkube.models.core_v1")


def check_kubernetes(value: Any, kind: Any, where: str) -> None:
    """The same for Kubernetes' own types, as dataclasses of its API."""
    options = [one for one in typing.get_args(kind) if one is not type(None)]
    origin = typing.get_origin(kind)
    if origin is list:
        for number, one in enumerate(value):
            check_kubernetes(one, options[0], f"{where}[{number}]")
    elif kind is dict or origin is dict:
        assert all(isinstance(inner, str) for inner in value.values()), f"{where}: all values are strings"
    elif options:
        check_kubernetes(value, options[0], where)
    elif dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, vars(sys.modules[kind.__module__]))
        needed = {f.name for f in dataclasses.fields(kind) if not f.name.startswith("_") and _is_needed(f)}
        assert isinstance(value, dict), f"{where} is {value!r}, not a mapping"
        assert needed <= value.keys(), f"{where} lacks {needed - value.keys()}"
        for name, inner in value.items():
            assert name in hints, f"{where}: {kind.__name__} has no {name}"
            check_kubernetes(inner, hints[name], f"{where}.{name}")
    elif isinstance(kind, type):
        assert type(value) is kind, f"{where} is {value!r}, not {kind.__name__}"


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def rayjob(name: str) -> Any:
    return yaml.safe_load((DEPLOY / "kuberay" / f"rayjob-{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["train", "preprocess"])
def test_rayjobs_have_fields_that_kuberay_and_kubernetes_know(name: str) -> None:
    job = rayjob(name)
    check_kuberay(job, "RayJob", name)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray_version()
    assert cluster["authOptions"] == {"mode": "token"}
    assert job["spec"]["backoffLimit"] > 0  # an evicted job is tried again ...
    assert job["spec"]["submitterConfig"]["backoffLimit"] == 0  # ... as a whole, not its submission alone
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert_ray_start([f"--{name}={value}" for name, value in group["rayStartParams"].items()])
        check_pod(group)


def check_pod(group: Any) -> None:
    """Shared memory in memory and large enough, and time for the hook that stops the training."""
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    shm = mounts["/dev/shm"]["emptyDir"]
    assert shm["medium"] == "Memory"
    size, limit = quantity(shm["sizeLimit"]), quantity(container["resources"]["limits"]["memory"])
    assert int(group["rayStartParams"].get("object-store-memory", 0)) < size < limit / 2
    assert "persistentVolumeClaim" in mounts["/data"]
    hook = container.get("lifecycle", {}).get("preStop")
    if hook is not None:
        python, script, flag, seconds = hook["exec"]["command"]
        assert (python, flag) == ("python", "--timeout-s")
        assert (ROOT / Path(script).relative_to(INSTALLED)).name == "stop.py"
        assert float(seconds) < pod["terminationGracePeriodSeconds"]


def quantity(text: str) -> int:
    number, unit = text[:-2], text[-2:]
    return int(number) << {"Gi": 30, "Mi": 20}[unit]


def test_the_training_job_fits_its_cluster() -> None:
    spec = rayjob("train")["spec"]
    cluster = checked_cluster(job_arguments(spec["entrypoint"]))
    groups = spec["rayClusterSpec"]
    assert groups["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = groups["workerGroupSpecs"]
    per_node = group["rayStartParams"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    assert cluster.use_gpu
    assert cluster.num_ranks == group["replicas"] * int(per_node["num-gpus"])
    on_a_node = int(per_node["num-gpus"]) * (
        cluster.cpus_per_rank + cluster.samplers_per_rank * cluster.cpus_per_sampler
    )
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert on_a_node <= int(per_node["num-cpus"]) == int(resources["requests"]["cpu"])
    assert resources["limits"]["nvidia.com/gpu"] == per_node["num-gpus"]
    for spec_ in (groups["headGroupSpec"], group):
        assert "preStop" in spec_["template"]["spec"]["containers"][0]["lifecycle"]


def test_the_conversion_job_uses_its_cluster_and_passes_over_what_is_done() -> None:
    spec = rayjob("preprocess")["spec"]
    arguments = job_arguments(spec["entrypoint"])
    groups = spec["rayClusterSpec"]
    (group,) = groups["workerGroupSpecs"]
    per_node = int(group["rayStartParams"]["num-cpus"])
    assert groups["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert int(requests["cpu"]) == per_node
    assert arguments.ray
    assert arguments.workers == group["replicas"] * per_node
    assert arguments.skip_existing
    assert arguments.slides == ["/data/slides/*.svs"]  # the shell of the job expands it


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda job: job["spec"].update(backoffLimits=3), "RayJobSpec has no backoffLimits"),
        (lambda job: job["spec"].update(backoffLimit="3"), "backoffLimit is '3', not int"),
        (lambda job: pod_of(job).update(containres=[]), "PodSpec has no containres"),
        (lambda job: pod_of(job).update(terminationGracePeriodSeconds="9"), "is '9', not int"),
        (lambda job: pod_of(job)["containers"][0].pop("name"), "lacks {'name'}"),
        (lambda job: pod_of(job)["containers"][0]["resources"].update(limits={"cpu": 1}), "are strings"),
    ],
)
def test_the_check_of_fields_sees_mistakes(spoil: Any, said: str) -> None:
    job = rayjob("train")
    spoil(job)
    with pytest.raises(AssertionError, match=re.escape(said)):
        check_kuberay(job, "RayJob", "job")


def pod_of(job: Any) -> Any:
    return job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


# --- Slurm


def test_the_batch_script_is_clean() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    shellcheck = Path(sys.executable).absolute().with_name("shellcheck")
    done = subprocess.run([shellcheck, "--severity=style", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", SCRIPT.read_text(), re.MULTILINE))
    assert "requeue" in options
    assert options["signal"] == "B:USR1@300"  # to the batch script alone; Ray's processes would die of theirs
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == "1"  # one Ray for each node


# Stand-ins for what a node has. 'ray' keeps its own words and becomes the entry command, as on the head node;
# 'ats-stream' ends as it is told, or, if it is to wait, when it is asked.
FAKES = {
    "scontrol": (
        'if [[ "$1 $2" == "show hostnames" ]]; then printf "node-a\\nnode-b\\n"; '
        'else echo "$*" >>"$LOG/scontrol"; fi'
    ),
    "srun": 'printf "%s\\n" "$@" >"$LOG/srun"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "ray": 'printf "%s\\n" "$@" >"$LOG/ray"\nuntil [[ $1 == -- ]]; do shift; done\nshift\nexec "$@"',
    "ats-stream": (
        'printf "%s\\n" "$@" >"$LOG/ats-stream"\nenv | grep ^RAY_ | sort >"$LOG/env"\n'
        'if [[ $END != wait ]]; then exit "$END"; fi\n'
        'trap "exit 75" TERM\ntouch "$LOG/ready"\nwhile true; do read -rt 0.05 <>"$LOG/never" || true; done'
    ),
}


def start_batch(folder: Path, *, end: object, gpus: int = 4, cpus: int = 32) -> subprocess.Popen[str]:
    bin_, log = folder / "bin", folder / "log"
    for one in (bin_, log):
        one.mkdir()
    subprocess.run(["mkfifo", log / "never"], check=True)
    for name, text in FAKES.items():
        (bin_ / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (bin_ / name).chmod(0o755)
    environment = {
        "PATH": f"{bin_}:/usr/bin:/bin",
        "LOG": str(log),
        "END": str(end),
        "TMPDIR": str(folder),
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_CPUS_PER_TASK": str(cpus),
        **({"SLURM_GPUS_ON_NODE": str(gpus)} if gpus else {}),
    }
    words = ["bash", str(SCRIPT), "/data/a.csv", "/data/runs/first", "--patches", "16", "--lag", "1"]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("gpus", [4, 0])
def test_the_batch_script_starts_ray_and_the_training_in_their_own_words(tmp_path: Path, gpus: int) -> None:
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

    with start_batch(tmp_path, end=0, gpus=gpus) as process:
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
    assert not (tmp_path / "log" / "scontrol").exists()  # done is not put back into the queue
    verb, *words = (tmp_path / "log" / "ray").read_text().splitlines()
    assert verb == "symmetric-run"
    ours = words[: words.index("--")]
    assert_ray_start(curate_and_validate_ray_start_args(list(ours)))
    context = symmetric_run.make_context("symmetric-run", list(ours))
    assert context.params["address"] == "node-a:21234"
    assert context.params["min_nodes"] == 2
    assert f"--num-gpus={gpus}" in ours
    command, *rest = (tmp_path / "log" / "ats-stream").read_text().splitlines()
    arguments = parse(command, rest)
    cluster = checked_cluster(arguments)
    assert cluster.use_gpu == (gpus > 0)
    assert (cluster.num_ranks, cluster.samplers_per_rank) == ((8, 7) if gpus else (2, 31))
    assert cluster.address == "node-a:21234"
    assert (arguments.archive, arguments.out, arguments.lag) == ("/data/a.csv", "/data/runs/first", 1)
    settings = dict(line.split("=", 1) for line in (tmp_path / "log" / "env").read_text().splitlines())
    assert settings["RAY_AUTH_MODE"] == "token"
    assert re.fullmatch("[0-9a-f]{64}", settings["RAY_AUTH_TOKEN"])


def test_a_signal_reaches_the_training_and_the_job_goes_back_into_the_queue(tmp_path: Path) -> None:
    with start_batch(tmp_path, end="wait") as process:
        deadline_s = time.monotonic() + 60
        while not (tmp_path / "log" / "ready").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        subprocess.run(["kill", "-USR1", str(process.pid)], check=True)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert said.splitlines() == [
        "train.sbatch: asking the training to stop",
        "train.sbatch: saved; back into the queue",
    ]
    assert (tmp_path / "log" / "scontrol").read_text() == "requeue 41234\n"
    assert not list(tmp_path.glob("*.pid"))


@pytest.mark.parametrize("code", [1, 2])
def test_a_job_that_fails_stays_out_of_the_queue(tmp_path: Path, code: int) -> None:
    with start_batch(tmp_path, end=code) as process:
        process.communicate(timeout=60)
    assert process.returncode == code
    assert not (tmp_path / "log" / "scontrol").exists()


def test_too_few_cpus_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with start_batch(tmp_path, end=0, cpus=4) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said == "train.sbatch: 4 CPUs are too few for 4 ranks with a sampler each\n"
    assert not (tmp_path / "log" / "srun").exists()


def test_the_installed_ray_has_the_command_that_slurm_uses() -> None:
    done = subprocess.run([RAY, "symmetric-run", "--help"], capture_output=True, text=True, check=True)
    assert "--min-nodes" in done.stdout
    assert importlib.import_module("ray.scripts.symmetric_run").CLUSTER_WAIT_TIMEOUT == 30  # what we lengthen

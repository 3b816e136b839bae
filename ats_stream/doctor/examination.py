"""The whole examination: what is asked, and what the answers mean."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats_stream.doctor import packages, places
from ats_stream.doctor.ask import ask
from ats_stream.doctor.finding import Finding, State
from ats_stream.doctor.probe import PROBES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ats_stream.doctor.ask import Answer

MIN_PYTHON = (3, 11)
_ADVICE = {
    "codecs": "pip install --force-reinstall imagecodecs",
    "openslide-library": "pip install --force-reinstall openslide-bin openslide-python",
    "object-stores": "pip install --force-reinstall obstore",
    "video": "pip install --force-reinstall av",
}


def examine() -> Iterator[Finding]:
    """Find out everything, a line at a time; takes some seconds, most of them for importing."""
    yield python(sys.version_info[:3])
    found = packages.declared()
    if not found:
        said = "not installed by pip: the versions of packages are not compared"
        yield Finding(State.NOTE, packages.DISTRIBUTION, said, "pip install . in its checkout")
    environ = dict(os.environ)
    names = packages.installed_names()
    has_cupy = any(name.startswith("cupy-cuda") for name in names)
    probes = [name for name in PROBES if name not in ("cupy-device", "video")]
    probes += ["cupy-device"] * has_cupy + ["video"] * ("av" in names)
    modules = [package.module for package in found if package.module]
    answers = ask([*dict.fromkeys([*modules, *probes])])
    for package in found:
        yield packages.judge(package, answers)
    yield from packages.clashes(names)
    yield from devices(answers)
    yield codecs(answers["codecs"])
    yield _told("OpenSlide's library", "openslide-library", answers, lambda facts: facts["version"])
    if "video" in answers:
        yield _told("video", "video", answers, lambda facts: f"decodes {', '.join(facts['decoders'])}")
    yield stores(answers["object-stores"], places.credentials(environ))
    package_folder = Path(__file__).parent.parent
    yield from places.caches(environ, Path.home(), package_folder, has_cupy=has_cupy)
    yield from places.space(places.folders_of_work(environ))
    yield from places.shared_memory()
    if address := environ.get("RAY_ADDRESS"):
        said = f"RAY_ADDRESS is set: commands with --executor ray join {_shown(address)}"
        yield Finding(State.NOTE, "ray cluster", said)


def python(version: tuple[int, ...]) -> Finding:
    """Whether the interpreter is new enough.

    >>> python((3, 9, 1)).state.value
    'bad'
    """
    said = f"{'.'.join(map(str, version))} on {platform.system()} {platform.machine()}"
    if version[:2] < MIN_PYTHON:
        return Finding(State.BAD, "python", f"{said}, 3.11 or newer is needed", "make a new environment")
    return Finding(State.OK, "python", said)


def devices(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    """What to say of GPUs, and of CuPy beside torch."""
    gpu = answers["gpu"]
    if gpu.error:
        yield Finding(State.BAD, "gpu", gpu.error, "reinstall torch for the driver of this machine")
        return
    built_for = gpu.facts["built_for"]
    for number, device in enumerate(gpu.facts["devices"]):
        said = f"{device['name']}, {device['memory_bytes'] / 2**30:.0f} GiB, torch for CUDA {built_for}"
        if device["adds"]:
            yield Finding(State.OK, f"gpu {number}", said)
        else:
            yield Finding(
                State.BAD, f"gpu {number}", f"{said}: a sum on it came out wrong", "see to the device"
            )
    if not gpu.facts["devices"]:
        if built_for:
            said = f"torch is built for CUDA {built_for} and sees no device: training runs on the CPU"
            yield Finding(
                State.NOTE, "gpu", said, "look at nvidia-smi and the driver, if there should be one"
            )
        else:
            advice = "with a GPU, take the build of torch for CUDA from pytorch.org"
            yield Finding(State.NOTE, "gpu", "torch is built for the CPU alone", advice)
        return
    yield _cupy(str(built_for), answers.get("cupy-device"))


def _cupy(built_for: str, answer: Answer | None) -> Finding:
    major = built_for.split(".", maxsplit=1)[0]
    install = f'pip install "{packages.DISTRIBUTION}[cuda{major}]"'
    if answer is None:
        return Finding(State.BAD, "CuPy on the gpu", "not installed: `train --gpu` needs it", install)
    if answer.error:
        return Finding(State.BAD, "CuPy on the gpu", answer.error, install)
    if not answer.facts["available"]:
        return Finding(State.BAD, "CuPy on the gpu", "sees no device although torch does", install)
    runtime = answer.facts["runtime"] // 1000
    said = f"{answer.facts['version']} for CUDA {runtime}"
    if str(runtime) != major:
        return Finding(State.BAD, "CuPy on the gpu", f"{said}, torch is for CUDA {built_for}", install)
    return Finding(State.OK, "CuPy on the gpu", said)


def codecs(answer: Answer) -> Finding:
    """What to say of the codecs of pixels."""
    advice = _ADVICE["codecs"]
    if answer.error:
        return Finding(State.BAD, "codecs", answer.error, advice)
    if fails := answer.facts["fails"]:
        return Finding(State.BAD, "codecs", f"{', '.join(fails)} cannot write and read a picture", advice)
    return Finding(State.OK, "codecs", f"{', '.join(answer.facts['works'])} write and read a picture")


def stores(answer: Answer, credentials: list[str]) -> Finding:
    """What to say of object stores; names of variables, never what they hold."""
    if answer.error:
        return Finding(State.BAD, "object stores", answer.error, _ADVICE["object-stores"])
    found = f"credentials by {', '.join(credentials)}" if credentials else "no credentials in the environment"
    return Finding(State.OK, "object stores", f"{', '.join(answer.facts['schemes'])}; {found}")


def _told(
    subject: str, probe: str, answers: Mapping[str, Answer], say: Callable[[dict[str, Any]], str]
) -> Finding:
    answer = answers[probe]
    if answer.error:
        return Finding(State.BAD, subject, answer.error, _ADVICE[probe])
    return Finding(State.OK, subject, say(answer.facts))


def _shown(address: str) -> str:
    """An address without what may stand before an @ in it.

    >>> _shown("ray://user:secret@head:10001")
    'ray://head:10001'
    """
    scheme, separator, rest = address.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"

"""sample.cu on host memory: its two kernels as planned, built by g++, in the place of the CUDA operator."""

from __future__ import annotations

import functools

import cuda_on_cpu
import torch
from cuda_on_cpu import CpuModule

from ats_stream.kernels.launch import source_text
from ats_stream.kernels.sample import Arrivals, Race, RacePlan
from ats_stream.kernels.specialisations import BY_SOURCE

EXPRESSIONS = tuple(one.expression for one in BY_SOURCE["sample.cu"])
SMALL = RacePlan(num_parts=3, block=64, room=64)  # many tiles, parts and sorts in few logits


@functools.cache
def race_module() -> CpuModule:
    return CpuModule(cuda_on_cpu.build("sample.cu", source_text("sample.cu"), EXPRESSIONS), EXPRESSIONS)


def race_by_kernel(
    logits_BM: torch.Tensor,
    num_kept: int,
    *,
    plan: RacePlan,
    seed: int = 0,
    stream_ids_B: torch.Tensor | None = None,
    by_logit: bool = False,
    global_index: torch.Tensor | None = None,
    thread_order: int = 0,
) -> Arrivals:
    """What the CUDA operator gives; memory that it must write begins as garbage."""
    streams_B = torch.arange(len(logits_BM)) if stream_ids_B is None else stream_ids_B
    race = Race.of(logits_BM, num_kept, torch.tensor(seed), streams_B, by_logit, global_index, plan)
    for tensor in (race.parts, *race.fields):
        tensor.view(torch.int64).fill_(-0x5A5A5A5A5A5A5A5B)
    module = race_module()
    module.configure(thread_order=thread_order)
    for launch in race.launches():
        module.launch(launch.expression, launch.grid, launch.block, launch.args)
    return Arrivals(*race.fields)

"""The environment of a run: machine, device, versions, settings that change speed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from djinn_fx.benchmarks.record import Json

#: Distributions whose version a record names.
PACKAGES = ("djinn-fx", "torch", "triton", "transformers", "numpy", "nnsight", "transformer-lens", "vllm")

#: Environment variables that change what is measured.
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "DJINN_KERNELS")


def environment(device: torch.device) -> dict[str, Json]:
    """What a reader needs to judge the figures of a run on ``device``."""
    found: dict[str, Json] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "device": str(device),
        "device_name": _cpu_name(),
        "cuda": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device_name"] = properties.name
        found["device_bytes"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
        found["cuda"] = torch.version.cuda
    return found


def version_of(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    if name == "djinn-fx":
        from djinn_fx import __version__

        return __version__
    if name == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or sys.platform

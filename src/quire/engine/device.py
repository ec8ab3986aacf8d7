"""Which device an engine runs on, and what it has."""

from __future__ import annotations

import sys

import torch

from quire.cache.ledger import available_memory
from quire.core.errors import ConfigError
from quire.core.machine import has_gpu_driver


def resolve_device(asked: str) -> torch.device:
    """`asked` is `EngineConfig.device`. Raises ConfigError for a device that torch cannot use here, and says why."""
    if asked == "auto":
        trouble = _trouble("cuda")
        if trouble is None:
            return torch.device("cuda", 0)
        if has_gpu_driver():
            print(f"quire: there is a GPU, but {trouble}; computing on the CPU.", file=sys.stderr)
        return torch.device("cpu")
    device = torch.device(asked)
    if device.type == "cpu":
        return torch.device("cpu")
    trouble = _trouble(device.type)
    if trouble is not None:
        raise ConfigError(f"device is {asked}, but {trouble}.", param="device", remedy=_REMEDY)
    count = torch.cuda.device_count() if device.type == "cuda" else torch.xpu.device_count()
    index = device.index or 0
    if index >= count:
        raise ConfigError(
            f"device is {asked}, but torch sees {count} of that kind.",
            param="device",
            remedy=f"Take {device.type}:0 to {device.type}:{count - 1}; CUDA_VISIBLE_DEVICES may hide others.",
        )
    return torch.device(device.type, index)


_SIGNS = ("CUDA error", "HIP error", "Triton Error", "XPU error", "CUDA driver error")
_LONGEST = 300
_REMEDY = "Install a torch for this GPU and its driver (see docs/gpu.md), or take --device cpu."


def _trouble(kind: str) -> str | None:
    """Why torch cannot use devices of that kind here, or None."""
    if kind == "xpu":
        return None if torch.xpu.is_available() else "torch finds no XPU"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) is built without CUDA and ROCm"
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # says what is wrong with driver and library
        return f"torch {torch.__version__} cannot use it: {' '.join(str(error).split())}"
    return "torch finds none"


def make_current(device: torch.device) -> None:
    """Triton, and streams and graphs that name no device, go to the process's current one. So engines of one process
    share a GPU; those on several are processes of their own, as under `quire serve`."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "xpu":
        torch.xpu.set_device(device)


def memory_for(device: torch.device) -> int:
    """Bytes that could be allocated there, by this process."""
    match device.type:
        case "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        case "xpu":
            free, _ = torch.xpu.mem_get_info(device)
            return int(free)
        case _:
            return available_memory()


def device_fault(error: BaseException) -> str | None:
    """In words, what a GPU's error means for whoever runs the engine; None for errors of another kind."""
    told = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"The GPU ran out of memory: {told[:_LONGEST]} Lower --memory-utilization or --max-num-batched-tokens, or "
            "end what else runs on it."
        )
    if isinstance(error, RuntimeError) and any(sign in told for sign in _SIGNS):
        return (
            f"The GPU failed: {told[:_LONGEST]} Everything on it is lost to this process. If it fails again, look at "
            "the driver's log (dmesg, nvidia-smi -q)."
        )
    return None

"""The one table of devices: memory and peak of each, and the peak of the device that a process runs on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["CPU_THREAD_FLOPS", "DEVICES", "Device", "device_named", "peak_flops"]


@dataclass(frozen=True)
class Device:
    """An accelerator: its memory in units of 10^9 bytes, its dense bf16 peak in FLOP/s."""

    name: str
    """a part of the name that torch gives it"""
    memory_gb: int
    peak_flops: float

    @property
    def label(self) -> str:
        """As the forecast names it."""
        return f"{self.memory_gb} GB ({self.name})"


DEVICES = (
    Device("GB200", 186, 2.5e15),
    Device("B200", 180, 2.25e15),
    Device("H200", 141, 989e12),
    Device("H100", 80, 989e12),
    Device("H100 NVL", 94, 835e12),
    Device("H100 PCIe", 80, 756e12),
    Device("H800", 80, 989e12),
    Device("GH200", 96, 989e12),
    Device("H20", 96, 148e12),
    Device("A100", 40, 312e12),
    Device("A100-SXM4-80GB", 80, 312e12),
    Device("A100 80GB", 80, 312e12),
    Device("A800", 80, 312e12),
    Device("L40S", 48, 362e12),
    Device("L40", 48, 181e12),
    Device("L4", 24, 121e12),
    Device("A40", 48, 150e12),
    Device("A30", 24, 165e12),
    Device("A10G", 24, 70e12),
    Device("A10", 24, 125e12),
    Device("RTX 6000 Ada", 48, 364e12),
    Device("RTX 4090", 24, 165e12),
    Device("RTX 3090", 24, 71e12),
    Device("MI300X", 192, 1307e12),
)
"""Source: the makers' data sheets; peaks without sparsity. A device sold as 80 GB has a little over 80e9 bytes."""
CPU_THREAD_FLOPS = {"float32": 40e9, "bfloat16": 97e9}
"""Peak of one thread with AVX-512. Source: half of what was measured on two (80 and 195 GFLOP/s at 2048^3)."""
_MEASURE_S = 0.3
_SIDE = {"cpu": 768, "cuda": 8192}
"""Side of the measured matrices: large enough that arithmetic, not memory, is the limit."""


def device_named(name: str) -> Device | None:
    """The device in the table whose name is the longest part of ``name`` (``NVIDIA H100 PCIe``); None where none is."""
    return max((d for d in DEVICES if d.name in name), key=lambda d: len(d.name), default=None)


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The peak FLOP/s of a device, and where the figure comes from.

    A GPU in bf16 is looked up by its name. Everything else, CPUs above all, is measured once by a matrix product in the
    precision of the run and with its threads.
    """
    if device.type == "cuda" and precision == "bfloat16":
        name = torch.cuda.get_device_name(device)
        if (known := device_named(name)) is not None:
            return known.peak_flops, f"data sheet of {name}"
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return _measured(device, dtype), "measured by a matrix product"


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    side = _SIDE.get(device.type, 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, end = float("inf"), time.perf_counter() + _MEASURE_S
    while time.perf_counter() < end or best == float("inf"):
        wait()
        began = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - began)
    return 2.0 * side**3 / best

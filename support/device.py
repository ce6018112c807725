"""What this machine has: devices, free memory, bfloat16."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from support.cli import InputError


def pick_device(device: str = "auto") -> torch.device:
    """The named device, or the best there is: cuda, mps, cpu."""
    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here.insert(0, "cuda")
    if device not in ("auto", *here):
        raise InputError(f"--device {device}: not to be had here; expected auto or {' or '.join(here)}")
    return torch.device(here[0] if device == "auto" else device)


def has_native_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 (AMX, AVX-512), twice as fast as in float32."""
    features = getattr(torch.cpu, "get_capabilities", dict)()  # which torch 2.11 lacks
    return any(there and "bf16" in name for name, there in features.items())


def free_memory(device: torch.device) -> float:
    """Free bytes of a GPU, or of the host for other devices (infinite where one cannot ask)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not (memory := Path("/proc/meminfo")).exists():
        return float("inf")
    return int(memory.read_text().split("MemAvailable:")[1].split()[0]) * 1024


def peak_mib(device: torch.device) -> float:
    """The most memory used so far, in MiB: of a GPU if the model is on one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, a GPU's or the host's, has run out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turn an error that says that memory has run out into an InputError with this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's own out-of-memory error is a RuntimeError
        if not out_of_memory(error):
            raise
        raise InputError(f"too little memory {advice}") from None

"""The machine: a missing device is named in the error, and the scripts start on Windows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.cli import InputError
from support.device import pick_device

ROOT = Path(__file__).resolve().parents[1]


def test_a_device_that_is_not_there_is_named_with_those_that_are():
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda: not to be had here; expected auto or .*cpu"):
            pick_device("cuda")
    assert pick_device("cpu").type == "cpu" and pick_device("auto").type in ("cuda", "mps", "cpu")


@pytest.mark.slow
def test_the_scripts_start_where_there_is_no_resource_module():
    """Windows has no such module, so importing the scripts must not need it."""
    code = """if True:
        import contextlib, sys
        with contextlib.suppress(ImportError):
            import psutil  # transformers 5.17 imports it; on Linux it needs `resource`
        sys.modules["resource"] = None
        import grpo, toy, torch
        print(grpo.peak_mib(torch.device("cpu")))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "0.0\n"

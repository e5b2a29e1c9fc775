"""Machine: on what, and by which code, a figure was obtained.

Needs: torch, torchvision.
"""

import os
import platform
import subprocess
from pathlib import Path

import torch
import torchvision


def machine(device):
    """A dict for a line of results; gpu only where device is "cuda", commit only where these files lie in a git repository."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    gpu = dict(gpu=torch.cuda.get_device_name()) if device == "cuda" else {}
    return dict(processor=names[0] if names else platform.machine(), **gpu, cores=os.cpu_count(), threads=torch.get_num_threads(),
                python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__, **commit())


def commit():
    """{"commit": ...}, with -dirty if tracked files differ from it; {} outside a repository."""
    try:
        told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git here
        return {}
    return dict(commit=told.stdout.strip()) if told.returncode == 0 else {}

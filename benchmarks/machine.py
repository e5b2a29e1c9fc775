"""Machine: what all measurements share. Rows of JSON, and on what and by which code they were obtained.

Needs: torch, torchvision.
"""

import json
import math
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path

import torch
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def machine(device):
    """A dict for a row; gpu only where device is "cuda", commit only inside a git repository."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    name = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = name[1] if name else platform.machine()
    gpu = dict(gpu=torch.cuda.get_device_name()) if device == "cuda" else {}
    versions = dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__)
    cores = dict(cores=os.cpu_count(), threads=torch.get_num_threads())
    return dict(processor=processor, **gpu, **cores, **versions, **commit())


def commit():
    """{"commit": ...}, with -dirty if tracked files differ from it; {} outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # git is not installed
        return {}
    return dict(commit=result.stdout.strip()) if result.returncode == 0 else {}


def read_rows(path, keys):
    """The rows of a file; a last line that a kill cut short does not count. ValueError where a row lacks a key."""
    rows = []
    for number, line in enumerate(whole_lines(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            for key in keys:
                row[key]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} line {number} is not a measurement; name another file") from None
        rows.append(row)
    return rows


def whole_lines(path):
    text = Path(path).read_text() if Path(path).exists() else ""
    return text[:text.rfind("\n") + 1]


def append(path, row):
    """Written at once, so that nothing measured is lost."""
    whole = whole_lines(path).encode()
    if whole and len(whole) < Path(path).stat().st_size:
        os.truncate(path, len(whole))  # a cut line: it is measured anew
    with open(path, "a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def finite(value):
    return value is not None and math.isfinite(value)


def spread(values):
    """Mean ± sample standard deviation, to three digits of the larger; n/a where a value is missing."""
    if not values or not all(map(finite, values)):
        return "n/a"
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return plus_minus(statistics.fmean(values), deviation)


def plus_minus(mean, reach):
    largest = max(abs(mean), reach or 0.0)
    digits = 0
    if largest > 0:
        digits = min(6, max(0, 2 - math.floor(math.log10(largest))))
    text = f"{mean:,.{digits}f}"
    return text if reach is None else f"{text} ± {reach:,.{digits}f}"


@torch.no_grad()
def multiply_adds(model, *inputs):
    """Of a forward pass, per image of the first input. Attention is written out: no fused kernel hides it."""
    with sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 2 / len(inputs[0])


def put_between(path, marks, text):
    """Replace what stands between two marks in a file."""
    page = Path(path).read_text()
    begin, end = marks
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{path} must hold the lines {begin!r} and {end!r} once each; add them")
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    Path(path).write_text(f"{before}{begin}\n{text}\n{end}{after}")

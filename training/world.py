"""World: device and ranks, one path for one process and for torchrun; and the signals that end a run politely.

Needs: torch, tqdm.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

ENDINGS = ("SIGTERM", "SIGINT", "SIGHUP")  # of which Windows lacks the last


class World:
    """Device and ranks: one path for one process and for torchrun."""

    def __init__(self, device="auto"):
        self.size = from_environment("WORLD_SIZE", 1, least=1)
        self.rank = from_environment("RANK", 0, below=self.size)
        usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = device
        if kind == "auto":
            kind = next(name for name in usable if usable[name])
        if not usable[kind]:
            raise ValueError(f"--device {kind} is not available here; try --device cpu")
        self.device = torch.device(kind)
        if kind == "cuda":
            self.device = torch.device(kind, from_environment("LOCAL_RANK", 0))
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        self.main = self.rank == 0
        self.device_ids = [self.device.index] if kind == "cuda" else None  # as DDP wants them
        self.grouped = self.size > 1 and not dist.is_initialized()
        if self.grouped:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")

    def bf16(self, precision):
        """auto: where the GPU computes in bf16."""
        if precision == "auto":
            return self.device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8
        return precision == "bf16"

    def autocast(self, precision):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16(precision))

    def workers(self, args):
        """Loading processes."""
        if args.workers is not None:
            return args.workers
        return min(8, os.cpu_count() or 1) if self.device.type == "cuda" else 0

    def move(self, batch):
        """Tensors, also those in lists and dicts, to the device."""
        if isinstance(batch, torch.Tensor):
            return batch.to(self.device, non_blocking=True)
        if isinstance(batch, dict):
            return {key: self.move(value) for key, value in batch.items()}
        if isinstance(batch, (list, tuple)):
            return [self.move(value) for value in batch]
        return batch

    def sum(self, numbers):
        """Add up a list of numbers over all ranks."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor([float(number) for number in numbers], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """The (picklable) value of each rank, as a list; also a barrier."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def share(self, tensors):
        """Rank 0's values for all."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def progress(self, steps, title):
        """A bar on a terminal of rank 0."""
        return tqdm(steps, title, leave=False, disable=None if self.main else True)

    def say(self, text):
        """Print on rank 0. A closed pager, a full disk or an old terminal behind stdout does not end a training."""
        if not self.main or sys.stdout is None:
            return
        encoding = sys.stdout.encoding or "utf-8"
        try:
            tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()
        except OSError:
            sys.stdout = open(os.devnull, "w")

    def close(self):
        if self.grouped:
            dist.destroy_process_group()


def from_environment(name, default, least=0, below=2**31):
    """A number that torchrun sets."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not least <= int(text) < below:
        raise ValueError(f"the environment variable {name} is {text!r}, not a number from {least} to {below - 1}; "
                         f"torchrun sets it, for one process unset {name}")
    return int(text)


def lost_process(error):
    """Which process was lost, in a sentence for the user; None for an error of another kind."""
    reason = str(error).splitlines()[0]
    if "DataLoader worker" in reason:
        return (f"a loading process was lost ({reason}), often for lack of memory; continue with --resume and fewer "
                "--workers")
    if "Connection" in reason:  # of gloo and NCCL
        return f"another of the training processes was lost ({reason}); continue with --resume"
    return None


class Stop:
    """SIGTERM, SIGHUP and Ctrl-C ask the loop to save and end; a second Ctrl-C ends at once."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        numbers = [getattr(signal, name) for name in ENDINGS if hasattr(signal, name)]
        self.before = {number: signal.signal(number, self.request) for number in numbers}
        return self

    def request(self, number, frame):
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

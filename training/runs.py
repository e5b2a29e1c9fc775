"""Runs: ranks, a folder, a log, a checkpoint, and how to continue after a kill at any moment.

Nothing here knows what is trained. Data order and all random draws are functions of (seed, epoch or
step, index), so the position of a run, its model and its optimizer are all there is to save:

    args.json        the flags, written once at the start
    log.jsonl        a line per logged step and per epoch
    checkpoint.pt    written beside the old one, then renamed: a kill or a full disk leaves the old one whole

Lines of the log after the last checkpoint are cut off on resuming, and written again.

Needs: torch, tqdm; checkpoints.py.
"""

import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoints import read_checkpoint

RUN_FILES = ("args.json", "log.jsonl", "checkpoint.pt")
FREE = ("resume", "output_dir", "workers", "save_minutes", "data_path")  # may differ when a run is resumed


# ---------------------------------------------------------------------------- processes


class World:
    """Device and ranks: one path for one process and for torchrun."""

    def __init__(self, device="auto"):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = device
        if kind == "auto":
            kind = next(name for name in usable if usable[name])
        if not usable[kind]:
            raise ValueError(f"--device {kind} is not available here; try --device cpu")
        self.device = torch.device(kind)
        if kind == "cuda":
            self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
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

    def say(self, text):
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self):
        if self.grouped:
            dist.destroy_process_group()


class Stop:
    """SIGTERM and Ctrl-C ask the loop to save and end; a second Ctrl-C ends at once."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def request(self, number, frame):
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------- the folder of a run


def saved_flags(folder):
    """args.json of a run's folder, or {} where there is none."""
    path = Path(folder) / "args.json"
    if not path.exists():
        return {}
    try:
        flags = json.loads(path.read_text())
    except ValueError:
        flags = None
    if not isinstance(flags, dict) or "task" not in flags:
        raise ValueError(f"{path} does not hold the flags of a run; restore it or start anew in another folder")
    return flags


def choose_folder(args, world):
    """--output-dir, or the next free number under runs/. It is checked here and made later."""
    if args.output_dir is None:
        numbered = (Path("runs") / f"{n:04d}" for n in itertools.count(1))
        return world.gather(next(path for path in numbered if not path.exists()))[0]  # rank 0's choice
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {folder} is a file, not a folder")
    taken = [name for name in RUN_FILES if (folder / name).exists()]
    if taken and not args.resume:
        raise ValueError(f"--output-dir {folder} already holds a run ({taken[0]}); choose another folder or add --resume")
    world.gather(None)  # no rank creates it before every rank has looked
    return folder


class Run:
    """The folder of one run: args.json, log.jsonl, checkpoint.pt. Only rank 0 writes.

    hint  the folder that --resume should name; that of the whole run where this is a part of it
    """

    def __init__(self, args, world, folder, hint=None):
        self.args, self.world, self.folder, self.hint = args, world, folder, hint or folder
        self.path, self.file = folder / "checkpoint.pt", None
        self.saved = read_checkpoint(self.path) if args.resume and self.path.exists() else None

    @property
    def weights(self):
        """The saved model, for build: None at a fresh start."""
        return None if self.saved is None else self.saved["model"]

    def restore(self, plan, **parts):
        """Load the saved parts (model, optimizer, ema) if there are any -> the position to start from."""
        self.parts, self.plan = parts, plan
        at = SimpleNamespace(epoch=0, step=0, loss_sum=0.0, loss_count=0, bad_steps=0, line={})
        if self.saved is None:
            return at

        # the same run: as many steps on as many processes
        before = self.saved.get("total_steps"), self.saved.get("processes")
        if before != (plan.total_steps, self.world.size):
            raise ValueError(f"{self.path} is of a run of {before[0]} steps on {before[1]} processes, this one has "
                             f"{plan.total_steps} on {self.world.size}; resume with as many processes and images")
        try:
            for name, part in parts.items():
                if part is not None:
                    part.load_state_dict(self.saved[name])
            at = SimpleNamespace(**self.saved["at"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{self.path} does not fit this run ({reason}); resume with the run's own model and "
                             "flags") from None
        return at

    def open(self, data):
        """Every check is passed: only now does the run leave a trace. data: tasks.Data"""
        self.about = dict(classes=list(data.classes), mean=list(data.mean), std=list(data.std))
        self.saved_at = time.monotonic()
        if not self.world.main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "args.json").exists():
                (self.folder / "args.json").write_text(json.dumps(vars(self.args), indent=1) + "\n")
            self.file = open(self.folder / "log.jsonl", "a")
        except OSError as error:
            raise ValueError(f"cannot write to --output-dir {self.folder}: {error.strerror}") from None
        self.file.truncate(0 if self.saved is None else self.saved["log_bytes"])
        self.file.seek(0, os.SEEK_END)
        self.saved = None  # the tensors are in the model now

    def log(self, **entry):
        """One line of log.jsonl; NaN, which JSON lacks, becomes null."""
        if self.file is None:
            return
        for key, value in entry.items():
            if isinstance(value, float):
                entry[key] = float(f"{value:.6g}") if math.isfinite(value) else None
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def save_is_due(self):
        return time.monotonic() - self.saved_at > 60 * self.args.save_minutes

    def save(self, at, epoch):
        """Write checkpoint.pt; epoch: the one to continue in."""
        at.epoch, self.saved_at = epoch, time.monotonic()
        if not self.world.main:
            return
        state = {name: part.state_dict() for name, part in self.parts.items() if part is not None}
        state |= self.about
        state |= dict(at=vars(at), args=vars(self.args), log_bytes=self.file.tell())
        state |= dict(total_steps=self.plan.total_steps, processes=self.world.size)
        save_checkpoint(self.path, state)

    # what it says

    def describe(self, data, learner, at):
        args, plan, world = self.args, self.plan, self.world
        size = "x".join(map(str, args.img_size))
        patch = f", patch {args.patch_size}" if args.patch_size else ""
        held_out = "no" if data.val is None else len(data.val)
        trainable = sum(p.numel() for p in learner.parameters() if p.requires_grad)
        precision = "bf16" if world.bf16(args.precision) else "fp32"
        world.say(f"{args.task}{' by ' + args.method if 'method' in args else ''}: {args.model}, {size} px{patch}; "
                  f"{len(data.train)} training and {held_out} validation images of {args.data}")
        world.say(f"  {trainable:,} parameters learn on {world.device.type} x {world.size} in {precision}")
        world.say(f"  {plan.total_steps} steps of {plan.effective} images ({plan.batch_size} x accum {args.accum} x "
                  f"{world.size} processes), lr {plan.lr:.3g}")
        if at.step:
            world.say(f"  resumed at epoch {at.epoch}, step {at.step}")

    def report_bad_step(self, at, lr, gives_up):
        self.world.say(f"  step {at.step}, lr {lr:.3g}: the loss or its gradient is not finite, step skipped "
                       f"({at.bad_steps} so far)")
        if gives_up:
            raise SystemExit(f"train.py: the loss was not finite several times in a row, last at step {at.step} with lr "
                             f"{lr:.3g}; try a smaller --lr, more --warmup-epochs or --clip-grad 1")

    def report_epoch(self, at):
        epoch, share = at.line["epoch"], at.line["data_share"]
        if self.args.task == "probe" and epoch % max(1, self.args.epochs // 5):  # a probe's epochs are short
            return
        values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in at.line.items()}
        self.world.say("  " + ", ".join(f"{key} {value}" for key, value in values.items()))
        if share > 0.3 and at.step and self.args.task != "probe":
            self.world.say(f"  loading takes {share:.0%} of the time: try more --workers")

    def exit(self, stop, at):
        """End after a signal, with the exit code that a shell expects."""
        self.world.say(f"  stopped at step {at.step}; continue with --resume --output-dir {self.hint}")
        raise SystemExit(128 + (stop.signal or signal.SIGTERM))

    def close(self):
        if self.file is not None:
            self.file.close()
        self.world.gather(None)  # the checkpoint is complete before any rank goes on to read it


def save_checkpoint(path, state):
    """Write a temporary file, then rename it."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise SystemExit(f"train.py: cannot save {path} ({str(error).splitlines()[0]}); the previous checkpoint is "
                         "untouched, free some space and continue with --resume") from None

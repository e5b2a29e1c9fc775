"""Runs: a folder, a log, a checkpoint, and how to continue after a kill at any moment.

Nothing here knows what is trained. Data order and all random draws are functions of (seed, epoch or
step, index), so the position of a run, its model and its optimizer are all there is to save:

    args.json        the flags, written once at the start
    log.jsonl        a line per logged step and per epoch; locked while the run goes on
    checkpoint.pt    written beside the old one, then renamed: a kill or a full disk leaves the old one whole

Lines of the log after the last checkpoint are cut off on resuming, and written again.

Needs: torch; checkpoints.py.
"""

import contextlib
import itertools
import json
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from checkpoints import read_checkpoint
from training import pictures
from training.flags import between, count, path, positive
from training.optim import check_state

RUN_FILES = ("args.json", "log.jsonl", "checkpoint.pt")
# flags that may differ when a run is resumed, and when it is judged only
MAY_DIFFER = ("resume", "output_dir", "workers", "save_minutes", "data_path", "skip_bad", "eval_only", "dry_run")
TO_JUDGE = ("device", "precision", "batch_size", "val_images", "crop_ratio", "mean_std", "val_share", "class_names",
            "eval_corruptions", "eval_pgd", "attack_eps", "data", "data_size", "data_seed", "scenes")


# ---------------------------------------------------------------------------- flags, and those of an earlier run


def run_flags(flag):
    flag("--output-dir", type=path, metavar="DIR", help="folder of the run (default: the next free number under runs/)")
    flag("--resume", action="store_true", help="continue the run in --output-dir")
    flag("--seed", type=between(0, 2**32, int), default=0, help="of weights, order, augmentation and masks")
    flag("--eval-every", type=count, default=1, help="epochs between evaluations; the last one always has one")
    flag("--save-minutes", type=between(0, 1e6), default=10.0, help="save this often, besides every epoch")
    flag("--workers", type=between(0, 1000, int), help="loading processes (default: up to 8 on a GPU, else 0)")
    flag("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    flag("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the GPU has it")
    flag("--compile", action="store_true", help="torch.compile")
    flag("--eval-only", action="store_true", help="train nothing: judge the run in --output-dir (with --resume), or a "
                                                  "classifier (--task classify --init FILE)")
    flag("--dry-run", action="store_true", help="print sizes and costs, train nothing, need no data")
    flag("--tflops", type=positive, default=100.0, help="device speed that --dry-run assumes")


def saved_flags(folder):
    """The flags of the run in a folder: of args.json, else of its checkpoint; {} where there is no run."""
    path, checkpoint = Path(folder) / "args.json", Path(folder) / "checkpoint.pt"
    flags = None
    try:
        if os.path.isfile(path):  # unlike Path.is_file it is silent about folders that are closed
            flags = json.loads(path.read_text())
        elif os.path.isfile(checkpoint):
            flags = read_checkpoint(checkpoint).get("args")
        else:
            return {}
    except (OSError, RecursionError, json.JSONDecodeError, UnicodeDecodeError):
        if not os.path.isfile(checkpoint):  # nothing was trained yet
            return {}
    if not isinstance(flags, dict) or not isinstance(flags.get("init_options"), dict | None):
        raise ValueError(f"{path} does not hold the flags of a run; remove it if checkpoint.pt is there, or start "
                         "a run in another folder")
    return {**flags, "dry_run": None}


def same_flags(args, saved, source="the run's own"):
    """ValueError where a flag contradicts the run that goes on."""
    free = MAY_DIFFER + (TO_JUDGE if args.eval_only else ())
    for name, value in vars(args).items():
        if name in saved and name not in free and value != saved[name]:
            raise ValueError(f"--{name.replace('_', '-')} {value} differs from {source} {saved[name]}; drop it or "
                             f"start a new run, with --init {args.output_dir}/checkpoint.pt from these weights")


def check_folder(args, world):
    """--output-dir may hold a run only if it is resumed. The folder is made later."""
    if args.output_dir is None:
        return
    folder = Path(args.output_dir)
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output-dir {folder} is a file, not a folder")
        taken = [name for name in RUN_FILES if (folder / name).exists()]
    except OSError as error:
        raise ValueError(f"--output-dir {str(folder)[:80]} cannot be used: {error.strerror}") from None
    if taken and not args.resume:
        raise ValueError(f"--output-dir {folder} already holds a run ({taken[0]}); choose another folder or "
                         "add --resume")
    if args.resume and not taken:
        world.say(f"no run in {folder} yet: this one starts there")
    world.gather(None)  # no rank creates it before every rank has looked


# ---------------------------------------------------------------------------- the run


class Run:
    """The folder of one run: args.json, log.jsonl, checkpoint.pt. Only rank 0 writes.

    folder  None: the next free number under runs/, taken when the run starts
    hint    the folder that a message names for --resume: that of the whole run, where this is a part of it
    """

    def __init__(self, args, world, folder=None, hint=None):
        self.args, self.world, self.hint, self.file = args, world, hint, None
        self.folder = None if folder is None else Path(folder)
        self.saved, self.saved_at = None, None
        if args.resume and (self.folder / "checkpoint.pt").is_file():
            self.saved = read_checkpoint(self.folder / "checkpoint.pt")
            if isinstance(self.saved.get("args"), dict):
                same_flags(args, self.saved["args"], "its checkpoint's")

    @property
    def weights(self):
        """The saved model, for build: None at a fresh start."""
        return None if self.saved is None else self.saved.get("model")

    def restore(self, plan, optimizer, **parts):
        """Load model, optimizer and ema if they were saved -> the position to start from."""
        self.parts, self.plan = dict(parts, optimizer=optimizer), plan
        at = SimpleNamespace(epoch=0, step=0, loss_sum=0.0, loss_count=0, bad_steps=0, bad_in_a_row=0, line={})
        if self.saved is None:
            return at

        # the same run: as many steps on as many processes
        path, saved = self.folder / "checkpoint.pt", self.saved
        before = saved.get("total_steps"), saved.get("processes")
        if before != (plan.total_steps, self.world.size):
            raise ValueError(f"{path} is of a run of {before[0]} steps on {before[1]} processes, this one has "
                             f"{plan.total_steps} on {self.world.size}; resume with as many processes and images")
        try:
            check_state(optimizer, saved["optimizer"])
            for name, part in self.parts.items():
                if part is not None:
                    part.load_state_dict(saved[name])
                if isinstance(part, torch.nn.Module):
                    check_weights(saved[name], part)
            at = position(saved, at, plan, self.args.epochs)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{path} does not fit this run ({reason}); resume with its own model and flags") from None
        return at

    def open(self, data):
        """Every check is passed: only now does the run leave a trace. data: tasks.Data"""
        self.about = dict(classes=list(data.classes), mean=list(data.mean), std=list(data.std))
        if self.world.main:
            try:
                self.make_folder()
            except OSError as error:
                raise ValueError(f"cannot write to --output-dir {self.folder or 'runs'}: {error.strerror}") from None
        self.folder = self.world.gather(self.folder)[0]
        self.hint = self.hint or self.folder
        self.saved, self.saved_at = None, time.monotonic()  # the tensors are in the model now

    def make_folder(self):
        # a numbered folder is taken by making it, so that runs that start together get one each
        (self.folder or Path("runs")).mkdir(parents=True, exist_ok=True)
        numbers = itertools.count(1)
        while self.folder is None:
            folder = Path("runs") / f"{next(numbers):04d}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                self.folder = folder

        # one process per folder; lines after the last checkpoint will be written again
        self.file = open(self.folder / "log.jsonl", "a")
        lock(self.file, self.folder)
        length = os.path.getsize(self.folder / "log.jsonl")
        if not self.args.resume and length:
            raise ValueError(f"--output-dir {self.folder} already holds a run (log.jsonl); choose another folder")
        self.file.truncate(0 if self.saved is None else min(length, self.saved["log_bytes"]))
        self.file.seek(0, os.SEEK_END)
        flags = json.dumps(vars(self.args), indent=1) + "\n"
        write_whole(self.folder / "args.json", lambda file: file.write(flags.encode()))

    def log(self, **entry):
        """One line of log.jsonl; NaN, which JSON lacks, becomes null."""
        if self.file is None:
            return
        for key, value in entry.items():
            if isinstance(value, float):
                entry[key] = float(f"{value:.6g}") if math.isfinite(value) else None
        with self.writing("log.jsonl"):
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()

    def save_is_due(self):
        return time.monotonic() - self.saved_at > 60 * self.args.save_minutes

    def save(self, at, epoch):
        """Write checkpoint.pt; epoch: the one to continue in."""
        at.epoch, self.saved_at = epoch, time.monotonic()
        if not all(param.isfinite().all() for param in self.parts["model"].parameters()):
            raise SystemExit(f"train.py: the weights are not finite after step {at.step}; the last checkpoint, if any, "
                             "is from before it; start a new run with a smaller --lr or more --warmup-epochs")
        if not self.world.main:
            return
        state = {name: part.state_dict() for name, part in self.parts.items() if part is not None}
        state |= self.about
        state |= dict(at=vars(at), args=vars(self.args), log_bytes=self.file.tell())
        state |= dict(total_steps=self.plan.total_steps, processes=self.world.size)
        with self.writing("checkpoint.pt"):
            write_whole(self.folder / "checkpoint.pt", lambda file: torch.save(state, file))

    @contextlib.contextmanager
    def writing(self, name):
        """A full disk ends the run in one sentence."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            # torch's writer of zip files has no error of its own
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            raise SystemExit(f"train.py: cannot write {self.folder / name} ({str(error).splitlines()[0]}); the "
                             "previous checkpoint is untouched: free space and continue with --resume") from None

    def save_picture(self, task, model, data):
        if self.world.main:
            with self.writing("the picture"):
                task.save_picture(self.folder, model, self.args, data)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.file is not None:
            self.file.close()  # and with it the lock
        if self.saved_at is not None and isinstance(error, ValueError):  # a broken sample, met in training
            self.world.say(f"  that mended, continue with --resume --output-dir {self.hint}")

    def fault(self, at):
        """Why the state after an epoch is not worth saving, or None."""
        if at.bad_in_a_row:
            return f"the loss was not finite in the last {at.bad_in_a_row} steps"
        if not math.isfinite(at.line.get("val_loss", 0)):
            return f"the validation loss is not finite after epoch {at.line['epoch']}"
        return None

    def finish(self, at):
        fault = self.fault(at)
        if fault:
            raise SystemExit(f"train.py: {fault}; the last checkpoint, if any, is from before; start a new run with a "
                             "smaller --lr, more --warmup-epochs or --clip-grad 1")
        if self.world.main:
            pictures.save_curves(self.folder)
        self.world.gather(None)  # the checkpoint is complete before any rank goes on to read it

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
        if not data.fitted:
            sizes = f"{plan.batch_size} x accum {args.accum} x {world.size} processes"
            world.say(f"  {plan.total_steps} steps of {plan.effective} images ({sizes}), lr {plan.lr:.3g}")
        if at.epoch == args.epochs and world.main and not (self.folder / "curves.png").exists():
            pictures.save_curves(self.folder)  # a kill came between the last checkpoint and it
        if at.step:
            world.say(f"  resumed at epoch {at.epoch}, step {at.step}")

    def report_bad_step(self, at, lr, gives_up):
        self.world.say(f"  step {at.step}, lr {lr:.3g}: the loss or its gradient is not finite, step skipped "
                       f"({at.bad_steps} so far)")
        if gives_up:
            raise SystemExit(f"train.py: the loss was not finite several times in a row, last at step {at.step} "
                             f"with lr {lr:.3g}; start a new run with a smaller --lr, more --warmup-epochs or "
                             "--clip-grad 1")

    def report_epoch(self, at):
        epoch, share = at.line["epoch"], at.line["data_share"]
        if self.args.task == "probe" and epoch % max(1, self.args.epochs // 5):  # a probe's epochs are short
            return
        values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in at.line.items()}
        if not at.step:  # fitted before the loop
            values = {key: value for key, value in values.items() if key.startswith("val_")}
        self.world.say("  " + ", ".join(f"{key} {value}" for key, value in values.items()))
        if share > 0.3 and at.step and self.args.task != "probe":
            self.world.say(f"  loading takes {share:.0%} of the time: try more --workers")

    def exit(self, stop, at):
        """End after a signal, with the exit code that a shell expects."""
        self.world.say(f"  stopped at step {at.step}; continue with --resume --output-dir {self.hint}")
        raise SystemExit(128 + (stop.signal or signal.SIGTERM))


def summary(args, line, trained, random, folder):
    """The end of the default run: what the features are worth. trained, random: last lines of the two probes"""
    # two standard errors of a difference of two accuracies
    shares = [probe["val_acc"] / 100 for probe in (trained, random)]
    error = 200 * math.sqrt(sum(p * (1 - p) for p in shares) / trained["val_images"])
    gain = trained["val_acc"] - random["val_acc"]
    learned = "learned" if gain > max(error, 3) else "did not learn: try more --epochs or another --lr"
    untrained = f"same encoder at initialization   (chance: 1 in {trained['classes']})"
    other = "mae" if args.method != "mae" else "mixmim"
    loss, baseline = line.get("val_loss", line["train_loss"]), line.get("baseline", math.nan)
    return f"""
summary
  loss on hidden patches  {loss:.3f}   (predicting the patch mean: {baseline:.3f})
  linear probe            {trained['val_acc']:.1f} %  after pre-training by {args.method}
                          {random['val_acc']:.1f} %  {untrained}
  the features            {gain:+.1f} points, {error:.1f} of which could be chance: {learned}
  picture                 {folder / 'reconstruction.png'}

try next
  python train.py --method {other}
  python train.py --depth 24 --segments 6"""


def write_whole(path, write):
    """Write a temporary file, then rename it. write(file): puts the content into a binary file."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError):
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def evaluated_weights(saved):
    """The weights that a run evaluated, from its checkpoint: where --ema kept a moving average, that."""
    probe = saved["args"]["task"] == "probe" and saved["args"].get("style") != "mae"
    learner = "head.1." if probe else ""  # the part that learns
    average = {}
    for name, value in (saved.get("ema") or {}).items():
        if name.startswith("module."):
            average[learner + name.removeprefix("module.")] = value
    return {**saved["model"], **average}


def check_weights(saved, model):
    for name, value in model.state_dict().items():
        if saved[name].dtype != value.dtype or not value.isfinite().all():
            raise ValueError(f"{name} is of another type or not finite")


def position(saved, start, plan, epochs):
    """The saved position: of the same form as that at the start, and within the run."""
    at, log_bytes = SimpleNamespace(**saved["at"]), saved["log_bytes"]
    damaged = type(log_bytes) is not int or log_bytes < 0 or not math.isfinite(at.loss_sum)
    for name, value in vars(start).items():
        damaged = damaged or type(getattr(at, name)) is not type(value)
    counts = [value for value in vars(at).values() if type(value) is int]
    if damaged or min(counts) < 0:
        raise ValueError("its position is damaged")

    first = at.epoch * plan.steps_per_epoch
    last = min(first + plan.steps_per_epoch, plan.total_steps)
    if at.epoch > epochs or not first <= at.step <= last:
        raise ValueError(f"epoch {at.epoch}, step {at.step} is no position of this run")
    return at


def lock(file, folder):
    """Refuse a second process in one folder. The lock ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process trains in {folder}; wait for it or choose another --output-dir") from None

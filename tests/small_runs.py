"""What the tests of training share: tiny models, starting a run, reading what it left, interrupting it."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from data import EvalBatches, make_loader
from tasks import load_run
from training.world import World

ROOT = Path(train.__file__).resolve().parent
CPU = torch.device("cpu")
TIMES = ("img_s", "data_share", "seconds")  # the entries of a log that two equal runs may differ in

VIT = "--embed-dim 32 --depth 2 --num-heads 2 --patch-size 8"
TINY = f"{VIT} --data-size 64 --batch-size 8 --epochs 2"  # 8 steps an epoch, 16 validation images
PRETRAIN = f"--task pretrain --segments 2 {TINY}"
CLASSIFY = f"--task classify {TINY}"
PROBE = f"--task probe --style adamw {VIT} --data-size 64 --batch-size 32 --epochs 5"
FOLDER = f"--task classify {VIT} --batch-size 4 --epochs 2 --data folder"
CONTRAST = f"--task contrast {TINY}"
HIERARCHICAL = "--img-size 32 --embed-dim 16 --window-size 4 4 2"  # 2 x 2 positions of 16 pixels
MIXMIM = f"--task pretrain --method mixmim {HIERARCHICAL} --data-size 64 --batch-size 8 --epochs 2"
RESNET = "--task classify --model resnet8 --data-size 64 --batch-size 8 --epochs 1"
DENSE = "--img-size 48 --patch-size 8 --depth 4 --embed-dim 32 --num-heads 2 --data-size 16 --batch-size 4 --epochs 2"
DETECT = f"--task detect {DENSE}"
SEGMENT = f"--task segment {DENSE} --channels 16"
STILL = "--lr 1e-30 --min-lr 0"  # weights that do not move
FLAT = "--lr 0.05 --min-lr 0.05 --warmup-epochs 0 --weight-decay 0"  # a constant learning rate


# ---------------------------------------------------------------------------- starting


def start(flags, folder=None):
    """Train in this process."""
    where = ["--output-dir", str(folder)] if folder else []
    return train.main([*flags.split(), *where])


def command(flags):
    return [sys.executable, str(ROOT / "train.py"), *flags.split()]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def shell(flags, cwd):
    """Train in a process of its own."""
    return subprocess.run(command(flags), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=400)


def torchrun(arguments, cwd, limit=180):
    """Start two processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    options = dict(env=environment(), capture_output=True, text=True, timeout=limit)
    return subprocess.run([*launch, *arguments], cwd=cwd, **options)


def refused(flags, capsys, folder=None, before_training=True):
    """The sentence with which a command line is refused."""

    def forbid(number, model, loss):
        assert not before_training, f"it trains: {flags}"

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        on_each_loss(patch, forbid)
        start(flags, folder)
    error = capsys.readouterr().err
    assert end.value.code == 2, error
    assert error.startswith("train.py: ") and error.count("\n") == 1, error
    return error


def refusal(call, *args, **kwargs):
    """The message of the ValueError; it is one sentence (one line, no full stop inside)."""
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and ". " not in message, message
    return message


def built(flags):
    """Flags -> args, task, data and the model as a run of them starts."""
    args = train.parse(flags.split())
    task = train.TASKS[args.task]
    world = World("cpu")
    data = task.open_data(args, world)
    torch.manual_seed(args.seed)
    return SimpleNamespace(args=args, task=task, data=data, model=task.build(args, data, world))


# ---------------------------------------------------------------------------- what a run left


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def weights(folder):
    return checkpoint(folder)["model"]


def position(folder):
    """Epoch and step of a checkpoint."""
    at = checkpoint(folder)["at"]
    return at["epoch"], at["step"]


def log(folder):
    """The lines of a log without times."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def epochs(folder):
    return [line for line in log(folder) if "epoch" in line]


def percents(text):
    return [float(number) for number in re.findall(r"([\d.]+) %", text)]


def judged(folder, batch_size):
    """The figures of a run's checkpoint, of its validation set in batches of another size."""
    run = load_run(folder)
    task = train.TASKS[run.args.task]
    world = World("cpu")
    data = task.open_data(run.args, world)
    batches = EvalBatches(len(data.val), batch_size, 0, 1, data.smallest)
    loader = make_loader(data.val, batches, 0, CPU, data.val_collate)
    with torch.no_grad():
        return task.evaluate(run.model, loader, run.args, data, world)


def make_pipe(path):
    """A pipe. Who opens it would wait for ever; here it ends after a moment, so that a test fails and does not hang."""
    os.mkfifo(path)

    def end():
        for _ in range(40):
            time.sleep(0.05)
            with contextlib.suppress(OSError):  # nobody has opened it
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    threading.Thread(target=end, daemon=True).start()


def inventory(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[0]}"


def assert_same_run(a, b):
    """Equal weights and logs."""
    assert_same_bits(weights(a), weights(b))
    assert log(a) == log(b)


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


# ---------------------------------------------------------------------------- interfering


def on_each_loss(monkeypatch, act):
    """Call act(number, model, loss) at every micro-batch, counted from 1; a returned tensor replaces the loss."""
    count = 0

    def watch(loss_of):
        def loss(model, *rest):
            nonlocal count
            count += 1
            value = loss_of(model, *rest)
            replaced = act(count, model, value)
            return value if replaced is None else replaced

        return loss

    for task in train.TASKS.values():
        monkeypatch.setattr(task, "loss", watch(task.loss))


class Killed(BaseException):
    pass


def kill_at_save(monkeypatch, number, after):
    """End the run as a kill would, just before or after the number-th checkpoint gets its name."""
    rename = os.replace
    count = 0

    def replace(source, target):
        nonlocal count
        if Path(target).name != "checkpoint.pt":
            return rename(source, target)
        count += 1
        if count == number and not after:
            raise Killed
        rename(source, target)
        if count == number:
            raise Killed

    monkeypatch.setattr(os, "replace", replace)


def killed(monkeypatch, number, flags, folder, after=True):
    """Start a run and kill it at the number-th save."""
    with monkeypatch.context() as patch:
        kill_at_save(patch, number, after)
        try:
            start(flags, folder)
        except Killed:
            return
    raise AssertionError("the run ended before it could be killed")


def interrupted_run(flags, folder):
    """A run that is killed after its first save -> its folder."""
    with pytest.MonkeyPatch.context() as patch:
        killed(patch, 1, flags, folder)
    return folder

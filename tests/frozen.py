"""Frozen runs: do two versions of this repository train the same weights from the same flags?

Fourteen short runs on a CPU, each some 16 steps of a tiny model, that together pass through every task. Of each
run this records the hash of its final weights and the numbers of its log. Hashes depend on the machine and on the
version of torch, so nothing is stored here: run it for both versions on one machine, then compare.

    git worktree add ../old d75e5b4
    python tests/frozen.py --repo ../old --style old --out old.json      (80 s)
    python tests/frozen.py --repo . --style new --out new.json
    python tests/frozen.py --compare old.json new.json

Style old is the command line of commit d75e5b4 and before; style new is that of today. Every flag that changes a
number is given, so that defaults may change; only `default` is what a run without --task does. New keys in a log
are reported, but are no difference.
"""

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

TIMES = ("img_s", "data_share", "seconds")  # the keys of a log that two equal runs may differ in

MACHINE = "--seed 3 --workers 0 --device cpu --precision fp32 --save-minutes 10"
SCHEDULE = "--warmup-epochs 0.5 --min-lr 1e-5 --weight-decay 0.05 --eval-every 1"
SHARED = f"{MACHINE} {SCHEDULE} --data shapes"
IMAGES = f"{SHARED} --data-size 64 --batch-size 8 --epochs 2 --schedule cosine"
VIT = "--model vit_demo --img-size 32 --patch-size 8 --embed-dim 32 --depth 4 --num-heads 2 --drop-path 0.1"
PYRAMID = "--model vit_demo --img-size 48 --patch-size 8 --embed-dim 32 --depth 4 --num-heads 2 --pyramid taps"
HIERARCHICAL = "--model mixmim_demo --img-size 32 --embed-dim 16 --window-size 4 4 2 --drop-path 0.1"
DECODER = "--decoder-embed-dim 32 --decoder-depth 1 --decoder-num-heads 1 --augment padcrop"
ADAMW = "--optimizer adamw --beta2 0.999 --blr 8e-3"
CLASSIFY = f"{IMAGES} --augment padcrop --layer-decay 1.0"
DENSE = f"{SHARED} --data-size 16 --batch-size 4 --epochs 4 --norm group --heads small --accum 1 --clip-grad 1"
DENSE = f"{DENSE} {ADAMW}"
SEGMENT = f"--task segment {DENSE} {PYRAMID} --schedule linear --channels 16"
PRETRAIN = f"--task pretrain {IMAGES} {DECODER} --accum 1 --optimizer adamw --beta2 0.95 --blr 8e-3"


class Frozen(NamedTuple):
    flags: str  # the same in both styles
    old: str = ""  # of the old style only
    new: str = "--scenes crowded"
    after: str = ""  # the run that writes the file of --init
    processes: int = 1


RUNS = {
    "default": Frozen(f"{MACHINE} --data-size 256 --epochs 2"),
    "mae": Frozen(f"{PRETRAIN} {VIT} --method mae --mask-ratio 0.75"),
    "mirl": Frozen(f"{PRETRAIN} {VIT} --method mirl --mask-ratio 0.75 --segments 2"),
    "mixmim": Frozen(f"{PRETRAIN} {HIERARCHICAL} --method mixmim --mask-ratio 0.5 --fill mix"),
    "classify": Frozen(
        f"--task classify {CLASSIFY} {VIT} {ADAMW} --accum 2 --mixup 0.8 --cutmix 1.0 --ema 0.9 --clip-grad 1"
        " --label-smoothing 0.1 --pool mean --epochs 4"),
    "init": Frozen(
        f"--task classify {IMAGES} --augment padcrop {VIT} {ADAMW} --accum 1 --layer-decay 0.7 --label-smoothing 0.1"
        " --img-size 48 32 --pool cls --init mirl/checkpoint.pt", after="mirl"),
    "probe": Frozen(
        f"{MACHINE} --data shapes --data-size 64 --batch-size 16 --epochs 4 --schedule cosine --warmup-epochs 0.5"
        " --min-lr 1e-5 --weight-decay 0 --eval-every 2 --optimizer adamw --beta2 0.999 --blr 0.2 --accum 1 --pool "
        "mean"
        f" --init mirl/checkpoint.pt {VIT.replace('--drop-path 0.1', '')}",
        "--task classify --probe", "--task probe --style adamw --scenes crowded", after="mirl"),
    "sam": Frozen(
        f"--task classify {CLASSIFY} {VIT} {ADAMW} --optimizer sam --rho 0.1 --base-optimizer adamw --accum 3"
        " --clip-grad 1 --mixup 0.8 --pool mean --epochs 5"),
    "robust": Frozen(
        f"--task classify {IMAGES} --model resnet8 --img-size 32 --augment padcrop --optimizer sgd --lr 0.05 "
        f"--accum 1"
        " --adversarial --attack-eps 4 --eval-corruptions --eval-pgd"),
    "contrast": Frozen(
        f"{CLASSIFY} {VIT} {ADAMW} --accum 1", "--task classify --loss supcon", "--task contrast --scenes crowded"),
    "detect": Frozen(f"--task detect {DENSE} {PYRAMID} --schedule cosine --global-blocks quarters"),
    "segment": Frozen(f"{SEGMENT} --global-blocks all"),
    "transfer": Frozen(
        f"{SEGMENT} --global-blocks quarters --window-size 3 --slide 32 16 --eval-flip --jitter 0.5 2 --layer-decay "
        f"0.7"
        " --init mirl/checkpoint.pt", after="mirl"),
    "ranks": Frozen(f"{PRETRAIN} {VIT} --method mirl --mask-ratio 0.75 --segments 2 --data-size 128", processes=2),
}


# ---------------------------------------------------------------------------- running


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(repo, style, name):
    """The command line of a run."""
    run = RUNS[name]
    launch = [sys.executable]
    if run.processes > 1:
        torchrun = "-m torch.distributed.run --nproc_per_node"
        launch += [*torchrun.split(), str(run.processes), "--master_port", str(free_port())]
    flags = f"{getattr(run, style)} {run.flags} --output-dir {name}"
    return [*launch, str(repo / "train.py"), *flags.split()]


def weights_hash(folder):
    """SHA-256 over names and bytes of the saved tensors, sorted by name."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def log_numbers(folder):
    """The lines of the log without times."""
    numbers = []
    for text in (folder / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        numbers.append({key: value for key, value in line.items() if key not in TIMES})
    return numbers


def run_all(repo, style, names):
    """Train all of names in a temporary folder -> {name: weights, log, seconds}."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = {**clean, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            # train
            begin = time.monotonic()
            words = command(repo, style, name)
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
            seconds = time.monotonic() - begin

            # record
            if done.returncode:
                error = done.stderr.strip()[-4000:]
                results[name] = dict(error=error)
                print(f"{name:10} {seconds:5.1f} s  failed: {error.splitlines()[-1]}", flush=True)
                continue
            run = Path(folder) / name
            weights, log = weights_hash(run), log_numbers(run)
            results[name] = dict(weights=weights, log=log, seconds=round(seconds, 1))
            print(f"{name:10} {seconds:5.1f} s  {log[-1]['step']:3} steps  {weights[:16]}", flush=True)
    return results


# ---------------------------------------------------------------------------- comparing


def log_differences(old, new):
    """What a log says otherwise, in words."""
    if len(old) != len(new):
        yield f"{len(old)} lines of log, now {len(new)}"
    for number, (before, after) in enumerate(zip(old, new), start=1):
        for key, value in before.items():
            if after.get(key) != value:
                yield f"line {number} of the log: {key} {value}, now {after.get(key, 'missing')}"


def differences(old, new):
    """What a run did otherwise, in words."""
    for version, result in (("old", old), ("new", new)):
        if "error" in result:
            yield f"the {version} run failed: {result['error'].splitlines()[-1]}"
            return
    if old["weights"] != new["weights"]:
        yield "other weights"
    yield from log_differences(old["log"], new["log"])


def added_keys(old, new):
    before = {key for line in old.get("log", []) for key in line}
    after = {key for line in new.get("log", []) for key in line}
    return sorted(after - before)


def compare(old, new):
    """Print what differs -> the number of runs that do."""
    different = 0
    for name in old:
        if name not in new:
            print(f"{name:10} not run")
            continue
        texts = list(differences(old[name], new[name]))
        different += bool(texts)
        added = added_keys(old[name], new[name])
        note = f"  (new in the log: {', '.join(added)})" if added else ""
        print(f"{name:10} {'; '.join(texts[:4]) if texts else 'equal'}{note}")
    return different


def with_sources(name):
    """A run, after the one that it starts from."""
    return [*filter(None, [RUNS[name].after]), name]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repo", type=Path, default=Path(__file__).resolve().parents[1], help="what to run")
    parser.add_argument("--style", choices=("old", "new"), default="new", help="of the command lines")
    parser.add_argument("--only", choices=RUNS, help="this run, after the one that it starts from")
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="two files of results")
    args = parser.parse_args()
    if args.compare:
        sys.exit(bool(compare(*(json.loads(path.read_text()) for path in args.compare))))
    begin = time.monotonic()
    results = run_all(args.repo.resolve(), args.style, with_sources(args.only) if args.only else RUNS)
    print(f"{time.monotonic() - begin:.0f} s, torch {torch.__version__}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(any("error" in result for result in results.values()))


if __name__ == "__main__":
    main()

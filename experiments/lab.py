"""Lab: training runs as measurements. Trained once, remembered, compared seed by seed, judged by a rule fixed before.

A claim has arms, each a function that trains with train.py and returns {figure: number}. All arms meet the same seeds, and
with a seed the same images and the same initial weights where sizes allow; so a statement about them is judged by its
paired effects e_1 .. e_n, one per seed, with the sign the paper expects:

    interval = mean(e) ± t sd(e) / sqrt(n)        t: 95th percentile of Student's t, n - 1 degrees of freedom        (1)

    not seen           it lies within ± `worth`, the smallest effect that would matter
    agrees             else, it lies above zero
    opposite           it lies below zero
    not seen           it reaches below zero, and not up to `worth`
    too noisy to say   anything else, and always with one seed

The first that applies. Beyond ten seeds t stays that of ten: a little too careful. Either end of the interval is missed by chance once in
twenty, so of many statements some are wrong. Seeds draw weights, order, masks and augmentations; the training images and those that judge
are the same for all, as in any benchmark.

A training run lies in a folder named after its flags: two claims that need the same run share it, and an interrupted one
goes on where it stopped. Every arm and seed becomes a line of JSON as soon as it is measured.

Needs: torch, torchvision, einops, tqdm (matplotlib for figures); train.py with all it needs; machine.py beside it.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shlex
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the concept files lie in the repository root
sys.path.insert(0, str(Path(__file__).resolve().parent))  # machine.py, also when this file is imported

import train
from machine import machine
from checkpoints import read_checkpoint
from data import Images, augmentation, first_of_shuffle, open_source

STUDENT = (math.nan, 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)  # one-sided 95 %, by degrees of freedom


class Statement(NamedTuple):
    """What the paper says, as a number that it expects above zero."""

    text: str
    effect: Callable  # {arm: figures} of one seed -> number
    unit: str = "points"
    worth: float = 1.0  # smaller effects would not matter


class Claim(NamedTuple):
    paper: str
    says: str  # the paper's claim, a sentence
    arms: dict  # name -> function() -> {figure: number, or None where there is none}; figures named "curve ..." are lists of (x, y)
    statements: list
    shown: tuple = ()  # the figures of the plot; default all numbers, the first four
    axes: tuple = ("", "")  # of the curves
    data: str = None  # "shapes": generated scenes whatever --data says


class Run(NamedTuple):
    folder: Path
    last: dict  # the last epoch's line of the log
    seconds: float  # of training, without evaluations

    @property
    def checkpoint(self):
        return self.folder / "checkpoint.pt"

    def curve(self, key):
        """[(step, value)] of the epochs that were evaluated."""
        lines = map(json.loads, (self.folder / "log.jsonl").read_text().splitlines())
        return [(line["step"], line[key]) for line in lines if "epoch" in line and line.get(key) is not None]


class Lab:
    """One seed of a claim: trains what its arms ask for.

    data    "shapes", or a folder of images (train/ and val/ or test/, a folder per class)
    budget  minutes per claim and seed that lengths of training were chosen for, roughly: at 10, claims took from 13 to 38 on one busy
            core. Epochs scale with it, those of linear probes do not
    tiny    sizes for a test: nothing is learnt
    """

    def __init__(self, folder, data="shapes", seed=0, budget=10.0, tiny=False, say=print):
        self.folder, self.data, self.seed, self.budget, self.tiny, self.say = Path(folder), str(data), seed, budget, tiny, say
        self.commands = []  # of the arm being measured
        self.reused = {}  # name -> seconds of training, of runs that were there before they were asked for

    def pick(self, usual, tiny):
        return tiny if self.tiny else usual

    def epochs(self, usual):
        """So many in the default budget, in proportion in another, at least one."""
        return 1 if self.tiny else max(1, round(usual * self.budget / 10))

    def images(self, count, val=2000):
        """Flags for `count` training images and `val` that judge, or as many as there are; of shapes at least `val`."""
        count, val = self.pick((count, val), (min(count, 48), 24))
        if self.data == "shapes":  # a quarter of the set judges
            return dict(data="shapes", data_size=max(count, 4 * val), train_images=count)
        there = files_in(self.data)
        return dict(data="folder", data_path=self.data, train_images=min(count, there["train"]), val_images=min(val, there["val"] or there["test"]))

    def train(self, **flags):
        """A run of train.py with these flags, or the finished one that is there -> Run."""
        flags = {"seed": self.seed, "eval_every": 10_000, **flags}
        name = hashlib.sha256(json.dumps(sorted((key, str(value)) for key, value in flags.items())).encode()).hexdigest()[:10]
        kind = "-".join(str(flags[key]) for key in ("task", "method", "model", "optimizer") if flags.get(key))
        folder = self.folder / f"{kind}-seed{self.seed}-{name}"
        argv = as_argv(flags)
        # a line that a reader can type: data and earlier runs by name, not by this machine's paths
        told = {key: f"runs/{Path(value).relative_to(self.folder)}" if key in ("data_path", "init") and value and str(value) != self.data else value
                for key, value in flags.items()}
        if told.get("data_path") == self.data:
            told["data_path"] = "DATA"
        self.commands.append(f"python train.py {shlex.join(as_argv({**told, 'output_dir': f'runs/{folder.name}'}))}")
        reused = finished(folder)
        if not reused:
            self.say(f"  {self.commands[-1]}")
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(f"{folder}.txt", "a") as output, contextlib.redirect_stdout(output), alone(output):
                if not finished(folder):  # another claim may have trained it while this one waited
                    resume = ["--resume"] if (folder / "args.json").exists() else []
                    train.main([*argv, *resume, "--output-dir", str(folder)])
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        epochs = [line for line in lines if "epoch" in line]
        args = json.loads((folder / "args.json").read_text())
        steps = epochs[-1]["step"] / len(epochs)  # per epoch; several processes are not for this file
        speeds = [line["img_s"] for line in epochs if line.get("img_s")]  # none in an epoch that ended as the run was stopped
        seconds = len(epochs) * steps * args["batch_size"] * args["accum"] * statistics.fmean(1 / speed for speed in speeds)
        if reused:
            self.reused[f"runs/{folder.name}"] = seconds
        return Run(folder, epochs[-1], seconds)

    def load(self, run):
        """The model a run ended with, in eval mode, and its flags."""
        saved = read_checkpoint(run.checkpoint)
        args = train.argparse.Namespace(**{**train.DEFAULTS["all"], **saved["args"]})  # older files lack newer flags
        model = train.build_model(args, args.num_classes, resumed=True)
        model.load_state_dict(saved["model"])
        return model.eval(), args


def untrained(args):
    """The model of a run as it was before its first step."""
    torch.manual_seed(args.seed)  # as train.py does
    return train.build_model(args, args.num_classes, resumed=True).eval()


def as_argv(flags):
    """{"img_size": 32, "probe": True, "init": None} -> ["--img-size", "32", "--probe"]"""
    argv = []
    for key, value in flags.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            argv += [f"--{key.replace('_', '-')}", *map(str, values)]
    return argv


@functools.cache
def files_in(data):
    """How many images a folder holds, by split."""
    return {split: sum(1 for _ in Path(data).glob(f"{split}/*/*")) for split in ("train", "val", "test")}


@contextlib.contextmanager
def alone(file):
    """Two claims at once may need the same run: the second waits for the first. Ends with the process, also by kill -9."""
    try:
        import fcntl
    except ImportError:  # Windows: do not start two at once
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def finished(folder):
    """Did the run there come to its end? What counts is the checkpoint, which is written after the log."""
    try:
        saved = read_checkpoint(folder / "checkpoint.pt")
        return saved["epoch"] == saved["args"]["epochs"]
    except (ValueError, KeyError):
        return False


def images_of(args, count, training=False):
    """The first images of a run's set, not augmented: x (B, C, H, W), y (B,), the masks' noise (B, N) as in evaluation; the set, their places in it."""
    source = open_source(args.data, args.data_path, training, tuple(args.img_size), args.data_size)
    indices = first_of_shuffle(len(source), min(count, len(source)))  # train.py takes its images from the same shuffle
    noise_size = math.prod(side // args.mask_patch_size for side in args.img_size) if args.task == "pretrain" else 0
    some = Images(source, augmentation("none", args.img_size, source.mean, source.std), args.seed, indices, noise_size)
    x, y, noise = zip(*(some[0, i] for i in range(len(some))))
    return torch.stack(x), torch.tensor(y), torch.stack(noise), source, indices


@torch.no_grad()
def multiply_adds(model, img_size, *more):
    """Of a forward pass, per image, in millions. more: what the model wants besides images. A pair is measured, as MixMIM mixes."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, *img_size), *more)
    return counter.get_total_flops() / 2 / 2 / 1e6  # two operations, two images


# ---------------------------------------------------------------------------- measuring and remembering


def read_rows(path):
    """The measurements in a file, a line each; a last line cut by a kill does not count. ValueError if it is another file."""
    rows = []
    for number, line in enumerate(whole_lines(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            [row[key] for key in ("claim", "arm", "seed", "figures", "data", "budget", "tiny", "commands", "seconds", "trained_before", "processor",
                                  "threads", "torch")]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} line {number} is no measurement of a claim; move that file away or give another folder") from None
        rows.append(row)
    return rows


def whole_lines(path):
    text = Path(path).read_text() if Path(path).exists() else ""
    return text[:text.rfind("\n") + 1]


def append(path, row):
    """At once, so that nothing measured is lost."""
    whole = whole_lines(path).encode()
    if whole and len(whole) < Path(path).stat().st_size:
        os.truncate(path, len(whole))  # a kill had cut the last line: its arm is measured anew
    with open(path, "a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def measure(name, make, lab, path):
    """All arms of one seed -> rows, each appended to the file at `path` as soon as it is there; what is there is not measured again."""
    claim, rows, where = make(lab), [], machine("cuda" if torch.cuda.is_available() else "cpu")
    data = claim.data or ("shapes" if lab.data == "shapes" else Path(lab.data).resolve().name)
    what = dict(claim=name, seed=lab.seed, data=data, budget=lab.budget, tiny=lab.tiny)
    known = {row["arm"]: row for row in read_rows(path) if {key: row.get(key) for key in what} == what}
    for arm, function in claim.arms.items():
        if arm not in known:
            lab.say(f"{name}, seed {lab.seed}: {arm}")
            lab.commands, began = [], time.monotonic()
            figures = {key: value if finite(value) else None for key, value in function().items()}
            # what another claim trained counts too, but nothing twice in one claim and seed; the last word of a command is its run
            here = {command.split()[-1] for row in known.values() for command in row["commands"]}
            before = sum(seconds for run, seconds in lab.reused.items() if run not in here)
            row = dict(**what, arm=arm, figures=figures, commands=lab.commands, seconds=round(time.monotonic() - began, 1), trained_before=round(before, 1),
                       **where, day=time.strftime("%Y-%m-%d"))
            append(path, row)
            known[arm] = row
        rows.append(known[arm])
    return claim, rows


# ---------------------------------------------------------------------------- judging and showing


def judge(effects, worth):
    """Effects, one per seed, positive where the paper expects it -> one of four verdicts, see (1). NaN is too noisy."""
    if len(effects) < 2 or not all(map(math.isfinite, effects)):
        return "too noisy to say"
    mean = statistics.fmean(effects)
    reach = STUDENT[min(len(effects), len(STUDENT)) - 1] * statistics.stdev(effects) / len(effects) ** 0.5
    if -worth < mean - reach and mean + reach < worth:
        return "not seen"
    if mean - reach > 0:
        return "agrees"
    if mean + reach < 0:
        return "opposite"
    return "not seen" if mean + reach < worth else "too noisy to say"


def spread(values):
    """Mean, and ± sample standard deviation where there are several; three digits of the larger. n/a where a seed has none."""
    if not all(finite(value) for value in values):
        return "n/a"
    mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    largest = max(abs(mean), deviation)
    digits = min(6, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 0
    return f"{mean:,.{digits}f}" + (f" ± {deviation:,.{digits}f}" if len(values) > 1 else "")


def by_seed(claim, rows):
    """{seed: {arm: figures}} of the seeds that have all arms."""
    seeds = {}
    for row in rows:
        if row["arm"] in claim.arms:
            seeds.setdefault(row["seed"], {})[row["arm"]] = row["figures"]
    return {seed: {arm: arms[arm] for arm in claim.arms} for seed, arms in sorted(seeds.items()) if len(arms) == len(claim.arms)}


def verdicts(claim, rows):
    """[(statement, effects, verdict)]"""
    seeds = by_seed(claim, rows)
    found = []
    for statement in claim.statements:
        effects = []
        for arms in seeds.values():
            try:
                effects.append(float(statement.effect(arms)))
            except TypeError:  # a figure is None
                effects.append(math.nan)
        found.append((statement, effects, judge(effects, statement.worth)))
    return found


def finite(value):
    """A number that is one, or a curve of them."""
    return all(math.isfinite(y) for _, y in value) if isinstance(value, list) else value is not None and math.isfinite(value)


def numbers(claim, rows):
    """{arm: {figure: [a number per seed]}}, arms and figures in their order; curves left out."""
    table = {}
    for arms in by_seed(claim, rows).values():
        for arm, figures in arms.items():
            for key, value in figures.items():
                if not key.startswith("curve"):
                    table.setdefault(arm, {}).setdefault(key, []).append(value)
    return table


def table(claim, rows):
    """Markdown: a line per arm, a column per figure."""
    cells = numbers(claim, rows)
    keys = list(dict.fromkeys(key for figures in cells.values() for key in figures))
    lines = [f"| arm | {' | '.join(keys)} |", "| --- |" + " ---: |" * len(keys)]
    lines += [f"| {arm} | {' | '.join(spread(figures[key]) if key in figures else '' for key in keys)} |" for arm, figures in cells.items()]
    return "\n".join(lines)


def told(claim, rows):
    """The verdicts as lines of text."""
    return "\n".join(f"{verdict:17} {statement.text}: {spread(effects)} {statement.unit} (n = {len(effects)}; an effect matters from {statement.worth:g})"
                     for statement, effects, verdict in verdicts(claim, rows))


def draw(path, name, claim, rows):
    """A panel per figure: each arm's mean, and a dot per seed; then a panel of curves, where there are any."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        raise ValueError("matplotlib is not installed; pip install matplotlib") from None
    cells, seeds = numbers(claim, rows), by_seed(claim, rows)
    keys = claim.shown or list(dict.fromkeys(key for figures in cells.values() for key in figures))[:4]
    curves = sorted({key for arms in seeds.values() for figures in arms.values() for key in figures if key.startswith("curve")})
    panels = len(keys) + len(curves)
    figure, axes = plt.subplots(1, panels, figsize=(1.5 + 3.6 * panels, 1.4 + max(0.34 * len(cells), 2.4)), layout="constrained", squeeze=False)
    for n, (ax, key) in enumerate(zip(axes[0], keys)):
        for k, (arm, figures) in enumerate(cells.items()):
            values = [value for value in figures.get(key, []) if value is not None]
            ax.plot(values, [k] * len(values), "o", color=f"C{k % 10}", alpha=0.5, markersize=4)
            if values:
                ax.plot(statistics.fmean(values), k, "|", color=f"C{k % 10}", markersize=16, markeredgewidth=2.5)
        ax.set(yticks=range(len(cells)), ylim=(len(cells) - 0.5, -0.5), title=textwrap.fill(key, 34))
        ax.set_yticklabels(cells if n == 0 else [])
        ax.grid(alpha=0.3)
    for ax, key in zip(axes[0][len(keys):], curves):
        for k, arm in enumerate(cells):
            lines = [arms[arm][key] for arms in seeds.values() if arms[arm].get(key)]
            for line in lines:
                ax.plot(*zip(*line), color=f"C{k % 10}", linewidth=0.7, alpha=0.4)
            if lines:  # the runs of an arm share their steps
                ax.plot([x for x, _ in lines[0]], [statistics.fmean(y) for y in zip(*([y for _, y in line] for line in lines))], ".-", color=f"C{k % 10}",
                        label=arm)
        ax.set(xlabel=claim.axes[0], ylabel=claim.axes[1], title=textwrap.fill(key.removeprefix("curve "), 34))
        if ax.lines:
            ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    figure.suptitle(f"{name} ({len(seeds)} {'seeds' if len(seeds) > 1 else 'seed'}; bar: mean, dot: seed)")
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)

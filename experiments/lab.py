"""Lab: command lines as measurements. Run once, remembered, compared seed by seed, judged by a fixed rule.

A claim (claims.py) has arms: a command line of train.py, and what follows from what it trained. All arms see the same
seeds, and with a seed the same images and, where sizes allow, the same initial weights. So a statement about them is
judged by its effects e_1 .. e_n, one per seed, positive where the paper expects it:

    interval = mean(e) ± t sd(e) / sqrt(n)        t: 95th percentile of Student's t, n - 1 degrees of freedom    (1)

    not seen           the interval lies within ± `worth`, the smallest effect that would matter
    agrees             it lies above zero
    opposite           it lies below zero
    not seen           it reaches below zero, and not up to `worth`
    too noisy to say   anything else, and always with one seed

The first that applies. Beyond ten seeds t stays that of ten, which is a little too careful. Each end of an interval is
wrong once in twenty, so some of many statements are. The images are the same for all seeds.

A training run lies in a folder named after its flags: two claims that need the same run share it, and an interrupted
one is resumed. Each arm and seed is a line of JSON, written as soon as it is measured, with the commands that repeat
it: those that ran, with DATA for the folder of the images and runs/ for that of the runs.

Needs: torch, torchvision, einops, tqdm (matplotlib for figures); train.py and benchmarks/machine.py.
"""

import contextlib
import hashlib
import itertools
import json
import math
import shlex
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the concept files are in the repository root
sys.path.insert(0, str(Path(__file__).resolve().parent))

import first_blocks
import train
from benchmarks.machine import append, finite, machine, plus_minus, read_rows, spread
from checkpoints import read_checkpoint
from training.pictures import pyplot, read_log

STUDENT = (math.nan, 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)  # one-sided 95 %, by n - 1
SHAPES = "--data shapes --scenes crowded --data-size 16000"  # 4,000 more are the validation set
# for tests of the program: nothing is learned. Each replaces a flag that a command has, and adds none
TINY = ("--epochs 1 --train-images 32 --val-images 24 --data-size 96 --batch-size 8 --img-size 32 --embed-dim 16 "
        "--depth 4 --num-heads 1 --segments 2 --decoder-embed-dim 32 --decoder-num-heads 2 --channels 8")
KEYS = ("claim", "arm", "seed", "figures", "data", "commands", "seconds", "trained_before", "processor", "threads",
        "torch")


# ---------------------------------------------------------------------------- command lines


def read_flags(text):
    """"--lr 1e-3 --single" -> {"--lr": ["1e-3"], "--single": []}"""
    flags = {}
    for word in shlex.split(text):
        if word.startswith("--"):
            flags[word] = values = []
        else:
            values.append(word)
    return flags


def command(words):
    """As a reader types it."""
    return f"python {shlex.join(words)}"


class Lab:
    """One seed of a claim.

    folder     of the training runs
    data       what train.py calls it; claims on detection and segmentation have generated scenes of their own
    times      factor on the epochs of each arm's first run
    overrides  flags that replace those of the commands that have them: pilots, and TINY
    """

    def __init__(self, folder, data="shapes", data_path=None, seed=0, times=1.0, overrides="", say=print):
        self.folder, self.data, self.data_path, self.seed = Path(folder), data, data_path, seed
        self.times, self.overrides, self.say = times, overrides, say
        self.trained_before = {}  # folder of a run that existed -> seconds of its training

    def words(self, *texts, init=None, seed=None, times=1.0):
        """The command line of a run: later texts replace flags of earlier ones."""
        flags = {}
        for text in texts:
            flags |= read_flags(text)
        if "--data" not in flags:
            flags |= read_flags(SHAPES if self.data == "shapes" else f"--data {self.data} --data-path DATA")
        if times != 1:
            flags["--epochs"] = [str(max(1, round(int(flags["--epochs"][0]) * times)))]
        flags.setdefault("--eval-every", ["10000"])
        flags["--seed"] = [str(self.seed if seed is None else seed)]
        for name, values in read_flags(self.overrides).items():
            if name in flags:
                flags[name] = values
        if init:
            flags["--init"] = [init]

        # the folder is named after all of them
        digest = hashlib.sha256(json.dumps(sorted(flags.items())).encode()).hexdigest()[:10]
        kind = [flags[name][0] for name in ("--task", "--method", "--model", "--optimizer") if name in flags]
        flags["--output-dir"] = [f"runs/{'-'.join(kind)}-seed{flags['--seed'][0]}-{digest}"]
        return ["train.py", *itertools.chain.from_iterable([name, *values] for name, values in flags.items())]

    def plan(self, claim, arm):
        """[(name, words)]: "" is the arm's first run, the others are named by the claim's `then`."""
        flags, more = as_pair(claim["arms"][arm])
        steps, main, init = [], None, None
        if flags is not None:
            main = self.words(claim["common"], flags, times=self.times)
            init = f"{main[-1]}/checkpoint.pt"
            steps.append(("", main))
        for name, text in claim.get("then", {}).items():
            extra = more.get(name, "") if isinstance(more, dict) else more
            if extra is None:
                continue
            repeats = claim.get("probes", 1) if "--task probe" in text else 1
            for seed in range(self.seed, self.seed + 1000 * repeats, 1000):
                start = init
                depth = depth_of(self.words(text, extra))
                if main and depth < depth_of(main):  # a smaller depth than was pre-trained: the first blocks
                    steps.append(("cut", ["experiments/first_blocks.py", init, str(depth)]))
                    start = first_blocks.output(init, depth)
                steps.append((name, self.words(text, extra, init=start, seed=seed)))
        return steps

    def place(self, word):
        """From a command that anyone can type to the files of this machine."""
        if word == "DATA":
            return str(self.data_path)
        return str(self.folder / word[5:]) if word.startswith("runs/") else word

    def train(self, words):
        """The run of a command line, trained now or before -> Run."""
        name = words[-1]
        folder, argv = Path(self.place(name)), [self.place(word) for word in words[1:]]
        existed = finished(folder)
        if not existed:
            self.say(f"  {command(words)}")
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(f"{folder}.txt", "a") as output, contextlib.redirect_stdout(output), locked(output):
                if not finished(folder):  # another process may have trained it while this one waited
                    resume = ["--resume"] if (folder / "args.json").exists() else []
                    train.main([*argv, *resume])
        run = Run(folder)
        if existed:
            self.trained_before[name] = run.value("seconds")
        return run

    def arm(self, claim, arm):
        """Train what an arm needs -> {figure: number, None where it is not one, or curve}."""
        runs = {}
        for name, words in self.plan(claim, arm):
            if words[0] == "train.py":
                runs.setdefault(name, []).append(self.train(words))
            else:
                first_blocks.main([self.place(word) for word in words[1:]])

        # figures of the logs, then those measured on the trained models
        figures = {}
        for key, source in claim["figures"].items():
            name, _, what = source.rpartition(".")
            if name in runs:
                figures[key] = average([run.value(what) for run in runs[name]])
        if "measure" in claim:
            figures |= claim["measure"](self, runs)
        return {key: value if is_number(value) else None for key, value in figures.items()}


def as_pair(arm):
    """An arm is flags of the first run; or a pair: those (None: no such run), and flags of what follows."""
    return arm if isinstance(arm, tuple) else (arm, "")


def depth_of(words):
    return int(words[words.index("--depth") + 1]) if "--depth" in words else math.inf


class Run:
    """What a training run left behind."""

    def __init__(self, folder):
        self.folder, self.checkpoint = Path(folder), Path(folder) / "checkpoint.pt"
        self.epochs = [line for line in read_log(self.folder) if "epoch" in line]

    def value(self, what):
        """"val_acc": its last one. "val_acc first", "mean" or "curve": of all evaluations."""
        key, _, how = what.partition(" ")
        if key in ("seconds", "minutes"):
            return self.seconds() / (60 if key == "minutes" else 1)
        curve = [(line["step"], line[key]) for line in self.epochs if line.get(key) is not None]
        if not curve or how == "curve":
            return curve or None
        values = [value for _, value in curve]
        return statistics.fmean(values) if how == "mean" else values[0 if how == "first" else -1]

    def seconds(self):
        """Of training, without evaluations."""
        args = json.loads((self.folder / "args.json").read_text())
        images = self.epochs[-1]["step"] * args["batch_size"] * args["accum"]
        speeds = [line["img_s"] for line in self.epochs if line.get("img_s")]  # none in an epoch resumed at its end
        return images * statistics.fmean(1 / speed for speed in speeds)


def average(values):
    """Of runs that differ in their seed. A curve is that of the first."""
    if isinstance(values[0], list):
        return values[0]
    return statistics.fmean(values) if all(map(finite, values)) else None


def is_number(value):
    return all(finite(y) for _, y in value) if isinstance(value, list) else finite(value)


@contextlib.contextmanager
def locked(file):
    """Two claims at once may need the same run: the second waits. The lock ends with its process."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX)
    except ImportError:  # Windows: start one claim at a time
        pass
    yield


def finished(folder):
    """The checkpoint decides, as it is written after the log."""
    try:
        saved = read_checkpoint(Path(folder) / "checkpoint.pt")
        return saved["at"]["epoch"] == saved["args"]["epochs"]
    except (ValueError, KeyError):
        return False


# ---------------------------------------------------------------------------- remembering


def measure(name, claim, lab, path):
    """All arms of one seed -> rows, each appended to the file; what the file has is not measured again."""
    rows, where = [], machine("cuda" if torch.cuda.is_available() else "cpu")
    known = {}
    for row in read_rows(path, KEYS):
        known[row["arm"], row["seed"], tuple(row["commands"])] = row
    for arm in claim["arms"]:
        commands = [command(words) for _, words in lab.plan(claim, arm)]
        key = arm, lab.seed, tuple(commands)
        if key not in known:
            lab.say(f"{name}, seed {lab.seed}: {arm}")
            began, lab.trained_before = time.monotonic(), {}
            figures = lab.arm(claim, arm)
            seconds = time.monotonic() - began

            # what other claims trained counts too, but nothing twice in one claim and seed
            counted = {line.split()[-1] for row in rows for line in row["commands"]}
            before = sum(value for run, value in lab.trained_before.items() if run not in counted)
            data = "shapes" if claim.get("data") == "shapes" else lab.data
            what = dict(claim=name, arm=arm, seed=lab.seed, data=data, times=lab.times, overrides=lab.overrides)
            cost = dict(seconds=round(seconds, 1), trained_before=round(before, 1), day=time.strftime("%Y-%m-%d"))
            known[key] = dict(**what, figures=figures, commands=commands, **cost, **where)
            append(path, known[key])
        rows.append(known[key])
    return rows


# ---------------------------------------------------------------------------- judging


class Statement(NamedTuple):
    """What the paper says, as an effect that it expects above zero."""

    text: str
    effect: object  # {arm: figures} of one seed -> number
    unit: str = "points"
    worth: float = 1.0  # smaller effects would not matter


def reach(deviation, n):
    """Half the length of the interval (1)."""
    return STUDENT[min(n, len(STUDENT)) - 1] * deviation / n**0.5


def decide(mean, deviation, n, worth):
    low, high = mean - reach(deviation, n), mean + reach(deviation, n)
    if -worth < low and high < worth:
        return "not seen"
    if low > 0:
        return "agrees"
    if high < 0:
        return "opposite"
    return "not seen" if high < worth else "too noisy to say"


def judge(effects, worth):
    """Effects, one per seed -> one of four verdicts. NaN is too noisy."""
    if len(effects) < 2 or not all(map(math.isfinite, effects)):
        return "too noisy to say"
    return decide(statistics.fmean(effects), statistics.stdev(effects), len(effects), worth)


def seeds_needed(effects, worth, most=1000):
    """How many seeds would decide, if mean and deviation stayed as they are; None where they are not known."""
    if len(effects) < 2 or not all(map(math.isfinite, effects)):
        return None
    mean, deviation = statistics.fmean(effects), statistics.stdev(effects)
    for n in range(len(effects), most):
        if decide(mean, deviation, n, worth) != "too noisy to say":
            return n
    return most


def by_seed(claim, rows):
    """{seed: {arm: figures}} of the seeds that have all arms."""
    seeds = {}
    for row in rows:
        seeds.setdefault(row["seed"], {})[row["arm"]] = row["figures"]
    complete = {}
    for seed in sorted(seeds):
        if claim["arms"].keys() <= seeds[seed].keys():
            complete[seed] = {arm: seeds[seed][arm] for arm in claim["arms"]}
    return complete


def verdicts(claim, rows):
    """[(statement, effects, verdict)]"""
    result, seeds = [], by_seed(claim, rows)
    for text, values in claim["expects"].items():
        statement, effects = Statement(text, *values), []
        for arms in seeds.values():
            try:
                effects.append(float(statement.effect(arms)))
            except (TypeError, KeyError):  # a figure is None, or was not measured
                effects.append(math.nan)
        result.append((statement, effects, judge(effects, statement.worth)))
    return result


# ---------------------------------------------------------------------------- showing


def numbers(claim, rows):
    """{arm: {figure: [a number per seed]}}, curves left out."""
    table = {}
    for arms in by_seed(claim, rows).values():
        for arm, figures in arms.items():
            for key, value in figures.items():
                if not key.startswith("curve"):
                    table.setdefault(arm, {}).setdefault(key, []).append(value)
    return table


def markdown(head, lines):
    """Rows of cells as a table whose first column is text."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def table(claim, rows, keys=None):
    """A line per arm, a column per figure: mean ± deviation over seeds."""
    cells = numbers(claim, rows)
    keys = keys or list(dict.fromkeys(itertools.chain.from_iterable(cells.values())))
    lines = []
    for arm, figures in cells.items():
        lines.append([arm] + [spread(figures[key]) if key in figures else "" for key in keys])
    return markdown(["arm", *keys], lines)


def judged(claim, rows):
    """Cells of a line per statement: its text, verdict, and effect ± half its interval."""
    lines = []
    for statement, effects, verdict in verdicts(claim, rows):
        effect, needed = spread(effects), seeds_needed(effects, statement.worth)
        if len(effects) > 1 and all(map(finite, effects)):
            effect = plus_minus(statistics.fmean(effects), reach(statistics.stdev(effects), len(effects)))
        more = f", {needed} seeds would decide" if verdict == "too noisy to say" and needed else ""
        lines.append([statement.text, f"**{verdict}**{more}", f"{effect} {statement.unit}", f"{statement.worth:g}"])
    return lines


def verdict_table(claim, rows):
    return markdown(["statement", "verdict", "effect ± interval", "matters from"], judged(claim, rows))


def draw(path, name, claim, rows):
    """A panel per figure: each arm's mean, and a dot per seed. Then a panel per curve."""
    cells, seeds = numbers(claim, rows), by_seed(claim, rows)
    arms = list(seeds.values())
    keys = list(claim.get("shown") or claim["figures"])[:4]
    keys = [key for key in keys if not key.startswith("curve")]
    curves = sorted({key for figures in arms[0].values() for key in figures if key.startswith("curve")})
    panels, height = len(keys) + len(curves), max(0.34 * len(cells), 2.4)
    plt = pyplot()
    size = (1.5 + 3.6 * panels, 1.4 + height)
    figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    for ax, key in zip(axes[0], [*keys, *curves]):
        for row, arm in enumerate(arms[0]):
            values = [figures[arm][key] for figures in arms if figures[arm].get(key) is not None]
            if values and key in curves:
                draw_curves(ax, values, f"C{row % 10}", arm)
            elif values:
                ax.plot(values, [row] * len(values), "o", color=f"C{row % 10}", alpha=0.5, markersize=4)
                ax.plot(statistics.fmean(values), row, "|", color=f"C{row % 10}", markersize=16, markeredgewidth=2.5)
        if key in keys:
            ax.set(yticks=range(len(cells)), ylim=(len(cells) - 0.5, -0.5), yticklabels=[])
        else:
            ax.set_xlabel(key.partition(" over ")[2] or "training steps")
            ax.legend(fontsize=7)
        ax.set_title(textwrap.fill(key.removeprefix("curve "), 34))
        ax.grid(alpha=0.3)
    axes[0][0].set_yticklabels(arms[0])
    figure.suptitle(f"{name} ({len(seeds)} {'seeds' if len(seeds) > 1 else 'seed'}; bar: mean, dot: seed)")
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def draw_curves(ax, lines, color, arm):
    """Each seed thinly, their mean boldly: the runs of an arm are evaluated at the same steps."""
    for line in lines:
        ax.plot(*zip(*line), color=color, linewidth=0.7, alpha=0.4)
    means = [statistics.fmean(y for _, y in points) for points in zip(*lines)]
    ax.plot([step for step, _ in lines[0]], means, ".-", color=color, label=arm)

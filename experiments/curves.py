"""Curves: what training runs logged, as a figure. One run in full, or groups of runs with their spread over seeds.

    python experiments/curves.py runs/0001                     loss, learning rate and what was evaluated -> curves.png
    python experiments/curves.py --run "random start" runs/random* --run "MAE" runs/mae* --key box_ap50

Takes the folders (or log.jsonl files) that train.py wrote. Each --run is a name and runs that differ in their seed: the
table gives mean and sample standard deviation at every epoch that all of them evaluated, the figure draws each run
thinly and the mean boldly, over training steps.

Needs: torch, torchvision; training/pictures.py; matplotlib for the figure.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import spread
from training.pictures import curve, draw_run, pyplot, read_log


def read_curve(path, key):
    """Of the epochs of a run."""
    epochs = [line for line in read_log(path) if "epoch" in line]
    points = curve(epochs, key)
    if not points:
        known = sorted(set().union(*epochs) - {"epoch", "step"})
        raise ValueError(f"{path} has no epoch with {key!r}; --key can be {', '.join(known)}")
    return points


def summarize(curves):
    """{step: values} over the steps that all curves have."""
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: [points[step] for points in curves] for step in steps}


def table(groups, key):
    """Markdown: a line per name, a column per step."""
    rows = {name: summarize(curves) for name, curves in groups.items()}
    steps = sorted(set().union(*rows.values()))
    lines = [f"| {key} after | " + " | ".join(f"{step:,} steps" for step in steps) + " |"]
    lines.append("| --- |" + " ---: |" * len(steps))
    for name, row in rows.items():
        cells = [spread(row[step]) if step in row else "" for step in steps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path, groups, key):
    figure, ax = pyplot().subplots(figsize=(6, 4), layout="constrained")
    for k, (name, curves) in enumerate(groups.items()):
        for points in curves:
            ax.plot(list(points), list(points.values()), color=f"C{k}", linewidth=0.8, alpha=0.5)
        means = {step: statistics.fmean(values) for step, values in summarize(curves).items()}
        label = f"{name} ({len(curves)} seeds)"
        ax.plot(list(means), list(means.values()), "o-", color=f"C{k}", linewidth=2, label=label)
    ax.set(xlabel="training steps", ylabel=key, xlim=(0, None))
    if "loss" not in key:
        ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=120, format="png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?", help="one run, drawn in full")
    parser.add_argument("--run", action="append", nargs="+", metavar=("NAME", "FOLDER"), help="a name and its runs")
    parser.add_argument("--key", default="box_ap50", help="of --run: what to draw (default %(default)s)")
    parser.add_argument("--output", default="curves.png", help="the figure (default %(default)s)")
    flags = parser.parse_args(argv)
    try:
        if (flags.folder is None) == (flags.run is None):
            raise ValueError("give the folder of one run, or --run NAME FOLDER ...")
        if flags.folder:
            draw_run(flags.output, read_log(flags.folder))
        else:
            draw_groups(flags)
    except (ValueError, OSError) as error:
        print(f"curves.py: {error}; see --help", file=sys.stderr)
        sys.exit(2)
    print(f"saved {flags.output}")


def draw_groups(flags):
    groups = {}
    for name, *paths in flags.run:
        if not paths or name in groups:
            raise ValueError(f"--run {name!r} needs at least one folder, and a name of its own")
        groups[name] = [read_curve(path, flags.key) for path in paths]
        if not summarize(groups[name]):
            raise ValueError(f"the runs of {name!r} have no step in common; they must differ in their seed only")
    print(table(groups, flags.key))
    draw(flags.output, groups, flags.key)


if __name__ == "__main__":
    main()

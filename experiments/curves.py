"""Curves: a figure of training runs, epoch by epoch, with their spread over seeds.

    python experiments/curves.py --run "random start" runs/random* --run "MAE" runs/mae* --key box_ap50

Takes the folders (or log.jsonl files) that train.py wrote. Each --run is a name and runs that differ in
their seed: the table gives mean and sample standard deviation at every epoch that all of them
evaluated, the figure draws each run thinly and the mean boldly, over training steps.

Needs: Python alone; matplotlib for the figure.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path


def read_curve(path, key):
    """{step: value} of the epoch lines that have the key."""
    path = Path(path)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a folder that train.py wrote, or its log.jsonl")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        curve = {line["step"]: line[key] for line in lines if "epoch" in line and line.get(key) is not None}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no log of train.py; give its log.jsonl") from None
    if not curve:
        known = sorted({name for line in lines if "epoch" in line for name in line} - {"epoch", "step"})
        raise ValueError(f"{path} has no epoch with {key!r}; --key can be {', '.join(known)}")
    return curve


def summarize(curves):
    """[{step: value}] -> {step: (mean, sample standard deviation or None)} over the steps that all of them have."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = {step: [curve[step] for curve in curves] for step in steps}
    return {step: (statistics.fmean(some), statistics.stdev(some) if len(some) > 1 else None) for step, some in values.items()}


def table(rows, key):
    """Markdown: a line per run, a column per step."""
    steps = sorted({step for row in rows.values() for step in row})
    lines = [f"| {key} after | " + " | ".join(f"{step:,} steps" for step in steps) + " |", "| --- |" + " ---: |" * len(steps)]
    for name, row in rows.items():
        cells = ["" if step not in row else f"{row[step][0]:.1f}" + ("" if row[step][1] is None else f" ± {row[step][1]:.1f}") for step in steps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path, groups, rows, key):
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        raise ValueError("matplotlib is not installed; pip install matplotlib") from None
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for k, (name, curves) in enumerate(groups.items()):
        for curve in curves:
            ax.plot(list(curve), list(curve.values()), color=f"C{k}", linewidth=0.8, alpha=0.5)
        label = f"{name} ({len(curves)} seed{'s' * (len(curves) > 1)})"
        ax.plot(list(rows[name]), [mean for mean, _ in rows[name].values()], "o-", color=f"C{k}", linewidth=2, label=label)
    ax.set(xlabel="training steps", ylabel=key, ylim=(0, None), xlim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=120, format="png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", action="append", nargs="+", required=True, metavar=("NAME", "FOLDER"), help="a name and the runs that bear it")
    parser.add_argument("--key", default="box_ap50", help="what to draw (default %(default)s)")
    parser.add_argument("--output", default="curves.png", help="the figure (default %(default)s)")
    flags = parser.parse_args(argv)
    try:
        for name, *paths in flags.run:
            if not paths:
                raise ValueError(f"--run {name!r} needs a name and at least one folder")
        if len({name for name, *_ in flags.run}) < len(flags.run):
            raise ValueError("two --run have the same name; give each its own")
        groups = {name: [read_curve(path, flags.key) for path in paths] for name, *paths in flags.run}
        rows = {name: summarize(curves) for name, curves in groups.items()}
        for name, row in rows.items():
            if not row:
                raise ValueError(f"the runs of {name!r} have no step in common; they must differ in their seed only")
    except (ValueError, OSError) as error:
        print(f"curves.py: {error}; see --help", file=sys.stderr)
        sys.exit(2)
    print(table(rows, flags.key))
    try:
        draw(flags.output, groups, rows, flags.key)
        print(f"saved {flags.output}")
    except (ValueError, OSError) as error:
        print(f"no figure: {error}")


if __name__ == "__main__":
    main()

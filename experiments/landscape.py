"""Landscape: did training end in a wide minimum or in a sharp one?

    python experiments/landscape.py runs/sam0 runs/sam1 runs/adamw0 --json figures.jsonl

Takes runs of `train.py --task classify` (folders or checkpoint.pt), measures all in the same way, prints one table and
saves one figure. The columns are explained under the table, the equations are in geometry.py. Runs must share data set,
image size and classes, and are measured on the same images. Folders whose names differ only in digits at their end
(sam0, sam1) are seeds of one row: mean and sample standard deviation. Measured are the weights themselves, in fp32,
also where --ema kept their average. Corrupted and attacked images: train.py --eval-corruptions --eval-pgd.

Source: Chen, Hsieh, Gong 2022, arXiv 2106.01548, who compare ResNets, ViTs and Mixers by such figures.
Needs: torch, torchvision, einops, tqdm (matplotlib for the figure); tasks/ and geometry.py.
"""

import argparse
import math
import statistics
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lab import markdown  # first: it makes the concept files importable
import geometry
from benchmarks.machine import append, spread
from data import EvalBatches, make_loader
from tasks import load_run
from training.pictures import pyplot
from training.world import World

BATCH = 256  # images at a time, where no weights are derived
SHARED = ("data", "data_size", "scenes", "img_size")  # must be the same in all runs

COLUMNS = dict(params="params", train_loss="train loss", test_acc="test %", lambda_max="lambda", L_N="L_N", gap="gap",
               weight_norm="norm", doubling_radius="radius", active_first="active 1st %", active_mean="active %")


def fail(message):
    print(f"landscape.py: {message}; see --help", file=sys.stderr)
    sys.exit(2)


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="landscape.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("checkpoints", help="runs of train.py --task classify", nargs="+")
    flag("--images", help="training images to measure on", type=int, default=1024)
    flag("--micro-batch", help="so many of them at a time; the first are the loss surface's", type=int, default=256)
    flag("--sigma", help="standard deviation of the weight noise", type=float, default=0.01)
    flag("--draws", help="of weight noise", type=int, default=10)
    flag("--iters", help="at most so many Hessian-vector products", type=int, default=100)
    flag("--tol", help="relative error at which the eigenvalue is good enough", type=float, default=1e-2)
    flag("--surface-steps", help="points along each side of the loss surface, odd", type=int, default=11)
    flag("--surface-radius", help="its reach; 1: as far as the weights are long", type=float, default=0.5)
    flag("--data-path", help="where the data is now; without it where the runs found it")
    flag("--device", help="auto: cuda, mps or cpu", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    flag("--seed", help="of all directions and noise", type=int, default=0)
    flag("--output", help="the figure", default="landscape.png")
    flag("--json", help="append a line per checkpoint with all figures to this file")
    flags = parser.parse_args(argv)
    if flags.surface_steps % 2 == 0:
        fail(f"--surface-steps {flags.surface_steps} leaves out the weights themselves; use {flags.surface_steps + 1}")
    flags.micro_batch = min(flags.micro_batch, flags.images)
    if flags.images % flags.micro_batch:
        fail(f"--images {flags.images} is not a multiple of --micro-batch {flags.micro_batch}")
    return flags


# ---------------------------------------------------------------------------- runs and rows


def open_runs(paths, flags, device):
    """Runs of classifiers that can be compared."""
    opened = [load_run(path, device) for path in paths]
    first = vars(opened[0].args)
    for path, run in zip(paths, opened):
        if run.args.task != "classify":
            raise ValueError(f"{path} is of --task {run.args.task}; compare runs of --task classify")
        for name in SHARED:
            value = getattr(run.args, name, None)
            if value != first.get(name):
                raise ValueError(f"{path} has {name} {value}, {paths[0]} {first.get(name)}; compare runs that share it")
        if flags.data_path is None and run.args.data_path != first["data_path"]:
            raise ValueError(f"the data was in {first['data_path']} and {run.args.data_path}; choose by --data-path")
    return opened


def group(paths):
    """{name: indices of its runs}. runs/sam0 and runs/sam1 are seeds of "sam", runs/0001 is a row of its own."""
    rows = {}
    for i, path in enumerate(paths):
        name = path.parent.name if path.name == "checkpoint.pt" else path.stem
        rows.setdefault(name.rstrip("0123456789") or name, []).append(i)
    return rows


def open_data(run, flags):
    """Training images, not augmented, that every run may have seen: the first of the shuffle of --train-images."""
    args = argparse.Namespace(**{**vars(run.args), "augment": "none"})
    args.data_path = flags.data_path or args.data_path
    if args.train_images and args.train_images < flags.images:
        raise ValueError(f"--images {flags.images} is more than the {args.train_images} of a run; take fewer")
    args.train_images, args.download = flags.images, None
    return run.task.open_data(args, World("cpu"))


# ---------------------------------------------------------------------------- measurements


def measure(run, data, flags, world):
    """-> {key of COLUMNS: number, "active": {layer: share}} of one network, and its loss surface."""
    model = run.model.requires_grad_(True)
    train = make_loader(data.train, EvalBatches(len(data.train), flags.micro_batch), 0, world.device)
    batches = [world.move(batch) for batch in train]
    loss_fns = [lambda x=x, y=y: F.cross_entropy(model(x), y) for x, y, _ in batches]

    # the training loss around the weights
    surface = geometry.loss_surface(model, loss_fns[0], flags.surface_radius, flags.surface_steps, seed=flags.seed)
    flat = geometry.average_flatness(model, loss_fns, flags.sigma, flags.draws, seed=flags.seed)
    top = geometry.hessian_max_eigenvalue(model, loss_fns, iters=flags.iters, tol=flags.tol, seed=flags.seed)
    positive = surface.losses.flatten()[surface.losses.numel() // 2] > 0  # a loss of 0 never doubles
    layers = geometry.active_neurons(model, [x for x, *_ in batches])
    shares = [100 * share for share in layers.values()]
    figures = dict(
        params=sum(p.numel() for p in model.parameters()),
        train_loss=flat.clean,
        lambda_max=top,
        L_N=flat.perturbed,
        gap=flat.gap,
        weight_norm=geometry.weight_norm(model),
        doubling_radius=geometry.doubling_radius(surface) if positive else math.nan,
        active_first=shares[0],
        active_mean=statistics.fmean(shares),
        active=layers,
    )

    # test images
    loader = make_loader(data.val, EvalBatches(len(data.val), BATCH), 0, world.device)
    with torch.no_grad():
        figures["test_acc"] = run.task.evaluate(model, loader, run.args, data, world)["val_acc"]
    return figures, surface


# ---------------------------------------------------------------------------- table and figure


def cell(key, values, reach):
    if key == "doubling_radius" and math.inf in values:  # beyond the surface: a lower bound
        return f"> {statistics.fmean(min(value, reach) for value in values):.3f}"
    if key == "params":
        return f"{values[0]:,}"
    return spread(values)


def table(rows, measured, flags):
    lines = []
    for name, members in rows.items():
        cells = [cell(key, [measured[i][key] for i in members], flags.surface_radius) for key in COLUMNS]
        lines.append([name, str(len(members)), *cells])
    return markdown(["run", "seeds", *COLUMNS.values()], lines)


LEGEND = """On {images} training images, not augmented: train loss, cross-entropy; lambda, the eigenvalue of largest
magnitude of its Hessian; L_N, the mean loss under weight noise of sigma {sigma:g} ({draws} draws); gap, L_N minus train
loss; active, the share of activations above zero, in the first layer and in the mean over layers. On {micro_batch} of
them: radius, how far along a random plane the loss doubles; 1 is the length of the weights. norm: L2, all trainable
weights. test %: on all test images. ±: sample standard deviation over seeds."""


def draw(path, rows, measured, surfaces):
    """Loss surfaces on one color scale, of the first seed of each row; then active neurons, and eigenvalues."""
    panels = len(rows) + 2
    figure, axes = pyplot().subplots(1, panels, figsize=(4 * panels, 3.8), layout="constrained")

    # surfaces
    planes = [surfaces[members[0]] for members in rows.values()]
    heights = [plane.losses.nan_to_num(nan=math.inf).clamp(1e-6, 1e6).log10() for plane in planes]
    lowest, highest = torch.stack(heights).aminmax()
    levels = torch.linspace(lowest, max(highest, lowest + 1e-3), 21).tolist()
    for ax, name, plane, height in zip(axes, rows, planes, heights):
        x = plane.coordinates.tolist()
        picture = ax.contourf(x, x, height, levels=levels, cmap="viridis", extend="both")
        ax.set_title(textwrap.fill(name, 40), fontsize=9)
    figure.colorbar(picture, ax=axes[:len(rows)].tolist(), label="log10 of the training loss")

    # neurons and eigenvalues, a color per row
    neurons, bars = axes[len(rows):]
    for k, members in enumerate(rows.values()):
        layers = zip(*(measured[i]["active"].values() for i in members))
        shares = [100 * statistics.fmean(layer) for layer in layers]
        neurons.plot(range(1, len(shares) + 1), shares, "o-", markersize=4, color=f"C{k}")
        values = [abs(measured[i]["lambda_max"]) for i in members]
        bars.barh(k, statistics.fmean(values), color=f"C{k}", alpha=0.7)
        bars.plot(values, [k] * len(values), "k.")
    neurons.set(title="active neurons, %", xlabel="layer, from input to output")
    bars.set(title="magnitude of lambda (dots: seeds)", xscale="log", yticks=range(len(rows)))
    bars.set_yticklabels([textwrap.fill(name, 26) for name in rows], fontsize=7)
    bars.invert_yaxis()  # the first row on top, as in the table
    figure.savefig(path, dpi=120, format="png")


def main(argv=None):
    flags = parse(argv)
    try:
        world = World(flags.device)
        paths = list(map(Path, flags.checkpoints))
        opened = open_runs(paths, flags, world.device)
        rows = group(paths)
        for name, members in rows.items():
            if len({opened[i].args.seed for i in members}) < len(members):
                raise ValueError(
                    f"two runs of {name} have the same seed; give one, or folders of other names")
        measured, surfaces = [], []
        for i, run in enumerate(tqdm(opened, leave=False, disable=None)):
            figures, surface = measure(run, open_data(run, flags), flags, world)
            measured.append(figures)
            surfaces.append(surface)
            if flags.json:
                name = next(name for name, members in rows.items() if i in members)
                row = dict(checkpoint=str(paths[i]), row=name, train_seed=run.args.seed, **figures, flags=vars(flags))
                if not math.isfinite(row["doubling_radius"]):
                    row["doubling_radius"] = None  # beyond the surface
                append(flags.json, row)
    except (ValueError, OSError) as error:
        fail(str(error).strip().splitlines()[-1])
    print(f"{table(rows, measured, flags)}\n\n{LEGEND.format(**vars(flags))}")
    try:
        draw(flags.output, rows, measured, surfaces)
        print(f"saved {flags.output}")
    except (ValueError, OSError) as error:
        print(f"no figure: {error}")


if __name__ == "__main__":
    main()

"""Landscape: did training end in a wide valley or in a crack, and what is that worth on new images?

    python experiments/landscape.py A.pt B.pt ...
    python experiments/landscape.py runs/sam0 runs/sam1 runs/adamw0 --markdown --json figures.jsonl

Takes what `train.py --task classify` wrote (checkpoint.pt, or the folder it lies in), measures every
network in the same way, prints one table and saves one figure. Each column is said under the table;
the equations behind them are in geometry.py and robust.py.

All runs must share data set, image size and classes, and all meet the same images. Runs that differ
in nothing but their seed are one row: mean and sample standard deviation. The weights themselves are
measured, in fp32 and eval mode, also where --ema kept their average. Two calls give the same numbers,
but for images/s.

Source: Chen, Hsieh, Gong 2022, arXiv 2106.01548, who compare ResNets, ViTs and Mixers by such figures.
Needs: torch, torchvision, einops, tqdm (matplotlib for the figure); train.py with all it needs.
"""

import argparse
import json
import math
import os
import statistics
import sys
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the concept files lie in the repository root

import geometry
import train
from checkpoints import read_checkpoint
from data import EvalBatches, Folder, Images, augmentation, channel_statistics, first_of_shuffle, make_loader, open_source
from robust import CORRUPTIONS, corruption_accuracy, mean_accuracy, pgd

BATCH = 256  # images at a time, where no weights are derived
FREE = {*train.FREE_AT_RESUME, "seed", "device", "download", "eval_every", "num_classes", "mask_patch_size"}  # may differ within a row

COLUMNS = {  # key of a measurement: header, format
    "params": ("params", ",.0f"),
    "img_s": ("img/s", ",.0f"),
    "train_loss": ("train loss", ".3g"),
    "test_acc": ("test %", ".1f"),
    "corrupted_acc": ("corrupt %", ".1f"),
    "attacked_acc": ("attacked %", ".1f"),
    "lambda_max": ("lambda", ".3g"),
    "L_N": ("L_N", ".3g"),
    "gap": ("gap", ".2g"),
    "weight_norm": ("norm", ".1f"),
    "doubling_radius": ("radius", ".3f"),
    "active_first": ("active 1st %", ".1f"),
    "active_mean": ("active %", ".1f"),
}


def fail(message):
    print(f"landscape.py: {message}; see --help", file=sys.stderr)
    sys.exit(2)


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="landscape.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("checkpoints", help="what train.py --task classify wrote: checkpoint.pt, or its folder", nargs="+")
    flag("--images", help="training images for loss, curvature, flatness and neurons", type=int, default=1024)
    flag("--micro-batch", help="so many of them at a time, fewer for large networks; the first are the loss surface's", type=int, default=256)
    flag("--test-images", help="for the accuracy; without it all", type=int)
    flag("--corruption-images", help="test images to corrupt; 0: no such column", type=int, default=1000)
    flag("--attack-images", help="test images to attack; 0: no such column", type=int, default=0)
    flag("--attack-eps", help="how far a pixel may move, in 255ths", type=float, default=2)
    flag("--sigma", help="standard deviation of the weight noise", type=float, default=0.01)
    flag("--draws", help="of weight noise", type=int, default=10)
    flag("--iters", help="at most so many Hessian-vector products", type=int, default=100)
    flag("--tol", help="relative error at which the eigenvalue is good enough", type=float, default=1e-2)
    flag("--surface-steps", help="points along each side of the loss surface, odd", type=int, default=11)
    flag("--surface-radius", help="its reach; 1: as far as the weights are long", type=float, default=0.5)
    flag("--data-path", help="where the data lies now; without it where the runs found it")
    flag("--device", help="auto: cuda, mps or cpu", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    flag("--seed", help="of all directions and noise", type=int, default=0)
    flag("--output", help="the figure; one that is there is replaced", default="landscape.png")
    flag("--json", help="append a line per checkpoint with all figures to this file")
    flag("--markdown", help="print the table as Markdown", action="store_true")
    flags = parser.parse_args(argv)
    for key, least in dict(images=1, micro_batch=1, test_images=1, corruption_images=0, attack_images=0, attack_eps=0, sigma=0, draws=1, iters=1,
                           tol=1e-9, surface_steps=3, surface_radius=1e-9, seed=0).items():
        if getattr(flags, key) is not None and not least <= getattr(flags, key) < math.inf:
            fail(f"--{key.replace('_', '-')} {getattr(flags, key)} must be at least {least}")
    if flags.surface_steps % 2 == 0:
        fail(f"--surface-steps {flags.surface_steps} puts no point on the weights themselves; use an odd number such as {flags.surface_steps + 1}")
    # geometry.py wants micro-batches of equal size
    flags.micro_batch = next(size for size in range(min(flags.micro_batch, flags.images), 0, -1) if flags.images % size == 0)
    return flags


# ---------------------------------------------------------------------------- runs, rows, images


def read_run(path):
    """-> the run's flags as train.py had them, its weights. ValueError if it is no classifier of ours."""
    saved = read_checkpoint(path)
    if not isinstance(saved.get("args"), dict) or not isinstance(saved.get("model"), dict):
        raise ValueError(f"{path} was not written by train.py; give the checkpoint.pt of a run of train.py --task classify")
    run = argparse.Namespace(**{**train.DEFAULTS["all"], **saved["args"]})  # older files lack newer flags
    kind = (f"is of --task {run.task}" if run.task != "classify" else "is a linear probe, whose encoder that run did not train" if run.probe
            else "was trained by --loss supcon and classifies nothing" if getattr(run, "loss", None) == "supcon" else None)
    if kind or "head.weight" not in saved["model"]:
        raise ValueError(f"{path} {kind or 'has no classifier'}; compare runs of train.py --task classify")
    run.num_classes = len(saved["model"]["head.weight"])
    return run, saved["model"]


def group(paths, runs):
    """-> {label: indices of the runs that are alike but for FREE}. A label has model, optimizer and what else tells rows of one model apart."""
    rows = {}
    for i, run in enumerate(runs):
        rows.setdefault(repr(sorted((key, value) for key, value in vars(run).items() if key not in FREE)), []).append(i)
    for members in rows.values():
        if len({runs[i].seed for i in members}) < len(members):
            raise ValueError(f"of {', '.join(str(paths[i]) for i in members)} two are the same run with the same seed; give one of them")
    firsts = [vars(runs[members[0]]) for members in rows.values()]

    def differ(key, among):
        return len({repr(run.get(key)) for run in among}) > 1

    def label(run):
        siblings = [other for other in firsts if other["model"] == run["model"]]
        said = FREE | {"model", "optimizer", "rho"} | (set() if run["optimizer"] == "sam" else {"adaptive", "base_optimizer"})
        keys = [key for key in run if key not in said and differ(key, siblings)]
        rho = [f"rho {run['rho']:g}"] if run["optimizer"] == "sam" else []
        return " ".join([run["model"], run["optimizer"], *rho, *(f"{key}={run[key]}" for key in keys)])

    return dict(zip(map(label, firsts), rows.values()))


def open_data(paths, runs, flags):
    """-> {use: (source, indices)}, {--stats or not: (mean, std)}. ValueError if the runs cannot share them."""
    def told(run):
        size = f"{run.data_size} " if run.data == "shapes" else ""
        return f"{size}{run.data}, {run.img_size[0]}x{run.img_size[1]} px, {run.num_classes} classes"

    first = runs[0]
    for path, run in zip(paths, runs, strict=True):
        if told(run) != told(first):
            raise ValueError(f"{paths[0]} was trained on {told(first)}, {path} on {told(run)}; compare runs that share all of this")
    places = {flags.data_path or run.data_path for run in runs}
    if len(places) > 1 and first.data != "shapes":
        raise ValueError(f"the runs found {first.data} in {', '.join(sorted(map(str, places)))}; name one place by --data-path")
    source, test = (open_source(first.data, flags.data_path or first.data_path, part, tuple(first.img_size), first.data_size,
                                skip_bad=any(run.skip_bad for run in runs)) for part in (True, False))
    if len(source.classes) != first.num_classes:
        raise ValueError(f"the data has {len(source.classes)} classes, the networks {first.num_classes}; name their data by --data-path")
    # --train-images takes the first of the same shuffle: what comes first was in the training set of every run
    shared = min(run.train_images or len(source) for run in runs)
    for name, there in {"images": shared, **dict.fromkeys(("test_images", "corruption_images", "attack_images"), len(test))}.items():
        if (getattr(flags, name) or 0) > there:
            name, count = name.replace("_", "-"), getattr(flags, name)
            raise ValueError(f"--{name} {count} is more than the {there} images there are; try --{name} {there}")
    shuffled = first_of_shuffle(len(test), len(test))
    chosen = {"train": (source, first_of_shuffle(len(source), flags.images)), "test": (test, shuffled[:flags.test_images]),
              "corrupted": (test, shuffled[:flags.corruption_images]), "attacked": (test, shuffled[:flags.attack_images])}
    for some, indices in (chosen["train"], chosen["test"]):
        if isinstance(some, Folder):
            some.cache(indices)
    return chosen, {stats: channel_statistics(source) if stats else (source.mean, source.std) for stats in {bool(run.stats) for run in runs}}


# ---------------------------------------------------------------------------- measurements


def build(run, weights):
    model = train.build_model(argparse.Namespace(**{**vars(run), "init": None}), run.num_classes)  # its own weights come anyway
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the model of the run's flags ({str(error).splitlines()[-1].strip()}); was its train.py "
                         "another one?") from None
    return model


def stack(images):
    """An image set -> (B, C, H, W), (B,)."""
    pictures, labels, _ = zip(*(images[0, i] for i in range(len(images))))
    return torch.stack(pictures), torch.tensor(labels)


@torch.no_grad()
def images_per_second(model, shape, device, warm_up=2, timed=7):
    """Median over batches; on an accelerator the clock waits for the last one to end."""
    batch, seconds = torch.zeros(BATCH, *shape, device=device), []
    for _ in range(warm_up + timed):
        start = time.perf_counter()
        model(batch)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return BATCH / statistics.median(seconds[warm_up:])


def measure(model, run, chosen, scale, flags, world, say):
    """-> {key of COLUMNS: number, "active": {layer: share}} of one network, and its loss surface. scale: mean and std of the data."""
    mean, std = scale
    device, plain = world.device, augmentation("none", run.img_size, mean, std)
    sets = {use: Images(source, plain, indices=indices) for use, (source, indices) in chosen.items()}
    xs, ys = (t.to(device).split(flags.micro_batch) for t in stack(sets["train"]))
    loss_fns = [lambda x=x, y=y: F.cross_entropy(model(x), y) for x, y in zip(xs, ys)]

    say("loss surface")
    surface = geometry.loss_surface(model, loss_fns[0], flags.surface_radius, flags.surface_steps, seed=flags.seed)
    positive = surface.losses.flatten()[surface.losses.numel() // 2] > 0  # a loss of 0 never doubles
    say("flatness")
    flat = geometry.average_flatness(model, loss_fns, flags.sigma, flags.draws, seed=flags.seed)
    layers = geometry.active_neurons(model, list(xs))
    shares = [100 * share for share in layers.values()]
    say("curvature")
    top = geometry.hessian_max_eigenvalue(model, loss_fns, iters=flags.iters, tol=flags.tol, seed=flags.seed)
    found = dict(params=sum(p.numel() for p in model.parameters()), img_s=images_per_second(model, xs[0].shape[1:], device), train_loss=flat.clean,
                 lambda_max=top, L_N=flat.perturbed, gap=flat.gap, weight_norm=geometry.weight_norm(model),
                 doubling_radius=geometry.doubling_radius(surface) if positive else math.nan,
                 active_first=shares[0], active_mean=statistics.fmean(shares), active=layers)

    say("accuracy")
    workers = min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    loader = make_loader(sets["test"], EvalBatches(len(sets["test"]), BATCH), workers, device)
    found["test_acc"] = train.evaluate(model, loader, run, world, nullcontext())["val_acc"]
    model.eval()  # evaluate() ends in training mode
    if flags.corruption_images:
        say("corruptions")
        by_kind = corruption_accuracy(model, *stack(sets["corrupted"]), mean, std, batch_size=BATCH, seed=flags.seed)
        found["corrupted_acc"] = 100 * mean_accuracy(by_kind)
    if flags.attack_images:
        say("attack")
        generator, right = torch.Generator().manual_seed(flags.seed), 0
        for x, y in zip(*(t.to(device).split(BATCH) for t in stack(sets["attacked"]))):
            attacked = pgd(model, x, y, flags.attack_eps / 255, steps=10, mean=mean, std=std, generator=generator)
            with torch.no_grad():
                right += (model(attacked).argmax(dim=1) == y).sum().item()
        found["attacked_acc"] = 100 * right / flags.attack_images
    return found, surface


# ---------------------------------------------------------------------------- table and figure


def cell(key, values, reach):
    """Mean, and ± standard deviation where there are several."""
    form = COLUMNS[key][1]
    if key == "doubling_radius" and math.inf in values:  # beyond the surface: a lower bound
        return f"> {statistics.fmean(min(value, reach) for value in values):{form}}"
    mean = statistics.fmean(values)
    if len(values) == 1 or key == "params" or not math.isfinite(mean):
        return f"{mean:{form}}"
    return f"{mean:{form}} ± {statistics.stdev(values):{form.replace('3g', '2g')}}"


def table(rows, measured, flags):
    keys = [key for key in COLUMNS if key in measured[0]]
    lines = [["run", "seeds", *(COLUMNS[key][0] for key in keys)]]
    for label, members in rows.items():
        lines.append([label, str(len(members)), *(cell(key, [measured[i][key] for i in members], flags.surface_radius) for key in keys)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    if not flags.markdown:
        return "\n".join(map("  ".join, lines))
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def legend(flags, tests, device):
    """What the headers mean, and on which images."""
    corrupt = (f" On {flags.corruption_images} of them: corrupt, mean accuracy over {len(CORRUPTIONS)} corruptions at 5 severities (robust.py)."
               if flags.corruption_images else "")
    attacked = (f" On {flags.attack_images} of them: attacked, accuracy after ten steps of PGD with eps {flags.attack_eps:g}/255."
                if flags.attack_images else "")
    return "\n".join(textwrap.fill(line, 140) for line in (
        f"On {flags.images} training images, not augmented: train loss, cross-entropy; lambda, the eigenvalue of largest magnitude of its Hessian; "
        f"L_N, the mean loss under weight noise of sigma {flags.sigma:g} ({flags.draws} draws); gap, L_N minus train loss; active, the share of "
        "activations above zero, in the first layer and in the mean over layers.",
        f"On {flags.micro_batch} of them: radius, how far along a random plane the loss doubles; 1 is as far as the weights themselves are long.",
        f"On {tests} test images: test, accuracy.{corrupt}{attacked}",
        f"norm: L2, all trainable weights. img/s: inference on {device.type}, fp32, {BATCH} at a time. ±: sample standard deviation over seeds."))


def draw(path, rows, measured, surfaces, runs):
    """Loss surfaces on one colour scale, of the first seed of each row; active neurons layer by layer; eigenvalues."""
    panels = len(rows) + 2
    columns = math.ceil(panels / math.ceil(panels / 5))  # five in a line can still be read
    lines = math.ceil(panels / columns)
    fig, _ = geometry.figure(columns)
    fig.clear()
    fig.set_size_inches(4 * columns, 3.8 * lines)
    axes = fig.subplots(lines, columns, squeeze=False, subplot_kw=dict(box_aspect=1)).flatten()
    for ax in axes[panels:]:
        ax.remove()

    planes = [surfaces[members[0]] for members in rows.values()]
    heights = torch.stack([plane.losses.nan_to_num(nan=math.inf).clamp(1e-6, 1e6).log10() for plane in planes])
    lowest, highest = heights.aminmax()
    levels = torch.linspace(lowest, max(highest, lowest + 1e-3), 21).tolist()
    for k, (ax, (label, members), plane, height) in enumerate(zip(axes, rows.items(), planes, heights), start=1):
        x, radius = plane.coordinates.tolist(), measured[members[0]]["doubling_radius"]
        picture = ax.contourf(x, x, height, levels=levels, cmap="viridis", extend="both")
        caption = f"the loss does not double within {x[-1]:g}"
        if math.isfinite(radius):
            angle = torch.linspace(0, 2 * math.pi, 100)
            ax.plot(radius * angle.cos(), radius * angle.sin(), "w--", linewidth=1.5)
            caption = f"dashed: the loss doubles, radius {radius:.3f}"
        seed = f" (seed {runs[members[0]].seed})" if len(members) > 1 else ""
        ax.set_title(f"{textwrap.fill(f'{k}: {label}{seed}', 40)}\n{caption}", fontsize=9)
    fig.colorbar(picture, ax=axes[:len(rows)].tolist(), label="training loss", format=lambda v, _: f"{10**v:.2g}", shrink=0.7)

    curves, bars = axes[len(rows):panels]
    for k, (label, members) in enumerate(rows.items()):
        shares = [100 * statistics.fmean(layer) for layer in zip(*(measured[i]["active"].values() for i in members))]
        curves.plot(range(1, len(shares) + 1), shares, "o-", markersize=4, color=f"C{k}")
        values = [abs(measured[i]["lambda_max"]) for i in members]
        bars.barh(k, statistics.fmean(values), color=f"C{k}", alpha=0.7)
        bars.plot(values, [k] * len(values), "k.")
    curves.set_title("active neurons (colours: as the bars of lambda)", fontsize=8)
    curves.set(xlabel="layer, from input to output", ylabel="activations above zero, %", ylim=(0, 1.1 * curves.get_ylim()[1]))
    curves.xaxis.get_major_locator().set_params(integer=True)
    bars.set_title("magnitude of lambda (dots: seeds)", fontsize=9)
    sizes = [abs(figures["lambda_max"]) for figures in measured]
    bars.set(xscale="log", xlim=(min(sizes) / 3, max(sizes) * 3) if min(sizes) > 0 else None, yticks=range(len(rows)))
    bars.set_yticklabels([f"{k}: {textwrap.shorten(label, 26, placeholder=' ...')}" for k, label in enumerate(rows, start=1)], fontsize=7)
    bars.invert_yaxis()  # the first row on top, as in the table
    fig.savefig(path, dpi=120, format="png")


def main(argv=None):
    flags = parse(argv)
    try:
        paths = [path / "checkpoint.pt" if path.is_dir() else path for path in map(Path, flags.checkpoints)]
        for target in filter(None, (flags.output, flags.json)):
            if Path(target).resolve() in [path.resolve() for path in paths] or not Path(target).resolve().parent.is_dir():
                raise ValueError(f"{target} is one of the checkpoints, or in a folder that does not exist; choose another --output or --json")
        runs = [read_run(path)[0] for path in paths]
        rows = group(paths, runs)
        world = train.World(flags.device)
        chosen, scales = open_data(paths, runs, flags)
        measured, surfaces = [], []
        bar = tqdm(list(zip(paths, runs)), leave=False, disable=None)
        for i, (path, run) in enumerate(bar):
            bar.set_description(str(path))
            try:
                model = build(run, read_run(path)[1]).to(world.device).eval()
                figures, surface = measure(model, run, chosen, scales[bool(run.stats)], flags, world, bar.set_postfix_str)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            measured.append(figures)
            surfaces.append(surface)
            if flags.json:
                row = next(label for label, members in rows.items() if i in members)
                how = {**vars(flags), "device": world.device.type}
                numbers = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in figures.items()}
                with open(flags.json, "a") as file:  # at once: nothing measured is lost
                    file.write(json.dumps(dict(checkpoint=str(path), row=row, train_seed=run.seed, **numbers, flags=how)) + "\n")
    except (ValueError, OSError) as error:
        fail(str(error).strip().splitlines()[-1])
    print(f"{table(rows, measured, flags)}\n\n{legend(flags, len(chosen['test'][1]), world.device)}")
    done = f"saved {flags.output}"
    try:
        draw(flags.output, rows, measured, surfaces, runs)
    except (ValueError, OSError) as error:
        done = f"no figure: {error}"
    print(done)


if __name__ == "__main__":
    main()

"""Bench: memory and time, each figure from a fresh process, the variants taking turns.

    python experiments/bench.py attention --sizes 512 768 --json attention.jsonl    windowed, hybrid and global attention of a ViT-B/16
    python experiments/bench.py detection --size 512 --json detection.jsonl         ViT-B/16 and ResNet-50 in Mask R-CNN, torchvision's own beside
    python experiments/bench.py scaling --json scaling.jsonl --plot scaling.png     a training step against depth, tokens, batch, processes
    python experiments/bench.py table attention.jsonl                               a file of results as a table

Memory is the growth of the process (CPU) or of the allocator (CUDA) from just before a step to its
peak: activations and temporaries, without weights and gradients, which are there before. Time is the
median over --rounds; in every round each variant runs once, so that a slow minute hits all of them.
Ratios are worth more than seconds on a shared machine. The same work by other people's code: peers.py, beside this file.

scaling varies one thing at a time and fits seconds, and megabytes, by c x^a: a is the slope of the least-squares line
through the logarithms. Depth and batch should give 1; tokens 1 while the layers dominate, 2 where explicit attention
does; processes 0, for each has a batch of its own (data parallel, on the processes axis one thread each).
Over a short range fixed costs pull a below these.

Needs: torch, torchvision, einops; machine.py beside it, detect.py, mae.py, vit.py, resnet.py with what they need; matplotlib for the figure. Unix.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the concept files lie in the repository root
sys.path.insert(0, str(Path(__file__).resolve().parent))  # machine.py, also when this file is imported

from machine import machine

from detect import ViTPyramid, vit_mask_rcnn
from mae import MAE
from resnet import create_resnet
from vit import create_vit

LINUX = Path("/proc/self/clear_refs").exists()
BLOCKS = {"windows only": "none", "hybrid": "quarters", "all global": "all"}
AXES = {"depth": [2, 4, 8, 16], "tokens": [16, 64, 144, 256], "batch": [4, 8, 16, 32], "processes": [1, 2]}  # tokens: of the whole image
BASE = dict(depth=4, tokens=64, batch=8, processes=1)  # what the other axes stand at


# ---------------------------------------------------------------------------- what is measured


def attention_step(spec, device):
    """A training step of the backbone alone: one image, the maps' means as loss."""
    vit = create_vit(spec["model"], img_size=spec["size"], num_classes=0)
    model = ViTPyramid(vit, spec["window"], BLOCKS[spec["blocks"]], rel_pos_bias=spec["bias"], checkpointing=spec["checkpointing"]).to(device)
    image = torch.randn(1, 3, spec["size"], spec["size"], device=device)

    def step():  # explicit: the library's own; with a trainable bias a CPU has no other
        with nullcontext() if spec["fused"] else sdpa_kernel([SDPBackend.MATH]):
            sum(m.mean() for m in model(image).values()).backward()

    return model, step


def detection_step(spec, device):
    """A training step, or the inference, of a whole detector on one image with six objects. Nothing is trained: few detections."""
    size = spec["size"]
    if spec["detector"] == "torchvision's maskrcnn_resnet50_fpn_v2":
        model = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=81, min_size=size, max_size=size)
    elif spec["detector"] == "ResNet-50":
        model = vit_mask_rcnn(create_resnet("resnet50"), 80, size)
    else:
        model = vit_mask_rcnn(create_vit("vit_b16", img_size=size, num_classes=0), 80, size, spec["window"], rel_pos_bias=spec["bias"])
    model.to(device).train(spec["training"])
    corners = torch.rand(6, 2) * size / 2
    boxes = torch.cat([corners, corners + size / 4], dim=1).to(device)
    target = dict(boxes=boxes, labels=torch.arange(1, 7, device=device), masks=torch.ones(6, size, size, dtype=torch.uint8, device=device))
    image = torch.rand(3, size, size, device=device)

    def step():
        if spec["training"]:
            sum(model([image], [target]).values()).backward()
        else:
            with torch.no_grad():
                model([image])

    return model, step


def scaling_step(spec, device):
    """A training step without the optimizer's update; with several processes the gradients' average is part of it."""
    size = 16 * math.isqrt(spec["tokens"])
    width = dict(embed_dim=spec["embed_dim"], num_heads=spec["embed_dim"] // 64)
    model = create_vit("vit_b16", img_size=size, depth=spec["depth"], num_classes=10, **width)
    if spec["objective"] == "mae":
        model = MAE(model, decoder_embed_dim=128, decoder_depth=1, decoder_num_heads=4)
    model.to(device)
    imgs, labels = torch.randn(spec["batch"], 3, size, size, device=device), torch.randint(10, (spec["batch"],), device=device)
    run = torch.nn.parallel.DistributedDataParallel(model) if torch.distributed.is_initialized() else model

    def step():
        (run(imgs).loss if spec["objective"] == "mae" else F.cross_entropy(run(imgs), labels)).backward()

    return model, step


STEPS = {"attention": attention_step, "detection": detection_step, "scaling": scaling_step}


def memory(device, peak=False, reset=False):
    """Bytes held now by the process (CPU) or the allocator (CUDA), or the most so far; reset: the most starts again from now."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if not LINUX:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def measure(spec):
    """One variant in this process: {"seconds", "peak_mb", "params"}; the first step is not timed, unless it is the only one."""
    torch.manual_seed(0)
    device = torch.device(spec["device"])
    cuda = device.type == "cuda"
    if "RANK" in os.environ:  # torchrun started this process and its sisters
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_num_threads(1)
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    model, step = STEPS[spec["bench"]](spec, device)
    for p in model.parameters():
        p.grad = torch.ones_like(p).zero_()  # touched, so that it is there before
    before, seconds = memory(device, reset=True), []
    for _ in range(1 + spec["timed"]):
        began = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak_mb = (memory(device, peak=True) - before) / 2**20
    measured = dict(seconds=statistics.median(seconds[1:] or seconds), peak_mb=peak_mb, params=sum(p.numel() for p in model.parameters()))
    if torch.distributed.is_initialized():
        measured["processes"] = torch.distributed.get_world_size()
        torch.distributed.destroy_process_group()
    return measured


def in_new_process(spec, script=__file__):
    """measure(spec) in a process of its own, or in several; None where it runs out of memory."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(spec["processes"])] if spec.get("axis") == "processes" else []
    child = subprocess.run([sys.executable, *several, script, "one", json.dumps(spec)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if child.returncode in (-9, 137) or any(words in child.stderr for words in ("OutOfMemory", "not enough memory", "can't allocate memory")):
        return None
    if child.returncode:
        raise SystemExit(f"{Path(script).name}: {spec} failed:\n{child.stderr}")
    return json.loads(child.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------- running and showing


def variants(flags):
    """The specs of one round."""
    shared = dict(bench=flags.bench, device=flags.device, timed=flags.timed)
    if flags.bench == "scaling":
        return [dict(shared, **{**BASE, axis: value}, axis=axis, objective=objective, embed_dim=flags.embed_dim)
                for axis in flags.axes for value in AXES[axis] for objective in flags.objectives]
    shared["window"] = flags.window
    if flags.bench == "detection":
        pairs = [("ViT-B/16", True), ("ViT-B/16", False), ("ResNet-50", False), ("torchvision's maskrcnn_resnet50_fpn_v2", False)]
        return [dict(shared, size=flags.size, detector=name, bias=bias, training=training) for training in (True, False) for name, bias in pairs]
    kinds = [(False, True), (False, False), (True, False)]  # (bias, fused)
    if flags.device != "cpu":
        kinds.append((True, True))
    return [dict(shared, model=flags.model, size=size, blocks=blocks, bias=bias, fused=fused, checkpointing=checkpointing)
            for size in flags.sizes for bias, fused in kinds for checkpointing in (False, True) for blocks in BLOCKS]


def append(row, path):
    """At once: nothing measured is lost."""
    print(json.dumps(row), flush=True)
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(path):
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    except ValueError:
        rows = []
    if not rows or not all(isinstance(row, dict) and "bench" in row for row in rows):
        raise ValueError(f"{path} holds no measurements; give the file that --json wrote")
    return rows


def run(flags):
    if flags.json:
        open(flags.json, "a").close()  # if it cannot be written, say so now
    where = machine(flags.device)
    specs, rows, full = variants(flags), [], []
    for number in range(flags.rounds):
        for spec in specs:
            if spec in full:
                continue  # out of memory once is enough
            if flags.device == "cuda" and spec.get("processes", 1) > torch.cuda.device_count():
                full.append(spec)
                print(f"{spec['processes']} processes are skipped: each needs a GPU, here is {torch.cuda.device_count()}", flush=True)
                continue
            measured = in_new_process(spec)
            if measured is None:
                full.append(spec)
            rows.append({**spec, **where, "round": number, **(measured or {"out_of_memory": True})})
            append(rows[-1], flags.json)
    print(table(rows))
    if getattr(flags, "plot", None):
        draw(flags.plot, rows)


def median(rows, key):
    """Over the rounds; None where it did not fit, NaN where there are none."""
    values = [row.get(key) for row in rows]
    return None if None in values else statistics.median(values) if values else math.nan


def show(value, form):
    return "does not fit" if value is None else "" if math.isnan(value) else format(value, form)


def table_head(*names):
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def exponent(points):
    """a of the best y = c x^a, least squares on the logarithms, of {x: y}; NaN if there is nothing to fit."""
    logs = [(math.log(x), math.log(y)) for x, y in points.items() if y is not None and y > 0]
    if len({x for x, _ in logs}) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def scaling_lines(rows):
    """{(objective, axis, width, device, threads): {"seconds": {x: median}, "peak_mb": ..., "speed": images/s of all processes}}."""
    lines = {}
    for row in rows:
        line = lines.setdefault(tuple(row[k] for k in ("objective", "axis", "embed_dim", "device", "threads")), {})
        line.setdefault(row[row["axis"]], []).append(row)
    found = {}
    for key, line in lines.items():
        found[key] = {what: {x: median(some, what) for x, some in sorted(line.items())} for what in ("seconds", "peak_mb")}
        found[key]["speed"] = {x: None if s is None else line[x][0]["batch"] * line[x][0]["processes"] / s for x, s in found[key]["seconds"].items()}
    return found


def scaling_table(rows):
    """A row per axis: the points and the exponents."""
    lines = table_head("objective", "width", "axis", "points", "seconds", "exponent", "MB", "exponent", "images/s", "exponent")
    for (objective, axis, width, *_), line in scaling_lines(rows).items():
        words = [objective, str(width), axis, ", ".join(map(str, line["seconds"]))]
        for what, form in (("seconds", ".3g"), ("peak_mb", ".0f"), ("speed", ".3g")):
            words += [", ".join(show(y, form) for y in line[what].values()), show(exponent(line[what]), ".2f")]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines)


def draw(path, rows):
    """Seconds above, megabytes below, an axis per column; dots are measured, lines are the fits."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no figure: matplotlib is not installed; pip install matplotlib")
        return
    lines = scaling_lines(rows)
    axes = list(dict.fromkeys(axis for _, axis, *_ in lines))
    figure, panels = plt.subplots(2, len(axes), figsize=(3.2 * len(axes), 6), squeeze=False, layout="constrained")
    for column, axis in enumerate(axes):
        for panel, (what, label) in zip(panels[:, column], (("seconds", "seconds"), ("peak_mb", "MB")), strict=True):
            for k, (key, line) in enumerate((key, line) for key, line in lines.items() if key[1] == axis):
                points = {x: y for x, y in line[what].items() if y is not None and y > 0}
                a = exponent(points)
                panel.plot(list(points), list(points.values()), "o", color=f"C{k}")
                if not math.isnan(a):
                    c = math.exp(statistics.fmean(math.log(y) - a * math.log(x) for x, y in points.items()))
                    panel.plot(list(points), [c * x**a for x in points], color=f"C{k}", label=f"{key[0]}, width {key[2]}: exponent {a:.2f}")
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
            panel.set_xticks(list(points), [str(x) for x in points])
            panel.minorticks_off()
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")
    print(f"saved {path}")


def table(rows):
    """Markdown, of the measurements of one bench."""
    if len({row["bench"] for row in rows}) != 1:
        raise SystemExit("bench.py: the file holds several benches, or nothing; keep a file for each")
    cells = {}
    if rows[0]["bench"] == "peers":
        raise SystemExit("bench.py: the file is of peers.py; use python experiments/peers.py table FILE")
    if rows[0]["bench"] == "scaling":
        return scaling_table(rows)
    if rows[0]["bench"] == "detection":
        for row in rows:
            place = cells.setdefault((row["size"], row["window"], row["device"], row["detector"], row["bias"]), {})
            place.setdefault(row["training"], []).append(row)
        lines = table_head("detector", "px", "relative bias", "parameters", "training MB", "training s", "inference s")
        for (size, _, _, name, bias), both in cells.items():
            train, test = both.get(True, []), both.get(False, [])
            lines.append(f"| {name} | {size} | {'yes' if bias else 'no'} | {show(median(train, 'params'), ',.0f')} | "
                         f"{show(median(train, 'peak_mb'), ',.0f')} | {show(median(train, 'seconds'), '.2f')} | {show(median(test, 'seconds'), '.2f')} |")
        return "\n".join(lines)
    for row in rows:
        place = cells.setdefault((row["model"], row["window"], row["device"], row["size"], row["bias"], row["fused"], row["checkpointing"]), {})
        place.setdefault(row["blocks"], []).append(row)
    heads = [f"{name}, {unit}" if name else "global / hybrid" for unit in ("MB", "s") for name in [*BLOCKS, ""]]
    lines = table_head("px", "bias", "attention", "recompute", *heads)
    for (*_, size, bias, fused, checkpointing), row in sorted(cells.items()):
        words = [str(size), "yes" if bias else "no", "fused" if fused else "explicit", "yes" if checkpointing else "no"]
        for key, form in (("peak_mb", ",.0f"), ("seconds", ".1f")):
            windows, hybrid, everywhere = (median(row.get(name, []), key) for name in BLOCKS)
            words += [show(value, form) for value in (windows, hybrid, everywhere)]
            words.append("" if None in (hybrid, everywhere) else show(everywhere / hybrid, ".2f"))
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="bench", required=True)
    for name in STEPS:
        command = commands.add_parser(name)
        if name == "attention":
            command.add_argument("--sizes", type=int, nargs="+", default=[512, 768], help="of the square image, a multiple of the patch")
            command.add_argument("--model", default="vit_b16", help="preset of vit.py")
        elif name == "detection":
            command.add_argument("--size", type=int, default=512, help="of the square image")
        else:
            command.add_argument("--objectives", nargs="+", default=["mae", "vit"], choices=("mae", "vit"), help="masked pre-training, classification")
            command.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
            command.add_argument("--embed-dim", type=int, default=192, help="width, a multiple of 64, the width of a head")
            command.add_argument("--plot", help="draw the figure here (.png)")
        if name != "scaling":
            command.add_argument("--window", type=int, default=14, help="tokens")
        command.add_argument("--rounds", type=int, default=1 if name == "scaling" else 3)
        command.add_argument("--timed", type=int, default=3 if name == "scaling" else 1, help="timed steps per round after the first; 0 times the first, cold")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
        command.add_argument("--json", help="append the results, a line each")
    command = commands.add_parser("table")
    command.add_argument("file")
    command.add_argument("--plot", help="of scaling: draw the figure here (.png)")
    commands.add_parser("one").add_argument("spec")
    flags = parser.parse_args(argv)
    if flags.bench == "one":
        measured = measure(json.loads(flags.spec))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(measured))
        return
    try:
        if flags.bench == "table":
            rows = read_rows(flags.file)
            print(table(rows))
            if flags.plot and rows[0]["bench"] != "scaling":
                raise ValueError(f"--plot {flags.plot}: {flags.file} is of {rows[0]['bench']}, and only scaling has a figure; leave --plot out")
            if flags.plot:
                draw(flags.plot, rows)
            return
        if flags.rounds < 1 or flags.timed < 0:
            raise ValueError(f"--rounds {flags.rounds} must be at least 1, and --timed {flags.timed} at least 0")
        if flags.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU; use --device cpu")
        if flags.bench == "scaling" and (flags.embed_dim < 64 or flags.embed_dim % 64):
            raise ValueError(f"--embed-dim {flags.embed_dim} must be a multiple of 64, the width of a head, such as 192")
        run(flags)
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}; see --help", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

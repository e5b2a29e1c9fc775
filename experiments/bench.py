"""Bench: memory and time, each figure from a fresh process, the variants taking turns.

    python experiments/bench.py attention --sizes 512 768 --json attention.jsonl    windowed, hybrid and global attention of a ViT-B/16
    python experiments/bench.py detection --size 512 --json detection.jsonl         ViT-B/16 and ResNet-50 in Mask R-CNN, torchvision's own beside
    python experiments/bench.py table attention.jsonl                               a file of results as a table

Memory is the growth of the process (CPU) or of the allocator (CUDA) from just before a step to its
peak: activations and temporaries, without weights and gradients, which are there before. Time is the
median over --rounds; in every round each variant runs once, so that a slow minute hits all of them.
Ratios are worth more than seconds on a shared machine.

Needs: torch, torchvision, einops; detect.py, vit.py, resnet.py with what they need. Unix.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the concept files lie in the repository root

from detect import ViTPyramid, vit_mask_rcnn
from resnet import create_resnet
from vit import create_vit

LINUX = Path("/proc/self/clear_refs").exists()
BLOCKS = {"windows only": "none", "hybrid": "quarters", "all global": "all"}


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


STEPS = {"attention": attention_step, "detection": detection_step}


def measure(spec):
    """One variant in this process: {"seconds", "peak_mb", "params"}; the first step is not timed, unless it is the only one."""
    torch.manual_seed(0)
    device = torch.device(spec["device"])
    cuda = device.type == "cuda"
    model, step = STEPS[spec["bench"]](spec, device)
    for p in model.parameters():
        p.grad = torch.ones_like(p).zero_()  # touched, so that it is there before

    def memory(peak):
        if cuda:
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        if LINUX:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            return int(status["VmHWM" if peak else "VmRSS"].split()[0]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    if not cuda and LINUX:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before, seconds = memory(peak=False), []
    for _ in range(1 + spec["timed"]):
        began = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return dict(seconds=statistics.median(seconds[1:] or seconds), peak_mb=(memory(peak=True) - before) / 2**20, params=sum(p.numel() for p in model.parameters()))


def in_new_process(spec):
    """measure(spec) in a process of its own; None where it runs out of memory."""
    child = subprocess.run([sys.executable, __file__, "one", json.dumps(spec)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if child.returncode in (-9, 137) or any(words in child.stderr for words in ("OutOfMemory", "not enough memory", "can't allocate memory")):
        return None
    if child.returncode:
        raise SystemExit(f"bench.py: {spec} failed:\n{child.stderr}")
    return json.loads(child.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------- running and showing


def variants(flags):
    """The specs of one round."""
    shared = dict(bench=flags.bench, device=flags.device, window=flags.window, timed=flags.timed)
    if flags.bench == "detection":
        pairs = [("ViT-B/16", True), ("ViT-B/16", False), ("ResNet-50", False), ("torchvision's maskrcnn_resnet50_fpn_v2", False)]
        return [dict(shared, size=flags.size, detector=name, bias=bias, training=training) for training in (True, False) for name, bias in pairs]
    kinds = [(False, True), (False, False), (True, False)]  # (bias, fused)
    if flags.device != "cpu":
        kinds.append((True, True))
    return [dict(shared, model=flags.model, size=size, blocks=blocks, bias=bias, fused=fused, checkpointing=checkpointing)
            for size in flags.sizes for bias, fused in kinds for checkpointing in (False, True) for blocks in BLOCKS]


def run(flags):
    machine = dict(torch=torch.__version__, threads=torch.get_num_threads(), cores=os.cpu_count(), machine=platform.machine())
    if flags.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    specs, rows, full = variants(flags), [], []
    for number in range(flags.rounds):
        for spec in specs:
            if spec in full:
                continue  # out of memory once is enough
            measured = in_new_process(spec)
            if measured is None:
                full.append(spec)
            rows.append({**spec, **machine, "round": number, **(measured or {"out_of_memory": True})})
            print(json.dumps(rows[-1]), flush=True)
            if flags.json:
                with open(flags.json, "a") as file:  # at once: nothing measured is lost
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


def median(rows, key):
    """Over the rounds; None where it did not fit, NaN where there are none."""
    values = [row.get(key) for row in rows]
    return None if None in values else statistics.median(values) if values else math.nan


def show(value, form):
    return "does not fit" if value is None else "" if math.isnan(value) else format(value, form)


def table(rows):
    """Markdown, of the measurements of one bench."""
    if len({row["bench"] for row in rows}) != 1:
        raise SystemExit("bench.py: the file holds several benches, or nothing; keep a file for each")
    cells = {}
    if rows[0]["bench"] == "detection":
        for row in rows:
            place = cells.setdefault((row["size"], row["window"], row["device"], row["detector"], row["bias"]), {})
            place.setdefault(row["training"], []).append(row)
        lines = ["| detector | px | relative bias | parameters | training MB | training s | inference s |", "|---|---|---|---|---|---|---|"]
        for (size, _, _, name, bias), both in cells.items():
            train, test = both.get(True, []), both.get(False, [])
            lines.append(f"| {name} | {size} | {'yes' if bias else 'no'} | {show(median(train, 'params'), ',.0f')} | {show(median(train, 'peak_mb'), ',.0f')} | "
                         f"{show(median(train, 'seconds'), '.2f')} | {show(median(test, 'seconds'), '.2f')} |")
        return "\n".join(lines)
    for row in rows:
        place = cells.setdefault((row["model"], row["window"], row["device"], row["size"], row["bias"], row["fused"], row["checkpointing"]), {})
        place.setdefault(row["blocks"], []).append(row)
    heads = " | ".join(f"{name}, {unit}" if name else "global / hybrid" for unit in ("MB", "s") for name in [*BLOCKS, ""])
    lines = [f"| px | bias | attention | recompute | {heads} |", "|" + "---|" * 12]
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
        else:
            command.add_argument("--size", type=int, default=512, help="of the square image")
        command.add_argument("--window", type=int, default=14, help="tokens")
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--timed", type=int, default=1, help="timed steps per round after the first; 0 times the first, cold")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
        command.add_argument("--json", help="append the results, a line each")
    commands.add_parser("table").add_argument("file")
    commands.add_parser("one").add_argument("spec")
    flags = parser.parse_args(argv)
    if flags.bench == "one":
        print(json.dumps(measure(json.loads(flags.spec))))
    elif flags.bench == "table":
        print(table([json.loads(line) for line in Path(flags.file).read_text().splitlines()]))
    else:
        run(flags)


if __name__ == "__main__":
    main()

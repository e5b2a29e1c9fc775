"""Peers: the same work by somebody else's code, the two taking turns.

    python experiments/peers.py compare --only mae vit --precisions fp32 bf16 --json peers.jsonl
    python experiments/peers.py table peers.jsonl

    mae    a pre-training step of MAE-B                     transformers' ViTMAEForPreTraining
    vit    a training step of the ViT-B/16 classifier       timm's vit_base_patch16_224
    swin   a training step of MixMIM-B's encoder with a     timm's swin_base_patch4_window7_224 with our windows (14, 14, 14, 7):
           classifier                                       of its Swin-B the one with the nearest multiply-adds
    swin7  the same                                         the same as published: windows of 7
    sam    SAM around AdamW, on a ViT-B/16                  pytorch_optimizer's SAM

A step is forward, loss and backward into gradients that are there already. The optimizer's update is left
out, since it would be the same code on as many numbers. Of SAM counted are the whole step, and what
it adds by itself: both halves around an optimizer that does nothing (climb, norms, way back), in units of one
fused AdamW update. Weights are random, and no result is compared here: tests/ does that.

Time is paired: one process holds ours, the peer's and a matrix multiplication (2048^3 on a CPU, 8192^3 on a
GPU, same precision), and each round runs all of them, every other round in reverse. The ratio is the median of
the rounds' ratios of images/s, so a slow minute hits both sides. The share of the machine is 2 x 3 x multiply-adds of the
forward pass / seconds / the rate of that multiplication in the same round. Multiply-adds are counted by torch
with attention written out, so that no fused kernel hides them. Memory is measured as in bench.py, each side in a process of its own.

Needs: torch, einops; bench.py and machine.py beside it, mae.py, mixmim.py, sam.py, vit.py with what they need; the peers' packages. Unix.
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the concept files lie in the repository root
sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench.py, also when this file is imported

from bench import append, in_new_process, memory, read_rows, table_head
from machine import machine

from mae import MAE
from mixmim import create_mixmim
from sam import SAM
from vit import create_vit

PACKAGES = {"mae": "transformers", "vit": "timm", "swin": "timm", "swin7": "timm", "sam": "pytorch_optimizer"}
SAME_WORK = ("mae", "vit", "swin")  # these must agree in multiply-adds


# ---------------------------------------------------------------------------- the two sides


def mae_model(side, tiny):
    size = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2) if tiny else dict(img_size=224)
    decoder = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2) if tiny else dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)
    if side == "ours":
        return MAE(create_vit("vit_b16", num_classes=0, **size), **decoder)
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    full = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, **size) if not tiny else size
    config = ViTMAEConfig(
        image_size=full["img_size"], patch_size=full["patch_size"], hidden_size=full["embed_dim"], num_hidden_layers=full["depth"],
        num_attention_heads=full["num_heads"], intermediate_size=4 * full["embed_dim"], decoder_hidden_size=decoder["decoder_embed_dim"],
        decoder_num_hidden_layers=decoder["decoder_depth"], decoder_num_attention_heads=decoder["decoder_num_heads"],
        decoder_intermediate_size=4 * decoder["decoder_embed_dim"], mask_ratio=0.75, norm_pix_loss=True)
    return ViTMAEForPreTraining(config)


def vit_model(side, tiny):
    size = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2) if tiny else dict(img_size=224)
    if side == "ours":
        return create_vit("vit_b16", **size)
    import timm
    return timm.create_model("vit_base_patch16_224", **size)


def swin_model(side, tiny, windows=14):
    size = dict(img_size=64, embed_dim=16, depths=(1, 1), num_heads=(1, 2)) if tiny else dict(img_size=224)
    if side == "ours":
        return create_mixmim("mixmim_b", **size, **(dict(window_size=(14, 8)) if tiny else {}))
    import timm
    # timm shrinks a window to the map, as we do: 14, 14, 14, 7
    return timm.create_model("swin_base_patch4_window7_224", window_size=windows, drop_path_rate=0.0, **size)  # ours has none


def image_step(spec, side, device):
    """(model, step) of one side; a step is forward, loss, backward."""
    name, size = spec["peer"], img_size(spec)
    torch.manual_seed(0)
    make = {"mae": mae_model, "vit": vit_model, "swin": swin_model, "swin7": lambda side, tiny: swin_model(side, tiny, windows=7)}[name]
    model = make(side, spec["tiny"]).to(device).train()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    imgs, labels = torch.randn(spec["batch"], 3, size, size, device=device), torch.randint(10, (spec["batch"],), device=device)
    run = torch.compile(model) if spec["compiled"] else model

    def forward():
        with torch.autocast(device.type, torch.bfloat16, enabled=spec["precision"] == "bf16"):
            return run(imgs).loss if name == "mae" else F.cross_entropy(run(imgs), labels)

    return model, lambda: forward().backward()


def img_size(spec):
    return {"mae": 32, "vit": 32, "swin": 64, "swin7": 64, "sam": 32}[spec["peer"]] if spec["tiny"] else 224


class NoUpdate(torch.optim.Optimizer):
    """A base optimizer that does nothing: what is left of SAM's time is SAM's own."""

    def __init__(self, params, **defaults):
        super().__init__(params, defaults)

    def step(self, closure=None):
        pass


def sam_steps(spec, side, device):
    """(model, whole step, SAM's own part of it, one update of AdamW)."""
    model, backward = image_step({**spec, "peer": "vit"}, "ours", device)
    if side == "ours":
        make = SAM
    else:
        from pytorch_optimizer import SAM as make
    adamw = dict(lr=1e-6, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    whole = make(model.parameters(), torch.optim.AdamW, rho=0.05, **adamw)
    own = make(model.parameters(), NoUpdate, rho=0.05)
    plain = torch.optim.AdamW(model.parameters(), **adamw)

    def step():
        for half in (whole.first_step, whole.second_step):
            model.zero_grad()
            backward()
            half()

    def own_part():
        own.first_step()
        own.second_step()

    return model, step, own_part, plain.step


# ---------------------------------------------------------------------------- measuring


def multiply_adds(model, spec, device):
    """Of the forward pass, per image."""
    size = img_size(spec)
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, size, size, device=device))
    return counter.get_total_flops() // 2


def matmul(spec, device):
    """(function, how many operations it does): the yardstick."""
    n = 128 if spec["tiny"] else 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if spec["precision"] == "bf16" else torch.float32) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * n**3


def seconds(run, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def paired(spec):
    """Both sides in this process; yields a row per round."""
    device = torch.device(spec["device"])
    jobs, facts = {}, {}
    for side in ("ours", "peer"):
        if spec["peer"] == "sam":
            model, jobs[side], jobs[f"{side}_own"], jobs["adamw"] = sam_steps(spec, side, device)
        else:
            model, jobs[side] = image_step(spec, side, device)
        facts[f"{side}_macs"] = multiply_adds(model, spec, device)
        facts[f"{side}_params"] = sum(p.numel() for p in model.parameters())
        if spec["peer"] == "mae" and side == "peer":
            facts["attention"] = model.config._attn_implementation  # the library's default, to be shown
    if spec["peer"] in SAME_WORK and not 0.99 < facts["ours_macs"] / facts["peer_macs"] < 1.01:
        raise SystemExit(f"peers.py: {spec['peer']} is no fair comparison, multiply-adds {facts['ours_macs']:,} here and {facts['peer_macs']:,} there")
    jobs["matmul"], operations = matmul(spec, device)
    for name, run in jobs.items():
        for _ in range(2 if spec["compiled"] or device.type == "cuda" else 1):  # SAM's halves too; compiling, tuning, first allocations
            run()
    for number in range(spec["rounds"]):
        order = list(jobs) if number % 2 == 0 else list(jobs)[::-1]
        times = {f"{name}_s": seconds(jobs[name], device) for name in order}
        yield {**spec, **facts, **times, "kind": "time", "round": number, "matmul_flops": operations / times["matmul_s"]}


def peak(spec):
    """Memory of one side in this process: {"peak_mb"}, the growth over two steps."""
    device = torch.device(spec["device"])
    _, step, *_ = (sam_steps if spec["peer"] == "sam" else image_step)(spec, spec["side"], device)
    before = memory(device, reset=True)
    for _ in range(2):
        step()
    return dict(peak_mb=max(0, memory(device, peak=True) - before) / 2**20)  # the kernel counts pages a little late


# ---------------------------------------------------------------------------- running and showing


def compare(flags):
    if flags.json:
        open(flags.json, "a").close()  # if it cannot be written, say so now
    where = machine(flags.device)
    rows = []

    def keep(row):
        rows.append({**row, **where})
        append(rows[-1], flags.json)

    for name in flags.only:
        try:
            version = importlib.metadata.version(PACKAGES[name])
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is skipped: pip install {PACKAGES[name]}", flush=True)
            continue
        for precision in flags.precisions:
            spec = dict(bench="peers", peer=name, package=f"{PACKAGES[name]} {version}", precision=precision, compiled=flags.compile and name != "sam",
                        batch=flags.batch_size, rounds=flags.rounds, device=flags.device, tiny=flags.tiny)
            with subprocess.Popen([sys.executable, __file__, "one", json.dumps(spec)], stdout=subprocess.PIPE, text=True) as child:
                for line in child.stdout:  # as they come: a run that is interrupted has its rounds in the file
                    if line.startswith("{"):
                        keep(json.loads(line))
            if child.returncode:
                raise SystemExit(f"peers.py: {name} in {precision} failed (exit code {child.returncode}), see above")
            for side in ("ours", "peer"):
                keep({**spec, "kind": "memory", "side": side, **(in_new_process({**spec, "side": side}, __file__) or {"out_of_memory": True})})
    if rows:
        print(table(rows))


def spread(values, form=".2f"):
    """Median, and from where to where."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(rows):
    """Markdown: one line per comparison; SAM, whose units are others, below."""
    if not rows or {row.get("bench") for row in rows} != {"peers"}:
        raise ValueError("the file holds other rows than those of peers.py compare, or none; give the file of its --json")
    groups = {}
    for row in rows:
        # rounds of other code are another line; the first lines of this kind knew no commit
        key = tuple(row.get(k) for k in ("peer", "package", "precision", "compiled", "batch", "device", "threads", "tiny", "commit"))
        groups.setdefault(key, []).append(row)
    images, sams = [], []
    for (name, package, precision, compiled, batch, device, *_), some in groups.items():
        rounds = [row for row in some if row["kind"] == "time"]
        held = {row["side"]: "does not fit" if "out_of_memory" in row else f"{row['peak_mb']:,.0f}" for row in some if row["kind"] == "memory"}
        if not rounds:
            continue

        def middle(value, form):
            return format(statistics.median(map(value, rounds)), form)

        sides = ("ours", "peer")
        speed = " | ".join(middle(lambda row: batch / row[f"{side}_s"], ".3g") for side in sides)
        ratio = spread([row["peer_s"] / row["ours_s"] for row in rounds])
        mb = " / ".join(held.get(side, "") for side in sides)
        how = f"{device}, {precision}{', compiled' if compiled else ''}"
        if name == "sam":
            own = " | ".join(spread([row[f"{side}_own_s"] / row["adamw_s"] for row in rounds]) for side in sides)
            sams.append(f"| {package} | {how} | {batch} | {own} | {speed} | {ratio} | {mb} |")
            continue
        passes = 2 * 3 * batch
        share = " / ".join(middle(lambda row: passes * row[f"{side}_macs"] / row[f"{side}_s"] / row["matmul_flops"], ".0%") for side in sides)
        gmacs = " / ".join(f"{rounds[0][f'{side}_macs'] / 1e9:.4g}" for side in sides)
        work = " / ".join(middle(lambda row: batch * row[f"{side}_macs"] / row[f"{side}_s"] / 1e9, ".3g") for side in sides)
        attention = next((f", {row['attention']} attention" for row in rounds if "attention" in row), "")
        images.append(f"| {name} | {package}{attention} | {how} | {batch} | {speed} | {ratio} | {gmacs} | {work} | {share} | {mb} |")
    parts = []
    if images:
        parts.append(table_head("comparison", "peer", "device, precision", "batch", "images/s, ours", "peer's", "ratio",
                                "10^9 multiply-adds per image, ours / peer's", "10^9 per second", "of the matmul rate", "peak MB") + images)
    if sams:
        parts.append(table_head("SAM's peer", "device, precision", "batch", "own part, in AdamW updates, ours", "peer's", "images/s of a step, ours", "peer's",
                                "ratio", "peak MB, ours / peer's") + sams)
    return "\n\n".join("\n".join(part) for part in parts)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("compare")
    command.add_argument("--only", nargs="+", default=list(PACKAGES), choices=list(PACKAGES), help="the comparisons (default: all)")
    command.add_argument("--precisions", nargs="+", default=["fp32"], choices=("fp32", "bf16"),
                         help="bf16 is autocast, on both sides; minutes a step where the CPU has no instructions for it")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--compile", action="store_true", help="torch.compile on both sides; SAM's halves are eager in any case")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    command.add_argument("--json", help="append the measurements, a line each")
    command.add_argument("--tiny", action="store_true", help="toy sizes, to see whether it runs")
    commands.add_parser("table").add_argument("file", help="what compare --json wrote")
    commands.add_parser("one").add_argument("spec")
    flags = parser.parse_args(argv)
    if flags.command == "one":
        spec = json.loads(flags.spec)
        for row in [peak(spec)] if "side" in spec else paired(spec):
            print(json.dumps(row), flush=True)
        return
    try:
        if flags.command == "table":
            print(table(read_rows(flags.file)))
        else:
            for name in ("batch_size", "rounds"):
                if getattr(flags, name) < 1:
                    raise ValueError(f"--{name.replace('_', '-')} {getattr(flags, name)} must be at least 1")
            if flags.device == "cuda" and not torch.cuda.is_available():
                raise ValueError("--device cuda: torch finds no GPU; use --device cpu")
            compare(flags)
    except (ValueError, OSError) as error:
        print(f"peers.py: {error}; see --help", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""What the detection benchmark claims, and its like for segmentation: which pre-training is worth most to a plain ViT with a dense head?

Generated scenes of 64 px, which have labels, boxes, masks and a class for every pixel. Every start but the random one has made the same
number of passes through the same scenes before, with the class of their largest shape or without (supervised contrastive learning sees
two views in a pass); then detector or segmenter train on few of them. "Early" is after a third (detection) or a quarter of that training,
in whole epochs.

Source: Li et al. 2021, arXiv 2111.11429 (detection); MIRL, arXiv 2309.14136, and MixMIM, arXiv 2205.13137 (segmentation).
Needs: lab.py, bench.py, train.py with all it needs; pycocotools for detection.
"""

from functools import partial

import torch

import bench
from lab import Claim, Statement

SHAPE = dict(model="vit_demo", embed_dim=96, depth=8, num_heads=3, patch_size=8, img_size=64)
PRETRAINING = {  # name -> flags; none: random start
    "random": None,
    "supervised": dict(task="classify", lr=1e-3),
    "supervised contrastive": dict(task="classify", loss="supcon", lr=1e-3),
    "mask symbol": dict(task="pretrain", method="mixmim", fill="mask", lr=1e-3),
    "MAE": dict(task="pretrain", method="mae", lr=1e-3),
    "MIRL": dict(task="pretrain", method="mirl", segments=4, lr=1e-3),
    "MixMIM": dict(task="pretrain", method="mixmim", lr=1e-3),
}
STANDS_FOR = {"supervised contrastive": "supervised contrastive (for MoCo v3)", "mask symbol": "mask symbol (for BEiT)"}


def start(lab, name, scenes=2048, epochs=4, **shape):
    """Flags of a dense task that begin with this pre-training."""
    flags = PRETRAINING[name]
    small = dict(embed_dim=16, depth=4, num_heads=1) if lab.tiny else {}
    shape = {**SHAPE, **shape, **small}
    if flags is None:
        return shape
    run = lab.train(**{**shape, **flags}, data="shapes", data_size=lab.pick(scenes, 48), batch_size=lab.pick(32, 16), epochs=lab.epochs(epochs))
    method = {"method": "mixmim"} if flags.get("method") == "mixmim" else {}
    return {**shape, **method, "init": run.checkpoint}


def detect(lab, name, scenes=192, epochs=6, shape=None, **more):
    """shape: of the encoder, also in pre-training; more: flags of the detector alone. 128 other scenes judge."""
    passes = lab.epochs(epochs)
    run = lab.train(task="detect", **start(lab, name, **(shape or {})), data="shapes", data_size=lab.pick(512, 16),
                    train_images=lab.pick(scenes, 8), epochs=passes, eval_every=max(1, passes // 3), **more)
    curve = run.curve("box_ap50")
    return {"box AP50": run.last["box_ap50"], "box AP": run.last["box_ap"], "mask AP50": run.last["mask_ap50"], "AP50 early": curve[0][1],
            "minutes": run.seconds / 60, "curve box AP50": curve}


def detect_init(lab):
    def ahead(one, other, key="box AP50"):
        return lambda f: f[STANDS_FOR.get(one, one)][key] - f[STANDS_FOR.get(other, other)][key]

    says = "masked pre-training (MAE, BEiT) gives the best detectors; supervised and contrastive no better than random start, in the end"
    return Claim("Detection benchmark", says, {
        STANDS_FOR.get(name, name): partial(detect, lab, name) for name in PRETRAINING}, [
        Statement("MAE is ahead of random start", ahead("MAE", "random"), "points of AP50"),
        Statement("a third of the way MAE is ahead of random start", ahead("MAE", "random", "AP50 early"), "points of AP50"),
        Statement("the mask symbol is ahead of random start", ahead("mask symbol", "random"), "points of AP50"),
        Statement("MAE is ahead of supervised", ahead("MAE", "supervised"), "points of AP50"),
        Statement("MAE is ahead of supervised contrastive", ahead("MAE", "supervised contrastive"), "points of AP50"),
        Statement("random start is ahead of supervised", ahead("random", "supervised"), "points of AP50"),
        Statement("MIRL, of another paper, is ahead of random start", ahead("MIRL", "random"), "points of AP50"),
        Statement("MixMIM, of another paper, is ahead of random start", ahead("MixMIM", "random"), "points of AP50")],
        ("box AP50", "AP50 early", "mask AP50"), ("training steps", "box AP50"), "shapes")


def detect_scale(lab):
    """The paper's sizes are ViT-B and ViT-L; here width alone grows, and the heads on top stay as they are."""
    widths = (64, 96, 128)
    arms = {f"{name}, {width} channels": partial(detect, lab, name, shape=dict(embed_dim=width, num_heads=width // 32))
            for width in widths for name in ("random", "MAE")}

    def gain(f, width):
        return f[f"MAE, {width} channels"]["box AP50"] - f[f"random, {width} channels"]["box AP50"]

    return Claim("Detection benchmark", "the larger the encoder, the more MAE gains over random start", arms, [
        Statement(f"MAE gains more at {widths[-1]} channels than at {widths[0]}", lambda f: gain(f, widths[-1]) - gain(f, widths[0]), "points of AP50"),
        *(Statement(f"MAE is ahead of random start at {width} channels", lambda f, width=width: gain(f, width), "points of AP50") for width in widths)],
        ("box AP50", "AP50 early", "mask AP50"), ("training steps", "box AP50"), "shapes")


def detect_window(lab):
    """As in the paper four windows side by side, here of 2 x 2 tokens, and MAE before. At such a size windows save nothing: memory and time
    are those of a training step of a wider ViT on a larger image, windows of 14, with the paper's trainable bias (bench.py).
    """
    def measured(blocks, flags):
        figures = detect(lab, "MAE", window_size=None if flags["global_blocks"] == "all" else 2, **flags)
        spec = dict(bench="attention", device="cuda" if torch.cuda.is_available() else "cpu", window=lab.pick(14, 2), timed=lab.pick(1, 0), blocks=blocks,
                    model=lab.pick("vit_ti16", "vit_demo"), size=lab.pick(768, 32), bias=True, fused=False, checkpointing=False)
        cost = bench.measure(spec) if lab.tiny else bench.in_new_process(spec)  # memory is read off a process, so a new one each; a test need not
        if cost is None:
            raise ValueError(f"{blocks}: a training step at {spec['size']} px ran out of memory; close other programs, as it takes some 2 GB")
        return {**figures, f"MB at {spec['size']} px": cost["peak_mb"], f"seconds at {spec['size']} px": cost["seconds"]}

    memory, time = (f"{what} at {lab.pick(768, 32)} px" for what in ("MB", "seconds"))

    def saved(one, other, key):  # a tiny step may need no new memory at all
        return lambda f: 100 * (1 - f[one][key] / f[other][key]) if f[other][key] > 0 else 0.0

    def ahead(one, other):
        return lambda f: f[one]["box AP50"] - f[other]["box AP50"]

    return Claim("Detection benchmark", "windows with four global blocks detect as well as global attention, for less memory and time; windows alone do not", {
        name: partial(measured, name, dict(global_blocks=blocks)) for name, blocks in bench.BLOCKS.items()}, [
        Statement("hybrid is ahead of windows alone", ahead("hybrid", "windows only"), "points of AP50"),
        Statement("hybrid is less than 2 points behind all global", lambda f: 2 + ahead("hybrid", "all global")(f), "points of room", 0.1),
        Statement("hybrid needs less memory than all global", saved("hybrid", "all global", memory), "% of it", 10),
        Statement("hybrid needs less time than all global", saved("hybrid", "all global", time), "% of it", 10),
        Statement("windows alone need less memory than hybrid", saved("windows only", "hybrid", memory), "% of it", 10)],
        ("box AP50", "AP50 early", memory, time), ("training steps", "box AP50"), "shapes")


# ---------------------------------------------------------------------------- segmentation


def segment(lab, name, scenes=256, epochs=12):
    passes = lab.epochs(epochs)
    run = lab.train(task="segment", **start(lab, name), data="shapes", data_size=lab.pick(1024, 16), train_images=lab.pick(scenes, 8),
                    channels=lab.pick(32, 8), batch_size=4, lr=2e-3, epochs=passes, eval_every=max(1, passes // 4))
    curve = run.curve("miou")
    return {"mIoU": run.last["miou"], "mIoU early": curve[0][1], "pixel %": run.last["pixel_acc"], "minutes": run.seconds / 60,
            "curve mIoU": curve}


def segment_init(lab):
    """The papers' scenes are ADE20K's; both fine-tune with layer-wise learning rates, chosen per start, here all starts have one."""
    names = ("random", "MAE", "MIRL", "mask symbol", "MixMIM")

    def ahead(one, other, key="mIoU"):
        return lambda f: f[one][key] - f[other][key]

    return Claim("MIRL, MixMIM", "masked pre-training helps segmentation, MIRL more than MAE, MixMIM more than a mask symbol", {
        name: partial(segment, lab, name) for name in names}, [
        *(Statement(f"{name} is ahead of random start", ahead(name, "random"), "points of mIoU") for name in names[1:]),
        Statement("MIRL is ahead of MAE", ahead("MIRL", "MAE"), "points of mIoU"),
        Statement("MixMIM is ahead of the mask symbol", ahead("MixMIM", "mask symbol"), "points of mIoU"),
        Statement("a quarter of the way MAE is ahead of random start", ahead("MAE", "random", "mIoU early"), "points of mIoU")],
        ("mIoU", "mIoU early", "pixel %"), ("training steps", "mIoU"), "shapes")


CLAIMS = {"detect-init": detect_init, "detect-scale": detect_scale, "detect-window": detect_window, "segment-init": segment_init}

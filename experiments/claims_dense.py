"""What the detection benchmark claims, and its like for segmentation: which pre-training is worth most to a plain ViT with a dense head?

Generated scenes of 64 px, which have labels, boxes, masks and a class for every pixel. Every start but the random one has seen the
same scenes equally often before, with the class of their largest shape or without; then detector or segmenter train on few of them.

Source: Li et al. 2021, arXiv 2111.11429 (detection); MIRL, arXiv 2309.14136, and MixMIM, arXiv 2205.13137 (segmentation).
Needs: lab.py, train.py with all it needs; pycocotools for detection.
"""

from functools import partial

from lab import Claim, Statement

SHAPE = dict(model="vit_demo", embed_dim=96, depth=8, num_heads=3, patch_size=8, img_size=64)
PRETRAINING = {  # name -> flags; none: random start
    "random": None,
    "supervised": dict(task="classify", lr=1e-3),
    "supervised contrastive": dict(task="classify", loss="supcon", lr=1e-3),
    "mask symbol": dict(task="pretrain", method="mixmim", fill="mask", lr=1e-3),
    "MAE": dict(task="pretrain", method="mae", raw_pixels=True, lr=1e-3),
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


def detect(lab, name, scenes=192, epochs=6):
    passes = lab.epochs(epochs)
    run = lab.train(task="detect", **start(lab, name), data="shapes", data_size=lab.pick(scenes, 8), epochs=passes, eval_every=max(1, passes // 4))
    curve = run.curve("box_ap50")
    return {"box AP50": run.last["box_ap50"], "box AP": run.last["box_ap"], "mask AP50": run.last["mask_ap50"], "AP50 midway": curve[(len(curve) - 1) // 2][1],
            "minutes": run.seconds / 60, "curve box AP50": curve}


def detect_init(lab):
    def ahead(one, other, key="box AP50"):
        return lambda f: f[STANDS_FOR.get(one, one)][key] - f[STANDS_FOR.get(other, other)][key]

    return Claim("Detection benchmark", "masked pre-training (MAE, BEiT) gives the best detectors; supervised and contrastive no better than random start, in the end", {
        STANDS_FOR.get(name, name): partial(detect, lab, name) for name in PRETRAINING}, [
        Statement("MAE is ahead of random start", ahead("MAE", "random"), "points of AP50"),
        Statement("MAE is ahead of random start midway", ahead("MAE", "random", "AP50 midway"), "points of AP50"),
        Statement("the mask symbol is ahead of random start", ahead("mask symbol", "random"), "points of AP50"),
        Statement("MAE is ahead of supervised", ahead("MAE", "supervised"), "points of AP50"),
        Statement("MAE is ahead of supervised contrastive", ahead("MAE", "supervised contrastive"), "points of AP50"),
        Statement("random start is ahead of supervised", ahead("random", "supervised"), "points of AP50"),
        Statement("MIRL is ahead of random start", ahead("MIRL", "random"), "points of AP50"),
        Statement("MixMIM is ahead of random start", ahead("MixMIM", "random"), "points of AP50")],
        ("box AP50", "AP50 midway", "mask AP50"), ("training steps", "box AP50"))


CLAIMS = {"detect-init": detect_init}

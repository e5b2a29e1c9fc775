"""What the SAM paper claims: ViTs and Mixers end in sharp minima; sharpness-aware minimisation takes them out, and they improve most.

A ViT, a Mixer and a ResNet of a similar speed learn few images without augmentation, until they know most by heart: the
regime in which sharp minima hurt. Radii are those chosen for larger ones on another seed (README, "SAM on ViT, Mixer and
ResNet"), looked at here on one more (100); learning rates are the same with and without SAM.

Source: Chen, Hsieh, Gong 2022, arXiv 2106.01548. Needs: lab.py, landscape.py, train.py with all it needs.
"""

import math
from functools import partial

import torch.nn.functional as F

from lab import Claim, Statement  # first: it makes the concept files importable

import geometry
import landscape
import train
from data import augmentation

NETS = {  # flags without and with SAM
    "ViT": (dict(model="vit_demo", patch_size=8, embed_dim=96, depth=4, num_heads=3, lr=1e-3, weight_decay=0.1), dict(optimizer="sam", rho=0.05)),
    "Mixer": (dict(model="mixer_demo", patch_size=8, embed_dim=96, depth=4, lr=1e-3, weight_decay=0.1), dict(optimizer="sam", rho=0.1)),
    "ResNet": (dict(model="resnet8", optimizer="sgd", lr=0.1, weight_decay=5e-4), dict(optimizer="sam", base_optimizer="sgd", rho=0.02)),
}
SMALL = {"ViT": dict(embed_dim=16, depth=2, num_heads=1), "Mixer": dict(embed_dim=16, depth=2), "ResNet": {}}  # --tiny


def learn(lab, net, sam=False, images=1000, epochs=25, **more):
    """A classifier, trained from scratch without augmentation."""
    plain, sharpness_aware = NETS[net]
    flags = {**plain, **(sharpness_aware if sam else {}), **(SMALL[net] if lab.tiny else {}), "augment": "none", **more}
    return lab.train(task="classify", **lab.images(images, val=4000), img_size=32, batch_size=lab.pick(32, 16), epochs=lab.epochs(epochs), **flags)


def named(net, sam):
    return f"{net} + SAM" if sam else net


def sam_accuracy(lab):
    few, many = 250, 1000

    def judged(net, sam, images, epochs):
        run = learn(lab, net, sam, images, epochs)
        return {"test %": run.last["val_acc"], "train loss": run.last["train_loss"], "minutes": run.seconds / 60}

    arms = {f"{named(net, sam)}, {images:,} images": partial(judged, net, sam, images, 25) for images in (few, many) for net in NETS for sam in (False, True)}
    arms |= {f"{net} for twice the epochs, {many:,} images": partial(judged, net, False, many, 50) for net in NETS}

    def gain(f, net, images=many, other="{net}, {images:,} images"):
        return f[f"{net} + SAM, {images:,} images"]["test %"] - f[other.format(net=net, images=images)]["test %"]

    return Claim("SAM for ViT and Mixer", "SAM improves ViTs and Mixers much, ResNets little; the fewer the images, the more", arms, [
        Statement("SAM helps the ViT", partial(gain, net="ViT")),
        Statement("SAM helps the Mixer", partial(gain, net="Mixer")),
        Statement("SAM helps the ViT more than the ResNet", lambda f: gain(f, "ViT") - gain(f, "ResNet")),
        Statement("SAM helps the Mixer more than the ViT", lambda f: gain(f, "Mixer") - gain(f, "ViT")),
        Statement("SAM helps the ViT at equal compute", partial(gain, net="ViT", other="{net} for twice the epochs, {images:,} images")),
        Statement("SAM helps the Mixer at equal compute", partial(gain, net="Mixer", other="{net} for twice the epochs, {images:,} images")),
        Statement(f"SAM helps ViT and Mixer more with {few:,} images than with {many:,}",
                  lambda f: sum(gain(f, net, few) - gain(f, net, many) for net in ("ViT", "Mixer")) / 2),
        Statement("with SAM the ViT is ahead of the ResNet", lambda f: f[f"ViT + SAM, {many:,} images"]["test %"] - f[f"ResNet, {many:,} images"]["test %"])],
        ("test %", "train loss", "minutes"))


# ---------------------------------------------------------------------------- geometry


def sharpness(lab, net, sam):
    """landscape.py's figures, and those that it leaves out: eigenvalues of three blocks, the NTK's condition number."""
    run = learn(lab, net, sam)
    model, args = lab.load(run)
    images = lab.pick(256, 16)
    flags = landscape.parse([str(run.checkpoint), "--images", str(images), "--micro-batch", str(images), "--test-images", str(lab.pick(2000, 12)),
                             "--corruption-images", "0", "--iters", str(lab.pick(40, 2)), "--tol", "0.03", "--draws", str(lab.pick(10, 2)),
                             "--surface-steps", str(lab.pick(9, 3))])
    chosen, scales = landscape.open_data([run.checkpoint], [args], flags)
    scale = scales[bool(args.stats)]
    found, _ = landscape.measure(model, args, chosen, scale, flags, train.World("cpu"), lambda _: None)
    source, indices = chosen["train"]
    x, y = landscape.stack(landscape.Images(source, augmentation("none", args.img_size, *scale), indices=indices))

    def eigenvalue(module):
        return geometry.hessian_max_eigenvalue(model, lambda: F.cross_entropy(model(x), y), params=list(module.parameters()), iters=flags.iters, tol=flags.tol)

    kappa = min(geometry.ntk_condition_number(model, x[:lab.pick(64, 4)]).kappa, 1e14)  # beyond float32's rounding, squared, it is infinite
    figures = {"lambda": abs(found["lambda_max"]), "log10 NTK condition": math.log10(kappa), "gap to L_N": found["gap"], "train loss": found["train_loss"],
               "radius": min(found["doubling_radius"], flags.surface_radius), "weight norm": found["weight_norm"], "active first %": found["active_first"],
               "active mean %": found["active_mean"]}
    if net != "ResNet":
        embedding = model.patch_embed if hasattr(model, "patch_embed") else model.stem
        figures |= {"lambda of embedding": abs(eigenvalue(embedding)), "lambda of first block": abs(eigenvalue(model.blocks[0])),
                    "lambda of last block": abs(eigenvalue(model.blocks[-1]))}
    return figures


def sam_geometry(lab):
    arms = {named(net, sam): partial(sharpness, lab, net, sam) for net in NETS for sam in (False, True)}

    def ratio(f, key, above, below):  # as a logarithm, so that seeds can be averaged
        return math.log2(max(f[above][key], 1e-9) / max(f[below][key], 1e-9))

    def lower(key, net, unit="% points", worth=1.0):
        return Statement(f"SAM lowers the {net}'s {key}", lambda f: f[net][key] - f[f"{net} + SAM"][key], unit, worth)

    doublings = "doublings"
    return Claim("SAM for ViT and Mixer", "sharpness grows from ResNet to ViT to Mixer, and SAM flattens", arms, [
        *(Statement(f"SAM lowers the {net}'s lambda", lambda f, net=net: ratio(f, "lambda", net, f"{net} + SAM"), doublings, 0.5) for net in NETS),
        Statement("the ViT's lambda is above the ResNet's", lambda f: ratio(f, "lambda", "ViT", "ResNet"), doublings, 0.5),
        Statement("the Mixer's lambda is above the ViT's", lambda f: ratio(f, "lambda", "Mixer", "ViT"), doublings, 0.5),
        *(Statement(f"SAM narrows the {net}'s gap to L_N", lambda f, net=net: ratio(f, "gap to L_N", net, f"{net} + SAM"), doublings, 0.3)
          for net in ("ViT", "Mixer")),
        *(Statement(f"SAM widens the {net}'s valley", lambda f, net=net: ratio(f, "radius", f"{net} + SAM", net), doublings, 0.3) for net in ("ViT", "Mixer")),
        Statement("the ViT's NTK is worse conditioned than the ResNet's", lambda f: f["ViT"]["log10 NTK condition"] - f["ResNet"]["log10 NTK condition"],
                  "decades", 0.2),
        Statement("the Mixer's NTK is worse conditioned than the ViT's", lambda f: f["Mixer"]["log10 NTK condition"] - f["ViT"]["log10 NTK condition"],
                  "decades", 0.2),
        *(Statement(f"the {net}'s embedding is sharper than its last block",
                    lambda f, net=net: math.log2(f[net]["lambda of embedding"] / f[net]["lambda of last block"]), doublings, 0.5) for net in ("ViT", "Mixer")),
        *(Statement(f"SAM makes weights longer: {net}", lambda f, net=net: 100 * (f[f"{net} + SAM"]["weight norm"] / f[net]["weight norm"] - 1), "%", 1)
          for net in ("ViT", "Mixer")),
        *(lower("active first %", net) for net in ("ViT", "Mixer"))],
        ("lambda", "gap to L_N", "radius", "log10 NTK condition", "active first %"))


CLAIMS = {"sam-accuracy": sam_accuracy, "sam-geometry": sam_geometry}

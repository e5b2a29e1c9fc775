"""What MIRL claims: plain masked modelling trains deep blocks badly; residual learning lets depth pay.

Small images (32 px, patches of 4), narrow encoders (64 channels), one pass of minutes over some thousand images: the paper's
encoders are 54 blocks deep and saw ImageNet 300 times. What shows up here is direction, not size.

Source: MIRL, Huang, Fu, Bors 2023, arXiv 2309.14136. Needs: lab.py, train.py with all it needs.
"""

from functools import partial

import torch

from lab import Claim, Statement  # first: it makes the concept files importable

from data import Images, augmentation, first_of_shuffle, open_source
from masking import normalize_patches, patchify

SHAPE = dict(model="vit_demo", embed_dim=64, num_heads=2, patch_size=4, img_size=32)


def sizes(lab, depth, **more):
    return {**SHAPE, "depth": depth, **more, **(dict(embed_dim=16, num_heads=1, patch_size=8) if lab.tiny else {})}


def pretrain(lab, method, depth, images=10_000, epochs=2, **more):
    """method: mae, mirl, or "plain", which is MIRL without pairing."""
    if method != "mae":
        more = dict(segments=lab.pick(4, 2), **more)
    if method == "plain":
        method, more = "mirl", dict(no_pairing=True, **more)
    shape = {key: more.pop(key) for key in ("embed_dim", "num_heads") if key in more}
    return lab.train(task="pretrain", method=method, **sizes(lab, depth, **shape), **lab.images(images), epochs=lab.epochs(epochs), batch_size=lab.pick(64, 16),
                     lr=1e-3, decoder_embed_dim=lab.pick(64, 32), **more)


def probe(lab, depth, init=None, images=4000, **shape):
    """Accuracy of a linear classifier on the frozen features of the first `depth` blocks."""
    run = lab.train(task="classify", probe=True, **sizes(lab, depth, **shape), **lab.images(images), init=init, epochs=lab.pick(50, 1))
    return run.last["val_acc"]


def trained_and_probed(lab, method, depth, **more):
    run = pretrain(lab, method, depth, **more)
    return {"probe %": probe(lab, depth, run.checkpoint), "loss": run.last["val_loss"], "minutes": run.seconds / 60}


def mirl_depth(lab):
    shallow, deep = lab.pick((12, 24), (2, 4))
    arms = {f"random, {depth} blocks": lambda depth=depth: {"probe %": probe(lab, depth)} for depth in (shallow, deep)}
    arms |= {f"{method.upper()}, {depth} blocks": partial(trained_and_probed, lab, method, depth) for method in ("mae", "mirl") for depth in (shallow, deep)}

    def gain(f, method):
        return f[f"{method}, {deep} blocks"]["probe %"] - f[f"{method}, {shallow} blocks"]["probe %"]

    return Claim("MIRL", "plain masked modelling gains little or loses with depth, MIRL goes on gaining", arms, [
        Statement(f"from {shallow} to {deep} blocks MIRL gains more than MAE", lambda f: gain(f, "MIRL") - gain(f, "MAE")),
        Statement(f"at {deep} blocks MIRL is ahead of MAE", lambda f: f[f"MIRL, {deep} blocks"]["probe %"] - f[f"MAE, {deep} blocks"]["probe %"]),
        Statement(f"MAE loses from {shallow} to {deep} blocks", lambda f: -gain(f, "MAE"))], ("probe %", "loss", "minutes"))


# ---------------------------------------------------------------------------- what main and residual hold


@torch.no_grad()
def parts(lab, run, count=512):
    """Errors and variances on hidden patches of validation images, after each position's mean was taken from every part.

    The loss sees sums only, so that a constant per position and pixel may sit in either part; without it the parts can be compared.
    """
    model, args = lab.load(run)
    images, noise = validation(lab, args, lab.pick(count, 16))
    out = model(images, args.mask_ratio, noise)
    hidden = out.mask[..., None]

    def centred(x):
        return (x - (x * hidden).sum(dim=0) / hidden.sum(dim=0).clamp(min=1)) * hidden

    target = centred(normalize_patches(patchify(images, args.patch_size)))
    total = hidden.sum() * target.shape[-1]

    def mean_square(x):
        return (x.square().sum() / total).item()

    figures = {}
    for j in range(args.segments // 2):
        main, residual = centred(out.pred[j]), centred(out.pred[-1 - j])
        name = f" {j + 1}+{args.segments - j}"
        figures |= {f"error of main{name}": mean_square(main - target), f"error of residual{name}": mean_square(residual - target),
                    f"error of sum{name}": mean_square(main + residual - target), f"variance of main{name}": mean_square(main),
                    f"variance of residual{name}": mean_square(residual),
                    f"correlation{name}": (main * residual).sum().item() / (main.norm() * residual.norm()).item()}
    return figures


def validation(lab, args, count):
    """Images (count, C, H, W) as the run saw them in evaluation, and the noise of their masks."""
    source = open_source(args.data, args.data_path, False, tuple(args.img_size), args.data_size)
    some = Images(source, augmentation("none", args.img_size, source.mean, source.std), args.seed, first_of_shuffle(len(source), min(count, len(source))),
                  (args.img_size[0] // args.patch_size) * (args.img_size[1] // args.patch_size))
    images, _, noise = zip(*(some[0, i] for i in range(len(some))))
    return torch.stack(images), torch.stack(noise)


def mirl_residual(lab):
    depth = lab.pick(24, 4)

    def paired():
        run = pretrain(lab, "mirl", depth)
        return {"probe %": probe(lab, depth, run.checkpoint), **parts(lab, run)}

    def plain():
        run = pretrain(lab, "plain", depth)
        return {"probe %": probe(lab, depth, run.checkpoint)}

    def share(f, part, other):  # of the outermost pair: how much smaller, in percent of the other
        ends = f" 1+{lab.pick(4, 2)}"
        row = f["MIRL"]
        return 100 * (1 - row[part + ends] / row[other + ends])

    return Claim("MIRL", "shallow segments predict the image's main component, deep ones a smaller residual; the pairing is what helps",
                 {"MIRL": paired, "plain deep supervision": plain}, [
        Statement("pairing is ahead of plain deep supervision", lambda f: f["MIRL"]["probe %"] - f["plain deep supervision"]["probe %"]),
        Statement("the sum's error is below the main component's", lambda f: share(f, "error of sum", "error of main"), "% of it", 2),
        Statement("the main component's error is below the residual's", lambda f: share(f, "error of main", "error of residual"), "% of it", 2),
        Statement("the residual varies less than the main component", lambda f: share(f, "variance of residual", "variance of main"), "% of it", 5)],
        ("probe %",) + tuple(f"{what} 1+{lab.pick(4, 2)}" for what in ("error of main", "error of residual", "error of sum")))


CLAIMS = {"mirl-depth": mirl_depth, "mirl-residual": mirl_residual}

"""What MixMIM claims: fill the holes of one image with another's tokens, and a hierarchical encoder learns more from each pass.

A hierarchical encoder of three stages (48 channels) sees images of 32 px with 4 x 4 squares to hide. The paper's is Swin-B,
600 times through ImageNet. All claims compare with one run, the method as it is, which is trained once.

Source: MixMIM, Liu et al. 2022, arXiv 2205.13137. Needs: lab.py, claims_mirl.py, train.py with all it needs.
"""

import math
import statistics
import time
from functools import partial

import torch

import claims_mirl
from lab import Claim, Statement, images_of, multiply_adds

SHAPE = dict(method="mixmim", model="mixmim_demo", img_size=32, patch_size=2)


def pretrain(lab, times=1, images=10_000, **more):
    """Two epochs, or `times` as many -> Run."""
    small = dict(embed_dim=8, decoder_embed_dim=32) if lab.tiny else {}
    return lab.train(task="pretrain", **{**SHAPE, **small, **more}, **lab.images(images), batch_size=lab.pick(64, 16), epochs=times * lab.epochs(2))


def probe(lab, init=None, images=4000, **more):
    small = dict(embed_dim=8) if lab.tiny else {}
    return lab.train(task="classify", probe=True, **{**SHAPE, **small, **more}, **lab.images(images), init=init, epochs=lab.pick(50, 1)).last["val_acc"]


def trained_and_probed(lab, times=1, **more):
    run = pretrain(lab, times, **more)
    return {"probe %": probe(lab, run.checkpoint), "loss": run.last["val_loss"], "minutes": run.seconds / 60}


def step_ratio(lab, *runs, rounds=21):
    """How many times as long a step of the first run takes as of the second: forward and backward, taking turns, median of the rounds' ratios.

    The runs' own clocks would not do: they were made at different times, and beside different things. Loading and the update, the same for
    both, are left out, which favours the second run a little.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def step(model, images, mask_ratio):
        model(images, mask_ratio).loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    jobs = []
    for run in runs:
        model, args = lab.load(run)
        images, *_ = images_of(args, lab.pick(64, 4))
        jobs.append(partial(step, model.train().to(device), images.to(device), args.mask_ratio))
    ratios = []
    for number in range(lab.pick(rounds, 1) + 1):
        seconds = {}
        for k in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            jobs[k]()
            seconds[k] = time.perf_counter() - began
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])  # the first round makes the gradients


def ahead(one, other, key="probe %"):
    return lambda f: f[one][key] - f[other][key]


def less(one, other, key):
    """By how much it is smaller, in percent of the other."""
    return lambda f: 100 * (1 - f[one][key] / max(f[other][key], 1e-12))


def mixmim_fill(lab):
    def as_long():
        """The mask symbol's steps are cheaper, as each image is decoded once: as many more images as MixMIM's time allows."""
        ratio = step_ratio(lab, pretrain(lab), pretrain(lab, fill="mask"))
        return trained_and_probed(lab, images=lab.pick(500 * round(20 * ratio), 10_000), fill="mask")

    return Claim("MixMIM", "another image's tokens in the holes are better than a mask symbol", {
        "random": lambda: {"probe %": probe(lab)},
        "mix": partial(trained_and_probed, lab),
        "mask symbol": partial(trained_and_probed, lab, fill="mask"),
        "mask symbol, equal time": as_long}, [
        Statement("mixing is ahead of the symbol at equal steps", ahead("mix", "mask symbol")),
        Statement("mixing is ahead of the symbol at equal time", ahead("mix", "mask symbol, equal time"))], ("probe %", "loss"))


# ---------------------------------------------------------------------------- the parts of the method


def mixmim_dual(lab):
    return Claim("MixMIM", "reconstructing both images of a mixture is better than one: as much from fewer passes (as remembered)", {
        "random": lambda: {"probe %": probe(lab)},
        "both": partial(trained_and_probed, lab),
        "one": partial(trained_and_probed, lab, single=True),
        "one, twice the steps": partial(trained_and_probed, lab, 2, single=True)}, [
        Statement("both are ahead of one at equal steps", ahead("both", "one")),
        Statement("both are less than a point behind one with twice the steps", lambda f: 1 + ahead("both", "one, twice the steps")(f),
                  "points of room", 0.1)], ("probe %", "loss", "minutes"))


def mixmim_attention(lab):
    """The paper's third way, a learnt embedding that tells the two images apart, is not in mixmim.py."""
    return Claim("MixMIM", "tokens should attend to those of their own image only (as remembered)", {
        "random": lambda: {"probe %": probe(lab)},
        "own image only": partial(trained_and_probed, lab),
        "both images": partial(trained_and_probed, lab, open_attention=True)}, [
        Statement("masked attention gives the better features", ahead("own image only", "both images")),
        Statement("masked attention predicts hidden places better", less("own image only", "both images", "loss"), "% of the loss")], ("probe %", "loss"))


def mixmim_ratio(lab):
    """With two images a share r and a share 1 - r are the same puzzle, host and guest having changed places: a quarter and three
    quarters differ by chance only, and show how large that is. The paper's three quarters mix four images, which mixmim.py does not.
    """
    return Claim("MixMIM", "half of each image hidden is the best share (as remembered)", {
        "random": lambda: {"probe %": probe(lab)},
        "a quarter": partial(trained_and_probed, lab, mask_ratio=0.25),
        "half": partial(trained_and_probed, lab),
        "three quarters": partial(trained_and_probed, lab, mask_ratio=0.75)}, [
        Statement("half is ahead of the mean of the two others",
                  lambda f: f["half"]["probe %"] - (f["a quarter"]["probe %"] + f["three quarters"]["probe %"]) / 2)], ("probe %", "loss"))


# ---------------------------------------------------------------------------- from pre-training to clean images


def frechet(x, y):
    """Between Gaussians of the mean and covariance of two sets of features (n, D), in shares of y's total variance -> float.

    |m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2), divided by tr S'
    """
    (m, s), (m2, s2) = ((z.double().mean(dim=0), z.double().T.cov()) for z in (x, y))
    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    distance = (m - m2).square().sum() + s.trace() + s2.trace() - 2 * cross
    return (distance.clamp(min=0) / s2.trace().clamp(min=1e-12)).item()


@torch.no_grad()
def gap(lab, run, count=1024):
    """How far the last stage's features (before the last norm) of pre-training lie from those of the same images when clean.

    The same validation images: 64 at a time share a mask, as in training. Visible places: those that the mask symbol did not fill.
    """
    model, args = lab.load(run)
    images, *_ = images_of(args, lab.pick(count, 24))
    generator, seen = torch.Generator().manual_seed(args.seed), []
    hook = model.encoder.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    hidden = []
    for batch in images.split(lab.pick(64, 12)):
        noise = torch.rand(model.grid_size[0] * model.grid_size[1], generator=generator)
        hidden.append(model(batch, args.mask_ratio, noise).mask.flatten() > 0)
        model.encoder.forward_features(batch)
    hook.remove()
    in_training, clean = (torch.cat([tokens.flatten(0, 1) for tokens in seen[k::2]]) for k in (0, 1))
    visible = torch.ones_like(torch.cat(hidden)) if args.fill == "mix" else ~torch.cat(hidden)  # a mixture has no holes
    return {"gap, % of the variance": 100 * frechet(in_training, clean), "gap at visible places": 100 * frechet(in_training[visible], clean[visible]),
            "gap between halves of the images": 100 * frechet(*clean.split(math.ceil(len(clean) / 2)))}  # how large chance makes it


def mixmim_gap(lab):
    def measured(**more):
        run = pretrain(lab, **more)
        return {**gap(lab, run), "probe %": probe(lab, run.checkpoint)}

    key = "gap, % of the variance"
    return Claim("MixMIM", "what the encoder makes of clean images is closer to what it made in pre-training, as no symbol was there", {
        "mix": measured, "mask symbol": partial(measured, fill="mask")}, [
        Statement("features shift less after mixing", less("mix", "mask symbol", key), "% of the shift", 10),
        Statement("features shift less after mixing, visible places alone", less("mix", "mask symbol", "gap at visible places"), "% of the shift", 10)],
        (key, "gap at visible places", "probe %"))


# ---------------------------------------------------------------------------- encoders, fine-tuning


def mixmim_encoders(lab):
    """Shifting needs several windows on a map: of 4 tokens there, as with the default's 8 only the first stage has them."""
    vit = dict(model="vit_demo", patch_size=8, embed_dim=lab.pick(192, 16), depth=lab.pick(9, 2), num_heads=lab.pick(6, 1))  # 16 tokens: the same squares
    encoders = {"hierarchical": {}, "shifted windows": dict(shift=True, window_size=[4, 4, 4]), "plain ViT": vit}

    def gained(shape):
        run = pretrain(lab, **shape)
        random, trained = probe(lab, **shape), probe(lab, run.checkpoint, **shape)
        model, args = lab.load(run)
        return {"gain": trained - random, "probe %": trained, "random %": random, "million multiply-adds": multiply_adds(model.encoder, args.img_size)}

    return Claim("MixMIM", "mixing serves any encoder that keeps all tokens, with windows, shifted windows or none", {
        name: partial(gained, shape) for name, shape in encoders.items()}, [
        *(Statement(f"pre-training lifts the encoder: {name}", lambda f, name=name: f[name]["gain"]) for name in encoders),
        Statement("the hierarchical encoder ends ahead of the plain one", ahead("hierarchical", "plain ViT"))],
        ("gain", "probe %", "random %", "million multiply-adds"))


def mixmim_transfer(lab):
    """A tenth of the images with labels. The ViT is that of mirl-depth, 12 blocks of 64: MAE's own place is a plain encoder."""
    depth = lab.pick(12, 2)

    def tuned(pretraining, vit=False):
        run = pretraining() if pretraining else None
        shape = claims_mirl.sizes(lab, depth) if vit else {**SHAPE, **(dict(embed_dim=8) if lab.tiny else {})}
        end = lab.train(task="classify", **shape, **lab.images(1000), init=run and run.checkpoint, lr=5e-4, batch_size=lab.pick(32, 16), epochs=lab.epochs(15))
        model, args = lab.load(end)
        figures = {"fine-tuned %": end.last["val_acc"], "million multiply-adds": multiply_adds(model, args.img_size), "minutes": end.seconds / 60}
        if run:  # a backward pass costs two forward passes
            model, args = lab.load(run)
            seen = run.last["step"] * args.batch_size
            figures["pre-training, 10^12 multiply-adds"] = 3 * seen * multiply_adds(model, args.img_size) / 1e6
        return figures

    arms = {"random": partial(tuned, None), "mask symbol": partial(tuned, partial(pretrain, lab, fill="mask")),
            "MixMIM": partial(tuned, partial(pretrain, lab)),
            "random, ViT": partial(tuned, None, vit=True), "MAE, ViT": partial(tuned, partial(claims_mirl.pretrain, lab, "mae", depth), vit=True)}
    better = partial(ahead, key="fine-tuned %")
    return Claim("MixMIM", "fine-tuned, it is ahead of a mask symbol and of MAE's plain encoder", arms, [
        Statement("MixMIM is ahead of random start", better("MixMIM", "random")),
        Statement("MixMIM is ahead of the mask symbol", better("MixMIM", "mask symbol")),
        Statement("MixMIM's encoder is ahead of MAE's", better("MixMIM", "MAE, ViT")),
        Statement("MixMIM gives its encoder more than MAE the ViT",
                  lambda f: better("MixMIM", "random")(f) - better("MAE, ViT", "random, ViT")(f))],
        ("fine-tuned %", "million multiply-adds", "pre-training, 10^12 multiply-adds"))


CLAIMS = {"mixmim-fill": mixmim_fill, "mixmim-dual": mixmim_dual, "mixmim-attention": mixmim_attention, "mixmim-ratio": mixmim_ratio, "mixmim-gap": mixmim_gap,
          "mixmim-encoders": mixmim_encoders, "mixmim-transfer": mixmim_transfer}

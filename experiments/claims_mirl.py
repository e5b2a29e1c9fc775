"""What MIRL claims: plain masked modelling trains deep blocks badly; residual learning lets depth pay.

Small images (32 px, patches of 4), narrow encoders (64 channels), one pass of minutes over some thousand images: the paper's
encoders are 54 blocks deep and saw ImageNet 300 times. What shows up here is direction, not size. For truncation, single
layers, shape and time the paper's text was not at hand: what it argues is tried by protocols of our own.

Source: MIRL, Huang, Fu, Bors 2023, arXiv 2309.14136. Needs: lab.py, train.py with all it needs.
"""

import re
from functools import partial
from itertools import pairwise

import torch

from lab import Claim, Statement, images_of, multiply_adds, untrained  # first: it makes the concept files importable

from checkpoints import read_checkpoint
from masking import normalize_patches, patchify

SHAPE = dict(model="vit_demo", embed_dim=64, num_heads=2, patch_size=4, img_size=32)


def sizes(lab, depth, **more):
    return {**SHAPE, "depth": depth, **more, **(dict(embed_dim=16, num_heads=1, patch_size=8) if lab.tiny else {})}


def pretrain(lab, method, depth, images=10_000, passes=None, **more):
    """method: mae, mirl, or "plain", which is MIRL without pairing; passes through the images: two in the default budget."""
    if method != "mae":
        more = dict(segments=lab.pick(4, 2), **more)
    if method == "plain":
        method, more = "mirl", dict(no_pairing=True, **more)
    shape = {key: more.pop(key) for key in ("embed_dim", "num_heads") if key in more}
    return lab.train(task="pretrain", method=method, **sizes(lab, depth, **shape), **lab.images(images), epochs=passes or lab.epochs(2),
                     batch_size=lab.pick(64, 16), lr=1e-3, decoder_embed_dim=lab.pick(64, 32), **more)


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
    images, _, noise, *_ = images_of(args, lab.pick(count, 16))
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
        Statement("in the outermost pair the sum's error is below the main component's", lambda f: share(f, "error of sum", "error of main"), "% of it", 2),
        Statement("in the outermost pair the main component's error is below the residual's", lambda f: share(f, "error of main", "error of residual"), "% of it", 2),
        Statement("in the outermost pair the residual varies less than the main component", lambda f: share(f, "variance of residual", "variance of main"), "% of it", 5)],
        ("probe %",) + tuple(f"{what} 1+{lab.pick(4, 2)}" for what in ("error of main", "error of residual", "error of sum")))


# ---------------------------------------------------------------------------- a run, taken apart


def finetune(lab, depth, init=None, images=500, epochs=12, **shape):
    """A classifier whose every weight learns from few labelled images -> Run.

    MIRL's layer decay, and none at random start, whose first blocks still have everything to learn.
    """
    return lab.train(task="classify", **sizes(lab, depth, **shape), **lab.images(images), init=init, epochs=lab.epochs(epochs),
                     batch_size=lab.pick(32, 16), lr=1e-3, layer_decay=0.88 if init else None)


def rewritten(lab, run, name, change):
    """A file beside the runs: a checkpoint whose tensors went through change(name, block, tensor); None drops one.

    block: the number of the encoder's block it belongs to, or -1.
    """
    saved, tensors = read_checkpoint(run.checkpoint), {}
    for key, value in saved["model"].items():
        found = re.match(r"encoder\.blocks\.(\d+)\.", key)
        tensors[key] = change(key, int(found[1]) if found else -1, value)
    path = lab.folder / f"{run.folder.name}-{name}.pt"
    torch.save({"model": {key: value for key, value in tensors.items() if value is not None}, "args": saved["args"]}, path)
    return path


def first_blocks(lab, run, count, depth):
    """A checkpoint of the encoder's first blocks."""
    if count == depth:
        return run.checkpoint
    return rewritten(lab, run, f"first{count}", lambda key, block, value: value if block < count else None)


def blocks_anew(lab, run, count, depth):
    """A checkpoint whose last blocks are again as they were before training."""
    if count == 0:
        return run.checkpoint
    fresh = untrained(lab.load(run)[1]).state_dict()
    return rewritten(lab, run, f"anew{count}", lambda key, block, value: fresh[key] if block >= depth - count else value)


def gradient_norms(lab, model, args, count=256):
    """[(block, log2 of the norm of its gradient)], of the pre-training loss on fixed validation images and masks."""
    images, _, noise, *_ = images_of(args, lab.pick(count, 16))
    model(images, args.mask_ratio, noise).loss.backward()
    norms = [torch.stack([p.grad.norm() for p in block.parameters()]).norm() for block in model.encoder.blocks]
    return [(number, norm.clamp(min=1e-30).log2().item()) for number, norm in enumerate(norms, start=1)]


def forward_cost(args):
    """Millions of multiply-adds of a forward pass; pre-training: with decoders, on what it sees."""
    return multiply_adds(untrained(args), args.img_size, *([args.mask_ratio] if args.task == "pretrain" else []))


# ---------------------------------------------------------------------------- are the deep blocks worth their training?


def mirl_truncate(lab):
    depth, counts = lab.pick((24, (0, 2, 4, 8)), (4, (0, 1)))

    def figures(accuracies):
        return {**{f"{count} anew %": accuracy for count, accuracy in accuracies}, "curve fine-tuned %": accuracies}

    def arm(method):
        run = pretrain(lab, method, depth)
        return figures([(count, finetune(lab, depth, blocks_anew(lab, run, count, depth)).last["val_acc"]) for count in counts])

    def cost(f, method, count):
        return f[method]["0 anew %"] - f[method][f"{count} anew %"]

    def extra(f):
        return sum(cost(f, "MIRL", count) - cost(f, "MAE", count) for count in counts[1:]) / len(counts[1:])

    return Claim("MIRL", "the last blocks of a plain masked model may as well be drawn anew before fine-tuning, MIRL's not (as remembered)", {
        "random": lambda: figures([(0, finetune(lab, depth).last["val_acc"])]),
        "MAE": partial(arm, "mae"),
        "MIRL": partial(arm, "mirl")}, [
        # no cost at all is what the paper expects of MAE: a point of room, of which little needs to be left
        *(Statement(f"drawing the last {count} blocks anew costs MAE less than a point", lambda f, count=count: 1 - cost(f, "MAE", count),
                    "points of room", 0.1) for count in counts[1:3]),
        Statement(f"it costs MIRL more than MAE, over {', '.join(map(str, counts[1:]))} blocks", extra),
        Statement("there is something to lose: MAE is ahead of random start", lambda f: f["MAE"]["0 anew %"] - f["random"]["0 anew %"])],
        tuple(f"{count} anew %" for count in counts), ("blocks drawn anew", "fine-tuned %"))


def mirl_layers(lab):
    depth, depths = lab.pick((24, range(3, 25, 3)), (4, (3, 4)))
    late = depth * 3 // 4

    def profile(run=None):
        found = [(count, probe(lab, count, run and first_blocks(lab, run, count, depth))) for count in depths]
        accuracy = dict(found)
        # the best of several measurements is an optimistic one: statements compare blocks that were named before
        return {"best block": max(accuracy, key=accuracy.get), "best %": max(accuracy.values()), f"block {late} %": accuracy[late],
                f"block {depth} %": accuracy[depth], "curve probe %": found}

    def arm(method):
        run = pretrain(lab, method, depth)
        model, args = lab.load(run)
        norms = {"untrained": gradient_norms(lab, untrained(args), args), "trained": gradient_norms(lab, model, args)}
        spans = {f"gradient span, {when}": max(y for _, y in curve) - min(y for _, y in curve) for when, curve in norms.items()}
        return {**profile(run), **spans, **{f"curve log2 gradient norm, {when}": curve for when, curve in norms.items()}}

    def rise(f, method):
        return f[method][f"block {depth} %"] - f[method][f"block {late} %"]

    def flatter(when):
        return lambda f: f["MAE"][f"gradient span, {when}"] - f["MIRL"][f"gradient span, {when}"]

    return Claim("MIRL", "plain masked modelling serves the last blocks badly: features are best before them; MIRL's gradients reach all depths alike (as remembered)", {
        "random": profile,
        "MAE": partial(arm, "mae"),
        "MIRL": partial(arm, "mirl")}, [
        Statement(f"MAE's block {late} is ahead of its block {depth}", lambda f: -rise(f, "MAE")),
        Statement(f"from block {late} to {depth} MIRL gains more than MAE", lambda f: rise(f, "MIRL") - rise(f, "MAE")),
        Statement("MIRL's best block comes later than MAE's", lambda f: f["MIRL"]["best block"] - f["MAE"]["best block"], "blocks", 3),
        Statement("untrained, MIRL's gradient norms span less over depth than MAE's", flatter("untrained"), "doublings", 0.5),
        Statement("trained, MIRL's gradient norms span less over depth than MAE's", flatter("trained"), "doublings", 0.5)],
        ("best block", "gradient span, trained"), ("block", ""))


# ---------------------------------------------------------------------------- how to spend multiply-adds and time


def mirl_shape(lab):
    # blocks, width, heads: within 5 % of the multiply-adds, and four segments divide both. The paper's: 54 x 384 against 12 x 768
    shapes = lab.pick(((24, 64, 2), (8, 112, 4)), ((4, 16, 1), (2, 32, 1)))
    deep, wide = (f"{depth} x {width}" for depth, width, _ in shapes)

    def arm(method, depth, width, heads):
        shape = {} if (width, heads) == (SHAPE["embed_dim"], SHAPE["num_heads"]) else dict(embed_dim=width, num_heads=heads)
        run = pretrain(lab, method, depth, **shape) if method else None
        tuned = finetune(lab, depth, run and run.checkpoint, **shape)
        figures = {"fine-tuned %": tuned.last["val_acc"], "probe %": probe(lab, depth, run and run.checkpoint, **shape),
                   "million multiply-adds": forward_cost(lab.load(tuned)[1])}
        if run:
            figures |= {"pre-training's": forward_cost(lab.load(run)[1]), "minutes": run.seconds / 60}
        return figures

    def ahead(f, name):  # by fine-tuning: a probe reads 64 features of one, 112 of the other
        return f[f"{name}, {deep}"]["fine-tuned %"] - f[f"{name}, {wide}"]["fine-tuned %"]

    return Claim("MIRL", "at equal multiply-adds a deep and narrow encoder is better than a wide and shallow one, with MIRL (as remembered)", {
        f"{name}, {depth} x {width}": partial(arm, method, depth, width, heads)
        for name, method in (("random", None), ("MAE", "mae"), ("MIRL", "mirl")) for depth, width, heads in shapes}, [
        Statement("under MIRL deep and narrow is ahead", lambda f: ahead(f, "MIRL")),
        Statement("MIRL favours deep and narrow more than MAE does", lambda f: ahead(f, "MIRL") - ahead(f, "MAE")),
        Statement("MIRL favours deep and narrow more than random start does", lambda f: ahead(f, "MIRL") - ahead(f, "random"))],
        ("fine-tuned %", "probe %", "million multiply-adds", "minutes"))


def between(curve, x):
    """Where a line through the points (x, y) of a curve is at x."""
    for (x0, y0), (x1, y1) in pairwise(sorted(map(tuple, curve))):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-12)
    return y1


def mirl_time(lab):
    """Minutes are those of the runs, wherever and beside whatever they were made; multiply-adds do not depend on that.

    The long decoder has the eight blocks of MAE's paper, not its 512 channels: as wide as the others, it costs twice a short one. MAE with a
    short one is shown, as a measure of what the decoder costs; we know of no claim about it.
    """
    depth = lab.pick(24, 4)
    by_minutes, by_work = "curve by minutes of pre-training", "curve by 10^12 multiply-adds"
    arms = {"MIRL, 1-block decoders": ("mirl", lab.pick((1, 2, 3), (1,)), {}),
            "MAE, 8-block decoder": ("mae", lab.pick((1, 2), (1,)), dict(decoder_depth=8)),  # slower: fewer passes
            "MAE, 1-block decoder": ("mae", lab.pick((1, 2, 3), (1,)), {})}
    mirl, paper, _ = arms

    def arm(method, lengths, more):
        start = probe(lab, depth)  # the same in all arms: no time, no work
        minutes, work = [(0.0, start)], [(0.0, start)]
        for epochs in dict.fromkeys(map(lab.epochs, lengths)):  # each with a schedule of its own; a small budget has fewer
            run = pretrain(lab, method, depth, passes=epochs, **more)
            accuracy, args = probe(lab, depth, run.checkpoint), lab.load(run)[1]
            million = forward_cost(args)
            minutes.append((run.seconds / 60, accuracy))
            work.append((3 * million * run.last["step"] * args.batch_size / 1e6, accuracy))  # a backward pass costs two forward
        return {"probe %": accuracy, "million multiply-adds": million, "minutes": run.seconds / 60, by_minutes: minutes, by_work: work}

    def ahead(f, key):  # where both were measured at least so long
        common = min(max(x for x, _ in f[name][key]) for name in (mirl, paper))
        return between(f[mirl][key], common) - between(f[paper][key], common)

    return Claim("MIRL", "in equal time MIRL, with its small decoders, is ahead of MAE (as remembered)", {name: partial(arm, *how) for name, how in arms.items()}, [
        Statement("in equal time MIRL is ahead of MAE with a decoder of eight blocks", lambda f: ahead(f, by_minutes)),
        Statement("with equal multiply-adds MIRL is ahead of MAE with a decoder of eight blocks", lambda f: ahead(f, by_work))],
        ("probe %", "minutes"), ("", "probe %"))


CLAIMS = {"mirl-depth": mirl_depth, "mirl-residual": mirl_residual, "mirl-truncate": mirl_truncate, "mirl-layers": mirl_layers, "mirl-shape": mirl_shape,
          "mirl-time": mirl_time}

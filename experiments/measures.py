"""Measures: what a claim asks of trained models beyond their logs. measure(bench, runs) -> {figure: number or curve}

bench  lab.Lab of the seed
runs   {"": [the arm's first run], and by name the runs that followed it}

Needs: torch; lab.py, tasks/, geometry.py, masking.py.
"""

import math
from argparse import Namespace

import torch
import torch.nn.functional as F

import lab  # first: it makes the concept files importable
import geometry
import landscape
from masking import normalize_patches, patchify
from tasks import Data, Silent, load_run
from training.world import World


def images_of(run, count, training=False):
    """The first images of a run's set, not augmented: x (B, C, H, W), y (B,), noise of the masks (B, N) or (B, 0)."""
    args = Namespace(**{**vars(run.args), "augment": "none"})
    if training:
        args.train_images = count = min(count, args.train_images or count)
    else:
        args.val_images = count
    data = run.task.open_data(args, Silent("cpu"))
    images = data.train if training else data.val
    x, y, noise = zip(*(images[0, i] for i in range(count)))
    return torch.stack(x), torch.tensor(y), torch.stack(noise)


def untrained(run):
    """The model as it was before its first step."""
    torch.manual_seed(run.args.seed)  # as train.py does
    return run.task.build(run.args, Data(classes=run.classes), Silent("cpu")).eval()


def few(bench, count):
    """So many, and 8 in tests."""
    return min(count, 8) if bench.overrides == lab.TINY else count


# ---------------------------------------------------------------------------- MIRL


@torch.no_grad()
def residual(bench, runs):
    """Errors and variances of MIRL's parts on hidden patches, without the mean of each position.

    The loss sees only sums, so a constant per position may be in either part. Without it the parts can be compared.
    """
    run = load_run(runs[""][0].folder)
    args = run.args
    if args.pairing is False:  # plain deep supervision has no parts
        return {}
    images, _, noise = images_of(run, few(bench, 512))
    out = run.model(images, args.mask_ratio, noise)
    hidden = out.mask[..., None]

    def centered(x):
        mean = (x * hidden).sum(dim=0) / hidden.sum(dim=0).clamp(min=1)
        return (x - mean) * hidden

    target = centered(normalize_patches(patchify(images, args.patch_size)))

    def mean_square(x):
        return (x.square().sum() / (hidden.sum() * target.shape[-1])).item()

    figures = {}
    for j in range(args.segments // 2):
        pair = f"{j + 1}+{args.segments - j}"
        main, rest = centered(out.pred[j]), centered(out.pred[-1 - j])
        figures[f"error of main {pair}"] = mean_square(main - target)
        figures[f"error of residual {pair}"] = mean_square(rest - target)
        figures[f"error of sum {pair}"] = mean_square(main + rest - target)
        figures[f"variance of main {pair}"] = mean_square(main)
        figures[f"variance of residual {pair}"] = mean_square(rest)
    return figures


def depths(bench, runs):
    """Linear classifiers on the features of six depths, and the gradient norm of each block."""
    run = load_run(runs[""][0].folder)
    figures = layer_probes(run, few(bench, 10_000), few(bench, 10_000 if run.args.data != "shapes" else 4000))
    for when, model in (("untrained", untrained(run)), ("trained", run.model)):
        norms = gradient_norms(model, run, few(bench, 256))
        figures[f"curve log2 gradient norm, {when}, over blocks"] = norms
        sizes = [size for _, size in norms]
        figures[f"gradient span, {when}"] = max(sizes) - min(sizes)
    return figures


@torch.no_grad()
def layer_probes(run, count, val_count, places=6):
    encoder, features = run.model.encoder, {}
    numbers = [round(len(encoder.blocks) * k / places) for k in range(1, places + 1)]
    sets = [images_of(run, count, training=True)[:2], images_of(run, val_count)[:2]]

    # pooled tokens after each of these blocks
    hooks = []
    for number in dict.fromkeys(numbers):
        def keep(module, inputs, out, number=number):
            features.setdefault(number, []).append(out[:, int(encoder.cls_token is not None):].mean(dim=1))
        hooks.append(encoder.blocks[number - 1].register_forward_hook(keep))
    for images, _ in sets:
        for batch in images.split(250):
            encoder(batch)
    for hook in hooks:
        hook.remove()

    accuracy = {}
    for number, rows in features.items():
        train, val = torch.cat(rows).split([len(images) for images, _ in sets])
        accuracy[number] = linear_accuracy(train, sets[0][1], val, sets[1][1])
    return {
        "mean probe %": sum(accuracy.values()) / len(accuracy),
        "last block %": accuracy[numbers[-1]],
        "late block %": accuracy[numbers[-2]],  # five sixths of the way
        "curve probe % over blocks": list(accuracy.items()),
    }


@torch.enable_grad()
def linear_accuracy(train, labels, val, val_labels, decay=1e-3):
    """In percent: multinomial logistic regression on standardized features, by L-BFGS. Convex, so no seeds."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, val = (train - mean) / std, (val - mean) / std
    layer = torch.nn.Linear(train.shape[1], int(labels.max()) + 1)
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(train), labels) + decay * layer.weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return 100 * (layer(val).argmax(dim=1) == val_labels).float().mean().item()


def gradient_norms(model, run, count):
    """[(block, log2 of the norm of its gradient)], of the pre-training loss on fixed images and masks."""
    images, _, noise = images_of(run, count)
    model.encoder.blocks.requires_grad_(True)
    model(images, run.args.mask_ratio, noise).loss.backward()
    norms = []
    for number, block in enumerate(model.encoder.blocks, start=1):
        norm = torch.stack([p.grad.norm() for p in block.parameters()]).norm()
        norms.append((number, norm.clamp(min=1e-30).log2().item()))
    return norms


# ---------------------------------------------------------------------------- SAM


def sharpness(bench, runs):
    """Around the final weights, on 256 training images; the NTK at the initial weights, on 64 of them."""
    run, count = load_run(runs[""][0].folder), few(bench, 256)
    words = f"run --images {count} --iters {few(bench, 40)} --draws {few(bench, 10)} --tol 0.03 --surface-steps 9"
    flags = landscape.parse(words.split())
    figures, surface = landscape.measure(run, landscape.open_data(run, flags), flags, World("cpu"))
    x, *_ = images_of(run, few(bench, 64), training=True)
    kappa = geometry.ntk_condition_number(untrained(run), x).kappa

    # the mean loss on a random circle around the weights, at a quarter of their length
    axis = surface.coordinates
    distance = torch.hypot(axis[:, None], axis[None])
    ring = surface.losses[(distance - 0.25).abs() < axis[1] - axis[0]]
    return {
        "lambda": abs(figures["lambda_max"]),
        "log10 NTK condition, untrained": math.log10(min(kappa, 1e14)),  # beyond the precision of float32: infinite
        "gap to L_N": figures["gap"],
        "rise of the loss": ring.clamp(max=1e3).mean().item() - figures["train_loss"],
        "weight norm": figures["weight_norm"],
        "active first %": figures["active_first"],
    }

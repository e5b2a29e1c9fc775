"""Measures: what a claim asks of trained models beyond their logs. measure(lab, runs) -> {figure: number or curve}

runs  {"": [the arm's first run], and by name the runs that followed it}

Needs: torch; lab.py, tasks/, geometry.py, masking.py.
"""

import math
from argparse import Namespace

import torch
import torch.nn.functional as F

import lab as _  # noqa: F401  it makes the concept files importable
import geometry
from masking import normalize_patches, patchify
from tasks import Data, Silent, load_run


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


def few(lab, count):
    """So many, and 8 in tests."""
    return min(count, 8) if lab.overrides else count


# ---------------------------------------------------------------------------- MIRL


@torch.no_grad()
def residual(lab, runs):
    """Errors and variances of MIRL's parts on hidden patches, without the mean of each position.

    The loss sees only sums, so a constant per position may be in either part. Without it the parts can be compared.
    """
    run = load_run(runs[""][0].folder)
    args = run.args
    if args.pairing is False:  # plain deep supervision has no parts
        return {}
    images, _, noise = images_of(run, few(lab, 512))
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


def depths(lab, runs):
    """Linear classifiers on the features of six depths, and the gradient norm of each block."""
    run = load_run(runs[""][0].folder)
    figures = layer_probes(run, few(lab, 10_000), few(lab, 10_000 if run.args.data != "shapes" else 4000))
    for when, model in (("untrained", untrained(run)), ("trained", run.model)):
        norms = gradient_norms(model, run, few(lab, 256))
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
        "best block": max(accuracy, key=accuracy.get),
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


def sharpness(lab, runs):
    """Around the final weights, on 256 training images; the NTK at the initial weights, on 64 of them."""
    run = load_run(runs[""][0].folder)
    model = run.model.requires_grad_(True)
    x, y, _ = images_of(run, few(lab, 256), training=True)

    def loss():
        return F.cross_entropy(model(x), y)

    def eigenvalue(module):
        return abs(geometry.hessian_max_eigenvalue(model, loss, list(module.parameters()), few(lab, 40), tol=0.03))

    flat = geometry.average_flatness(model, loss, draws=few(lab, 10))
    kappa = geometry.ntk_condition_number(untrained(run), x[:few(lab, 64)]).kappa
    active = [100 * share for share in geometry.active_neurons(model, x).values()]
    figures = {
        "lambda": eigenvalue(model),
        "log10 NTK condition, untrained": math.log10(min(kappa, 1e14)),  # beyond the precision of float32: infinite
        "gap to L_N": flat.gap,
        "L_N": flat.perturbed,
        "loss on clean training images": flat.clean,
        "rise of the loss": rise(model, loss) - flat.clean,
        "weight norm": geometry.weight_norm(model),
        "active first %": active[0],
    }
    if hasattr(model, "blocks"):
        embedding = model.patch_embed if hasattr(model, "patch_embed") else model.stem
        figures["lambda of embedding"] = eigenvalue(embedding)
        figures["lambda of last block"] = eigenvalue(model.blocks[-1])
    return figures


def rise(model, loss, steps=9):
    """The mean loss on a random circle around the weights, at a quarter of their length."""
    surface = geometry.loss_surface(model, loss, radius=0.5, steps=steps)
    axis = surface.coordinates
    distance = torch.hypot(axis[:, None], axis[None])
    ring = (distance - 0.25).abs() < axis[1] - axis[0]
    return surface.losses[ring].clamp(max=1e3).mean().item()

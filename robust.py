"""Robustness: how little must an image change before the model is wrong?

Two questions. The worst case: an adversary knows the model and may move every pixel by up to eps.
The attack climbs the loss L by the sign of its gradient, every pixel as far as a step allows, and
leaves neither that box around the image (the L-infinity ball) nor the range of a pixel:

    x_0     = clip(x + eps u),  u uniform in [-1, 1] for every pixel                (1)
    x_{k+1} = clip(x_k + alpha sign(grad_x L(f(x_k), y)))                           (2)
    clip      to [x - eps, x + eps] and to [0, 1], pixel by pixel                   (3)

PGD takes several such steps and may start anew; FGSM takes one and is cheap enough to train on.
The ordinary case: what cameras and files do to an image, as six corruptions at five severities.

eps, alpha and [0, 1] are in PIXELS. Models here take images normalized by a mean and a std, so the
attacks take these too, undo them for (1) to (3), and hand back normalized images.

Source: PGD: Madry et al. 2017, arXiv 1706.06083; FGSM with a random start: Wong et al. 2020, arXiv
2001.03994; corruptions: Hendrycks & Dietterich 2019, arXiv 1903.12261. Written from the papers.
The strengths in SEVERITIES are those of the official scripts (make_cifar_c.py for 32 pixels,
corruptions.py for 224); sizes between are interpolated. We differ: these are NOT the CIFAR-C and
ImageNet-C files. They are made on the fly, six kinds of fifteen, Gaussian blur for the four blurs,
rounded to 8 bits only where a codec needs it. Compare models with them, not with published numbers.
Needs: torch, torchvision (and shapes.py for the demo).
Demo: python robust.py (15 s on a CPU) saves robust_demo.png.
"""

import io
import math

import torch
import torch.nn.functional as F
from PIL import Image  # comes with torchvision, whose own JPEG coder is deprecated
from torch import nn
from torchvision.transforms.v2 import functional as TF

SEVERITIES = {  # what it means: five values at 32 pixels, five at 224
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),  # standard deviation
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),  # photons of a white pixel
    "blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),  # sigma in pixels
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),  # share of the contrast that is left
    "jpeg": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),  # quality
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),  # share of the resolution that is left
}
CORRUPTIONS = tuple(SEVERITIES)


def per_channel(values, imgs):
    """A number, or one a channel -> what broadcasts against (B, C, H, W)."""
    values = torch.as_tensor(
        values, device=imgs.device, dtype=torch.promote_types(imgs.dtype, torch.float32)
    ).flatten()
    if len(values) not in (1, imgs.shape[1]):
        raise ValueError(
            f"mean and std need 1 or {imgs.shape[1]} values, one a channel of the images, got {len(values)}"
        )
    return values.view(-1, 1, 1)


def check_scale(mean, std, imgs):
    """mean and std as they broadcast. ValueError unless imgs are float images and std is positive."""
    if imgs.ndim != 4 or not len(imgs) or imgs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"images must be (B, C, H, W) in float32 or float64 and at least one, got {tuple(imgs.shape)} "
            f"{imgs.dtype}; divide "
            "bytes by 255, and let autocast do half precision"
        )
    mean, std = per_channel(mean, imgs), per_channel(std, imgs)
    if not (std > 0).all():
        raise ValueError(f"std {std.flatten().tolist()} must be positive")
    return mean, std


def check_pixels(pixels, low=0.0, high=1.0):
    """ValueError unless (B, C, H, W) lies in the range of a pixel; rounding is forgiven. Also finds NaN."""
    least, most = pixels.min().item(), pixels.max().item()
    if not (least >= low - 1e-3 and most <= high + 1e-3):
        raise ValueError(
            f"pixels must lie in [{low:g}, {high:g}], got {least:.3g} to {most:.3g}; "
            "give the mean and std that these images were normalized with, or divide bytes by 255"
        )


# ---------------------------------------------------------------------------- the worst case


def pgd(
    model,
    imgs,
    labels,
    eps,
    alpha=None,
    steps=10,
    restarts=1,
    random_start=True,
    mean=0.0,
    std=1.0,
    low=0.0,
    high=1.0,
    generator=None,
):
    """(1) to (3): the image in the ball around each of imgs whose loss is highest among `restarts` climbs.

    imgs (B, C, H, W) as the model takes them; labels (B,) or soft (B, K) -> attacked imgs, alike
    eps, alpha  in pixels; alpha None: 2.5 eps / steps, so that a climb can cross the ball
    mean, std   with which imgs were normalized; wrong ones stretch the ball, unnoticed while the pixels stay in range
    low, high   the range of a pixel before that
    generator   for the random starts; without one they come from torch's global generator

    The model runs in the mode it is in: to judge it call model.eval() first. Its parameters and their .grad are
    left alone. Under DDP give model.module.
    """
    alpha = 2.5 * eps / max(steps, 1) if alpha is None else alpha
    if not 0 <= eps <= high - low or alpha < 0:
        raise ValueError(
            f"eps {eps} must lie in [0, {high - low:g}], alpha {alpha} not below 0, for pixels in [{low:g}, "
            f"{high:g}]; try eps=8/255"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError("inside torch.inference_mode() no gradient can be taken; use torch.no_grad() instead")
    mean, std = check_scale(mean, std, imgs)
    pixels = imgs.detach() * std + mean
    check_pixels(pixels, low, high)
    floor, ceiling = (pixels - eps).clamp(min=low), (pixels + eps).clamp(max=high)  # (3)

    def losses(x):
        return F.cross_entropy(model(((x - mean) / std).to(imgs.dtype)), labels, reduction="none").float()

    worst, highest = None, None
    for _ in range(restarts):
        x = pixels
        if random_start:
            u = 2 * torch.rand(x.shape, generator=generator, device=generator.device if generator else x.device) - 1
            x = (x + eps * u.to(x)).clamp(floor, ceiling)  # (1)
        for _ in range(steps):
            with torch.enable_grad():  # an evaluation loop has them off
                x.requires_grad_()
                # the sum, not the mean: an image's gradient does not shrink with the batch
                (grad,) = torch.autograd.grad(losses(x).sum(), x)
            x = (x.detach() + alpha * grad.sign()).clamp(floor, ceiling)  # (2)
        if restarts == 1:
            return ((x - mean) / std).to(imgs.dtype)
        with torch.no_grad():
            loss = losses(x)
        if worst is None:
            worst, highest = x, loss
        worst, highest = torch.where((loss > highest).view(-1, 1, 1, 1), x, worst), torch.maximum(loss, highest)
    return ((worst - mean) / std).to(imgs.dtype)


def fgsm(model, imgs, labels, eps, alpha=None, random_start=True, **options):
    """One step of (2). From a random start by 1.25 eps (Wong et al.), else by eps: the classic attack.

    For fast adversarial training: loss(model(fgsm(model, imgs, labels, eps, mean=..., std=...)), labels).
    options: mean, std, low, high, generator of `pgd`, and what it says on modes and DDP.
    """
    alpha = (1.25 if random_start else 1.0) * eps if alpha is None else alpha
    return pgd(model, imgs, labels, eps, alpha, steps=1, random_start=random_start, **options)


# ---------------------------------------------------------------------------- the ordinary case


def strength(name, severity, side):
    """SEVERITIES for images whose shorter side is `side`: geometric between 32 and 224, constant beyond."""
    small, large = (values[severity - 1] for values in SEVERITIES[name])
    t = min(max(math.log(side / 32) / math.log(224 / 32), 0.0), 1.0)
    return small ** (1 - t) * large**t


def through_pil(x, change):
    """Each image as 8-bit PIL image, changed, and back: (B, C, H, W) -> alike."""
    if x.shape[1] not in (1, 3):
        raise ValueError(f"jpeg and pixelate take 1 or 3 channels, the images have {x.shape[1]}")
    coded = [
        TF.pil_to_tensor(change(TF.to_pil_image(image)))
        for image in (x.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    ]
    return torch.stack(coded).to(x.device).float() / 255


def save_and_open(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def corrupt(imgs, name, severity, generator=None):
    """One of CORRUPTIONS at severity 1 to 5. imgs (B, C, H, W) float pixels in [0, 1] -> alike.

    A generator in the same state gives the same noise; the four without noise draw nothing.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption {name!r} is unknown; choose from {', '.join(CORRUPTIONS)}")
    if not isinstance(severity, int) or severity not in range(1, 6):
        raise ValueError(f"severity {severity} must be 1, 2, 3, 4 or 5")
    if imgs.ndim != 4 or not imgs.is_floating_point():
        raise ValueError(
            f"images must be (B, C, H, W) floats in [0, 1], got {tuple(imgs.shape)} {imgs.dtype}; divide uint8 by 255"
        )
    check_pixels(imgs)
    x, size = imgs.float(), imgs.shape[-2:]
    c = strength(name, severity, min(size))
    source = generator.device if generator else x.device  # where the random numbers are drawn
    if name == "gaussian_noise":
        x = x + c * torch.randn(x.shape, generator=generator, device=source).to(x.device)
    elif name == "shot_noise":
        x = torch.poisson(x.clamp(0, 1).to(source) * c, generator=generator).to(x.device) / c
    elif name == "blur":
        reach = min(math.ceil(3 * c), min(size) - 1)  # reflection cannot pad by more
        x = TF.gaussian_blur(x, 2 * reach + 1, c)
    elif name == "contrast":
        gray = x.mean(dim=(-2, -1), keepdim=True)  # of each channel
        x = gray + c * (x - gray)
    elif name == "jpeg":
        x = through_pil(x, lambda image: save_and_open(image, round(c)))
    else:  # pixelate
        small = [max(1, int(side * c)) for side in (size[1], size[0])]  # PIL says (W, H)
        x = through_pil(
            x, lambda image: image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)
        )
    return x.clamp(0, 1).to(imgs.dtype)


@torch.no_grad()
def corruption_accuracy(model, imgs, labels, mean=0.0, std=1.0, names=CORRUPTIONS, batch_size=256, seed=0):
    """{name: [accuracy at severity 1, ..., 5]}, fractions. imgs (B, C, H, W) as the model takes them, labels (B,).

    Noise depends on seed and batch_size alone, so that models can be compared on the same images.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before judging it")
    if tuple(labels.shape) != (len(imgs),):
        raise ValueError(f"labels {tuple(labels.shape)} must be ({len(imgs)},), a class number an image")
    device = next(model.parameters(), imgs).device
    mean, std = check_scale(mean, std, imgs)
    table = {}
    for name in [names] if isinstance(names, str) else names:
        table[name] = []
        for severity in range(1, 6):
            generator, right = torch.Generator().manual_seed(seed), 0
            for x, y in zip(imgs.split(batch_size), labels.split(batch_size), strict=True):
                pixels = x * std + mean
                check_pixels(pixels)
                x = (corrupt(pixels.clamp(0, 1), name, severity, generator) - mean) / std
                right += (model(x.to(device, imgs.dtype)).argmax(dim=1) == y.to(device)).sum().item()
            table[name].append(right / len(imgs))
    return table


def mean_accuracy(table):
    """Mean over corruptions and severities (not mCE, which divides by the errors of an AlexNet)."""
    return sum(sum(row) / len(row) for row in table.values()) / len(table)


if __name__ == "__main__":
    from shapes import Shapes, render, save_grid, shapes

    scene = shapes(3, img_size=64)[2:]
    generator = torch.Generator().manual_seed(0)
    save_grid(
        "robust_demo.png",
        {
            name.replace("_", " "): torch.cat([scene, *(corrupt(scene, name, s, generator) for s in range(1, 6))])
            for name in CORRUPTIONS
        },
    )
    print("saved robust_demo.png: from top to bottom the true scene, then severity 1 to 5")

    torch.manual_seed(0)
    imgs, labels = render(range(4000))
    chosen = torch.tensor([0, 6, 7])  # disc, plus, crescent
    keep, scale = torch.isin(labels, chosen), dict(mean=Shapes.mean, std=Shapes.std)
    imgs, labels = TF.normalize(imgs[keep].float() / 255, **scale), torch.searchsorted(chosen, labels[keep])
    x, y, x_test, y_test = imgs[200:], labels[200:], imgs[:200], labels[:200]
    print(f"a small network tells disc, plus and crescent apart; {len(x)} scenes, 200 others to judge")
    steps = 100
    for name, eps in (("trained plainly", 0), ("trained on FGSM, eps 8/255", 8 / 255)):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 64, 3),
        )
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
        for _ in range(steps):
            batch = torch.randint(len(x), (64,))
            seen = fgsm(model, x[batch], y[batch], eps, **scale) if eps else x[batch]
            loss = F.cross_entropy(model(seen), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        judged = {
            "clean": x_test,
            **{f"PGD-10 at {k}/255": pgd(model, x_test, y_test, k / 255, **scale) for k in (4, 8)},
        }
        right = {
            attack: (model(seen).argmax(dim=1) == y_test).float().mean().item() for attack, seen in judged.items()
        }
        right["corrupted"] = mean_accuracy(corruption_accuracy(model, x_test, y_test, **scale))
        print(f"{name:26s}: right on " + ", ".join(f"{attack} {share:.2f}" for attack, share in right.items()))
    print(
        "(expect: clean above 0.9 for both; under PGD at 8/255 the plain one is mostly wrong, the other mostly right)"
    )

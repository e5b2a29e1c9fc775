"""Robustness: how little must an image change before the model is wrong?

The worst case: an adversary knows the model and may change every pixel by up to eps. The attack climbs the
loss L by the sign of its gradient, every pixel as far as a step allows, and stays within that box around the
image (the L-infinity ball) and within the range of a pixel:

    x_0     = clip(x + eps u),  u uniform in [-1, 1] for every pixel                (1)
    x_{k+1} = clip(x_k + alpha sign(grad_x L(f(x_k), y)))                           (2)
    clip      to [x - eps, x + eps] and to [0, 1], pixel by pixel                   (3)

PGD takes several such steps and may restart; FGSM takes one and is cheap enough to train on.
The ordinary case: what cameras and files do to an image, as six corruptions at five severities.

eps, alpha and [0, 1] are in PIXELS. Models here take images normalized by a mean and a std, so the attacks
take these too, undo them for (1) to (3), and return normalized images.

Source: PGD: Madry et al. 2017, arXiv 1706.06083; FGSM with a random start: Wong et al. 2020, arXiv
2001.03994; corruptions: Hendrycks & Dietterich 2019, arXiv 1903.12261. Written from the papers. The strengths
in SEVERITIES are those of the official scripts (make_cifar_c.py for 32 pixels, corruptions.py for 224); sizes
between are interpolated. We differ: these are NOT the CIFAR-C and ImageNet-C files. They are made on the fly,
six kinds of fifteen, Gaussian blur for the four blurs, rounded to 8 bits only where a codec needs it. Compare
models with them, not with published numbers.
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

SEVERITIES = {  # five values at 32 pixels, five at 224
    "gaussian_noise": (  # standard deviation
        (0.04, 0.06, 0.08, 0.09, 0.10),
        (0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    "shot_noise": (  # photons of a white pixel
        (500, 250, 100, 75, 50),
        (60, 25, 12, 5, 3),
    ),
    "blur": (  # sigma in pixels
        (0.4, 0.6, 0.7, 0.8, 1.0),
        (1, 2, 3, 4, 6),
    ),
    "contrast": (  # share of the contrast that is left
        (0.75, 0.5, 0.4, 0.3, 0.15),
        (0.4, 0.3, 0.2, 0.1, 0.05),
    ),
    "jpeg": (  # quality
        (80, 65, 58, 50, 40),
        (25, 18, 15, 10, 7),
    ),
    "pixelate": (  # share of the resolution that is left
        (0.95, 0.9, 0.85, 0.75, 0.65),
        (0.6, 0.5, 0.4, 0.3, 0.25),
    ),
}
CORRUPTIONS = tuple(SEVERITIES)


# ---------------------------------------------------------------------------- the worst case


def pgd(model, imgs, labels, eps, alpha=None, steps=10, restarts=1, random_start=True, mean=0.0, std=1.0,
        low=0.0, high=1.0, generator=None):
    """(1) to (3): the image in the ball around each of imgs whose loss is highest among `restarts` climbs.

    imgs (B, C, H, W) as the model takes them; labels (B,) or soft (B, K) -> attacked imgs, alike
    eps, alpha  in pixels; alpha None: 2.5 eps / steps, so that a climb can cross the ball
    mean, std   of the normalization of imgs; wrong ones stretch the ball, which is noticed only by pixels
                out of range
    low, high   the range of a pixel before that
    generator   for the random starts; without one they come from torch's global generator

    The model runs in the mode it is in: to judge it call model.eval() first. Its parameters and their .grad
    do not change. Under DDP pass model.module.
    """
    alpha = 2.5 * eps / max(steps, 1) if alpha is None else alpha
    if not 0 <= eps <= high - low or alpha < 0:
        raise ValueError(f"eps {eps} must lie in [0, {high - low:g}] and alpha {alpha} must not be negative; "
                         "try eps=8/255")
    if torch.is_inference_mode_enabled():
        raise ValueError("inside torch.inference_mode() there are no gradients; use torch.no_grad() instead")
    mean, std = check_scale(mean, std, imgs)
    pixels = imgs.detach() * std + mean
    check_pixels(pixels, low, high)
    smallest = (pixels - eps).clamp(min=low)  # (3)
    largest = (pixels + eps).clamp(max=high)

    def normalized(x):
        return ((x - mean) / std).to(imgs.dtype)

    def losses(x):
        return F.cross_entropy(model(normalized(x)), labels, reduction="none").float()

    worst = pixels
    highest = torch.full((len(imgs),), -math.inf, device=imgs.device)
    for _ in range(restarts):
        # (1) the start
        x = pixels
        if random_start:
            device = generator.device if generator else x.device
            u = 2 * torch.rand(x.shape, generator=generator, device=device) - 1
            x = (x + eps * u.to(x)).clamp(smallest, largest)

        # (2) the climb
        for _ in range(steps):
            with torch.enable_grad():  # an evaluation loop has them off
                x.requires_grad_()
                # the sum, not the mean: an image's gradient does not shrink with the batch
                grad, = torch.autograd.grad(losses(x).sum(), x)
            x = (x.detach() + alpha * grad.sign()).clamp(smallest, largest)
        if restarts == 1:
            return normalized(x)

        # keep each image where its loss is highest so far
        with torch.no_grad():
            loss = losses(x)
        worst = torch.where((loss > highest).view(-1, 1, 1, 1), x, worst)
        highest = torch.maximum(loss, highest)
    return normalized(worst)


def fgsm(model, imgs, labels, eps, alpha=None, random_start=True, **options):
    """One step of (2). From a random start by 1.25 eps (Wong et al.), else by eps: the classic attack.

    For fast adversarial training: loss(model(fgsm(model, imgs, labels, eps, mean=..., std=...)), labels).
    options: mean, std, low, high and generator of `pgd`, which also describes modes and DDP.
    """
    alpha = (1.25 if random_start else 1.0) * eps if alpha is None else alpha
    return pgd(model, imgs, labels, eps, alpha, steps=1, random_start=random_start, **options)


# ---------------------------------------------------------------------------- the ordinary case


def corrupt(imgs, name, severity, generator=None):
    """One of CORRUPTIONS at severity 1 to 5. imgs (B, C, H, W) float pixels in [0, 1] -> alike.

    A generator in the same state gives the same noise; the four without noise draw nothing.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption {name!r} is unknown; choose from {', '.join(CORRUPTIONS)}")
    if severity not in range(1, 6):
        raise ValueError(f"severity {severity} must be 1, 2, 3, 4 or 5")
    check_pixels(imgs)
    x = imgs.float()
    shorter = min(imgs.shape[-2:])
    c = strength(name, severity, shorter)
    device = generator.device if generator else x.device  # where the random numbers are drawn
    if name == "gaussian_noise":
        x = x + c * torch.randn(x.shape, generator=generator, device=device).to(x.device)
    elif name == "shot_noise":
        x = torch.poisson(x.clamp(0, 1).to(device) * c, generator=generator).to(x.device) / c
    elif name == "blur":
        reach = min(math.ceil(3 * c), shorter - 1)  # reflection cannot pad by more
        x = TF.gaussian_blur(x, 2 * reach + 1, c)
    elif name == "contrast":
        gray = x.mean(dim=(-2, -1), keepdim=True)  # of each channel
        x = gray + c * (x - gray)
    elif name == "jpeg":
        x = through_pil(x, save_and_open, round(c))
    elif name == "pixelate":
        x = through_pil(x, shrink_and_enlarge, c)
    return x.clamp(0, 1).to(imgs.dtype)


def strength(name, severity, side):
    """SEVERITIES for images whose shorter side is `side`: geometric between 32 and 224, constant beyond."""
    at_32, at_224 = SEVERITIES[name]
    t = math.log(side / 32) / math.log(224 / 32)
    t = min(max(t, 0.0), 1.0)
    return at_32[severity - 1] ** (1 - t) * at_224[severity - 1] ** t


def through_pil(x, change, c):
    """Each image as 8-bit PIL image, changed, and back: (B, C, H, W) -> alike."""
    if x.shape[1] not in (1, 3):
        raise ValueError(f"jpeg and pixelate take 1 or 3 channels, the images have {x.shape[1]}")
    images = []
    for image in (x.clamp(0, 1) * 255).round().to(torch.uint8).cpu():
        image = change(TF.to_pil_image(image), c)
        images.append(TF.pil_to_tensor(image))
    return torch.stack(images).to(x.device).float() / 255


def save_and_open(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def shrink_and_enlarge(image, share):
    width, height = image.size
    small = max(1, int(width * share)), max(1, int(height * share))
    return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)


@torch.no_grad()
def corruption_accuracy(model, imgs, labels, mean=0.0, std=1.0, names=CORRUPTIONS, batch_size=256, seed=0):
    """{name: [accuracy at severity 1, ..., 5]}, fractions. imgs (B, C, H, W) as the model takes them.

    Noise depends on seed and batch_size alone, so that models can be compared on the same images.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if tuple(labels.shape) != (len(imgs),):
        raise ValueError(f"labels {tuple(labels.shape)} must be ({len(imgs)},), a class number per image")
    device = next(model.parameters(), imgs).device
    mean, std = check_scale(mean, std, imgs)
    batches = list(zip(imgs.split(batch_size), labels.split(batch_size), strict=True))
    table = {}
    for name in [names] if isinstance(names, str) else names:
        table[name] = []
        for severity in range(1, 6):
            generator = torch.Generator().manual_seed(seed)
            right = 0
            for x, y in batches:
                pixels = x * std + mean
                check_pixels(pixels)
                x = (corrupt(pixels.clamp(0, 1), name, severity, generator) - mean) / std
                prediction = model(x.to(device, imgs.dtype)).argmax(dim=1)
                right += (prediction == y.to(device)).sum().item()
            table[name].append(right / len(imgs))
    return table


def mean_accuracy(table):
    """Mean over corruptions and severities (not mCE, which divides by the errors of an AlexNet)."""
    return sum(sum(row) / len(row) for row in table.values()) / len(table)


# ---------------------------------------------------------------------------- checks


def check_scale(mean, std, imgs):
    """mean and std, numbers or one per channel, as they broadcast against (B, C, H, W)."""
    if imgs.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images must be in float32 or float64, got {imgs.dtype}; divide bytes by 255, and "
                         "leave half precision to autocast")
    scale = []
    for values in (mean, std):
        values = torch.as_tensor(values, device=imgs.device, dtype=imgs.dtype).flatten()
        if len(values) not in (1, imgs.shape[1]):
            raise ValueError(f"mean and std need 1 value or one per channel, {imgs.shape[1]}, got {len(values)}")
        scale.append(values.view(-1, 1, 1))
    return scale


def check_pixels(pixels, low=0.0, high=1.0):
    """ValueError unless (B, C, H, W) lies in the range of a pixel; rounding is allowed. Also finds NaN."""
    least, most = pixels.min().item(), pixels.max().item()
    if not (least >= low - 1e-3 and most <= high + 1e-3):
        raise ValueError(f"pixels must lie in [{low:g}, {high:g}], got {least:.3g} to {most:.3g}; give the "
                         "mean and std of the normalization of these images, or divide bytes by 255")


if __name__ == "__main__":
    from shapes import Shapes, render, save_grid, shapes

    # the six corruptions of one scene
    scene = shapes(3, img_size=64)[2:]
    generator = torch.Generator().manual_seed(0)
    columns = {}
    for name in CORRUPTIONS:
        corrupted = [corrupt(scene, name, severity, generator) for severity in range(1, 6)]
        columns[name.replace("_", " ")] = torch.cat([scene, *corrupted])
    save_grid("robust_demo.png", columns)
    print("saved robust_demo.png: from top to bottom the true scene, then severity 1 to 5")

    # scenes of three classes: 200 to test on, the others to train on
    torch.manual_seed(0)
    imgs, labels = render(range(4000))
    chosen = torch.tensor([0, 6, 7])  # disc, plus, crescent
    keep = torch.isin(labels, chosen)
    scale = dict(mean=Shapes.mean, std=Shapes.std)
    imgs = TF.normalize(imgs[keep].float() / 255, **scale)
    labels = torch.searchsorted(chosen, labels[keep])
    x, y = imgs[200:], labels[200:]
    x_test, y_test = imgs[:200], labels[:200]
    print(f"a small network classifies disc, plus and crescent; {len(x)} scenes, 200 others to test on")

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
            images = fgsm(model, x[batch], y[batch], eps, **scale) if eps else x[batch]
            loss = F.cross_entropy(model(images), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()

        # test both on clean, attacked and corrupted images
        tests = {"clean": x_test}
        for k in (4, 8):
            tests[f"PGD-10 at {k}/255"] = pgd(model, x_test, y_test, k / 255, **scale)
        shares = []
        for test, images in tests.items():
            share = (model(images).argmax(dim=1) == y_test).float().mean()
            shares.append(f"{test} {share:.2f}")
        corrupted = mean_accuracy(corruption_accuracy(model, x_test, y_test, **scale))
        print(f"{name:26s}: right on {', '.join(shares)}, corrupted {corrupted:.2f}")
    print("(expect: clean above 0.9 for both; under PGD at 8/255 the plain one is mostly wrong,")
    print(" the other mostly right)")

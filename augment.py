"""Augmentations, named after their paper; and RandAugment, as the fine-tuning recipes use it.

An augmentation is a list of torchvision transforms on one uint8 image. All that is random comes from torch's
generator, which data.py seeds per image. RandAugment is composed here: MAE, MIRL and MixMIM fine-tune with
timm's form of it, rand-m9-mstd0.5-inc1. Twice per image an operation of the table OPERATIONS is drawn, and
applied with probability 1/2 at a level around 9 of 10. In torchvision's form 9 is of 30, and both always act.

    level ~ N(9, 0.5), clipped to [0, 10]                        (1)
    value = start +- change * level / 10, rounded toward start   (2)   a higher level changes more

Operations that move pixels are bicubic and fill with the mean color. They work on PIL images, since
torchvision has no bicubic rotation of tensors.

Source: RandAugment, Cubuk et al. 2019, arXiv 1909.13719, with timm's ranges, probability and noise (a test
compares each operation with timm's, pixel by pixel); crops and colors as published with MAE (arXiv
2111.06377), the ViT / SAM experiments (arXiv 2106.01548) and SupCon (arXiv 2004.11362).
Needs: torch, torchvision (and shapes.py for the demo).
Demo: python augment.py (a few seconds) saves augment_demo.png, a scene under each operation at level 9.
"""

import math
from typing import Callable, NamedTuple

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

AUGMENTATIONS = ("none", "padcrop", "crop", "mae", "inception", "strong", "simclr")
BICUBIC, BILINEAR = v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR


# ---------------------------------------------------------------------------- augmentations by name


def augmentation(name, img_size, mean, std, crop_ratio=None):
    """uint8 image (C, H, W) -> normalized float (C, *img_size). See AUGMENTATIONS.

    none       the whole image where the size fits, else resize and center crop; crop_ratio: of FitSize
    padcrop    reflect-pad by 1/8, random crop, flip: for images that already have the size
    crop       random resized crop (0.08, 1) bicubic, flip: MAE's linear probe
    mae        random resized crop (0.2, 1) bicubic, flip: MAE, MIRL and MixMIM pre-training
    inception  random resized crop (0.05, 1), flip: "simple Inception-style preprocessing" of the SAM paper
    strong     random resized crop, flip, RandAugment, erasing 0.25: fine-tuning; mixup, cutmix act on batches
    simclr     random resized crop (0.2, 1), flip, color jitter, gray, blur above 32 px: contrastive learning
    """
    flip = v2.RandomHorizontalFlip()
    last = []
    if name == "none":
        first = [FitSize(img_size, crop_ratio)]
    elif name == "padcrop":
        height, width = img_size
        padding = [max(1, width // 8), max(1, height // 8)]
        crop = v2.RandomCrop(img_size, padding, padding_mode="reflect")
        first = [FitSize(img_size), crop, flip]
    elif name == "crop":
        first = [random_crop(img_size, 0.08), flip]
    elif name == "mae":
        first = [random_crop(img_size, 0.2), flip]
    elif name == "inception":  # without antialiasing, as in the JAX code
        first = [random_crop(img_size, 0.05, BILINEAR, antialias=False), flip]
    elif name == "strong":
        first = [random_crop(img_size, 0.08), flip, RandAugment(mean)]
        last = [v2.RandomErasing(p=0.25, value="random")]
    elif name == "simclr":
        first = [random_crop(img_size, 0.2, BILINEAR), flip, *random_colors(img_size)]
    else:
        raise ValueError(f"augment {name!r} is unknown; choose from {', '.join(AUGMENTATIONS)}")

    finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    if last:
        return Augmentation(v2.Compose([*first, finish, *last]), torch.nn.Identity())
    return Augmentation(v2.Compose(first), finish)


class Augmentation(NamedTuple):
    draw: Callable  # of one image, all that is random
    finish: Callable  # of one image or a whole batch

    def __call__(self, image):
        return self.finish(self.draw(image))


def random_crop(img_size, smallest, interpolation=BICUBIC, antialias=True):
    """smallest: share of the image's area"""
    return v2.RandomResizedCrop(
        img_size,
        scale=(smallest, 1.0),
        interpolation=interpolation,
        antialias=antialias,
    )


def random_colors(img_size):
    """SupCon's; the blur is that of MoCo v2, "similar to SimCLR"."""
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    colors = [
        v2.RandomApply([jitter], p=0.8),
        v2.RandomGrayscale(p=0.2),
    ]
    if max(img_size) > 32:
        blur = v2.GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))  # three sigma to each side
        colors.append(v2.RandomApply([blur], p=0.5))
    return colors


class FitSize(torch.nn.Module):
    """Resize, so that the center crop takes crop_ratio of the shorter side; then the crop.

    None: 7/8 up to 224 px (256 for 224) and the whole side above, as MAE and MixMIM evaluate; an image of the
    right size is left alone.
    """

    def __init__(self, img_size, crop_ratio=None):
        super().__init__()
        height, width = img_size
        self.img_size = (height, width)
        self.always = crop_ratio is not None
        self.crop_ratio = crop_ratio or (7 / 8 if max(img_size) <= 224 else 1.0)
        self.crop = v2.CenterCrop(self.img_size)

    def forward(self, image):
        height, width = self.img_size
        if tuple(image.shape[-2:]) == self.img_size and not self.always:
            return image
        rows, columns = image.shape[-2:]
        scale = 1 / self.crop_ratio * max(height / rows, width / columns)

        # of a long strip only the middle is resized: the crop shows no more, and all of it may not fit in memory
        middle = min(rows, math.ceil(16 * height / scale)), min(columns, math.ceil(16 * width / scale))
        if middle != (rows, columns):
            image = F.center_crop(image, list(middle))
            rows, columns = middle
        size = [round(rows * scale), round(columns * scale)]
        return self.crop(F.resize(image, size, BICUBIC, antialias=True))


# ---------------------------------------------------------------------------- RandAugment: the operations


def autocontrast(image, value, fill):
    return F.autocontrast(image)


def equalize(image, value, fill):
    return F.equalize(image)


def invert(image, value, fill):
    return F.invert(image)


def posterize(image, bits, fill):
    """Keep the upper bits of a pixel; none, at level 10, leave black."""
    mask = 256 - 2 ** (8 - bits)
    return image.point(lambda pixel: pixel & mask)


def solarize(image, threshold, fill):
    return F.solarize(image, threshold)


def solarize_add(image, added, fill):
    """Brighten the dark half of the range only."""
    return image.point(lambda pixel: pixel + added if pixel < 128 else pixel)


def color(image, factor, fill):
    return F.adjust_saturation(image, factor)


def contrast(image, factor, fill):
    return F.adjust_contrast(image, factor)


def brightness(image, factor, fill):
    return F.adjust_brightness(image, factor)


def sharpness(image, factor, fill):
    return F.adjust_sharpness(image, factor)


def rotate(image, degrees, fill):
    return F.rotate(image, degrees, BICUBIC, fill=fill)


def move(image, fill, shear=(0.0, 0.0), translate=(0.0, 0.0)):
    """Pixel (x, y) shows what was at (x + shear_x y + translate_x, y + shear_y x + translate_y)."""
    return F.affine(
        image,
        angle=0.0,
        translate=[-distance for distance in translate],
        scale=1.0,
        shear=[math.degrees(math.atan(slope)) for slope in shear],
        interpolation=BICUBIC,
        fill=fill,
        center=[0.0, 0.0],
    )


def shear_x(image, slope, fill):
    return move(image, fill, shear=(slope, 0.0))


def shear_y(image, slope, fill):
    return move(image, fill, shear=(0.0, slope))


def translate_x(image, share, fill):
    return move(image, fill, translate=(share * image.width, 0.0))


def translate_y(image, share, fill):
    return move(image, fill, translate=(0.0, share * image.height))


class Operation(NamedTuple):
    apply: Callable  # (PIL image, value, fill) -> PIL image
    start: float = 0.0  # the value at level 0
    change: float = 0.0  # what level 10 adds to it
    both_signs: bool = True  # added or subtracted, by chance

    def value(self, level, sign=1):
        """(2)"""
        change = self.change * level / 10
        if isinstance(self.change, int):
            change = int(change)
        if self.both_signs:
            change = sign * change
        return self.start + change


OPERATIONS = {
    "AutoContrast": Operation(autocontrast),
    "Equalize": Operation(equalize),
    "Invert": Operation(invert),
    "Rotate": Operation(rotate, 0.0, 30.0),  # degrees
    "Posterize": Operation(posterize, 4, -4, both_signs=False),  # bits kept
    "Solarize": Operation(solarize, 256, -256, both_signs=False),  # inverted from this value on
    "SolarizeAdd": Operation(solarize_add, 0, 110, both_signs=False),
    "Color": Operation(color, 1.0, 0.9),  # 0: gray, 1: unchanged
    "Contrast": Operation(contrast, 1.0, 0.9),
    "Brightness": Operation(brightness, 1.0, 0.9),
    "Sharpness": Operation(sharpness, 1.0, 0.9),
    "ShearX": Operation(shear_x, 0.0, 0.3),
    "ShearY": Operation(shear_y, 0.0, 0.3),
    "TranslateX": Operation(translate_x, 0.0, 0.45),  # of the width
    "TranslateY": Operation(translate_y, 0.0, 0.45),
}


# ---------------------------------------------------------------------------- RandAugment


class RandAugment(torch.nn.Module):
    """uint8 image (3, H, W) -> the same, changed. mean: of the data set, in [0, 1], fills what moves in."""

    def __init__(self, mean, num_ops=2, level=9.0, std=0.5, probability=0.5):
        super().__init__()
        self.fill = [round(255 * value) for value in mean]
        self.num_ops = num_ops
        self.level = level
        self.std = std
        self.probability = probability

    def forward(self, image):
        image = F.to_pil_image(image)
        operations = list(OPERATIONS.values())
        for _ in range(self.num_ops):
            operation = operations[torch.randint(len(operations), ())]
            if torch.rand(()) >= self.probability:
                continue

            # (1), (2)
            level = self.level + self.std * torch.randn(()).item()
            level = min(10, max(0, level))
            sign = 1 if torch.rand(()) < 0.5 else -1
            value = operation.value(level, sign)
            image = operation.apply(image, value, self.fill)
        return F.pil_to_tensor(image)


if __name__ == "__main__":
    from shapes import Shapes, save_grid

    source = Shapes(6, img_size=64)
    scenes = [source[i][0] for i in range(6)]
    augment = RandAugment(source.mean)

    # every operation at level 9
    columns = {"scene": torch.stack(scenes) / 255}
    for name, operation in OPERATIONS.items():
        value = operation.value(9)
        changed = []
        for scene in scenes:
            image = operation.apply(F.to_pil_image(scene), value, augment.fill)
            changed.append(F.pil_to_tensor(image))
        columns[name] = torch.stack(changed) / 255
        print(f"{name:12} {operation.value(0):6.2f} at level 0, {value:6.2f} at level 9")
    save_grid("augment_demo.png", columns)

    # how many images stay as they are
    torch.manual_seed(0)
    unchanged = 0
    for i in range(600):
        scene = scenes[i % 6]
        unchanged += torch.equal(augment(scene), scene)
    print(f"unchanged: {unchanged / 6:.0f} % of 600 draws (expect 25 % to 30 %)")
    print("saved augment_demo.png")

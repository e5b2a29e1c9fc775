"""Pictures: grids of images with captions, the samples to show, and the curves of a run.

Needs: torch, torchvision; shapes.py for the grid; matplotlib for the curves of a run.
"""

import io
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont  # comes with torchvision
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

import shapes

COLORS = ("red", "lime", "blue", "orange", "magenta", "cyan")


def spread(dataset, number):
    """Samples from all over a set, without augmentation of later epochs."""
    indices = torch.linspace(0, len(dataset) - 1, min(number, len(dataset))).long()
    return [dataset[0, i] for i in indices.tolist()]


def save_grid(path, columns, cell=128):
    """{caption: images} -> a PNG with a column per caption. Images of different sizes are padded to the largest."""
    columns = {name: stacked(images) for name, images in columns.items()}
    side = max(max(images.shape[-2:]) for images in columns.values())
    shapes.save_grid(path, columns, cell=max(cell, min(side, 320)))


def stacked(images):
    """(B, 3, H, W) in [0, 1], from a tensor or a list of uint8 images."""
    if isinstance(images, torch.Tensor):
        return images
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    padded = [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]), value=255) for image in images]
    return torch.stack(padded) / 255


def grid_png(columns, cell=128):
    """The bytes of such a grid."""
    buffer = io.BytesIO()
    save_grid(buffer, columns, cell)
    return buffer.getvalue()


def to_pil(image):
    return to_pil_image(image)


def to_png(image):
    """uint8 (1 or 3, H, W) -> bytes."""
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, "PNG")
    return buffer.getvalue()


def from_png(data):
    return Image.open(io.BytesIO(data))


def enlarged(image, side=320):
    """An image (C, H, W) by a whole factor, so that its shorter side has about so many pixels; large ones stay."""
    factor = max(1, round(side / min(image.shape[-2:])))
    return image.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def captioned(image, lines):
    """A uint8 image (3, H, W) with lines of text below."""
    picture = to_pil_image(enlarged(image, 256))
    font = ImageFont.load_default(size=16)
    longest = max(font.getlength(line) for line in lines)
    size = max(picture.width, math.ceil(longest) + 12), picture.height + 22 * len(lines) + 8
    page = Image.new("RGB", size, "white")
    page.paste(picture)
    draw = ImageDraw.Draw(page)
    for k, line in enumerate(lines):
        draw.text((6, picture.height + 4 + 22 * k), line, fill="black", font=font)
    return page


def row(columns, side=192):
    """{caption: uint8 image (3, H, W)} -> a picture of them side by side, each fitted into a square, captions above."""
    font = ImageFont.load_default(size=13)
    page = Image.new("RGB", (len(columns) * (side + 8) + 8, side + 68), "white")
    draw = ImageDraw.Draw(page)
    for k, (caption, image) in enumerate(columns.items()):
        left = 8 + k * (side + 8)
        lines = shapes.wrap(caption, side, font).splitlines()
        draw.text((left, 6), "\n".join(lines[:3]), fill="black", font=font)
        picture = to_pil_image(enlarged(image, side))
        picture.thumbnail((side, side))
        page.paste(picture, (left, 60))
    return page


def new_files(folder, paths):
    """folder/NAME.png per path; images of equal names get numbers. ValueError where such a file exists."""
    files = {}
    for path in paths:
        file = Path(folder, f"{path.stem}.png")
        number = 1
        while file in files:
            number += 1
            file = Path(folder, f"{path.stem}_{number}.png")
        if file.exists():
            raise ValueError(f"{file} exists already and is not written over; choose another --output-dir")
        files[file] = path
    Path(folder).mkdir(parents=True, exist_ok=True)
    return list(files)


def draw_objects(image, boxes, labels, masks, names, color="yellow", scores=None):
    """Boxes with the names of labels 1..K, and masks, on an image (uint8, or floats in [0, 1]) -> uint8 (3, H, W).

    Small images are enlarged first. scores: one per object, best first; None: the truth
    """
    if image.is_floating_point():
        image = (image * 255).round().to(torch.uint8)
    factor = enlarged(image).shape[-1] / image.shape[-1]
    image = enlarged(image)
    if not len(boxes):
        return image
    colors = [COLORS[k % len(COLORS)] for k in range(len(masks))]
    image = draw_segmentation_masks(image, enlarged(masks.bool()), alpha=0.5, colors=colors)

    # the best above the others
    page = to_pil_image(image)
    draw = ImageDraw.Draw(page)
    boxes = boxes * factor
    for box in boxes.flip(0).tolist():
        draw.rectangle(box, outline=color, width=2)

    # captions at the top left, moved down where a better one is
    font, spots = ImageFont.load_default(size=14), []
    for k, (left, top, *_) in enumerate(boxes.tolist()):
        caption = names[labels[k] - 1] + (f" {scores[k]:.2f}" if scores else "")
        width = font.getlength(caption) + 6
        x = max(0, min(left, page.width - width))
        y = max(0, top - 18)
        while any(abs(y - row) < 18 and x < end and start < x + width for start, end, row in spots):
            y += 3
        spots.append((x, x + width, y))
        draw.rectangle((x, y, x + width, y + 17), fill=color)
        draw.text((x + 3, y), caption, fill="black", font=font)
    return pil_to_tensor(page)


# ---------------------------------------------------------------------------- curves of a run

LOSSES = ("loss", "train_loss", "val_loss", "baseline")
NO_SHARES = {*LOSSES, "epoch", "step", "lr", "img_s", "data_share", "bad_steps", "skipped_images", "val_images",
             "classes"}  # all else that an epoch logs is in percent


def read_log(path):
    """The lines of a run's log."""
    path = Path(path)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a folder that train.py wrote, or its log.jsonl")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [line for line in lines if line["step"] >= 0]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a log of train.py; give its log.jsonl") from None


def curve(lines, key):
    """{step: value} of the lines that have the key."""
    return {line["step"]: line[key] for line in lines if line.get(key) is not None}


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is not installed; pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def draw_run(path, lines):
    """Panels of one run: its losses, its learning rate, and what was evaluated in percent."""
    epochs = [line for line in lines if "epoch" in line]
    steps = [line for line in lines if "epoch" not in line]
    names = set().union(*epochs)
    shares = sorted(names - NO_SHARES)
    plt = pyplot()
    width = 12 if shares else 8
    figure, axes = plt.subplots(1, 3 if shares else 2, figsize=(width, 3.4), layout="constrained")

    # steps, then epochs
    axes[0].plot(*zip(*curve(steps, "loss").items()), linewidth=0.7, alpha=0.5, label="loss of a step")
    axes[1].plot(*zip(*curve(lines, "lr").items()))
    panels = {"loss": [name for name in LOSSES if name in names], "learning rate": [], "%": shares}
    for ax, (title, keys) in zip(axes, panels.items()):
        for key in keys:
            points = curve(epochs, key)
            ax.plot(list(points), list(points.values()), ".-", label=key)
        if keys:
            ax.legend(fontsize=8)
        ax.set(title=title, xlabel="training steps")
        ax.grid(alpha=0.3)
    axes[1].set_ylim(bottom=0)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def save_curves(folder):
    """curves.png of the run in a folder, where matplotlib is installed and there are two epochs to connect."""
    try:
        lines = read_log(folder)
        if sum("epoch" in line for line in lines) > 1:
            draw_run(folder / "curves.png", lines)
    except Exception:  # no picture is worth a finished run
        pass

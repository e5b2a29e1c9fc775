"""Pictures: grids of images with captions, and the samples to show.

Needs: torch, torchvision; shapes.py for the grid.
"""

import io

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont  # comes with torchvision
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import shapes

COLORS = ("red", "lime", "blue", "orange", "magenta", "cyan")


def spread(dataset, number):
    """Samples from all over a set, without augmentation of later epochs."""
    indices = torch.linspace(0, len(dataset) - 1, min(number, len(dataset))).long()
    return [dataset[0, i] for i in indices.tolist()]


def save_grid(path, columns):
    """{caption: images} -> a PNG with a column per caption. Images of different sizes are padded to the largest."""
    columns = {name: stacked(images) for name, images in columns.items()}
    side = max(max(images.shape[-2:]) for images in columns.values())
    shapes.save_grid(path, columns, cell=max(128, min(side, 320)))


def stacked(images):
    """(B, 3, H, W) in [0, 1], from a tensor or a list of uint8 images."""
    if isinstance(images, torch.Tensor):
        return images
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    padded = [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
    return torch.stack(padded) / 255


def grid_png(columns):
    """The bytes of such a grid."""
    buffer = io.BytesIO()
    save_grid(buffer, columns)
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


def captioned(image, text, height=24):
    """A uint8 image (3, H, W) with a line of text below."""
    picture = to_pil_image(image)
    font = ImageFont.load_default(size=14)
    page = Image.new("RGB", (max(picture.width, int(font.getlength(text)) + 8), picture.height + height), "white")
    page.paste(picture)
    ImageDraw.Draw(page).text((4, picture.height + 4), text, fill="black", font=font)
    return page


def draw_objects(image, boxes, labels, masks, names, color="yellow"):
    """Boxes with the names of labels 1..K, and masks, on an image (uint8, or floats in [0, 1]) -> uint8 (3, H, W)."""
    if image.is_floating_point():
        image = (image * 255).round().to(torch.uint8)
    if not len(boxes):
        return image
    colors = [COLORS[k % len(COLORS)] for k in range(len(masks))]
    image = draw_segmentation_masks(image, masks.bool(), alpha=0.5, colors=colors)
    captions = [names[label - 1] for label in labels.tolist()]
    return draw_bounding_boxes(image, boxes, captions, colors=color, width=1)

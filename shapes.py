"""Shapes: an endless data set that is computed, not downloaded.

A crowded scene is a textured background with one large shape and up to four
small ones in front of it or behind it. A simple scene is one large flat shape on
a flat background: what is hidden of it can be inferred from what is seen. The
class of the large shape is the label; each shape has a box and a mask.

A scene is a pure function of its seed and its index, at any size. The k-th
random number of a scene is a hash:

    key = mix(mix(index) ^ mix(seed + 0x9E3779B9))
    u_k = upper 24 bits of mix(key ^ mix(k)) / 2**24                (1)

where mix scrambles 32 bits. So a scene is the same bit for bit in any batch. For
that the pictures use only + - * /, square roots and comparisons: sin, lerp and
matmul may round differently with the tensor's length.

A shape is the region where a function f(x, y) of its own coordinates is negative.
f grows about as fast as the distance to the edge, so with r the radius in pixels

    coverage of a pixel = clamp(1/2 - r f(x, y), 0, 1)              (2)

is an antialiased edge, and coverage > 1/2 is the mask.

Needs: torch, torchvision. Demo: python shapes.py (10 s on a CPU).
"""

import math
import textwrap
import time
from collections import namedtuple
from functools import cached_property, lru_cache

import torch
from PIL import Image, ImageDraw, ImageFont  # comes with torchvision
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.ops import masks_to_boxes
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

BITS = 0xFFFFFFFF  # 32 ones
VAL_START = 1 << 31  # validation scenes count from here, training scenes from 0
CACHE_BYTES = 256 << 20  # a larger set is drawn on access
MIN_VISIBLE = 4  # a shape with fewer visible pixels is not annotated


def hypot(x, y):
    return (x * x + y * y).sqrt()


def star(x, y):
    # fold the plane along the mirror lines until half of one point is left
    c, s, notch = math.cos(math.pi / 5), math.sin(math.pi / 5), 0.4
    x = x.abs()
    for a, b in ((c, -s), (-c, -s)):
        beyond = 2 * (a * x + b * y).clamp(min=0)
        x, y = x - beyond * a, y - beyond * b

    # the edge is now the line from the tip (0, 1) to the notch beside it
    a, b = 1 - notch * c, notch * s
    return (a * x.abs() + b * (y - 1)) / math.hypot(a, b)


def heart(x, y):
    # a square on its corner and two discs
    x, y, side = x.abs(), y + 0.1, 0.53
    half = side * 0.5**0.5
    square = (x + y.abs()) * 0.5**0.5
    whole = torch.minimum(square, hypot(x - half, y - half)) - side
    return torch.maximum(whole, 0.5 * (y - 1.7 * x - 0.2))  # minus a notch, to tell it from a disc


OUTLINES = {  # f of (2): negative inside, within the unit circle, y up
    "disc": lambda x, y: hypot(x, y) - 0.85,
    "ring": lambda x, y: (hypot(x, y) - 0.7).abs() - 0.22,
    "half disc": lambda x, y: torch.maximum(hypot(x, y + 0.38) - 0.92, -0.38 - y),
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.7,
    "triangle": lambda x, y: torch.maximum(-y, 0.75**0.5 * x.abs() + 0.5 * y) - 0.5,
    "star": star,
    "plus": lambda x, y: torch.maximum(torch.maximum(x.abs(), y.abs()) - 0.94,
                                       torch.minimum(x.abs(), y.abs()) - 0.25),
    "crescent": lambda x, y: torch.maximum(hypot(x, y) - 0.95, 0.8 - hypot(x - 0.45, y)),
    "bar": lambda x, y: torch.maximum(x.abs() - 0.96, y.abs() - 0.26),
    "heart": heart,
}
CLASSES = tuple(OUTLINES)
_at = (torch.arange(128) + 0.5) / 64 - 1
_inside = [f(_at, _at.view(-1, 1)) < 0 for f in OUTLINES.values()]
AREAS = torch.stack([inside.float().mean() * 4 for inside in _inside])  # of each shape at radius 1


def mix(x):
    """Scramble 32 bits of an int or int64 tensor, one to one (factors: github.com/skeeto/hash-prospector)."""
    x = x & BITS
    x = (x ^ (x >> 16)) * 0x21F0AAAD & BITS  # both factors keep below 2**63
    x = (x ^ (x >> 15)) * 0x735A2D97 & BITS
    return x ^ (x >> 15)


def scene_keys(indices, seed):
    """The key of (1) for each index: (B,) int64."""
    indices = torch.as_tensor(indices, dtype=torch.long)
    return mix(mix(indices) ^ mix(seed + 0x9E3779B9))  # mix(0) is 0: the constant keeps seed 0 away from it


def uniforms(key, start, count):
    """The numbers start to start+count-1 of each scene by (1), in [0, 1): (B, count) float32."""
    k = mix(torch.arange(start, start + count))
    return (mix(key[:, None] ^ k) >> 8).float() / 2**24  # 24 bits: exact in float32


def between(u, low, high):
    return low + (high - low) * u


def color(hue, saturation, luma):
    """RGB of about the given luma, stacked along a new last dimension."""
    shift = torch.tensor([0.0, 4.0, 2.0])
    rgb = ((hue[..., None] * 6 + shift) % 6 - 3).abs().sub(1).clamp(0, 1)
    rgb = 1 - saturation[..., None] * (1 - rgb)
    r, g, b = rgb.unbind(-1)
    brightness = 0.3 * r + 0.59 * g + 0.11 * b
    return (rgb * (luma / brightness)[..., None]).clamp(0, 1)


def rotation(u, degrees):
    """Cosine and sine of a turn of up to `degrees` either way, by the tangent t of half the angle."""
    t = between(u, -1, 1) * math.tan(math.radians(degrees / 2))
    return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)


# B scenes of S shapes, from back to front: label (B,) of the large one; kind (class) to sin (B, S), lengths
# in shorter sides of the image; color (B, S, 3); ground (B, 2, 3), the two colors that the texture blends
Plan = namedtuple("Plan", "label kind present radius cx cy cos sin color ground")


def simple_plan(key, height, width):
    """One large shape, all of it inside the picture, in any orientation."""
    u = uniforms(key, 0, 11).split(1, dim=1)  # each (B, 1)
    kind = (u[0] * len(CLASSES)).long()
    present = torch.ones_like(kind, dtype=torch.bool)
    radius = between(u[1], 0.32, 0.42)
    unit = min(height, width)
    cx = between(u[2], radius, width / unit - radius)
    cy = between(u[3], radius, height / unit - radius)
    cos, sin = rotation(u[4], 90)
    shape_color = color(u[5], between(u[6], 0.2, 0.9), between(u[7], 0.6, 0.95))
    ground = color(u[8], between(u[9], 0.1, 0.8), between(u[10], 0.12, 0.38)).expand(-1, 2, -1)
    return Plan(kind[:, 0], kind, present, radius, cx, cy, cos, sin, shape_color, ground)


def crowded_plan(key, height, width):
    """Two small shapes, the large one, two small ones, from back to front.

    A small shape has at most a quarter of the large one's area and only two can
    hide it, so at least half of it shows and the label is never in doubt.
    """
    u = uniforms(key, 0, 42)
    size, ground, hue, saturation, ground_hue, ground_saturation = u[:, 1:7].split(1, dim=1)  # each (B, 1)
    kind, share, x, y, turn, luma, contrast = u[:, 7:].reshape(-1, 7, 5).unbind(1)  # each (B, 5)
    kind = (kind * len(CLASSES)).long()
    rank = torch.tensor([1, 3, 0, 2, 4])  # shapes appear in this order; the large one is always present
    present = rank <= (u[:, :1] * 5).long()  # 1 to 5 shapes
    large = rank == 0

    # size: `share` is a small shape's area relative to the large one's
    size = between(size, 0.26, 0.33)
    share = between(share, 0.06, 0.25)
    radius = size * (share * AREAS[kind[:, large]] / AREAS[kind]).sqrt()
    radius = torch.where(large, size, radius)

    # place: the large shape keeps away from the edge, a small one may leave the picture
    unit = min(height, width)
    margin = torch.where(large, radius + (0.5 - radius) * 0.25, radius * 0.5)
    cx = between(x, margin, width / unit - margin)
    cy = between(y, margin, height / unit - margin)
    cos, sin = rotation(turn, 20)

    # color: light on dark, so that a small model learns the outline within minutes
    ground = between(ground, 0.12, 0.38) + torch.tensor([-0.08, 0.08])
    ground_hue = ground_hue + torch.tensor([0.0, 0.15])
    hue = torch.where(large, hue, hue + between(contrast, 0.25, 0.75))  # small ones differ from the large one
    shape_color = color(hue, between(saturation, 0.2, 0.9), between(luma, 0.6, 0.95))
    ground_color = color(ground_hue, between(ground_saturation, 0.1, 0.8), ground)
    return Plan(kind[:, 2], kind, present, radius, cx, cy, cos, sin, shape_color, ground_color)


def coverage(p, height, width):
    """Equation (2) for all shapes of a plan, each class on the shapes it has: (B, S, H, W) float32."""
    unit = min(height, width)
    px = (torch.arange(width) + 0.5) / unit
    py = (torch.arange(height) + 0.5) / unit
    cover = torch.zeros(*p.kind.shape, height, width)
    for c, outline in enumerate(OUTLINES.values()):
        # the M shapes of this class
        chosen = p.present & (p.kind == c)
        cos, sin, cx, cy, r = (v[chosen][:, None] for v in (p.cos, p.sin, p.cx, p.cy, p.radius))

        # each pixel in the shape's own coordinates: (M, H, W)
        dx, dy = (px - cx) / r, (cy - py) / r
        x = (cos * dx)[:, None, :] + (sin * dy)[:, :, None]
        y = (cos * dy)[:, :, None] - (sin * dx)[:, None, :]
        cover[chosen] = outline(x, y).mul_(-unit * r[:, :, None]).add_(0.5).clamp_(0, 1)
    return cover


def interpolate(lattice, length):
    """Linear interpolation of (B, cells + 1, ...) to (B, length, ...)."""
    cells = lattice.shape[1] - 1
    at = (torch.arange(length) + 0.5) * (cells / length)
    low = at.long()
    w = (at - low)[:, None]
    return lattice[:, low] * (1 - w) + lattice[:, low + 1] * w


def smooth(key, start, cells, height, width):
    """Random values on a coarse lattice, interpolated: (B, H, W) in [0, 1)."""
    lattice = uniforms(key, start, (cells + 1) ** 2).reshape(-1, cells + 1, cells + 1)
    lattice = interpolate(lattice.mT, width).mT
    return interpolate(lattice, height)


def texture(key, height, width):
    """Stripes, clouds and grain, mixed in each scene in its own proportions: (B, H, W), about 0 to 1."""
    u = uniforms(key, 48, 8)[:, :, None, None].unbind(1)  # each (B, 1, 1)
    unit = min(height, width)
    px = (torch.arange(width) + 0.5) / unit
    py = (torch.arange(height)[:, None] + 0.5) / unit
    wave = u[0] + between(u[1], -6, 6) * px + between(u[2], -6, 6) * py
    stripes = (wave % 1 - 0.5).abs() * 2
    clouds = smooth(key, 64, 4, height, width)
    spots = smooth(key, 128, 10, height, width)
    grain = uniforms(mix(key), 0, height * width).reshape(-1, height, width)
    a, b, c = (w + 0.1 for w in u[3:6])
    pattern = (a * stripes + b * clouds + c * spots) / (a + b + c)
    return pattern + between(u[6], 0, 0.5) * (grain - 0.5)


PLANS = {"simple": simple_plan, "crowded": crowded_plan}
STATISTICS = {  # mean and std of each channel, measured on 4,096 training scenes
    "simple": ((0.357, 0.349, 0.360), (0.241, 0.227, 0.249)),
    "crowded": ((0.332, 0.327, 0.337), (0.219, 0.208, 0.228)),
}


def paint(p, cover, pattern):
    """Lay the shapes over the ground, back to front: (B, 3, H, W) uint8."""
    first, second = p.ground[..., None, None].unbind(1)  # each (B, 3, 1, 1)
    pattern = pattern[:, None]
    images = first + (second - first) * pattern
    relief = (pattern - 0.5) * 0.2  # a shape shows the pattern faintly
    for s in range(cover.shape[1]):
        over = p.color[:, s, :, None, None] + relief
        images += cover[:, s, None] * over.sub_(images)
    return images.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)


def draw(key, height, width, scenes):
    """Plan, coverage and images of the scenes with these keys."""
    p = PLANS[scenes](key, height, width)
    cover = coverage(p, height, width)
    flat = torch.full((len(key), height, width), 0.5)
    pattern = flat if scenes == "simple" else texture(key, height, width)
    return p, cover, paint(p, cover, pattern)


def check_size(img_size):
    """(H, W) from an int or a pair of ints."""
    size = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    if len(size) != 2 or not all(isinstance(n, int) and 32 <= n <= 512 for n in size):
        raise ValueError(f"img_size {img_size} is not an int or a pair (H, W) of ints from 32 to 512; try 32")
    return tuple(size)


def render(indices, img_size=32, seed=0, scenes="crowded"):
    """The scenes with these indices -> images (B, 3, H, W) uint8, labels (B,) int64 from 0 to 9."""
    height, width = check_size(img_size)
    keys = scene_keys(indices, seed)
    images = torch.empty(len(keys), 3, height, width, dtype=torch.uint8)
    labels = torch.empty(len(keys), dtype=torch.long)
    chunk = max(1, 64 * 32 * 32 // (height * width))  # fits the processor's cache
    for i in range(0, len(keys), chunk):
        p, _, images[i:i + chunk] = draw(keys[i:i + chunk], height, width, scenes)
        labels[i:i + chunk] = p.label
    return images, labels


def scene(index, img_size=32, seed=0, scenes="crowded"):
    """One scene with all its annotations, in torchvision's detection terms.

    image (3, H, W) uint8; label int from 0 to 9, of the large shape; boxes (n, 4) float32, x1 y1 x2 y2; labels
    (n,) int64, 1 to 10; masks (n, H, W) uint8, visible pixels; semantic (H, W) int64, 0 is the background
    """
    p, cover, images = draw(scene_keys([index], seed), *check_size(img_size), scenes)

    # visible: not covered by a shape in front, which comes later in the list
    masks = cover[0] > 0.5  # (S, H, W)
    in_front = masks.flip(0).cumsum(0).flip(0) - masks.int()
    masks = masks & (in_front == 0)

    # annotate what shows enough of itself
    keep = masks.sum((1, 2)) >= MIN_VISIBLE
    masks, labels = masks[keep], p.kind[0][keep] + 1
    boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])  # a box ends after its last pixel
    semantic = (masks * labels[:, None, None]).sum(0)  # visible masks never overlap
    return dict(image=images[0], label=int(p.label), boxes=boxes, labels=labels,
                masks=masks.to(torch.uint8), semantic=semantic)


drawn = lru_cache(maxsize=2)(lambda *scenes: render(*scenes)[0])  # the sets of one process, drawn once


class Shapes(Dataset):
    """The scenes as an image data set: ds[i] is (image (3, H, W) uint8, label).

    `train` chooses between two disjoint ranges of scenes. At first use the whole set is
    drawn and kept as `images` (touch it before a DataLoader starts its workers, else each
    draws its own). Where that takes more than CACHE_BYTES, it is None: drawn on access.
    """

    classes = CLASSES
    mean, std = STATISTICS["crowded"]

    def __init__(self, size=4096, img_size=32, seed=0, train=True, scenes="crowded"):
        if not isinstance(size, int) or not 1 <= size <= VAL_START:
            raise ValueError(f"size {size} is not an int from 1 to 2**31; try 4096")
        if not isinstance(seed, int) or not 0 <= seed <= BITS:
            raise ValueError(f"seed {seed} is not an int from 0 to 2**32 - 1; try 0")
        if scenes not in PLANS:
            raise ValueError(f"scenes {scenes!r} is unknown; choose simple or crowded")
        self.indices = range(size) if train else range(VAL_START, VAL_START + size)
        self.img_size = check_size(img_size)
        self.seed, self.scenes = seed, scenes
        self.mean, self.std = STATISTICS[scenes]

    @cached_property
    def images(self):
        height, width = self.img_size
        if len(self) * 3 * height * width > CACHE_BYTES:
            return None
        return drawn(self.indices, self.img_size, self.seed, self.scenes)

    @cached_property
    def labels(self):  # the plan is enough, no picture is drawn
        keys = scene_keys(self.indices, self.seed).split(4096)
        return torch.cat([PLANS[self.scenes](key, *self.img_size).label for key in keys])

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        index = self.indices[i]  # an IndexError ends a for loop
        if self.images is not None:
            return self.images[i].clone(), int(self.labels[i])  # a copy: edits must not reach the cache
        images, labels = render([index], self.img_size, self.seed, self.scenes)
        return images[0], int(labels[0])

    def scene(self, i):
        return scene(self.indices[i], self.img_size, self.seed, self.scenes)


def shapes(n, img_size=32, seed=0, scenes="crowded"):
    """The first n scenes as a batch for demos: (n, 3, H, W) float32 in [0, 1]."""
    return render(range(n), img_size, seed, scenes)[0].float() / 255


def wrap(text, width, font):
    """Break a caption into lines of at most `width` pixels, between words where possible."""
    letters = len(text)
    while any(font.getlength(line) > width for line in textwrap.wrap(text, letters)):
        letters -= 1
    return textwrap.fill(text, letters)


def save_grid(path, columns, cell=128):
    """Write one PNG: a column per entry of a dict {caption: images}, a row per image.

    images (B, 3, H, W) or (B, 1, H, W) in [0, 1], enlarged by a whole factor to about `cell` pixels
    """
    if len({len(images) for images in columns.values()}) != 1:
        raise ValueError(f"columns {list(columns)} need the same number of images; cut them to the shortest")
    columns = {caption: images.detach().float().cpu().clamp(0, 1) for caption, images in columns.items()}

    # enlarge all columns to about the size of the largest
    cell = max(cell, *(min(images.shape[2:]) for images in columns.values()))
    tiles = []
    for images in columns.values():
        scale = max(1, round(cell / min(images.shape[2:])))
        tiles.append(F.interpolate(images.expand(-1, 3, -1, -1), scale_factor=scale, mode="nearest"))
    # pad them to one size and lay them out
    height, width = (max(tile.shape[d] for tile in tiles) for d in (2, 3))
    tiles = [F.pad(tile, (0, width - tile.shape[3], 0, height - tile.shape[2]), value=1.0) for tile in tiles]
    gap = 6
    grid = make_grid(torch.stack(tiles, dim=1).flatten(0, 1), nrow=len(tiles), padding=gap, pad_value=1.0)
    # captions above
    font = ImageFont.load_default(size=14)
    captions = [wrap(caption, width, font) for caption in columns]
    head = gap + 20 * max(caption.count("\n") + 1 for caption in captions)  # 20 pixels a line
    page = Image.new("RGB", (grid.shape[2], head + grid.shape[1]), "white")
    page.paste(to_pil_image(grid), (0, head))
    for i, caption in enumerate(captions):
        ImageDraw.Draw(page).text((gap + i * (width + gap), gap), caption, fill="black", font=font)
    page.save(path, "PNG")


if __name__ == "__main__":
    torch.set_num_threads(1)
    columns = {}
    for level in PLANS:
        start = time.process_time()  # of this process alone, whatever else runs
        images, _ = render(range(4096), scenes=level)
        rate = 4096 / (time.process_time() - start)
        print(f"{level}: {rate:.0f} images/s at 32 px on one core (expect 1,000 or more)")
        columns[f"{level}, 32 px"] = images[:6] / 255
    scenes = [scene(i, img_size=128) for i in range(6)]
    drawn = [draw_bounding_boxes(s["image"], s["boxes"], colors="red") for s in scenes]
    columns["the same at 128 px, boxes around what is visible"] = torch.stack(drawn) / 255
    save_grid("shapes_demo.png", columns)
    print("saved shapes_demo.png")

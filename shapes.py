"""Shapes: an endless data set that is a formula, not a download.

A scene is a textured background with one large shape and up to four small ones
in front of it or behind it. Everything about a scene follows from two numbers,
its seed and its index, so nothing is stored and any scene can be had at any
size. One rendering serves four tasks: the class of the large shape is the
label, and each shape has a box, a mask and its place in a semantic map.

There is no random generator whose state must be kept. The k-th random number
of a scene is a hash of what it is for:

    key = mix(mix(index) ^ mix(seed + 0x9E3779B9))
    u_k = upper 24 bits of mix(key ^ mix(k)) / 2**24                (1)

where mix scrambles 32 bits (the multipliers are those of C. Wellons,
github.com/skeeto/hash-prospector). Scenes can therefore be drawn in any order
and any batch, and stay the same bit for bit. For that the pictures use only
+ - * /, square roots and comparisons: sin, lerp and matmul may round differently
with the length of the tensor.

A shape is where a function f(x, y) of its own coordinates is negative. f grows
about as fast as the distance to the edge, so with r the radius in pixels

    coverage of a pixel = clamp(1/2 - r f(x, y), 0, 1)      (2)

is an antialiased edge, and coverage > 1/2 is the mask.

Needs: torch, torchvision. Demo: python shapes.py (10 s on a CPU).
"""

import math
import textwrap
import time

import torch
from PIL import Image, ImageDraw, ImageFont  # comes with torchvision
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

BITS = 0xFFFFFFFF  # 32 ones
VAL_START = 1 << 31  # validation scenes count from here, training scenes from 0
CACHE_BYTES = 256 << 20  # a larger set is rendered on access
MIN_VISIBLE = 4  # a shape with fewer visible pixels is not annotated


def hypot(x, y):
    return (x * x + y * y).sqrt()


def star(x, y):
    # Fold the plane along the mirror lines until one half point is left: the
    # edge is then the line from the tip (0, 1) to the notch beside it.
    c, s, notch = math.cos(math.pi / 5), math.sin(math.pi / 5), 0.4
    x = x.abs()
    for a, b in ((c, -s), (-c, -s)):
        beyond = 2 * (a * x + b * y).clamp(min=0)
        x, y = x - beyond * a, y - beyond * b
    edge = math.hypot(1 - notch * c, notch * s)
    return ((1 - notch * c) * x.abs() + notch * s * (y - 1)) / edge


def heart(x, y):
    x, y, side = x.abs(), y + 0.1, 0.53  # a square on its corner and two discs
    half = side * 0.5**0.5
    whole = torch.minimum((x + y.abs()) * 0.5**0.5, hypot(x - half, y - half)) - side
    return torch.maximum(whole, 0.5 * (y - 1.7 * x - 0.2))  # less a notch, to tell it from a disc


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
AREAS = torch.stack([(f(_at[None, :], _at[:, None]) < 0).float().mean() * 4
                     for f in OUTLINES.values()])  # of each shape at radius 1


def mix(x):
    """Scramble 32 bits, one to one; x is an int or an int64 tensor."""
    x = x & BITS
    x = (x ^ (x >> 16)) * 0x21F0AAAD & BITS  # both factors keep below 2**63
    x = (x ^ (x >> 15)) * 0x735A2D97 & BITS
    return x ^ (x >> 15)


def uniforms(key, start, count):
    """Numbers start .. start+count-1 of each scene by (1), in [0, 1).

    key (B,) int64 -> (B, count) float32
    """
    k = mix(torch.arange(start, start + count))
    return (mix(key[:, None] ^ k) >> 8).float() / 2**24  # 24 bits: exact in float32


def between(u, low, high):
    return low + (high - low) * u


def colour(hue, saturation, luma):
    """RGB of about the given luma, stacked along a new last dimension."""
    shift = torch.tensor([0.0, 4.0, 2.0])
    rgb = ((hue[..., None] * 6 + shift) % 6 - 3).abs().sub(1).clamp(0, 1)
    rgb = 1 - saturation[..., None] * (1 - rgb)
    r, g, b = rgb.unbind(-1)
    return (rgb * (luma / (0.3 * r + 0.59 * g + 0.11 * b))[..., None]).clamp(0, 1)


def plan(key, height, width):
    """What is where: kind, present, size, place, turn and colour of five shapes.

    They are listed from back to front: two small, the large one, two small. A
    small shape has at most a quarter of the large one's area and only two can
    hide it, so at least half of it shows and the label is never in doubt.
    Lengths are in units of the shorter side.
    """
    u = uniforms(key, 0, 42)
    draw = u[:, 7:].reshape(-1, 7, 5).unbind(1)  # seven numbers for each shape
    kind = (draw[0] * len(CLASSES)).long()
    turn = torch.tensor([1, 3, 0, 2, 4])  # the order in which shapes come to be
    present = turn <= (u[:, :1] * 5).long()  # 1 to 5 shapes

    large = between(u[:, 1:2], 0.26, 0.33)  # radius
    share = between(draw[1], 0.06, 0.25)  # area of a small shape, of the large one's
    radius = large * (share * AREAS[kind[:, 2:3]] / AREAS[kind]).sqrt()
    radius[:, 2:3] = large
    unit = min(height, width)
    margin = radius.clone()
    margin[:, [0, 1, 3, 4]] *= 0.5  # a small shape may leave the picture
    margin[:, 2] += (0.5 - margin[:, 2]) * 0.25  # the large one keeps away from the edge
    cx = between(draw[2], margin, width / unit - margin)
    cy = between(draw[3], margin, height / unit - margin)

    # A turn of up to 20 degrees either way, without sin and cos: t is the
    # tangent of half the angle.
    t = between(draw[4], -1, 1) * math.tan(math.pi / 18)
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)

    # Light on dark, so that a small model learns the outline within minutes.
    luma = between(draw[5], 0.6, 0.95)
    ground = between(u[:, 2:3], 0.12, 0.38)
    hue = u[:, 3:4] + between(draw[6], 0.25, 0.75)  # away from the large shape's
    hue[:, 2:3] = u[:, 3:4]
    return dict(kind=kind, present=present, radius=radius, cx=cx, cy=cy, cos=cos, sin=sin,
                colour=colour(hue, between(u[:, 4:5], 0.2, 0.9), luma),  # (B, 5, 3)
                ground=colour(u[:, 5:6] + torch.tensor([0.0, 0.15]),
                              between(u[:, 6:7], 0.1, 0.8),
                              ground + torch.tensor([-0.08, 0.08])))  # (B, 2, 3)


def coverage(p, height, width):
    """Equation (2) for all shapes of a plan, each class on the shapes it has.

    -> (B, 5, H, W) float32
    """
    unit = min(height, width)
    px, py = (torch.arange(width) + 0.5) / unit, (torch.arange(height) + 0.5) / unit
    cover = torch.zeros(*p["kind"].shape, height, width)
    for c, outline in enumerate(OUTLINES.values()):
        rows = torch.nonzero(p["present"] & (p["kind"] == c), as_tuple=True)
        cos, sin, cx, cy, r = (p[k][rows][:, None] for k in ("cos", "sin", "cx", "cy", "radius"))
        dx, dy = (px - cx) / r, (cy - py) / r  # (M, W), (M, H)
        x = (cos * dx)[:, None, :] + (sin * dy)[:, :, None]  # (M, H, W)
        y = (cos * dy)[:, :, None] - (sin * dx)[:, None, :]
        cover[rows] = outline(x, y).mul_(-unit * r[:, :, None]).add_(0.5).clamp_(0, 1)
    return cover


def smooth(key, start, cells, height, width):
    """Random values on a coarse lattice, interpolated: (B, H, W) in [0, 1)."""
    lattice = uniforms(key, start, (cells + 1) ** 2).reshape(-1, cells + 1, cells + 1)

    def steps(n):
        at = (torch.arange(n) + 0.5) * (cells / n)
        low = at.long()
        return low, at - low

    low, w = steps(width)
    lattice = lattice[:, :, low] * (1 - w) + lattice[:, :, low + 1] * w
    low, w = steps(height)
    return lattice[:, low] * (1 - w[:, None]) + lattice[:, low + 1] * w[:, None]


def texture(key, height, width):
    """Stripes, clouds and grain, in proportions of the scene's own: (B, H, W), about 0 to 1."""
    u = uniforms(key, 48, 8)[:, :, None, None].unbind(1)  # each (B, 1, 1)
    unit = min(height, width)
    px, py = (torch.arange(width) + 0.5) / unit, (torch.arange(height)[:, None] + 0.5) / unit
    stripes = ((u[0] + between(u[1], -6, 6) * px + between(u[2], -6, 6) * py) % 1 - 0.5).abs() * 2
    clouds = smooth(key, 64, 4, height, width)
    spots = smooth(key, 128, 10, height, width)
    a, b, c = (w + 0.1 for w in u[3:6])
    t = (a * stripes + b * clouds + c * spots) / (a + b + c)
    grain = uniforms(mix(key), 0, height * width).reshape(-1, height, width)
    return t + between(u[6], 0, 0.5) * (grain - 0.5)


def paint(p, cover, pattern):
    """Lay the shapes over the ground, back to front: (B, 3, H, W) uint8."""
    first, second = p["ground"][..., None, None].unbind(1)  # each (B, 3, 1, 1)
    pattern = pattern[:, None]
    images = first + (second - first) * pattern
    relief = (pattern - 0.5) * 0.2  # a shape shows the pattern faintly
    for s in range(cover.shape[1]):
        over = p["colour"][:, s, :, None, None] + relief
        images += cover[:, s, None] * over.sub_(images)
    return images.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)


def check_size(img_size):
    """(H, W) from an int or a pair of ints."""
    size = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    if len(size) != 2 or not all(isinstance(n, int) and 32 <= n <= 512 for n in size):
        raise ValueError(f"img_size {img_size} is not an int or a pair (H, W) of ints from 32 to 512; try 32")
    return tuple(size)


def scene_keys(indices, seed):
    """The key of equation (1) for each index: (B,) int64."""
    if not isinstance(seed, int) or not 0 <= seed <= BITS:
        raise ValueError(f"seed {seed} is not an int from 0 to 2**32 - 1; try 0")
    given, indices = indices, torch.as_tensor(indices)
    if indices.ndim != 1 or len(indices) and (
            indices.is_floating_point() or indices.min() < 0 or indices.max() > BITS):
        raise ValueError(f"indices {given} are not a flat list of ints from 0 to 2**32 - 1; try range(16)")
    return mix(mix(indices.long().cpu()) ^ mix(seed + 0x9E3779B9))  # mix(0) is 0: keep seed 0 off it


def render(indices, img_size=32, seed=0):
    """Draw the scenes with these indices, a chunk that fits the processor's cache at a time.

    -> images (B, 3, H, W) uint8, labels (B,) int64 from 0 to 9
    """
    height, width = check_size(img_size)
    key = scene_keys(indices, seed)
    images = torch.empty(len(key), 3, height, width, dtype=torch.uint8)
    labels = torch.empty(len(key), dtype=torch.long)
    chunk = max(1, 64 * 32 * 32 // (height * width))
    for i in range(0, len(key), chunk):
        k = key[i:i + chunk]
        p = plan(k, height, width)
        images[i:i + chunk] = paint(p, coverage(p, height, width), texture(k, height, width))
        labels[i:i + chunk] = p["kind"][:, 2]
    return images, labels


def scene(index, img_size=32, seed=0):
    """One scene with all its annotations, in torchvision's detection terms.

    image (3, H, W) uint8; label int from 0 to 9, the class of the largest shape;
    boxes (n, 4) float32, x1 y1 x2 y2; labels (n,) int64 from 1 to 10, as 0 is the
    background; masks (n, H, W) uint8, the visible pixels; semantic (H, W) int64
    """
    height, width = check_size(img_size)
    key = scene_keys([index], seed)
    p = plan(key, height, width)
    cover = coverage(p, height, width)
    image = paint(p, cover, texture(key, height, width))[0]

    masks = cover[0] > 0.5  # (5, H, W)
    in_front = masks.flip(0).int().cumsum(0).flip(0) - masks.int()
    masks = masks & (in_front == 0)
    keep = masks.sum((1, 2)) >= MIN_VISIBLE
    masks, labels = masks[keep], p["kind"][0][keep] + 1
    boxes = []
    for mask in masks:
        y, x = torch.nonzero(mask, as_tuple=True)
        boxes.append(torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]))
    return dict(image=image, label=int(p["kind"][0, 2]), boxes=torch.stack(boxes).float(),
                labels=labels, masks=masks.to(torch.uint8),
                semantic=(masks * labels[:, None, None]).sum(0))  # visible masks never overlap


class Shapes(Dataset):
    """The scenes as an image data set: ds[i] is (image (3, H, W) uint8, label).

    `train` picks one of two ranges of scenes that never meet. At first use the
    whole set is drawn and kept as `images` and `labels` (touch `ds.images` before
    a DataLoader starts its workers, else each draws its own); where that takes
    more than CACHE_BYTES, `images` is None and each scene is drawn when asked for.
    """

    classes = CLASSES
    mean = (0.332, 0.327, 0.337)  # measured on 4,096 training scenes
    std = (0.219, 0.208, 0.228)

    def __init__(self, size=4096, img_size=32, seed=0, train=True):
        if not isinstance(size, int) or not 1 <= size <= VAL_START:
            raise ValueError(f"size {size} is not an int from 1 to 2**31; try 4096")
        scene_keys([0], seed)  # complain now rather than in a worker
        self.size, self.img_size, self.seed = size, check_size(img_size), seed
        self.start = 0 if train else VAL_START
        self._images = self._labels = None

    @property
    def images(self):
        height, width = self.img_size
        if self._images is None and self.size * 3 * height * width <= CACHE_BYTES:
            self._images, self._labels = render(self._indices(), self.img_size, self.seed)
        return self._images

    @property
    def labels(self):
        if self._labels is None:  # the plan is enough: no picture is drawn
            key = scene_keys(self._indices(), self.seed)
            self._labels = torch.cat([plan(k, *self.img_size)["kind"][:, 2] for k in key.split(4096)])
        return self._labels

    def _indices(self):
        return torch.arange(self.start, self.start + self.size)

    def _index(self, i):
        if not -self.size <= i < self.size:
            raise IndexError(f"scene {i} of a set of {self.size}")  # also ends a for loop
        return self.start + i % self.size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        index = self._index(i)
        if self.images is not None:
            return self.images[i].clone(), int(self.labels[i])  # a copy: edits must not reach the cache
        images, labels = render([index], self.img_size, self.seed)
        return images[0], int(labels[0])

    def scene(self, i):
        return scene(self._index(i), self.img_size, self.seed)


def shapes(n, img_size=32, seed=0):
    """The first n scenes as a batch for demos: (n, 3, H, W) float32 in [0, 1]."""
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n {n} is not an int of at least 1; try 16")
    return render(range(n), img_size, seed)[0].float() / 255


def wrap(text, width, font):
    """Break a caption into lines of at most `width` pixels, between words where possible."""
    for letters in range(max(1, len(text)), 0, -1):
        lines = textwrap.wrap(text, letters)
        if all(font.getlength(line) <= width for line in lines):
            break
    return "\n".join(lines)


def save_grid(path, columns, cell=128):
    """Write one PNG: a column per entry of a dict {caption: images}, a row per image.

    images (B, 3, H, W) or (B, 1, H, W) in [0, 1]; small ones are enlarged by a
    whole factor to about `cell` pixels, and each pixel stays a square
    """
    if not columns or any(v.ndim != 4 or v.shape[1] not in (1, 3) for v in columns.values()):
        got = {k: tuple(v.shape) for k, v in columns.items()}
        raise ValueError(f"columns {got} is not a dict of (B, 3, H, W) or (B, 1, H, W) images; "
                         'try {"input": shapes(4)}')
    counts = {k: len(v) for k, v in columns.items()}
    if len(set(counts.values())) > 1 or not min(counts.values()):
        raise ValueError(f"columns need the same number of images, at least 1, got {counts}; "
                         "cut them to the shortest")
    cell = max(cell, *(min(v.shape[2:]) for v in columns.values()))  # all columns about as large as the largest
    tiles = []
    for v in columns.values():
        v = v.detach().float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)
        tiles.append(F.interpolate(v, scale_factor=max(1, round(cell / min(v.shape[2:]))), mode="nearest"))
    height, width = (max(t.shape[d] for t in tiles) for d in (2, 3))
    tiles = [F.pad(t, (0, width - t.shape[3], 0, height - t.shape[2]), value=1.0) for t in tiles]
    gap = 6
    grid = make_grid(torch.stack(tiles, 1).flatten(0, 1), nrow=len(tiles), padding=gap, pad_value=1.0)

    font = ImageFont.load_default(size=14)
    captions = [wrap(caption, width, font) for caption in columns]
    head = gap + 20 * max(c.count("\n") + 1 for c in captions)  # 20 pixels a line leave room for spacing
    page = Image.new("RGB", (grid.shape[2], head + grid.shape[1]), "white")
    page.paste(to_pil_image(grid), (0, head))
    for i, caption in enumerate(captions):
        ImageDraw.Draw(page).text((gap + i * (width + gap), gap), caption, fill="black", font=font)
    page.save(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    render(range(64))
    start = time.process_time()  # of this process alone, whatever else runs
    images, labels = render(range(4096))
    rate = len(images) / (time.process_time() - start)
    print(f"{rate:.0f} images/s at 32 px on one core (expect 1,000 or more)")
    share = labels.bincount(minlength=10) / len(labels)
    print("share of each class (expect about 10 %): "
          + ", ".join(f"{c} {100 * s:.1f} %" for c, s in zip(CLASSES, share)))
    pixels = images.float() / 255
    print("mean", [round(v, 3) for v in pixels.mean((0, 2, 3)).tolist()],
          "std", [round(v, 3) for v in pixels.std((0, 2, 3)).tolist()])

    scenes = [scene(i, img_size=128) for i in range(6)]
    hue = torch.arange(10) / 10
    palette = torch.cat([torch.zeros(1, 3), colour(hue, torch.ones(10), torch.full((10,), 0.5))])
    save_grid("shapes_demo.png", {
        "32 px": pixels[:6],
        "the same scenes at 128 px": torch.stack([s["image"] for s in scenes]) / 255,
        "semantic map": torch.stack([palette[s["semantic"]].permute(2, 0, 1) for s in scenes]),
        "boxes around what is visible": torch.stack([
            draw_bounding_boxes(s["image"], s["boxes"], colors="red") for s in scenes]) / 255})
    print("saved shapes_demo.png")

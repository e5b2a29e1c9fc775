"""Semantic sets: images in which every pixel has a label, and the augmentation that moves both alike.

An image is resized between its pixels, a label map is not: half of "cat" and half of "grass" is no class. So
labels are resized by nearest neighbor, cropped and flipped with the same draw as the image. Where the crop
reaches beyond the scene, the image gets the mean color and the labels 255: such pixels neither train nor count.

    shapes   generated scenes; the background is a class
    ade20k   150 classes; 0 in the file, "other", is ignored
    coco     133 things and stuff, from a folder of masks

Source: ADE20K, Zhou et al. 2016, arXiv 1608.05442; COCO's panoptic classes, Kirillov et al. 2018,
arXiv 1801.00868; resized and cropped as mmsegmentation does. Written from the papers.
Needs: torch, torchvision, tqdm; data.py, augment.py, files.py, schema.py, shapes.py.
Demo: python semantic.py (a few seconds) saves semantic_demo.png: scenes, and what training sees of them.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont  # comes with torchvision
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import schema
import shapes
from data import IMAGENET_MEAN, IMAGENET_STD, Scenes, seeded
from files import open_picture, read_image, read_text, shown
from shapes import Shapes

IGNORE = 255
DISTORTIONS = dict(brightness=(0.875, 1.125), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-0.05, 0.05))
FOLDERS = {  # layout -> folders of images and masks for training, then for validation
    "ade20k": [
        ("images/training", "annotations/training"),
        ("images/validation", "annotations/validation"),
    ],
    "coco": [("train2017", "semantic_train2017"), ("val2017", "semantic_val2017")],
}


# ---------------------------------------------------------------------------- sets


class SemanticFolder:
    """Images with a mask of class ids, in the layout of ADE20K or COCO.

    ade20k  root/images/{training,validation}/NAME.jpg, root/annotations/{training,validation}/NAME.png. Mask
            value 0 is ignored, 1..150 become 0..149; names from root/objectInfo150.txt where there is one
    coco    root/semantic_{train2017,val2017}/NAME.png names the images, root/{train2017,val2017}/NAME.jpg. Mask
            values are category ids, which root/annotations/semantic_categories.json maps to 0..132; 0 is ignored

    sample(i) -> image uint8 (3, H, W), labels uint8 (H, W): 0..K-1, or 255 to ignore. Grayscale becomes RGB.
    ValueError for what is missing (at once) or does not fit (when it is read).
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, layout, root, train=True):
        if layout not in FOLDERS:
            raise ValueError(f"data {layout!r} has no label for every pixel; choose shapes, ade20k or coco")
        if root is None:
            raise ValueError(f"data {layout!r} needs --data-path")
        folders = FOLDERS[layout][0 if train else 1]
        for folder in folders:
            if not Path(root, folder).is_dir():
                raise ValueError(
                    f"data-path {str(root)!r} has no folder {folder}/; expected the layout of {layout}"
                )
        self.images, self.masks = Path(root, folders[0]), Path(root, folders[1])

        # mask value -> label; -1: no such id
        ids, self.classes = read_ade(Path(root)) if layout == "ade20k" else read_coco(Path(root))
        self.table = torch.full((256,), -1)
        self.table[0] = IGNORE
        self.table[ids] = torch.arange(len(ids))

        # every mask has an image; in ADE20K every image has a mask
        self.image_files = files_by_stem(self.images, (".jpg", ".jpeg"))
        self.mask_files = files_by_stem(self.masks, (".png",))
        images, masks = set(self.image_files), set(self.mask_files)
        if not masks:
            raise ValueError(
                f"{shown(self.masks)} holds no *.png; expected a mask of class ids for each image"
            )
        check_partners(masks - images, "an image .jpg", self.images)
        if layout == "ade20k":
            check_partners(images - masks, "a mask .png", self.masks)
        self.names = sorted(masks)

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return self.image_files[self.names[i]].name

    def sample(self, i):
        file = self.mask_files[self.names[i]]
        image = read_image(self.image_files[self.names[i]])
        mask = read_mask(file)
        if image.shape[1:] != mask.shape:
            sizes = ["x".join(map(str, size)) for size in (mask.shape, image.shape[1:])]
            raise ValueError(f"{shown(file)}: the mask is {sizes[0]}, the image {sizes[1]}; resize one of them (a "
                             "mask by nearest neighbor)")
        labels = self.table[mask.int()]
        if (labels < 0).any():
            raise ValueError(f"{shown(file)}: value {mask[labels < 0][0]} is none of the {len(self.classes)} ids; "
                             "map it, or write 0 to ignore it")
        if (labels == IGNORE).all():
            raise ValueError(f"{shown(file)}: every pixel is 0, which is ignored; label some, or remove image and "
                             "mask")
        return image, labels.to(torch.uint8)


def files_by_stem(folder, suffixes):
    """{name without suffix: file}; .JPG is .jpg. Hidden files do not count."""
    files = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in suffixes or file.name.startswith("."):
            continue
        if file.stem in files:
            raise ValueError(
                f"{shown(folder)} holds {shown(files[file.stem].name)} and {shown(file.name)}, which share a "
                "mask; remove one"
            )
        files[file.stem] = file
    return files


def read_mask(file):
    """A mask file -> uint8 (H, W) of class ids; a palette is for the eye."""
    with open_picture(file) as picture:
        if picture.mode not in ("L", "P"):
            raise ValueError(
                f"a mask has one channel of 8 bits with class ids, this one has mode {picture.mode}"
            )
        return v2.functional.pil_to_tensor(picture)[0]


def check_partners(lonely, what, folder):
    if lonely:
        raise ValueError(
            f"{shown(min(lonely))} (the first of {len(lonely)}) lacks {what} in {shown(folder)}; add it "
            "or remove its partner"
        )


def read_ade(root):
    """-> ids 1..150 and their names, the first of the synonyms."""
    file, ids = root / "objectInfo150.txt", list(range(1, 151))
    if not file.is_file():
        return ids, [f"class {k}" for k in ids]
    lines = [line for line in read_text(file).splitlines()[1:] if line.strip()]
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines]
    if len(names) != len(ids):
        raise ValueError(
            f"{file} names {len(names)} classes below its headline, not 150; restore or remove it"
        )
    return ids, names


def read_coco(root):
    """-> ids and names, in the order of train_id."""
    file = root / "annotations" / "semantic_categories.json"
    if not file.is_file():
        raise ValueError(
            f"data-path {str(root)!r} has no annotations/semantic_categories.json, which says what the "
            "mask values mean"
        )
    return schema.read_categories(file)


class SemanticScenes(Scenes):
    """The generated scenes of shapes.py in the same form; the background is class 0, and no pixel is ignored."""

    classes = ["background", *Shapes.classes]

    def sample(self, i):
        scene = self.shapes.scene(i)
        return scene["image"], scene["semantic"].to(torch.uint8)


def open_semantic(name, path, train, img_size, size=4096, seed=0, scenes="crowded"):
    """The set `name` ("shapes", "ade20k", "coco"): len, sample(i), name(i), classes, mean, std."""
    if name == "shapes":
        return SemanticScenes(size if train else max(1, size // 4), img_size, seed, train, scenes)
    return SemanticFolder(name, path, train)


# ---------------------------------------------------------------------------- samples


class ShorterSide(v2.RandomShortestSize):
    """torchvision's, but the short side of a strip keeps a pixel."""

    def make_params(self, flat_inputs):
        params = super().make_params(flat_inputs)
        return params | dict(size=tuple(max(1, side) for side in params["size"]))


class Fit(v2.Resize):
    """torchvision's, but the short side of a strip keeps a pixel."""

    def transform(self, inpt, params):
        sides = inpt.shape[-2:]
        if min(sides) * self.max_size >= max(sides):
            return super().transform(inpt, params)
        size = [max(1, side * self.max_size // max(sides)) for side in sides]
        return v2.functional.resize(inpt, size, antialias=True)


def evaluation_transform(size, mean, std):
    """uint8 image -> the shorter side as the smaller of size, the longer at most four times that; normalized."""
    shorter = min(size)
    return v2.Compose(
        [
            Fit(shorter, max_size=max(4 * shorter, max(size)), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )


class Segmentations(Dataset):
    """(epoch, index) -> (normalized image float (3, H, W), labels int64 (h, w)).

    All draws are functions of (seed, epoch, index).

    img_size     S or (H, W); the shorter side of an image is measured against the smaller number
    train        True: colors distorted, shorter side to S times a factor in scale_range, a crop of img_size,
                 flipped or not. Where the image is smaller than the crop it is padded, with the mean color and 255.
                 False: shorter side to S (the longer to at most 4 S), labels at their own size: for lists
    mean, std    per channel in [0, 1]; default the source's

    Sizes and factors are mmsegmentation's for ADE20K. We differ: its retry of crops that are more than 75 % one
    class is left out, and colors are distorted before cropping, so that padding stays exactly zero. Each kind of
    ColorJitter acts on half of the images; torchvision's RandomPhotometricDistort would also swap channels.
    """

    def __init__(
        self,
        source,
        img_size,
        train,
        mean=None,
        std=None,
        seed=0,
        indices=None,
        scale_range=(0.5, 2.0),
    ):
        self.source, self.train, self.seed = source, train, seed
        self.indices = range(len(source)) if indices is None else indices
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        shorter = min(size)
        low, high = (round(shorter * scale) for scale in scale_range)
        if not 1 <= low <= high:
            raise ValueError(f"scale_range {scale_range} must be two factors, the smaller first, that leave at "
                             f"least a pixel of {shorter}; try (0.5, 2.0)")
        mean, std = mean or source.mean, std or source.std
        to_float, normalize = v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)
        if train:
            fill = {tv_tensors.Image: list(mean), tv_tensors.Mask: IGNORE}
            self.transform = v2.Compose(
                [
                    *(
                        v2.RandomApply([v2.ColorJitter(**{kind: reach})])
                        for kind, reach in DISTORTIONS.items()
                    ),
                    ShorterSide(list(range(low, high + 1)), max_size=4 * high, antialias=True),
                    to_float,
                    v2.RandomCrop(size, pad_if_needed=True, fill=fill),
                    v2.RandomHorizontalFlip(),
                    normalize,
                ]
            )
        else:
            self.transform = evaluation_transform(size, mean, std)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        epoch, index = key
        image, labels = self.source.sample(self.indices[index])
        if not self.train:
            return self.transform(image), labels.long()
        with seeded(self.seed, epoch, index):
            image, labels = self.transform(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return image.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor).long()


# ---------------------------------------------------------------------------- pictures


def palette(classes):
    """A color per class, (K + 1, 3) in [0, 1], neighbors far apart; "background" is gray, the last (ignored) black."""
    number = torch.arange(len(classes))
    hue, turn = number * 0.381966 % 1, number % 3  # a golden angle apart; three shades take turns
    colors = shapes.color(hue, 0.9 - 0.2 * turn, 0.35 + 0.15 * turn)
    colors[[name == "background" for name in classes]] = 0.25
    return torch.cat([colors, torch.zeros(1, 3)])


def paint(labels, classes):
    """A label map (h, w) -> its colors (3, h, w) in [0, 1]."""
    labels = labels.cpu().long()
    return palette(classes)[torch.where(labels == IGNORE, len(classes), labels)].permute(2, 0, 1)


def draw_classes(image, labels, classes):
    """An image uint8 (3, H, W) under the colors of its label map, with a legend -> uint8 (3, H + legend, W)."""
    overlay = (0.4 * image + 0.6 * 255 * paint(labels, classes)).round().to(torch.uint8)
    return v2.functional.pil_to_tensor(
        with_legend(v2.functional.to_pil_image(overlay), labels.unique(), classes)
    )


def with_legend(picture, numbers, classes):
    """A PIL image with the names and colors of some classes below."""
    colors, names = palette(classes), [*map(str, classes), "(ignored)"]
    numbers = sorted({min(int(k), len(classes)) for k in numbers})
    font = ImageFont.load_default(size=13)
    page = Image.new("RGB", (picture.width, picture.height + 20 * len(numbers) + 24), "white")
    page.paste(picture)
    draw, x, y = ImageDraw.Draw(page), 6, picture.height + 4
    for k in numbers:
        width = 32 + font.getlength(names[k])
        if x > 6 and x + width > page.width:
            x, y = 6, y + 20
        fill = tuple((colors[k] * 255).round().int().tolist())
        draw.rectangle((x, y + 2, x + 12, y + 14), fill=fill, outline="gray")
        draw.text((x + 18, y), names[k], fill="black", font=font)
        x += width
    return page.crop((0, 0, page.width, y + 24))


def save_segments(path, images, labels, predictions, classes, cell=160, largest=320):
    """A PNG with a row per image: image, truth, prediction, and below them the names of the classes that occur.

    images (3, H, W) in [0, 1]; labels and predictions (h, w); sizes may differ. Of sides above `largest` every
    second, third, ... pixel is shown
    """
    step = -(-max(max(truth.shape) for truth in labels) // largest)
    truth = [paint(part[::step, ::step], classes) for part in labels]
    predicted = [paint(part[::step, ::step], classes) for part in predictions]
    inputs = []
    for image, part in zip(images, truth, strict=True):
        inputs.append(F.interpolate(image[None].cpu(), part.shape[1:], mode="bilinear", antialias=True)[0])

    # one size for all, then the legend
    height, width = (max(part.shape[side] for part in truth) for side in (1, 2))
    columns = {}
    for name, column in {"image": inputs, "truth": truth, "prediction": predicted}.items():
        padded = [F.pad(p, (0, width - p.shape[-1], 0, height - p.shape[-2]), value=1.0) for p in column]
        columns[name] = torch.stack(padded)
    shapes.save_grid(path, columns, cell)
    numbers = torch.cat([part.cpu().flatten().long() for part in (*labels, *predictions)]).unique()
    with Image.open(path) as grid:
        page = with_legend(grid.convert("RGB"), numbers, classes)
    page.save(path)


if __name__ == "__main__":
    source = SemanticScenes(5, 96)
    train = Segmentations(source, 64, train=True)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (Shapes.mean, Shapes.std))

    # the scenes, and what training sees of them in two epochs
    columns = {}
    for epoch in (None, 0, 1):
        name = "scene" if epoch is None else f"epoch {epoch}"
        for i in range(5):
            image, labels = source.sample(i) if epoch is None else train[epoch, i]
            image = image / 255 if epoch is None else image * std + mean
            for title, picture in ((name, image), (f"{name}, labels", paint(labels, source.classes))):
                columns.setdefault(title, []).append(v2.functional.resize(picture, [96, 96]))
    shapes.save_grid(
        "semantic_demo.png", {title: torch.stack(pictures) for title, pictures in columns.items()}
    )

    pairs = [train[0, i] for i in range(5)]
    images, labels = (torch.stack([image for image, _ in pairs]), torch.stack([part for _, part in pairs]))
    outside = labels == IGNORE
    print(f"the same (seed, epoch, index) gives the same pair: {torch.equal(train[0, 3][0], images[3])} (expect "
          f"True)")
    zero = not images.movedim(1, -1)[outside].any()
    print(f"{outside.sum()} pixels beyond the scenes, all zero after normalization: {zero} (expect True)")
    print("saved semantic_demo.png")

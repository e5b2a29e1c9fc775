"""Semantic sets: images in which every pixel has a label, and the augmentation that moves both alike.

An image is resized between its pixels, a label map is not: half of "cat" and half of "grass" is no class. So
labels are resized by nearest neighbour, cropped and flipped with the same draw as the image, and where the crop
reaches beyond the scene the image gets the mean colour and the labels 255: a pixel that neither trains nor counts.

    shapes   generated scenes; the background is a class
    ade20k   150 classes; 0 in the file, "other", is ignored
    coco     133 things and stuff, from a folder of masks

Source: ADE20K, Zhou et al. 2016, arXiv 1608.05442; COCO's panoptic classes, Kirillov et al. 2018, arXiv 1801.00868;
resized and cropped as mmsegmentation does. Written from the papers.
Needs: torch, torchvision, tqdm; data.py, shapes.py.
Demo: python semantic.py (a few seconds) saves semantic_demo.png: scenes, and what training sees of them in two epochs.
"""

import json
from pathlib import Path

import torch
from PIL import Image  # comes with torchvision
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from data import BROKEN, IMAGENET_MEAN, IMAGENET_STD, Scenes, seeded
from shapes import Shapes

IGNORE = 255
DISTORTIONS = dict(brightness=(0.875, 1.125), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-0.05, 0.05))


class SemanticFolder:
    """Images with a mask of class ids, in the layout of ADE20K or COCO.

    ade20k  root/images/{training,validation}/NAME.jpg, root/annotations/{training,validation}/NAME.png. Mask value 0 is ignored,
            1..150 become 0..149; names from root/objectInfo150.txt where there is one
    coco    root/semantic_{train2017,val2017}/NAME.png says which images there are, root/{train2017,val2017}/NAME.jpg. Mask values are
            category ids, which root/annotations/semantic_categories.json maps to 0..132; 0 is ignored

    sample(i) -> image uint8 (3, H, W), labels uint8 (H, W): 0..K-1, or 255 to ignore. Grayscale images become RGB. ValueError in one
    sentence for what is missing (at once) or does not fit (when it is read).
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, layout, root, train=True):
        if layout not in ("ade20k", "coco"):
            raise ValueError(f"data {layout!r} has no label for every pixel; choose shapes, ade20k or coco")
        if root is None:
            raise ValueError(f"data {layout!r} needs --data-path")
        split = {"ade20k": ("validation", "training"), "coco": ("val2017", "train2017")}[layout][train]
        folders = (f"images/{split}", f"annotations/{split}") if layout == "ade20k" else (split, f"semantic_{split}")
        for folder in folders:
            if not Path(root, folder).is_dir():
                raise ValueError(f"data-path {str(root)!r} has no folder {folder}/; expected the layout of {layout}")
        self.images, self.masks = (Path(root, folder) for folder in folders)
        ids, self.classes = self.read_ade(Path(root)) if layout == "ade20k" else self.read_coco(Path(root))
        self.table = torch.full((256,), -1)  # mask value -> label; -1: no such id
        self.table[0], self.table[ids] = IGNORE, torch.arange(len(ids))
        pictures, masks = ({file.stem for file in folder.glob(end)} for folder, end in ((self.images, "*.jpg"), (self.masks, "*.png")))
        if not masks:
            raise ValueError(f"{self.masks} holds no *.png; expected a mask of class ids for each image")
        for lonely, has, lacks in ((masks - pictures, "a mask", "image"), (pictures - masks if layout == "ade20k" else (), "an image", "mask")):
            if lonely:
                raise ValueError(f"{min(lonely)} (the first of {len(lonely)}) has {has} in {self.masks if lacks == 'image' else self.images} but no "
                                 f"{lacks}; add what is missing or remove its partner")
        self.names = sorted(masks)

    @staticmethod
    def read_ade(root):
        """Ids 1..150 and their names, the first of the synonyms."""
        file, ids = root / "objectInfo150.txt", list(range(1, 151))
        if not file.is_file():
            return ids, [f"class {k}" for k in ids]
        names = [line.split("\t")[-1].split(",")[0].strip() for line in file.read_text().splitlines()[1:] if line.strip()]
        if len(names) != len(ids):
            raise ValueError(f"{file} names {len(names)} classes below its headline, not 150; restore or remove it")
        return ids, names

    @staticmethod
    def read_coco(root):
        file = root / "annotations" / "semantic_categories.json"
        if not file.is_file():
            raise ValueError(f"data-path {str(root)!r} has no annotations/semantic_categories.json, which says what the mask values mean")
        try:
            table = json.loads(file.read_text())["categories"]
            numbers, ids, names = zip(*sorted((entry["train_id"], entry["id"], entry["name"]) for entry in table))
            good = numbers == tuple(range(len(ids))) and {*ids} <= {*range(1, 256)} and len({*ids}) == len(ids)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise ValueError(f"{file} is no list of categories with name, id (1..255, each once) and train_id (from 0 without gaps); restore it")
        return list(ids), list(names)

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return f"{self.names[i]}.jpg"

    def sample(self, i):
        read, mask_file = [], self.masks / f"{self.names[i]}.png"
        for path in (self.images / self.name(i), mask_file):
            try:
                with Image.open(path) as picture:
                    mode = picture.mode
                    read.append(v2.functional.pil_to_tensor(picture if path == mask_file else picture.convert("RGB")))
            except BROKEN as error:
                raise ValueError(f"cannot read {path} ({str(error).splitlines()[0]}); repair it, or remove image and mask") from None
        image, mask = read
        if mode not in ("L", "P"):  # P: the numbers are ids, the palette is for the eye
            raise ValueError(f"{mask_file}: a mask has one channel of 8 bits with class ids, this one has mode {mode}; convert it")
        if image.shape[1:] != mask.shape[1:]:
            (h, w), (height, width) = mask.shape[1:], image.shape[1:]
            raise ValueError(f"{mask_file}: the mask is {h}x{w}, the image {height}x{width}; resize one of them (a mask by nearest neighbour)")
        labels = self.table[mask[0].int()]
        if (labels < 0).any():
            raise ValueError(f"{mask_file}: value {mask[0][labels < 0][0]} is none of the {len(self.classes)} ids; map it, or write 0 to ignore it")
        if (labels == IGNORE).all():
            raise ValueError(f"{mask_file}: every pixel is 0, which is ignored; label some, or remove image and mask")
        return image, labels.to(torch.uint8)


class SemanticScenes(Scenes):
    """The generated scenes of shapes.py in the same form; the background is class 0, and no pixel is ignored."""

    classes = ["background", *Shapes.classes]

    def sample(self, i):
        scene = self.shapes.scene(i)
        return scene["image"], scene["semantic"].to(torch.uint8)


def open_semantic(name, path, train, img_size, size=4096, seed=0):
    """The set `name` ("shapes", "ade20k", "coco"): len, sample(i), name(i), classes, mean, std. size is for shapes, as in open_source."""
    if name == "shapes":
        return SemanticScenes(size if train else max(1, size // 4), img_size, seed, train)
    return SemanticFolder(name, path, train)


class Segmentations(Dataset):
    """(epoch, index) -> (normalised image float (3, H, W), labels int64 (h, w)), every draw a function of (seed, epoch, index).

    img_size  S or (H, W); the shorter side of an image is measured against the smaller number
    train     True: colours distorted, shorter side to S times a factor in scale_range, a crop of img_size, flipped or not. Where the image
              is smaller than the crop it is padded, with the mean colour and label 255.
              False: shorter side to S (the longer to at most 4 S), labels at their own size: for lists, as sizes differ (`as_lists`)
    mean, std per channel in [0, 1]; default the source's

    Sizes and factors are mmsegmentation's for ADE20K. We leave out its retry of crops that are more than 75 % one class, and distort
    before cropping, so that padding stays exactly zero. Colours are distorted by torchvision's ColorJitter, each kind in half of the images;
    its RandomPhotometricDistort would also swap channels, which mmsegmentation does not.
    """

    def __init__(self, source, img_size, train, mean=None, std=None, seed=0, indices=None, scale_range=(0.5, 2.0)):
        self.source, self.train, self.seed = source, train, seed
        self.indices = range(len(source)) if indices is None else indices
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        low, high = (round(min(size) * scale) for scale in scale_range)
        if not 1 <= low <= high:
            raise ValueError(f"scale_range {scale_range} must be two factors, the smaller first, that leave at least a pixel of {min(size)}; try (0.5, 2.0)")
        mean, std = mean or source.mean, std or source.std
        to_float, normalize = v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)
        if train:
            self.transform = v2.Compose([
                *(v2.RandomApply([v2.ColorJitter(**{kind: reach})]) for kind, reach in DISTORTIONS.items()),
                v2.RandomShortestSize(list(range(low, high + 1)), max_size=4 * high, antialias=True), to_float,
                v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: list(mean), tv_tensors.Mask: IGNORE}),
                v2.RandomHorizontalFlip(), normalize])
        else:
            self.transform = v2.Compose([v2.Resize(min(size), max_size=max(4 * min(size), max(size)), antialias=True), to_float, normalize])

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


if __name__ == "__main__":
    from shapes import colour, save_grid

    source = SemanticScenes(5, 96)
    train = Segmentations(source, 64, train=True)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (Shapes.mean, Shapes.std))
    hue = torch.arange(len(source.classes)) / len(source.classes)
    colours = torch.cat([colour(hue, torch.tensor(0.8), torch.tensor(0.5)), torch.zeros(256 - len(hue), 3)])  # ignored: black
    colours[0] = 0.3
    columns = {}
    for name, pairs in dict(scene=[source.sample(i) for i in range(5)], **{f"epoch {k}": [train[k, i] for i in range(5)] for k in (0, 1)}).items():
        columns[name] = torch.stack([v2.functional.resize(image / 255 if image.dtype == torch.uint8 else image * std + mean, [96, 96]) for image, _ in pairs])
        columns[f"{name}, labels"] = torch.stack([v2.functional.resize(colours[labels.long()].permute(2, 0, 1), [96, 96], v2.InterpolationMode.NEAREST)
                                                  for _, labels in pairs])
    save_grid("semantic_demo.png", columns)
    images, labels = map(torch.stack, zip(*(train[0, i] for i in range(5))))
    outside = labels == IGNORE
    print(f"the same (seed, epoch, index) gives the same pair: {torch.equal(train[0, 3][0], images[3])} (expect True)")
    print(f"{outside.sum()} pixels beyond the scenes, all zero after normalisation: {not images.movedim(1, -1)[outside].any()} (expect True)")
    print("saved semantic_demo.png")

"""COCO: images with boxes and masks in, average precision out.

Three things around a detector that are not the detector. A data set in COCO's layout, which says at
once which sample is wrong instead of training on it. Large-scale jitter, the augmentation of the
benchmark: the scene is zoomed by a factor between 0.1 and 2, then cut or padded to one fixed square.

    scale ~ U(0.1, 2);  image fitted into scale * S;  crop or pad to S x S;  flip            (1)

And the one call that measures: average precision as pycocotools defines it, over IoU 0.5 ... 0.95.

Labels count from 1; 0 is the background, which torchvision's detectors add themselves. Crowds are
no targets in training, and neither hit nor miss in evaluation. Masks of results are kept
run-length encoded, a few hundred bytes each, so that memory stays flat over thousands of images.

Source: COCO, Lin et al. 2014, arXiv 1405.0312; large-scale jitter: Ghiasi et al. 2020, arXiv 2012.07177,
with the range of Li et al. 2021, arXiv 2111.11429. Written from the papers.
Needs: torch, torchvision, einops, tqdm, pycocotools (for AP and COCO files); checkpoints.py, data.py, detect.py, shapes.py.
Demo: python coco.py (10 s on a CPU) measures the truth against itself, and shifted by a few pixels.
"""

import contextlib
import functools
import io
import json
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image  # comes with torchvision
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import v2
from tqdm import tqdm

from data import BROKEN, IMAGENET_MEAN, IMAGENET_STD, Scenes, as_lists, seeded
from detect import check_target, covered


def need_pycocotools():
    """The modules mask, coco and cocoeval of pycocotools, or a sentence that names the install."""
    try:
        from pycocotools import coco, cocoeval, mask
    except ImportError:
        raise ValueError("COCO files and average precision need pycocotools: pip install pycocotools") from None
    return mask, coco, cocoeval


def quietly(function, *args, **kwargs):
    """pycocotools talks; here only results do."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **kwargs)


# ---------------------------------------------------------------------------- data sets


class CocoImages:
    """A data set in COCO's layout: root/annotations/instances_<split>.json and root/<split>/*.jpg.

    sample(i) -> image uint8 (3, H, W), target of tensors: boxes (n, 4) x1 y1 x2 y2, labels (n,) 1..K, masks (n, H, W) uint8.
    classes are the names by category id, ids those ids. Grayscale becomes RGB; an image may be empty. Objects without width or
    height, of which the official files have a few, are no targets. class_agnostic: everything is an "object", also in the truth.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, root, split="train2017", class_agnostic=False):
        mask, coco, _ = need_pycocotools()
        file, self.folder = Path(root) / "annotations" / f"instances_{split}.json", Path(root) / split
        if not file.is_file():
            raise ValueError(f"data-path {str(root)!r} has no annotations/instances_{split}.json; expected COCO's layout")
        try:
            content = json.loads(file.read_text())
            names = {image["id"]: image["file_name"] for image in content["images"]}
            annotations = content["annotations"]
            categories = sorted(content["categories"], key=lambda c: c["id"])
            self.ids, self.classes = [category["id"] for category in categories], [category["name"] for category in categories]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} is no COCO annotation file with images, annotations and categories; restore it") from None
        for entry in content["images"]:
            if not {"height", "width"} <= set(entry):
                raise ValueError(f"{file.name}: image {entry['file_name']} has no height and width; add them")
        for entry in annotations:
            entry.setdefault("iscrowd", 0)
            lacks = {"id", "image_id", "category_id", "bbox", "area", "segmentation"} - {key for key, value in entry.items() if value not in ([], None)}
            if not lacks and not (isinstance(entry["bbox"], list) and len(entry["bbox"]) == 4):
                raise ValueError(f"{file.name}: annotation {entry['id']} has bbox {entry['bbox']}; it must be [x, y, width, height]")
            if lacks or entry["image_id"] not in names:
                raise ValueError(f"{file.name}: annotation {entry.get('id')} has no {', '.join(sorted(lacks)) or 'image in the file'}; complete or "
                                 "drop it")
        absent = [name for name in names.values() if not (self.folder / name).is_file()]
        if absent:
            raise ValueError(f"{len(absent)} images named in {file.name} are not in {self.folder}, first {absent[0]}; add them or drop their entries")
        unknown = next((entry for entry in annotations if entry["category_id"] not in self.ids), None)
        if unknown is not None:
            raise ValueError(f"{names[unknown['image_id']]}: category_id {unknown['category_id']} is not among the categories of {file.name}; add it "
                             "or drop the annotation")
        if class_agnostic:
            self.ids, self.classes = [1], ["object"]
            content["categories"] = [dict(id=1, name="object")]
            for entry in annotations:
                entry["category_id"] = 1
        self.coco, self.mask = coco.COCO(), mask
        self.coco.dataset = content
        quietly(self.coco.createIndex)
        self.image_ids = sorted(names)

    def __len__(self):
        return len(self.image_ids)

    def name(self, i):
        return self.coco.imgs[self.image_ids[i]]["file_name"]

    def sample(self, i):
        try:
            with Image.open(self.folder / self.name(i)) as image:
                image = v2.functional.pil_to_tensor(image.convert("RGB"))
        except BROKEN as error:
            raise ValueError(f"cannot read {self.folder / self.name(i)} ({str(error).splitlines()[0]}); repair it or drop its entry") from None
        height, width = image.shape[-2:]
        entry = self.coco.imgs[self.image_ids[i]]
        if (entry["height"], entry["width"]) != (height, width):
            raise ValueError(f"{self.name(i)}: the annotations say {entry['height']}x{entry['width']}, the image is {height}x{width}; resize one of them")
        things = [a for a in self.coco.imgToAnns[self.image_ids[i]] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in things], dtype=torch.float32).view(-1, 4)
        boxes = box_convert(boxes, "xywh", "xyxy")
        slack = 1.0  # published boxes may reach a pixel's fraction beyond the image
        if len(boxes) and ((boxes < -slack).any() or (boxes[:, 2::2] > width + slack).any() or (boxes[:, 3::2] > height + slack).any()):
            raise ValueError(f"{self.name(i)}: a box reaches beyond the image of {width}x{height}; bbox must be [x, y, width, height] in pixels")
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        masks = []
        for a in things:
            try:
                masks.append(torch.from_numpy(self.coco.annToMask(a)))
            except Exception as error:  # pycocotools raises bare ones
                raise ValueError(f"{self.name(i)}: the segmentation of annotation {a['id']} is neither polygons nor run lengths ({error}); mend or drop "
                                 "it") from None
        labels = torch.tensor([self.ids.index(a["category_id"]) + 1 for a in things], dtype=torch.long)
        masks = torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8)
        real = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return image, dict(boxes=boxes[real], labels=labels[real], masks=masks[real])

    def truth(self):
        """pycocotools' COCO, crowds included."""
        return self.coco


class ShapeScenes(Scenes):
    """The generated scenes of shapes.py with boxes and masks, in the same form."""

    def __init__(self, size, img_size, seed=0, train=True, class_agnostic=False):
        super().__init__(size, img_size, seed, train)
        self.classes = ["object"] if class_agnostic else list(self.shapes.classes)
        self.ids = list(range(1, len(self.classes) + 1))
        self.image_ids = list(range(size))

    def sample(self, i):
        scene = self.shapes.scene(i)
        labels = scene["labels"].clamp(max=len(self.classes))  # class-agnostic: all of them 1
        return scene["image"], dict(boxes=scene["boxes"], labels=labels, masks=scene["masks"])

    @functools.cached_property
    def _truth(self):
        return make_truth([self.sample(i) for i in range(len(self))], self.ids)

    def truth(self):
        return self._truth


def make_truth(samples, ids):
    """[(image, target)] -> pycocotools' COCO, image ids counted from 0."""
    mask, coco, _ = need_pycocotools()
    images, annotations = [], []
    for i, (image, target) in enumerate(samples):
        images.append(dict(id=i, height=image.shape[-2], width=image.shape[-1]))
        for box, label, pixels in zip(box_convert(target["boxes"], "xyxy", "xywh").tolist(), target["labels"].tolist(), target["masks"]):
            annotations.append(dict(id=len(annotations) + 1, image_id=i, category_id=ids[label - 1], bbox=box, iscrowd=0,
                                    area=float(pixels.sum()), segmentation=encode(mask, pixels)))
    truth = coco.COCO()
    truth.dataset = dict(images=images, annotations=annotations, categories=[dict(id=k, name=str(k)) for k in ids])
    quietly(truth.createIndex)
    return truth


def encode(mask, pixels):
    """(H, W) of 0 and 1 -> COCO's run lengths."""
    return mask.encode(pixels.to(torch.uint8).cpu().numpy().astype("uint8", order="F"))


# ---------------------------------------------------------------------------- augmentation


class Zoom(v2.ScaleJitter):
    """torchvision's, which may shrink the short side of a long image to nothing (torch cannot resize to 1 x 1 either)."""

    def make_params(self, flat_inputs):
        return dict(size=tuple(max(2, side) for side in super().make_params(flat_inputs)["size"]))


def large_scale_jitter(img_size, fill, scale_range=(0.1, 2.0)):
    """(1), of torchvision's parts, on (image, masks) as tv_tensors. fill: the colour of the padding, 0..255 per channel.

    A scene smaller than the square lies anywhere in it; at evaluation the detector puts it into the upper left corner.
    """
    size = (img_size, img_size)
    return v2.Compose([
        v2.RandomHorizontalFlip(),
        Zoom(size, scale_range, antialias=True),
        v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: list(fill), "others": 0})])


class Detections(Dataset):
    """(epoch, index) -> (image float (3, H, W) in [0, 1], target), every draw a function of (seed, epoch, index).

    jitter  of large_scale_jitter, or None: the image as it is. Targets are checked; boxes are recomputed from the masks after a crop,
            and what is left with fewer than 2 pixels in width or height is dropped. Targets carry image_id for the evaluation.
    """

    def __init__(self, source, jitter=None, seed=0, indices=None):
        self.source, self.jitter, self.seed = source, jitter, seed
        self.indices = range(len(source)) if indices is None else indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        epoch, index = key
        i = self.indices[index]
        image, target = self.source.sample(i)
        pixels = image.float() / 255
        check_target(pixels, target, len(self.source.classes), self.source.name(i))
        if self.jitter is not None:
            with seeded(self.seed, epoch, index):
                image, masks = self.jitter(tv_tensors.Image(image), tv_tensors.Mask(target["masks"]))
            image, masks = image.as_subclass(torch.Tensor), masks.as_subclass(torch.Tensor)
            seen = masks.flatten(1).bool().any(1) if len(masks) else torch.zeros(0, dtype=torch.bool)
            masks, labels = masks[seen], target["labels"][seen]
            boxes = masks_to_boxes(masks).float() if len(masks) else torch.zeros(0, 4)
            boxes[:, 2:] += 1  # the last pixel belongs to the box
            large = (boxes[:, 2:] - boxes[:, :2] >= 2).all(1)
            pixels, target = image.float() / 255, dict(boxes=boxes[large], labels=labels[large], masks=masks[large])
        return pixels, {**target, "image_id": self.source.image_ids[i]}


# ---------------------------------------------------------------------------- average precision


AP = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5}  # places in pycocotools' stats


@contextlib.contextmanager
def proposals_of(model):
    """Inside, a list that grows by (size of the resized image, its proposals) with every image that a two-stage model sees."""
    seen = []
    if not hasattr(model, "rpn"):
        yield seen
        return
    hook = model.rpn.register_forward_hook(lambda rpn, args, out: seen.extend(zip(args[0].image_sizes, out[0], strict=True)))
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def coco_evaluate(model, loader, truth, ids, device="cpu", progress=False, image_ids=None):
    """{"box_ap": ..., "box_ap50", ..., "mask_ap", ...}: fractions; -1 where there is no truth of that kind
    (of that size too, if anything was found).

    From a two-stage detector also "proposal_recall": the share of the targets' boxes that some proposal covers, the first
    thing to look at when nothing is learnt.

    model   a detector of torchvision: list of images -> list of dicts of boxes, labels, scores, masks
    loader  batches (images, targets with image_id and boxes): each process its own share, every image once over all
    truth   pycocotools' COCO of the whole set; image_ids: those of its images that count, None for all
    ids     the category id of labels 1, 2, ...

    Every process gets the same result. Masks count where above 0.5.
    """
    mask, _, cocoeval = need_pycocotools()
    was_training = model.training
    model.eval()
    found, recalled, there = [], 0, 0
    for images, targets in tqdm(loader, desc="evaluate", leave=False, disable=None if progress else True):
        with proposals_of(model) as proposals:
            outputs = model([image.to(device) for image in images])
        for image, target, (size, boxes) in zip(images, targets, proposals):
            recalled += covered(target["boxes"], resize_boxes(boxes.float().cpu(), size, image.shape[-2:]))
            there += len(target["boxes"])
        for output, target in zip(outputs, targets, strict=True):
            boxes = box_convert(output["boxes"].float().cpu(), "xyxy", "xywh").tolist()
            masks = output.get("masks", [None] * len(boxes))
            for box, label, score, pixels in zip(boxes, output["labels"].tolist(), output["scores"].tolist(), masks):
                found.append(dict(image_id=target["image_id"], category_id=ids[label - 1], bbox=box, score=score))
                if pixels is not None:
                    found[-1]["segmentation"] = encode(mask, pixels[0] > 0.5)
    model.train(was_training)
    if dist.is_initialized() and dist.get_world_size() > 1:
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (found, recalled, there))
        found, recalled, there = (sum(column, start) for column, start in zip(zip(*shares), ([], 0, 0)))
    found.sort(key=lambda one: (one["image_id"], -one["score"], one["bbox"]))  # the same order however the images were shared
    result = {"proposal_recall": recalled / there} if there else {}
    kinds = {"box": "bbox", "mask": "segm"} if not found or "segmentation" in found[0] else {"box": "bbox"}
    for name, kind in kinds.items():
        if not found:
            result |= {f"{name}_{key}": 0.0 if truth.getAnnIds(imgIds=image_ids or [], iscrowd=False) else -1.0 for key in AP}
            continue
        # with a bbox in it pycocotools would take the box's area for the mask's
        results = [{key: value for key, value in one.items() if key != ("bbox" if kind == "segm" else "segmentation")} for one in found]
        judge = cocoeval.COCOeval(truth, quietly(truth.loadRes, results), kind)
        if image_ids is not None:
            judge.params.imgIds = sorted(image_ids)
        for part in (judge.evaluate, judge.accumulate, judge.summarize):
            quietly(part)
        result |= {f"{name}_{key}": float(judge.stats[place]) for key, place in AP.items()}
    return result


if __name__ == "__main__":
    source = ShapeScenes(24, 96, train=False)
    samples = [source.sample(i) for i in range(len(source))]

    class Oracle(torch.nn.Module):
        """Knows the truth, and reports it so many pixels to the right."""

        def __init__(self, shift):
            super().__init__()
            self.shift, self.at = shift, 0

        def forward(self, images):
            outputs = []
            for _ in images:
                target = samples[self.at]
                self.at += 1
                boxes = target[1]["boxes"] + torch.tensor([self.shift, 0, self.shift, 0])
                masks = torch.roll(target[1]["masks"], self.shift, dims=2)[:, None].float()
                outputs.append(dict(boxes=boxes, labels=target[1]["labels"], scores=torch.ones(len(boxes)), masks=masks))
            return outputs

    loader = [as_lists([(image.float() / 255, {**target, "image_id": i})]) for i, (image, target) in enumerate(samples)]
    for shift in (0, 1, 3, 9):
        result = coco_evaluate(Oracle(shift), loader, source.truth(), source.ids)
        print(f"the truth moved by {shift} pixels: box AP {result['box_ap']:.2f}, AP50 {result['box_ap50']:.2f}, mask AP {result['mask_ap']:.2f}")
    print("(expect 1.00 at 0, then less and less: AP asks for tight boxes, AP50 forgives)")

"""COCO: images with boxes and masks in, average precision out.

What a detector needs around it: a data set in COCO's layout, which names a broken sample instead of training
on it; large-scale jitter, the augmentation of the benchmark,

    scale ~ U(0.1, 2);  image fitted into scale * S;  crop, or pad right and below, to S x S;  flip    (1)

and average precision as pycocotools defines it, the mean over IoU thresholds 0.5 ... 0.95. Labels count from
1; 0 is the background, which torchvision's detectors add. Crowds are not used in training, and neither hit
nor miss in evaluation. Predicted masks are kept run-length encoded, a few hundred bytes each.

Source: COCO, Lin et al. 2014, arXiv 1405.0312; large-scale jitter: Ghiasi et al. 2020, arXiv 2012.07177, with
the range of Li et al. 2021, arXiv 2111.11429. Written from the papers.
Needs: torch, torchvision, tqdm, pycocotools (for AP and COCO files); data.py, augment.py, files.py, schema.py,
shapes.py.
Demo: python coco.py (10 s on a CPU) measures the truth against itself, shifted by a few pixels.
"""

import contextlib
import io
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import box_convert, box_iou, clip_boxes_to_image, masks_to_boxes
from torchvision.transforms import v2
from tqdm import tqdm

import schema
from data import IMAGENET_MEAN, IMAGENET_STD, Scenes, as_lists, seeded
from files import read_image, shown

AP = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # pycocotools' first six figures


# ---------------------------------------------------------------------------- data sets


class CocoImages:
    """A data set in COCO's layout: root/annotations/instances_<split>.json and root/<split>/*.jpg.

    sample(i) -> image uint8 (3, H, W), target of boxes (n, 4) x1 y1 x2 y2, labels (n,) 1..K, masks (n, H, W).
    ids are the category ids of labels 1..K, classes their names. Objects without width or height, of which the
    official files have a few, are left out. class_agnostic: one category, "object", also in the truth.
    masks False: for files with boxes only; the masks of sample(i) are the boxes, and there is no mask AP.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    @schema.uncollected()
    def __init__(self, root, split="train2017", class_agnostic=False, masks=True):
        _, coco, _ = need_pycocotools()
        self.folder, self.masks = Path(root) / split, masks
        file = Path(root) / "annotations" / f"instances_{split}.json"
        if not file.is_file():
            raise ValueError(
                f"data-path {str(root)!r} has no annotations/{file.name}; expected COCO's layout"
            )
        content = schema.read_coco(file, masks)
        check_images(content["images"], self.folder, file.name)
        if class_agnostic:
            content["categories"] = [dict(id=1, name="object")]
            for entry in content["annotations"]:
                entry["category_id"] = 1

        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.ids = [category["id"] for category in categories]
        self.classes = [category["name"] for category in categories]
        self.image_ids = sorted(image["id"] for image in content["images"])
        self.coco = coco.COCO()
        self.coco.dataset = content
        quietly(self.coco.createIndex)

    def __len__(self):
        return len(self.image_ids)

    def name(self, i):
        return self.coco.imgs[self.image_ids[i]]["file_name"]

    def sample(self, i):
        # image
        name, info = self.name(i), self.coco.imgs[self.image_ids[i]]
        image = read_image(self.folder / name)
        height, width = image.shape[-2:]
        if (height, width) != (info["height"], info["width"]):
            raise ValueError(
                f"{shown(name)}: the image is {height}x{width} (turned upright where EXIF says so), the "
                f"annotations say {info['height']}x{info['width']}; resize one of them"
            )

        # boxes; published ones may reach a fraction of a pixel beyond the image
        entries = [entry for entry in self.coco.imgToAnns[self.image_ids[i]] if not entry["iscrowd"]]
        boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32).view(-1, 4)
        boxes = clip_boxes_to_image(box_convert(boxes, "xywh", "xyxy"), (height, width))

        # labels and masks
        labels = [self.ids.index(entry["category_id"]) + 1 for entry in entries]
        masks = torch.zeros(len(entries), height, width, dtype=torch.uint8)
        for k, entry in enumerate(entries):
            if self.masks:
                masks[k] = torch.from_numpy(self.coco.annToMask(entry))
            else:
                left, top, right, bottom = boxes[k].round().int().tolist()
                masks[k, top:bottom, left:right] = 1
        target = dict(boxes=boxes, labels=torch.tensor(labels, dtype=torch.long), masks=masks)
        return image, select(target, (boxes[:, 2:] > boxes[:, :2]).all(dim=1))

    def truth(self):
        """pycocotools' COCO, crowds included."""
        for entry in self.coco.dataset["annotations"]:
            entry["bbox"] = list(entry["bbox"])  # what it takes
        return self.coco


class ShapeScenes(Scenes):
    """The generated scenes of shapes.py with boxes and masks, in the same form."""

    def __init__(self, size, img_size, seed=0, train=True, class_agnostic=False, scenes="crowded"):
        super().__init__(size, img_size, seed, train, scenes)
        self.classes = ["object"] if class_agnostic else list(self.shapes.classes)
        self.ids = list(range(1, len(self.classes) + 1))
        self.image_ids = list(range(size))
        self.coco = None

    def sample(self, i):
        scene = self.shapes.scene(i)
        labels = scene["labels"].clamp(max=len(self.classes))  # class-agnostic: all of them 1
        return scene["image"], dict(boxes=scene["boxes"], labels=labels, masks=scene["masks"])

    def truth(self):
        if self.coco is None:
            samples = [self.sample(i) for i in range(len(self))]
            self.coco = make_truth(samples, self.ids)
        return self.coco


def make_truth(samples, ids):
    """[(image, target)] -> pycocotools' COCO, image ids counted from 0."""
    _, coco, _ = need_pycocotools()
    images, annotations = [], []
    for i, (image, target) in enumerate(samples):
        images.append(dict(id=i, height=image.shape[-2], width=image.shape[-1]))
        boxes = box_convert(target["boxes"], "xyxy", "xywh").tolist()
        for box, label, mask in zip(boxes, target["labels"].tolist(), target["masks"]):
            entry = dict(id=len(annotations) + 1, image_id=i, category_id=ids[label - 1], iscrowd=0)
            entry |= dict(bbox=box, area=float(mask.sum()), segmentation=encode(mask))
            annotations.append(entry)
    truth = coco.COCO()
    categories = [dict(id=k, name=str(k)) for k in ids]
    truth.dataset = dict(images=images, annotations=annotations, categories=categories)
    quietly(truth.createIndex)
    return truth


def encode(mask):
    """(H, W) of 0 and 1 -> COCO's run lengths."""
    coding, _, _ = need_pycocotools()
    return coding.encode(mask.to(torch.uint8).cpu().numpy().astype("uint8", order="F"))


def select(target, keep):
    """The objects of a target that a mask (n,) keeps."""
    return {key: target[key][keep] for key in ("boxes", "labels", "masks")}


# ---------------------------------------------------------------------------- augmentation


class Zoom(v2.ScaleJitter):
    """torchvision's, but sides keep 2 pixels, below which torch cannot resize; then padded right and below."""

    def make_params(self, flat_inputs):
        height, width = super().make_params(flat_inputs)["size"]
        return dict(size=(max(2, height), max(2, width)))

    def transform(self, inpt, params):
        height, width = params["size"]
        padding = [0, 0, max(0, self.target_size[1] - width), max(0, self.target_size[0] - height)]
        fill = self.fill if isinstance(inpt, tv_tensors.Image) else 0
        return v2.functional.pad(super().transform(inpt, params), padding, fill=fill)


def large_scale_jitter(img_size, fill, scale_range=(0.1, 2.0)):
    """(1), of torchvision's parts, on (image, masks) as tv_tensors. fill: the padding's color, 0..255 per channel."""
    size = (img_size, img_size)
    zoom = Zoom(size, scale_range, antialias=True)
    zoom.fill = list(fill)  # a small scene is at the top left, as in evaluation
    return v2.Compose([v2.RandomHorizontalFlip(), zoom, v2.RandomCrop(size)])


class Detections(Dataset):
    """(epoch, index) -> (image float (3, H, W) in [0, 1], target), a function of (seed, epoch, index).

    Targets are checked, and get an image_id for the evaluation. jitter: of large_scale_jitter, None: no change.
    """

    def __init__(self, source, jitter=None, seed=0, indices=None):
        self.source = source
        self.jitter = jitter
        self.seed = seed
        self.indices = range(len(source)) if indices is None else indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        epoch, index = key
        i = self.indices[index]
        image, target = self.source.sample(i)
        check_target(image, target, len(self.source.classes), self.source.name(i))
        if self.jitter is not None:
            image = tv_tensors.Image(image)
            masks = tv_tensors.Mask(target["masks"])
            with seeded(self.seed, epoch, index):
                image, masks = self.jitter(image, masks)
            image = image.as_subclass(torch.Tensor)
            target = target_of(masks.as_subclass(torch.Tensor), target["labels"])
        return image.float() / 255, {**target, "image_id": self.source.image_ids[i]}


def target_of(masks, labels):
    """The target of cropped masks (n, H, W); objects of fewer than 2 pixels in width or height are dropped."""
    visible = masks.flatten(1).any(dim=1).bool()
    masks, labels = masks[visible], labels[visible]
    boxes = masks_to_boxes(masks).float()
    boxes[:, 2:] += 1  # the last pixel belongs to the box
    large = (boxes[:, 2:] - boxes[:, :2] >= 2).all(dim=1)
    return select(dict(boxes=boxes, labels=labels, masks=masks), large)


# ---------------------------------------------------------------------------- average precision


@torch.no_grad()
def coco_evaluate(
    model,  # a detector of torchvision: list of images -> list of dicts of boxes, labels, scores, masks
    loader,  # batches (images, targets with image_id and boxes); each process has its own share
    truth,  # pycocotools' COCO of the whole set
    ids,  # the category ids of labels 1, 2, ...
    device="cpu",
    progress=False,
    image_ids=None,  # the images of truth that count; None: all
    kinds=("box", "mask"),  # masks are judged where the model predicts them
):
    """{"box_ap": ..., "box_ap50", ..., "mask_ap", ...}: fractions, the same in every process; -1 without objects.

    From a two-stage detector also "proposal_recall": the share of the true boxes that some proposal covers, the
    first thing to look at when nothing is learned.
    """
    need_pycocotools()
    was_training = model.training
    model.eval()
    results, covered, boxes = [], 0, 0
    for images, targets in tqdm(loader, desc="evaluate", leave=False, disable=None if progress else True):
        with proposals_of(model) as proposals:
            outputs = model([image.to(device) for image in images])
        for output, target in zip(outputs, targets, strict=True):
            results += as_results(output, target["image_id"], ids)
        for image, target, (size, proposed) in zip(images, targets, proposals):
            proposed = resize_boxes(proposed.float().cpu(), size, image.shape[-2:])
            covered += count_covered(target["boxes"], proposed)
            boxes += len(target["boxes"])
    model.train(was_training)

    # all processes; the order must not depend on how the images were distributed
    if dist.is_initialized() and dist.get_world_size() > 1:
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (results, covered, boxes))
        results = [result for share in shares for result in share[0]]
        covered = sum(share[1] for share in shares)
        boxes = sum(share[2] for share in shares)
    results.sort(key=lambda result: (result["image_id"], -result["score"], result["bbox"]))
    metrics = {"proposal_recall": covered / boxes} if boxes else {}
    for kind in kinds:
        if kind == "box" or not results or "segmentation" in results[0]:
            metrics |= average_precision(results, truth, kind, image_ids)
    return metrics


def average_precision(results, truth, kind, image_ids):
    """pycocotools' figures of results, for kind "box" or "mask"."""
    _, _, cocoeval = need_pycocotools()
    if not results:
        has_objects = truth.getAnnIds(imgIds=image_ids or [], iscrowd=False)
        return {f"{kind}_{name}": 0.0 if has_objects else -1.0 for name in AP}
    # without the boxes of masks: pycocotools would take a box's area for the mask's
    other = "segmentation" if kind == "box" else "bbox"
    results = [{key: value for key, value in result.items() if key != other} for result in results]
    judge = cocoeval.COCOeval(truth, quietly(truth.loadRes, results), "bbox" if kind == "box" else "segm")
    if image_ids is not None:
        judge.params.imgIds = sorted(image_ids)
    quietly(judge.evaluate)
    quietly(judge.accumulate)
    quietly(judge.summarize)
    return {f"{kind}_{name}": float(value) for name, value in zip(AP, judge.stats)}


def as_results(output, image_id, ids):
    """A detector's output for an image, as COCO's list of results. Masks count where above 0.5."""
    boxes = box_convert(output["boxes"].float().cpu(), "xyxy", "xywh").tolist()
    categories = [ids[label - 1] for label in output["labels"].tolist()]
    results = []
    for box, category, score in zip(boxes, categories, output["scores"].tolist()):
        results.append(dict(image_id=image_id, category_id=category, bbox=box, score=score))
    for result, mask in zip(results, output.get("masks", [])):
        result["segmentation"] = encode(mask[0] > 0.5)
    return results


@contextlib.contextmanager
def proposals_of(model):
    """Inside, a list that grows by (size of the resized image, its proposals) per image of a two-stage model."""
    proposals = []

    def record(rpn, args, out):
        proposals.extend(zip(args[0].image_sizes, out[0], strict=True))

    hook = getattr(model, "rpn", torch.nn.Identity()).register_forward_hook(record)
    try:
        yield proposals
    finally:
        hook.remove()


def count_covered(boxes, proposals, iou=0.5):
    """How many of the boxes some proposal overlaps with at least this IoU."""
    if not len(boxes) or not len(proposals):
        return 0
    return (box_iou(boxes, proposals) >= iou).any(dim=1).sum().item()


# ---------------------------------------------------------------------------- checks


def need_pycocotools():
    """The modules mask, coco and cocoeval of pycocotools, or an error that names the install."""
    try:
        from pycocotools import coco, cocoeval, mask
    except ImportError:
        raise ValueError(
            "COCO files and average precision need pycocotools: pip install pycocotools"
        ) from None
    return mask, coco, cocoeval


def quietly(function, *args):
    """Call a function of pycocotools without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


def check_images(images, folder, file):
    """ValueError unless every image of the file is there."""
    names = [image["file_name"] for image in images]
    listed = set(os.listdir(folder)) if os.path.isdir(folder) else ()  # once: a look at each file takes seconds
    missing = [name for name in names if name not in listed and not os.path.isfile(os.path.join(folder, name))]
    if missing:
        first = shown(missing[0])
        raise ValueError(f"{shown(folder)} lacks {len(missing)} of {len(names)} images of {file}, first {first}")


def check_target(image, target, num_classes, name="image"):
    """ValueError, beginning with `name`, unless the target is what torchvision's detectors take."""
    missing = {"boxes", "labels", "masks"} - set(target)
    if missing:
        raise ValueError(
            f"{name}: the target has no {', '.join(sorted(missing))}; without objects they are empty"
        )
    boxes, labels, masks = target["boxes"], target["labels"], target["masks"]
    height, width = image.shape[-2:]
    n = len(boxes)
    if boxes.shape != (n, 4) or labels.shape != (n,) or masks.shape != (n, height, width):
        raise ValueError(f"{name}: boxes {tuple(boxes.shape)}, labels {tuple(labels.shape)} and masks "
                         f"{tuple(masks.shape)} must be (n, 4), (n,) and (n, {height}, {width})")
    good = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # not of NaN
    good &= (boxes == clip_boxes_to_image(boxes, (height, width))).all(dim=1)
    if not good.all():
        raise ValueError(
            f"{name}: box {boxes[~good][0].tolist()} must be (x1, y1, x2, y2) with a positive area "
            f"inside {width}x{height} pixels; torchvision.ops.box_convert converts (x, y, width, height)"
        )
    if n and not 1 <= labels.min() <= labels.max() <= num_classes:
        raise ValueError(
            f"{name}: labels {labels.tolist()} must lie in 1..{num_classes}; 0 is the background"
        )


if __name__ == "__main__":
    source = ShapeScenes(24, 96, train=False)
    samples = [Detections(source)[0, i] for i in range(24)]
    model = torch.nn.Module()
    for shift in (0, 1, 3, 9):
        targets = iter([target for _, target in samples])

        def forward(images):  # a "detector" that predicts the truth, moved to the right
            target = next(targets)
            boxes = target["boxes"] + torch.tensor([shift, 0, shift, 0])
            masks = target["masks"].roll(shift, dims=2)[:, None].float()
            return [
                dict(boxes=boxes, labels=target["labels"], scores=torch.ones(len(boxes)), masks=masks)
            ]

        model.forward = forward
        result = coco_evaluate(model, [as_lists([sample]) for sample in samples], source.truth(), source.ids)
        print(f"moved by {shift} pixels: box AP {result['box_ap']:.2f}, mask AP {result['mask_ap']:.2f}")
    print("(expect 1.00 at 0, then less and less: AP needs tight boxes)")

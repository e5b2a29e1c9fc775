"""Segmentation: a class per pixel, by UperNet on a pre-trained encoder, judged by mean IoU.

Model and metric in segment.py and pyramid.py, data in semantic.py. The small head is for a laptop; --heads full
is the width that MAE and BEiT report ADE20K with.
"""

import base64

import torch
from torchvision.transforms.v2.functional import pil_to_tensor

import semantic
from data import as_lists
from segment import UperNet, segment_evaluate
from segment import predict as predict_classes
from semantic import Segmentations, open_semantic
from tasks import Data
from tasks.detection import (add_dense_flags, build_encoder, complete_dense, describe_positions, split_scenes,
                             synchronized)
from training import pictures
from training.flags import count

DEFAULTS = dict(epochs=6, batch_size=16, blr=0.016, beta2=0.999, clip_grad=1.0, schedule="linear", layer_decay=1.0)


def add_flags(flag):
    add_dense_flags(flag, ("shapes", "coco", "ade20k"), global_blocks="all", jitter="none for shapes, else 0.5 2")
    flag("--channels", type=count, help="width of the head (default: 64, with --heads full 512)")
    flag("--slide", type=count, nargs=2, help="evaluate by windows of so many pixels, at steps of so many")
    flag("--eval-flip", action="store_true", help="evaluate image and mirror image together")


def complete(args):
    complete_dense(args, "all", img_size=[64], patch_size=8)
    args.channels = args.channels or (64 if args.heads == "small" else 512)
    if args.norm == "batch" and args.batch_size == 1:
        raise ValueError("--batch-size 1 leaves --norm batch nothing to average over in the coarsest pooled map; "
                         "take --norm group or at least 2")
    if args.jitter is None and args.data != "shapes":
        args.jitter = [0.5, 2.0]
    if args.jitter == [0, 0] and args.data != "shapes":
        raise ValueError("--jitter 0 0 leaves images of different sizes, which do not stack; take --jitter 1 1 for "
                         "crops without rescaling")
    if args.slide is not None and args.slide[1] > args.slide[0]:
        raise ValueError(f"--slide {args.slide[0]} {args.slide[1]} must be window and step, the step at most the "
                         "window, such as 512 341")


def open_data(args, world):
    size = tuple(args.img_size)
    source = open_semantic(args.data, args.data_path, True, size, args.data_size, args.data_seed, args.scenes)
    held_out = None
    if not args.eval_train:
        held_out = open_semantic(args.data, args.data_path, False, size, args.data_size, args.data_seed, args.scenes)
    found = split_scenes(args, source, held_out)
    jitter = None if args.jitter in (None, [0, 0]) else args.jitter
    train = Segmentations(found.train, size, jitter is not None, seed=args.seed, indices=found.indices,
                          scale_range=jitter or (1.0, 1.0))
    val = Segmentations(found.val, size, False, indices=found.val_indices)
    # evaluation keeps the size of each label map, and photographs have many
    lists = None if args.data == "shapes" else as_lists
    return Data(train, val, list(source.classes), found.mean, found.std, val_collate=lists)


def build(args, data, world):
    encoder = build_encoder(args, data, world)
    model = UperNet(
        encoder,
        len(data.classes),
        channels=args.channels,
        aux_channels=min(256, args.channels),
        norm=args.norm,
        window_size=args.window_size[0] if args.window_size else 14,
        global_blocks=args.global_blocks or "all",
        pyramid=args.pyramid or "taps",
        checkpointing=bool(args.checkpointing),
        img_size=tuple(args.img_size),
    )
    describe_positions(model.pyramid, args, world)
    return synchronized(model, world)


def loss(model, batch, args, data):
    """A mean over the labeled pixels of this micro-batch: means of means, where those counts differ."""
    images, labels = batch
    return model(images, labels).loss


def evaluate(model, loader, args, data, world):
    """miou and pixel_acc in percent."""
    window, stride = args.slide or (None, None)
    options = dict(window=window, stride=stride, flip=args.eval_flip, progress=world.main)
    result = segment_evaluate(model, loader, len(data.classes), world.device, **options)
    return {name: 100 * result[name] for name in ("miou", "pixel_acc")}


def label_map(model, image, size, args):
    window, stride = args.slide or (None, None)
    return predict_classes(model, image[None], size, window, stride, args.eval_flip)[0].cpu()


def save_picture(folder, model, args, data, rows=6):
    """Image, truth and prediction, with a legend of the classes that occur."""
    device = next(model.parameters()).device
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.mean, data.std))
    images, truth, predictions = [], [], []
    for image, labels in pictures.spread(data.val, rows):
        images.append((image * std + mean).clamp(0, 1))
        truth.append(labels)
        predictions.append(label_map(model, image.to(device), labels.shape, args))
    semantic.save_segments(folder / "segments.png", images, truth, predictions, data.classes)


def predict(model, images, args, classes, sizes=None):
    """The share of each class that occurs, and the label map as a PNG in base64.

    sizes: (H, W) of each label map; default that of the model's input. load_run gives those of the images, at
    which evaluation counts too.
    """
    results = []
    for i, image in enumerate(images):
        size = image.shape[-2:] if sizes is None else sizes[i]
        labels = label_map(model, image, size, args)
        shares = labels.flatten().bincount(minlength=len(classes)) / labels.numel()
        named = {str(classes[k]): share for k, share in enumerate(shares.tolist()) if share}
        png = pictures.to_png(labels[None].to(torch.uint8))
        results.append(dict(shares=named, labels=base64.b64encode(png).decode()))
    return results


def draw(image, prediction, classes):
    """The image under the colors of its label map, with a legend."""
    labels = pictures.from_png(base64.b64decode(prediction["labels"]))
    labels = pictures.enlarged(pil_to_tensor(labels))[0]
    return pictures.to_pil(semantic.draw_classes(pictures.enlarged(image), labels, classes))

"""Tasks: what train.py asks of pre-training, classification, probing, contrast, detection and segmentation.

A task is a module with exactly these names. train.py calls them in this order and knows nothing else:

    DEFAULTS                                    laptop-sized defaults of its flags (recipes/ hold the papers')
    add_flags(flag)                             its own flags; flag is parser.add_argument
    complete(args)                              fill in what depends on other flags; ValueError where two contradict
    open_data(args, world) -> Data              training and validation sets
    build(args, data, world) -> model           what is saved in checkpoint.pt
    loss(model, batch, args, data) -> scalar    of one micro-batch; model may be wrapped by DDP
    evaluate(model, loader, args, data, world)  -> {"val_loss": ...}, the same on all ranks, shares in percent
    save_picture(folder, model, args, data)     one PNG to look at; rank 0 only
    predict(model, images, args, classes)       -> a dict per image, of JSON types
    draw(image, prediction, classes)            -> a PIL image

pretrain.py is the one to read first, and the one to copy for a new task.

What a finished run has learned is used through load_run:

    run = load_run("runs/0002")
    run.model, run.args, run.classes, run.transform, run.predict(images), run.draw(image, prediction),
    run.features(images), run.export(file)
"""

import copy
import json
from argparse import Namespace
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Callable

import torch
from torch.utils.data import Dataset

import semantic
from checkpoints import read_checkpoint
from data import augmentation
from files import to_rgb
from training.runs import evaluated_weights
from vit import ViT

MODULES = {"pretrain": "pretrain", "classify": "classify", "probe": "probe", "contrast": "contrast",
           "detect": "detection", "segment": "segmentation"}


@dataclass
class Data:
    train: Dataset | None = None
    val: Dataset | None = None
    classes: list = field(default_factory=list)
    mean: tuple = (0.0, 0.0, 0.0)
    std: tuple = (1.0, 1.0, 1.0)
    collate: Callable | None = None  # how samples become a batch; None: stacked
    val_collate: Callable | None = None
    smallest: int = 1  # images in the smallest evaluation batch; 2 where images are mixed or compared
    learner: Callable | None = None  # model -> the part of it that learns; None: all
    fitted: bool = False  # build has trained the model already: no steps
    columns: list | None = None  # outputs that compete, where a set has a part of the classes; None: all
    final: bool = False  # the loop sets it before the last evaluation
    weights: dict | None = None  # of a run that goes on, so that build need not read --init


class LoadedRun:
    """A trained model with what is needed to use it."""

    def __init__(self, path, device="cpu"):
        path = Path(path)
        path = path / "checkpoint.pt" if path.is_dir() else path
        saved = read_checkpoint(path)
        missing = [name for name in ("model", "args", "classes", "mean", "std") if name not in saved]
        if missing:
            raise ValueError(f"{path} has no {', '.join(missing)}: it was not written by this version of train.py; "
                             "load its weights with --init or checkpoints.load_pretrained")
        self.args, self.classes = Namespace(**saved["args"]), saved["classes"]
        self.args.mean, self.args.std = tuple(saved["mean"]), tuple(saved["std"])
        self.device = torch.device(device)

        # the model, without its data set
        self.task = import_module(f"tasks.{MODULES[self.args.task]}")
        weights = evaluated_weights(saved)
        data = Data(classes=self.classes, mean=self.args.mean, std=self.args.std, weights=weights)
        self.model = self.task.build(self.args, data, Silent(self.device))
        self.model.load_state_dict(weights)
        self.model.to(self.device).eval().requires_grad_(False)
        self.transform = evaluation_transform(self.args)

    @torch.no_grad()
    def predict(self, images):
        """uint8 tensors (3, H, W) or PIL images, of any size -> a dict per image."""
        images = [as_tensor(image) for image in images]
        batch = [self.transform(image).to(self.device) for image in images]
        options = {}
        if self.args.task == "segment":  # at the size of the images, not of the model's input
            options["sizes"] = [tuple(image.shape[-2:]) for image in images]
        return self.task.predict(self.model, batch, self.args, self.classes, **options)

    def draw(self, image, prediction, threshold=0.5):
        """A picture of one prediction. image: uint8 (3, H, W) or PIL; threshold: smallest score of an object"""
        options = dict(threshold=threshold) if self.args.task == "detect" else {}
        return self.task.draw(as_tensor(image), prediction, self.classes, **options)

    @torch.no_grad()
    def features(self, images):
        """The encoder's pooled features, (n, D) on the CPU: what --task probe reads."""
        encoder = self.encoder
        batch = torch.stack([self.transform(as_tensor(image)) for image in images])
        return encoder(batch.to(self.device)).float().cpu()

    @cached_property
    def encoder(self):
        """The encoder without a head, a copy."""
        task = self.args.task
        if task in ("detect", "segment"):
            raise ValueError(f"features need an encoder of whole images, but this run of --task {task} has made a "
                             "pyramid of it; take the run that it started from")
        encoder = copy.deepcopy(getattr(self.model, "encoder", self.model))
        if task == "pretrain" and isinstance(encoder, ViT):
            encoder.reset_classifier(0, pool="mean")
        else:
            encoder.reset_classifier(0)
        return encoder.eval()

    def export(self, file):
        """Save a classifier or segmenter by torch.export, for batches of any size -> a sentence on what it takes."""
        args = self.args
        if args.task == "detect":
            raise ValueError("--export cannot save a detector: how many objects it finds depends on the image, and "
                             "torch.export needs sizes that do not; use tasks.load_run")
        if args.task not in ("classify", "probe", "segment"):
            raise ValueError(f"--export saves runs of --task classify, probe and segment, not of {args.task}; train "
                             "a probe on this one first")
        images = torch.zeros(2, 3, *args.img_size, device=self.device)
        free = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(self.model, (images,), dynamic_shapes=free)
        about = dict(classes=self.classes, mean=args.mean, std=args.std, img_size=args.img_size)
        torch.export.save(program, file, extra_files={"about.json": json.dumps(about)})
        height, width = args.img_size
        return (f"saved {file}: normalized images (B, 3, {height}, {width}) -> logits; classes, mean and std are in "
                "its about.json")


def as_tensor(image):
    """PIL or tensor -> uint8 (3, H, W)"""
    if not isinstance(image, torch.Tensor):
        return to_rgb(image)
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        raise ValueError(f"image is {image.dtype} {tuple(image.shape)}; give uint8 (3, H, W) or a PIL image")
    return image


def evaluation_transform(args):
    """uint8 image -> what the model takes, as in the task's evaluation."""
    size = tuple(args.img_size)
    if args.task == "detect":  # it resizes and normalizes by itself
        return to_unit
    if args.task == "segment":  # keeps the aspect ratio
        return semantic.evaluation_transform(size, args.mean, args.std)
    return augmentation("none", size, args.mean, args.std, getattr(args, "crop_ratio", None))  # older runs: None


def to_unit(image):
    return image.float() / 255


def describe(prediction, threshold=0.5):
    """A prediction in one line. threshold: smallest score of an object"""
    if "classes" in prediction:
        return ", ".join(f"{item['class']} {100 * item['probability']:.1f} %" for item in prediction["classes"])
    if "shares" in prediction:
        shares = sorted(prediction["shares"].items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares if share >= 0.0005)
    if "loss" in prediction:
        return "loss on hidden patches {loss:.3f} (predicting the patch mean: {baseline:.3f})".format(**prediction)
    if "features" in prediction:
        return f"{len(prediction['features'])} features (--neighbors IMAGE shows similar images)"

    # objects, best first
    words, sure = [], 0
    for item in prediction["objects"]:
        x, y, width, height = (round(number) for number in item["bbox"])
        words.append(f"{item['class']} {item['score']:.2f} at x {x} y {y}, {width} x {height}")
        sure += item["score"] >= threshold
    if sure:
        return "; ".join(words[:sure])
    best = f"the best is {words[0]}" if words else "there is none with a lower one"
    return f"no object with a score of at least {threshold:g} (--threshold); {best}"


class Silent:
    """The World of a process that trains nothing."""

    rank, size, main = 0, 1, False

    def __init__(self, device):
        self.device = device

    def say(self, text):
        pass


def load_run(path, device="cpu"):
    """What a run trained, rebuilt without its data set. path: its folder or its checkpoint.pt"""
    return LoadedRun(path, device)

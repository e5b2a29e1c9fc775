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
    run.model, run.args, run.classes, run.transform, run.predict(images)
"""

from argparse import Namespace
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Callable

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from checkpoints import read_checkpoint
from data import augmentation

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
        data = Data(classes=self.classes, mean=self.args.mean, std=self.args.std, weights=saved["model"])
        self.model = self.task.build(self.args, data, Silent(self.device))
        self.model.load_state_dict(saved["model"])
        self.model.to(self.device).eval().requires_grad_(False)
        self.transform = evaluation_transform(self.args)

    @torch.no_grad()
    def predict(self, images):
        """uint8 tensors (3, H, W) or PIL images, of any size -> a dict per image."""
        batch = [self.transform(as_tensor(image)).to(self.device) for image in images]
        return self.task.predict(self.model, batch, self.args, self.classes)

    def draw(self, image, prediction):
        """A picture of one prediction. image: uint8 (3, H, W) or PIL"""
        return self.task.draw(as_tensor(image), prediction, self.classes)


def as_tensor(image):
    """PIL or tensor -> uint8 (3, H, W)"""
    if isinstance(image, torch.Tensor):
        return image
    return v2.functional.pil_to_tensor(image.convert("RGB"))


def evaluation_transform(args):
    """uint8 image -> what the model takes. A detector resizes and normalizes by itself."""
    size, to_float = tuple(args.img_size), v2.ToDtype(torch.float32, scale=True)
    if args.task == "detect":
        return to_float
    if args.task == "segment":  # keeps the aspect ratio
        resize = v2.Resize(min(size), max_size=max(4 * min(size), max(size)), antialias=True)
        return v2.Compose([resize, to_float, v2.Normalize(args.mean, args.std)])
    return augmentation("none", size, args.mean, args.std, getattr(args, "crop_ratio", None))  # older runs: None


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

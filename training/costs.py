"""Costs: size, multiply-adds, memory and hours of a run, before anything is trained. And: does torch work here?

One forward pass on the meta device, without data or weights. A backward pass costs two forward passes,
recomputed activations one more, SAM and attacks double all of it.

Needs: torch, torchvision.
"""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data import Folder
from training.optim import plan_steps

SIZES = {"coco": (118_287, 80), "ade20k": (20_210, 150), "cifar10": (50_000, 10), "cifar100": (50_000, 100),
         "folder": (1_281_167, 1000)}  # training images and classes; a folder without --data-path: ImageNet-1k


def set_size(args):
    """-> training images, classes"""
    images, classes = SIZES.get(args.data, (args.data_size, 10))
    if args.task == "segment":  # stuff, and the background of shapes, are classes there
        classes = {"coco": 133, "shapes": 11}.get(args.data, classes)
    if args.data == "folder" and args.data_path and Path(args.data_path).is_dir():
        source = Folder(args.data_path, train=True, labeled=args.task != "pretrain")
        images, classes = len(source), len(source.classes)
    if getattr(args, "class_agnostic", False):
        classes = 1
    return args.train_images or images, classes


class Measured(nn.Module):
    """What a forward pass of the task computes, on a batch without content."""

    def __init__(self, model, args, count):
        super().__init__()
        self.model, self.args, self.count = model, args, count

    def forward(self, images):
        if self.args.task == "pretrain":
            return self.model(images, self.args.mask_ratio)
        if self.args.task == "contrast":  # two views; the comparison of all views costs next to nothing
            return self.model.head(self.model.encoder(images.repeat(2, 1, 1, 1)))
        if self.args.task == "detect":  # proposals depend on what is seen
            return self.model.backbone(images)
        if self.args.task == "segment":
            return self.model(images, torch.zeros(self.count, *self.args.img_size, dtype=torch.long))
        return self.model(images)


def measure(model, args):
    """-> multiply-adds and bytes of activations, per image."""
    weights = {t.untyped_storage()._cdata for t in itertools.chain(model.parameters(), model.buffers())}
    kept = {}

    def keep(tensor):  # what autograd saves for the backward pass
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    # a pair where images are mixed, or where BatchNorm meets a map of one place
    pair = args.task == "segment" or getattr(args, "method", None) == "mixmim"
    count = 2 if pair else 1
    if args.task == "probe":
        model.eval()
    images = torch.empty(count, 3, *args.img_size)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        Measured(model, args, count)(images)
    return counter.get_total_flops() / 2 / count, sum(s.nbytes() for s in kept.values()) // count


def dry_run(args, task, world):
    """Print parameters, multiply-adds, steps, memory and device-hours."""
    images, classes = set_size(args)
    args.init = None  # it may be written by a run yet to come
    data = SimpleNamespace(train=None, val=None, classes=list(range(classes)), weights={})
    data.mean, data.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    quiet = SimpleNamespace(**vars(world), say=lambda text: None)
    with torch.device("meta"):
        model = task.build(args, data, quiet)
        macs, activations = measure(model, args)

    # how often an image passes
    checkpointing = getattr(args, "checkpointing", False)
    passes = 1 if args.task == "probe" else 4 if checkpointing else 3
    passes *= (1 + (args.optimizer == "sam")) * (1 + getattr(args, "adversarial", False))
    style = getattr(args, "style", None)
    plan = plan_steps(args, 0 if style == "lbfgs" else images, world.size)
    seen = images if style in ("lbfgs", "adamw") else plan.total_steps * plan.effective  # features once
    rate = args.tflops * 1e12 / (2 * macs * passes)
    hours = seen / rate / 3600

    # memory: weights, and per trainable weight a gradient, two moments, SAM's copy
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    copies = 16 if args.optimizer == "sam" else 12
    bf16 = args.precision == "bf16"
    activations *= plan.batch_size / (2 if bf16 else 1)
    memory = 4 * total + copies * trainable + activations

    method = f" by {args.method}" if args.task == "pretrain" else ""
    detect = ", without the heads on proposals" if args.task == "detect" else ""
    print(f"model        {args.model}, {args.task}{method}, {args.img_size[0]}x{args.img_size[1]} px")
    print(f"parameters   {total:,} ({trainable:,} trainable)")
    print(f"multiply-adds {macs / 1e9:.3f} G per image, forward{detect}")
    print(f"steps        {plan.total_steps:,} of {plan.effective} images, {args.epochs} epochs of {images:,}")
    print(f"lr           {plan.lr:.3g}")
    kind = "bf16" if bf16 else "fp32"
    print(f"memory       about {memory / 1e9:.1f} GB per device in {kind}: weights, gradients, the optimizer's copies, "
          f"{activations / 1e9:.1f} GB of activations{detect}")
    print(f"device-hours {hours:.4g} at {args.tflops:g} TFLOP/s, {hours / 24:.3g} days of one device; loading must "
          f"deliver {rate:,.0f} images/s")


def check_installation():
    """Versions, device, and whether torch and torchvision were built for each other."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(f"python {sys.version.split()[0]}, {versions}, device {device}")
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2.1]])
    try:
        kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5)
    except RuntimeError as error:
        raise ValueError(f"torchvision does not fit torch ({str(error).splitlines()[0]}); install both in "
                         "one command from the same index: pip install --force-reinstall torch torchvision") from None
    print(f"torchvision.ops.nms works ({len(kept)} of 2 overlapping boxes kept)")

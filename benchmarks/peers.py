"""Peers: training steps of our models, and the same work by other people's code. JOBS, below, names them.

A step is forward, loss and backward into gradients that exist already. The optimizer's update is left out, as it
would be the same code on as many numbers; a step of sam has it. Weights are random.

Needs: torch, torchvision, einops; the concept files; the peers' packages, imported where they are measured.
"""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the concept files are in the repository root

from detect import vit_mask_rcnn
from mae import MAE
from mirl import MIRL
from mixer import create_mixer
from mixmim import MixMIM, create_mixmim
from resnet import create_resnet
from sam import SAM
from segment import UperNet
from vit import create_vit


def mae(name):
    return MAE(create_vit(name, num_classes=0))


def mirl(name):
    return MIRL(create_vit(name, num_classes=0))


def transformers_mae():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    return ViTMAEForPreTraining(ViTMAEConfig(mask_ratio=0.75, norm_pix_loss=True))


def timm_model(name, **options):
    import timm
    return timm.create_model(name, **options)


def torchvision_detector():
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
    options = dict(num_classes=81, min_size=512, max_size=512)
    return maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, **options)


# ---------------------------------------------------------------------------- what a model is called with


def images_only(images):
    return (images,), lambda out: out.loss


def with_labels(images):
    labels = torch.randint(10, (len(images),), device=images.device)
    return (images,), lambda logits: F.cross_entropy(logits, labels)


def with_segments(images):
    labels = torch.randint(150, (len(images), *images.shape[-2:]), device=images.device)
    return (images, labels), lambda out: out.loss


def with_objects(images):
    """Six per image."""
    size, device = images.shape[-1], images.device
    corners = torch.rand(6, 2, device=device) * size / 2
    boxes = torch.cat([corners, corners + size / 4], dim=1)
    masks = torch.ones(6, size, size, dtype=torch.uint8, device=device)
    target = dict(boxes=boxes, labels=torch.arange(1, 7, device=device), masks=masks)
    return (list(images), [target] * len(images)), lambda losses: sum(losses.values())


class Job(NamedTuple):
    ours: Callable
    inputs: Callable  # images -> what the model is called with, and a function from its output to the loss
    cpu: int  # images per step on a CPU
    gpu: int
    size: int = 224
    package: str | None = None
    peer: Callable | None = None


# timm shrinks a window to the map, as we do; its default of stochastic depth is switched off
TIMM_SWIN = partial(timm_model, "swin_base_patch4_window7_224", window_size=14, drop_path_rate=0.0)
VIT = partial(create_vit, "vit_b16")
LARGE_VIT = partial(create_vit, "vit_b16", num_classes=0, img_size=512)
MIXER = partial(create_mixer, "mixer_b16")
SWIN = partial(create_mixmim, "mixmim_b")

JOBS = {
    # pre-training: MAE-B, MIRL-S54, MixMIM-B
    "mae": Job(partial(mae, "vit_b16"), images_only, 4, 128, 224, "transformers", transformers_mae),
    "mirl": Job(partial(mirl, "vit_s54"), images_only, 2, 64),
    "mixmim": Job(lambda: MixMIM(SWIN()), images_only, 2, 64),
    # classifiers: ViT-B/16, Mixer-B/16, MixMIM-B's encoder; SAM around AdamW on the ViT
    "vit": Job(VIT, with_labels, 2, 64, 224, "timm", partial(timm_model, "vit_base_patch16_224")),
    "mixer": Job(MIXER, with_labels, 2, 64, 224, "timm", partial(timm_model, "mixer_b16_224")),
    "swin": Job(SWIN, with_labels, 2, 64, 224, "timm", TIMM_SWIN),
    "sam": Job(VIT, with_labels, 1, 64, 224, "pytorch_optimizer", VIT),
    # dense tasks: Mask R-CNN on a ResNet-50 and on a ViT-B/16, UperNet on a ViT-B/16
    "detector": Job(lambda: vit_mask_rcnn(create_resnet("resnet50"), 80, 512), with_objects, 1, 8, 512,
                    "torchvision", torchvision_detector),
    "detvit": Job(lambda: vit_mask_rcnn(LARGE_VIT(), 80, 512), with_objects, 1, 8, 512),
    "upernet": Job(lambda: UperNet(LARGE_VIT(), 150), with_segments, 2, 8, 512),
    # too slow for a CPU
    "mae_l": Job(partial(mae, "vit_l16"), images_only, 2, 128),
    "mirl_b48": Job(partial(mirl, "vit_b48"), images_only, 2, 32),
}


def make_step(spec, side):
    """(model, inputs, step) of one side: "ours", "peer", or "eager", which is ours without torch.compile."""
    job, device = JOBS[spec["job"]], torch.device(spec["device"])
    torch.manual_seed(0)
    model = job.peer() if side == "peer" else job.ours()
    model.to(device).train()
    images = torch.rand(spec["batch"], 3, job.size, job.size, device=device)
    inputs, loss = job.inputs(images)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    run = torch.compile(model) if spec["mode"] == "compiled" and side == "ours" else model

    def backward():
        with torch.autocast(device.type, torch.bfloat16) if spec["precision"] == "bf16" else nullcontext():
            value = loss(run(*inputs))
        value.backward()

    return model, inputs, sam_step(model, backward, side) if spec["job"] == "sam" else backward


def sam_step(model, backward, side):
    kind = SAM
    if side == "peer":
        from pytorch_optimizer import SAM as kind
    optimizer = kind(model.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-6, weight_decay=0.0, fused=True)

    def step():
        for half in (optimizer.first_step, optimizer.second_step):
            model.zero_grad()
            backward()
            half()

    return step

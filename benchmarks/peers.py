"""Peers: training steps of our models, and the same work by other people's code.

    mae       a pre-training step of MAE-B                   transformers' ViTMAEForPreTraining
    mirl      a pre-training step of MIRL-S54
    mixmim    a pre-training step of MixMIM-B
    vit       a step of the ViT-B/16 classifier              timm's vit_base_patch16_224
    mixer     a step of the Mixer-B/16 classifier            timm's mixer_b16_224
    swin      a step of MixMIM-B's encoder as a classifier   timm's swin_base_patch4_window7_224 with our windows
    sam       a step of SAM around AdamW, on a ViT-B/16      pytorch_optimizer's SAM
    detector  a step of Mask R-CNN, ResNet-50, 512 px        torchvision's maskrcnn_resnet50_fpn_v2
    detvit    the same on a ViT-B/16 with relative bias      (other work: four global blocks, no ResNet)
    upernet   a step of UperNet on a ViT-B/16, 512 px
    windows, hybrid, global    the ViT-B/16 backbone alone, 512 px: which blocks attend to the whole map

A step is forward, loss and backward into gradients that exist already. The optimizer's update is left out, as it
would be the same code on as many numbers; a step of sam has it. Weights are random.

Needs: torch, torchvision, einops; the concept files; the peers' packages, imported where they are measured.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the concept files are in the repository root

from detect import ViTPyramid, vit_mask_rcnn
from mae import MAE
from mirl import MIRL
from mixer import create_mixer
from mixmim import MixMIM, create_mixmim
from resnet import create_resnet
from sam import SAM
from segment import UperNet
from vit import create_vit

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2)  # for tests of the program
SMALL_VIT = dict(**SMALL, num_heads=2)
PACKAGES = {"mae": "transformers", "vit": "timm", "mixer": "timm", "swin": "timm", "sam": "pytorch_optimizer",
            "detector": "torchvision"}
CPU_BATCH = dict(mae=8, vit=4, mixer=4, swin=4, sam=2, mixmim=4, mirl=4, detector=1, detvit=1, upernet=2)


# ---------------------------------------------------------------------------- models: side, small -> module


def vit(side, small):
    if side == "ours":
        return create_vit("vit_b16", **(SMALL_VIT if small else {}))
    import timm
    return timm.create_model("vit_base_patch16_224", **(SMALL_VIT if small else {}))


def mixer(side, small):
    if side == "ours":
        return create_mixer("mixer_b16", **(SMALL if small else {}))
    import timm
    if small:
        return timm.models.MlpMixer(img_size=32, patch_size=8, embed_dim=32, num_blocks=2)
    return timm.create_model("mixer_b16_224")


def swin(side, small):
    sizes = dict(img_size=64, embed_dim=16, depths=(1, 1), num_heads=(1, 2)) if small else dict(img_size=224)
    if side == "ours":
        return create_mixmim("mixmim_b", **sizes, **(dict(window_size=(14, 8)) if small else {}))
    import timm
    # timm shrinks a window to the map, as we do; its default of stochastic depth is switched off
    return timm.create_model("swin_base_patch4_window7_224", window_size=14, drop_path_rate=0.0, **sizes)


def mae(side, small):
    width, depth, heads = (32, 1, 2) if small else (512, 8, 16)
    if side == "ours":
        encoder = create_vit("vit_b16", num_classes=0, **(SMALL_VIT if small else {}))
        return MAE(encoder, decoder_embed_dim=width, decoder_depth=depth, decoder_num_heads=heads)
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    size = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=128)
    decoder = dict(decoder_hidden_size=width, decoder_num_hidden_layers=depth, decoder_num_attention_heads=heads,
                   decoder_intermediate_size=4 * width)
    config = ViTMAEConfig(**(size if small else {}), **decoder, mask_ratio=0.75, norm_pix_loss=True)
    return ViTMAEForPreTraining(config)


def mirl(side, small):
    encoder = create_vit("vit_s54", num_classes=0, **(SMALL_VIT if small else {}))
    return MIRL(encoder, segments=2 if small else 6)


def mixmim(side, small):
    if small:
        return MixMIM(create_mixmim("mixmim_demo", img_size=32, num_classes=0), 32, 1, 2)
    return MixMIM(create_mixmim("mixmim_b", num_classes=0))


def detector(side, small):
    size = 64 if small else 512
    if side == "ours":
        return vit_mask_rcnn(create_resnet("resnet50"), 80, size)
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
    return maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=81, min_size=size, max_size=size)


def backbone(small, size=512):
    return create_vit("vit_b16", num_classes=0, **(SMALL_VIT | dict(depth=4) if small else dict(img_size=size)))


def detvit(side, small):
    return vit_mask_rcnn(backbone(small), 80, 64 if small else 512, window_size=2 if small else 14)


def upernet(side, small):
    return UperNet(backbone(small), 150, channels=16 if small else 512)


def pyramid(blocks):
    def make(side, small):
        return ViTPyramid(backbone(small), window_size=2 if small else 14, global_blocks=blocks)
    return make


MODELS = {"mae": mae, "mirl": mirl, "mixmim": mixmim, "vit": vit, "mixer": mixer, "swin": swin, "sam": vit,
          "detector": detector, "detvit": detvit, "upernet": upernet, "windows": pyramid("none"),
          "hybrid": pyramid("quarters"), "global": pyramid("all")}
PYRAMIDS, DETECTORS = ("windows", "hybrid", "global"), ("detector", "detvit")


# ---------------------------------------------------------------------------- steps


def img_size(job, small):
    if small:
        return 64 if job in ("swin", *DETECTORS) else 32
    return 512 if job in ("upernet", *PYRAMIDS, *DETECTORS) else 224


def inputs_of(job, batch, size, device):
    """What the model is called with, and a function from its output to the loss."""
    images = torch.rand(batch, 3, size, size, device=device)
    if job in ("mae", "mirl", "mixmim"):
        return (images,), lambda out: out.loss
    if job in PYRAMIDS:
        return (images,), lambda maps: sum(m.mean() for m in maps.values())
    if job == "upernet":
        labels = torch.randint(150, (batch, size, size), device=device)
        return (images, labels), lambda out: out.loss
    if job in DETECTORS:  # six objects per image
        corners = torch.rand(6, 2) * size / 2
        boxes = torch.cat([corners, corners + size / 4], dim=1).to(device)
        masks = torch.ones(6, size, size, dtype=torch.uint8, device=device)
        target = dict(boxes=boxes, labels=torch.arange(1, 7, device=device), masks=masks)
        return (list(images), [target] * batch), lambda losses: sum(losses.values())
    labels = torch.randint(10, (batch,), device=device)
    return (images,), lambda logits: F.cross_entropy(logits, labels)


def make_step(spec, side):
    """(model, inputs, step) of one side."""
    job, device = spec["job"], torch.device(spec["device"])
    torch.manual_seed(0)
    model = MODELS[job](side, spec["tiny"]).to(device).train()
    inputs, loss = inputs_of(job, spec["batch"], img_size(job, spec["tiny"]), device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    run = torch.compile(model) if spec["compiled"] else model

    def backward():
        with torch.autocast(device.type, torch.bfloat16, enabled=spec["precision"] == "bf16"):
            value = loss(run(*inputs))
        value.backward()

    return model, inputs, sam_step(model, backward, side) if job == "sam" else backward


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

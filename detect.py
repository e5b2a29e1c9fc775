"""Detection: Mask R-CNN on the feature pyramid of any encoder.

A two-stage detector first proposes regions, then looks at each of them. pyramid.py gives maps at strides
s = 4, 8, 16, 32; a top-down path mixes them, and one coarser map is added:

    anchors    boxes of size 8 s, in three aspect ratios, at each place of each map              (1)
    proposals  every anchor gets a score, object or not, and four numbers that move it           (2)
    regions    a proposal of area a is read from the map of stride 16 * 2^k,
               k = floor(log2(sqrt(a) / 224)), by bilinear sampling                              (3)
    heads      each region gets a class and a finer box from 7 x 7 samples, a mask from 14 x 14  (4)
    loss       CE(object) + L1(proposal) + CE(class) + L1(box) + CE(mask)                        (5)

The parts are torchvision's, composed to the stronger heads of the benchmark: normalized neck, two
convolutions before the proposals, four convolutions and a layer for boxes, normalized mask head. All
sizes are arguments, so that it also trains on a laptop. We differ: torchvision's RoIAlign samples half a
pixel beside detectron2's, and its L1 is smooth near zero.

Source: Mask R-CNN, He et al. 2017, arXiv 1703.06870; with plain ViTs: Li et al. 2021, arXiv 2111.11429.
Written from the papers, sizes checked in detectron2's ViTDet and MIMDet.
Needs: torch, torchvision, einops; pyramid.py, vit.py (demo: shapes.py).
Demo: python detect.py (a minute on a CPU) overfits eight scenes, counts objects and false alarms, and
saves detect_demo.png.
"""

import math
from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from pyramid import NORMS, ViTPyramid, as_pyramid, norm_layer  # noqa: F401, NORMS and ViTPyramid for importers

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def vit_mask_rcnn(
    encoder,  # a ViT, a hierarchical encoder, a ResNet, or a pyramid that was made with its own options
    num_classes,  # without background; labels are 1..num_classes
    img_size=1024,  # the longer side of an image is resized to it, and the image padded to a square
    window_size=14, global_blocks="quarters", pyramid="taps", rel_pos_bias=True, checkpointing=False,  # ViTPyramid
    norm="batch",  # in neck and heads: "batch" (convert_sync_batchnorm for several GPUs), "group" or "layer"
    channels=256, rpn_convs=2, box_convs=4, box_dim=1024, mask_convs=4,  # width and depths of neck and heads
    anchor_sizes=None,  # a tuple of pixels per map; default (1)
    aspect_ratios=(0.5, 1.0, 2.0),
    canonical_scale=224,  # of (3)
    image_mean=IMAGENET_MEAN,
    image_std=IMAGENET_STD,
    **options,  # of torchvision's MaskRCNN: rpn_batch_size_per_image, box_score_thresh, ...
):
    """torchvision's MaskRCNN around an encoder: lists of images (C, H, W) in [0, 1] and torchvision's targets.

    Build a ViT in the size it was pre-trained with, and call load_pretrained on it first: its position
    tables are resized here.
    """
    if not isinstance(img_size, int):
        raise ValueError(f"img_size {img_size} must be one number of pixels: images are padded to a square")
    if num_classes < 1:
        raise ValueError(f"num_classes {num_classes} counts classes without background; give at least 1")

    # encoder, pyramid and neck
    blocks = dict(window_size=window_size, global_blocks=global_blocks, rel_pos_bias=rel_pos_bias)
    encoder = as_pyramid(encoder, pyramid=pyramid, checkpointing=checkpointing, img_size=img_size, **blocks)
    check_channels(encoder, image_mean, image_std)
    make_norm = norm_layer(norm)
    backbone = Backbone(encoder, channels, make_norm)

    # (1), (2)
    anchors = make_anchors(backbone, anchor_sizes, aspect_ratios)
    rpn_head = RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=rpn_convs)

    # (3), (4)
    model = MaskRCNN(
        backbone,
        min_size=img_size,
        max_size=img_size,
        size_divisible=img_size,
        image_mean=list(image_mean),
        image_std=list(image_std),
        rpn_anchor_generator=anchors,
        rpn_head=rpn_head,
        box_roi_pool=roi_align(7, encoder.strides, canonical_scale),
        box_head=FastRCNNConvFCHead((channels, 7, 7), [channels] * box_convs, [box_dim], norm_layer=make_norm),
        box_predictor=FastRCNNPredictor(box_dim, num_classes + 1),
        mask_roi_pool=roi_align(14, encoder.strides, canonical_scale),
        mask_head=MaskRCNNHeads(channels, [channels] * mask_convs, 1, norm_layer=make_norm),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
        **options,
    )
    model.transform = KeepStrips(img_size, img_size, list(image_mean), list(image_std), size_divisible=img_size)
    leave_autocast(model)
    return model


class KeepStrips(GeneralizedRCNNTransform):
    """torchvision's, but an image so long that its short side would be resized to nothing is padded before."""

    def resize(self, image, target=None):
        height, width = image.shape[-2:]
        if min(height, width) * self.max_size < max(height, width):
            least = math.ceil(max(height, width) / self.max_size) + 1
            padding = (0, max(0, least - width), 0, max(0, least - height))
            image = nn.functional.pad(image, padding)
            if target is not None:
                target = {**target, "masks": nn.functional.pad(target["masks"], padding)}
        return super().resize(image, target)


class Backbone(nn.Module):
    """Pyramid and neck: images -> OrderedDict of maps with out_channels each.

    The maps of several blocks get a top-down path (FPN), scales of the last block do not need it (ViTDet).
    """

    def __init__(self, pyramid, out_channels, norm):
        super().__init__()
        self.pyramid = pyramid
        self.out_channels = out_channels
        self.strides = list(pyramid.strides)

        # one coarser map, for proposals only: regions are read from the encoder's maps
        self.coarser = None
        if pyramid.kind != "single":
            self.coarser = LastLevelMaxPool()
            self.strides.append(2 * pyramid.strides[-1])

        if pyramid.kind == "taps":
            self.neck = FeaturePyramidNetwork(pyramid.channels, out_channels, norm_layer=norm)
            return
        self.neck = nn.ModuleDict()
        for level, dim in enumerate(pyramid.channels):
            self.neck[str(level)] = nn.Sequential(
                nn.Conv2d(dim, out_channels, 1, bias=False),
                norm(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                norm(out_channels),
            )

    def forward(self, x):
        maps = self.pyramid(x)
        if self.pyramid.kind == "taps":
            maps = self.neck(maps)
        else:
            maps = OrderedDict((name, self.neck[name](feature)) for name, feature in maps.items())
        if self.coarser is not None:
            features = list(maps.values())
            features, names = self.coarser(features, features, list(maps))
            maps = OrderedDict(zip(names, features))
        return maps


def make_anchors(backbone, sizes, aspect_ratios):
    """(1): by default one size per map; a single map gets the sizes of all five."""
    if sizes is None and backbone.pyramid.kind == "single":
        sizes = [[round(8 * backbone.strides[0] * 2.0**k) for k in (-2, -1, 0, 1, 2)]]
    elif sizes is None:
        sizes = [[round(8 * stride)] for stride in backbone.strides]
    if len({len(level) for level in sizes}) > 1:
        # with a head for another number of anchors torchvision raises no error and learns nothing
        raise ValueError(f"anchor_sizes {sizes} must have as many sizes for every map: one head serves all of them")
    return AnchorGenerator(tuple(map(tuple, sizes)), (tuple(aspect_ratios),) * len(sizes))


def roi_align(size, strides, canonical_scale):
    """(3): torchvision's MultiScaleRoIAlign for maps of these strides.

    It would guess the strides from the first image, before padding, and keep the guess: for an image that is
    wider than high it may be wrong by a factor of two.
    """
    names = [str(level) for level in range(len(strides))]
    pool = MultiScaleRoIAlign(names, size, sampling_ratio=0, canonical_scale=canonical_scale)
    pool.scales = [1 / stride for stride in strides]
    finest = round(math.log2(strides[0]))
    coarsest = finest + len(strides) - 1
    pool.map_levels = initLevelMapper(finest, coarsest, canonical_scale=canonical_scale)
    return pool


def leave_autocast(model):
    """torchvision decodes boxes in the type of the predictions, and bf16 has steps of 4 pixels at 1,000."""
    heads = model.roi_heads
    for part in (model.backbone, model.rpn.head, heads.box_predictor, heads.mask_predictor):
        part.register_forward_hook(to_float32)


def to_float32(module, args, out):
    """A forward hook: all outputs in float32."""
    if isinstance(out, dict):
        return OrderedDict((name, value.float()) for name, value in out.items())
    if isinstance(out, (tuple, list)):
        return type(out)(to_float32(module, args, part) for part in out)
    return out.float()


def init_as_beit(vit):
    """The benchmark's random start: truncated normal of 0.02, the last layers of block l divided by sqrt(2 l)."""
    for module in vit.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        for number, block in enumerate(vit.blocks, start=1):
            block.attn.proj.weight /= math.sqrt(2 * number)
            block.mlp.fc2.weight /= math.sqrt(2 * number)


def check_channels(encoder, image_mean, image_std):
    """A mean of three values would turn a gray image into one of three channels."""
    convolutions = [weight for weight in encoder.parameters() if weight.ndim == 4]
    in_chans = convolutions[0].shape[1]
    if len(image_mean) != in_chans or len(image_std) != in_chans:
        raise ValueError(f"image_mean has {len(image_mean)} values and image_std {len(image_std)}, but the encoder "
                         f"takes {in_chans} channels; give one of each per channel")


if __name__ == "__main__":
    from torchvision.ops import box_iou
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image

    from shapes import CLASSES, Shapes
    from vit import create_vit

    # eight scenes, as torchvision's detectors take them
    torch.manual_seed(0)
    scenes = [Shapes(8, 96).scene(i) for i in range(8)]
    images = [scene["image"] / 255 for scene in scenes]
    targets = [{key: scene[key] for key in ("boxes", "labels", "masks")} for scene in scenes]

    encoder = create_vit("vit_demo", img_size=96, patch_size=8, depth=4, num_classes=0)
    options = dict(img_size=96, window_size=6, norm="group", image_mean=Shapes.mean, image_std=Shapes.std)
    options |= dict(channels=48, box_convs=1, box_dim=128, mask_convs=1, aspect_ratios=(1.0,), canonical_scale=112)
    options |= dict(anchor_sizes=[(12,), (20,), (32,), (48,), (72,)], rpn_post_nms_top_n_train=200)
    options |= dict(rpn_post_nms_top_n_test=100, rpn_batch_size_per_image=64, box_batch_size_per_image=32)
    model = vit_mask_rcnn(encoder, len(CLASSES), **options)

    # train on batches of four
    steps = 150
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    for step in range(steps):
        batch = torch.randperm(len(images))[:4].tolist()
        losses = model([images[i] for i in batch], [targets[i] for i in batch])  # (5)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 30 == 0 or step == steps - 1:
            parts = [f"{name.removeprefix('loss_')} {value.item():.3f}" for name, value in losses.items()]
            print(f"step {step:3d}  " + "  ".join(parts))

    # an object is found if a detection has its class and an IoU above 0.5; other detections are false alarms
    objects, found, detections, pictures = 0, 0, 0, []
    with torch.no_grad():
        outputs = model.eval()(images)
    for image, target, output in zip(images, targets, outputs, strict=True):
        sure = output["scores"] > 0.5
        boxes, labels, masks = output["boxes"][sure], output["labels"][sure], output["masks"][sure, 0] > 0.5
        hits = (box_iou(target["boxes"], boxes) > 0.5) & (target["labels"][:, None] == labels)
        objects += len(target["boxes"])
        found += hits.any(dim=1).sum().item()
        detections += len(boxes)
        seen = draw_segmentation_masks(image, masks, alpha=0.5, colors="red") if len(boxes) else image
        pictures.append(draw_bounding_boxes(image, target["boxes"], colors="white"))
        pictures.append(draw_bounding_boxes(seen, boxes, colors="yellow"))
    print(f"score above 0.5: found {found} of {objects} objects, and {detections - found} false alarms "
          "(expect nearly all objects, and several false alarms)")
    pictures = nn.functional.interpolate(torch.stack(pictures), scale_factor=2)
    save_image(pictures, "detect_demo.png", nrow=8)
    print("saved detect_demo.png: objects in white, to the right of each image the detections in yellow")

"""Segmentation: UperNet gives each pixel a class, from the same pyramid of maps as detection.

The class of a pixel depends on both ends of the pyramid: the coarse map M4 knows the scene (a street), the
fine map M1 knows where things end. UperNet joins them in three steps. [ ] concatenates channels, conv1 and
conv3 are convolutions with norm and ReLU, up is bilinear:

    pool  L4 = conv3[M4, up conv1 avg_1(M4), ... avg_2, avg_3, avg_6],  avg_s: means of s x s parts   (1)
    down  Lk = conv1(Mk) + up(Lk+1),  k = 3, 2, 1                                                   (2)
    fuse  F = conv3[conv3(L1), up conv3(L2), up conv3(L3), up L4],  logits = up(W F)                (3)
    loss  CE(logits) + 0.4 CE(up(W' conv3(M3))),  over labeled pixels only                          (4)

The second term of (4) is the auxiliary head: a short path from the labels to the encoder, in training only.
The measure is intersection over union. With n_ij the pixels of class i that are predicted as j, over a set,

    IoU_i = n_ii / (sum_j n_ij + sum_j n_ji - n_ii)
    mIoU  = mean of IoU_i over the classes that occur or were predicted                             (5)

The counts n_ij add up over batches and processes in any order, to the same integers.

Source: UperNet, Xiao et al. 2018, arXiv 1807.10221; pooling and auxiliary head: PSPNet, Zhao et al. 2016,
arXiv 1612.01105. Written from the papers; details that they leave open follow mmsegmentation's models of this
name (same numbers from the same weights). We differ: the mean in (4) is over labeled pixels, there by default
over all.
Needs: torch, torchvision, einops, tqdm; pyramid.py, vit.py (demo: shapes.py).
Demo: python segment.py (30 s on a CPU) overfits eight scenes and saves segment_demo.png.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from pyramid import as_pyramid, norm_layer

POOL_SCALES = (1, 2, 3, 6)
IGNORE = 255  # label of a pixel that neither trains nor counts


# ---------------------------------------------------------------------------- the model


class PyramidPooling(nn.Module):
    """(1): the coarsest map (B, D, H, W) -> (B, channels, H, W), in which each place knows the whole scene."""

    def __init__(self, dim, channels, norm):
        super().__init__()
        make_norm = norm_layer(norm)
        if norm == "group":
            # of a 1 x 1 map, one number per channel, 32 groups would leave hardly more than signs
            make_norm = partial(nn.GroupNorm, 1)
        self.branches = nn.ModuleList(conv(dim, channels, 1, make_norm) for _ in POOL_SCALES)
        self.bottleneck = conv(dim + len(POOL_SCALES) * channels, channels, 3, make_norm)

    def forward(self, x):
        norm = self.branches[0][1]
        if norm.training and isinstance(norm, nn.BatchNorm2d) and len(x) == 1:
            raise ValueError("norm 'batch' cannot train on one image, whose 1 x 1 map has no variance; take at "
                             "least 2, convert_sync_batchnorm over several processes, or norm='group'")
        features = [x]
        for branch, scale in zip(self.branches, POOL_SCALES, strict=True):
            pooled = branch(average(x, scale))
            features.append(resize(pooled, x.shape[-2:]))
        return self.bottleneck(torch.cat(features, dim=1))


class Segmented(NamedTuple):
    loss: torch.Tensor  # scalar, (4)
    main: torch.Tensor  # scalar, its first term
    auxiliary: torch.Tensor  # scalar, its second term without the weight
    logits: torch.Tensor  # (B, K, H, W)


class UperNet(nn.Module):
    """Normalized images (B, C, H, W) -> logits (B, num_classes, H, W); with labels (B, H, W) -> Segmented.

    The encoder is modified and loses its head; call load_pretrained on it first. Sides must be multiples of
    `stride` (predict pads).
    """

    def __init__(
        self,
        encoder,  # a ViT, a hierarchical encoder, a ResNet, or a pyramid that was made with its own options
        num_classes,  # 2..255; labels are 0..num_classes - 1, and 255 for pixels to ignore
        channels=512,  # of the head
        aux_channels=256,  # of the auxiliary head
        norm="batch",  # in the heads, as published; "group" or "layer" for batches of a few images
        dropout=0.1,  # of whole channels, before the classifiers
        aux_weight=0.4,
        window_size=14, global_blocks="all", pyramid="taps",  # these and the next ones: of ViTPyramid
        rel_pos_bias=None,  # None: only if the ViT has one
        checkpointing=False,
        img_size=None,
    ):
        super().__init__()
        if not 2 <= num_classes < IGNORE + 1:
            raise ValueError(f"num_classes {num_classes} must lie in 2..255: label 255 marks the pixels to ignore")
        if rel_pos_bias is None:
            rel_pos_bias = getattr(encoder, "has_relative_bias", False)
        blocks = dict(window_size=window_size, global_blocks=global_blocks, rel_pos_bias=rel_pos_bias)
        self.pyramid = as_pyramid(encoder, pyramid=pyramid, checkpointing=checkpointing, img_size=img_size, **blocks)
        self.num_classes = num_classes
        self.aux_weight = aux_weight
        transformer = getattr(self.pyramid, "vit", getattr(self.pyramid, "encoder", None))
        self.stride = getattr(transformer, "stride", 1)  # a ResNet takes any size

        # (1) to (3)
        *finer, coarsest = self.pyramid.channels
        make_norm = norm_layer(norm)
        self.ppm = PyramidPooling(coarsest, channels, norm)
        self.lateral_convs = nn.ModuleList(conv(dim, channels, 1, make_norm) for dim in finer)
        self.fpn_convs = nn.ModuleList(conv(channels, channels, 3, make_norm) for _ in finer)
        self.fpn_bottleneck = conv((len(finer) + 1) * channels, channels, 3, make_norm)
        self.conv_seg = nn.Sequential(
            nn.Dropout2d(dropout),
            nn.Conv2d(channels, num_classes, 1),
        )

        # (4): the third map, or the last one of a shorter pyramid
        self.aux_level = min(2, len(finer))
        dim = self.pyramid.channels[self.aux_level]
        self.auxiliary_head = nn.Sequential(
            conv(dim, aux_channels, 3, make_norm),
            nn.Dropout2d(dropout),
            nn.Conv2d(aux_channels, num_classes, 1),
        )

        # logits of about 1: with the usual normal(0.01) the demo's mIoU ends at 0.2 to 0.3 instead of 0.95
        for classifier in (self.conv_seg[-1], self.auxiliary_head[-1]):
            nn.init.normal_(classifier.weight, std=classifier.in_channels**-0.5)
            nn.init.zeros_(classifier.bias)

    def decode(self, maps):
        """(1) to (3): maps from fine to coarse -> logits at the size of the finest."""
        *finer, coarsest = maps
        finer = [lateral(feature) for lateral, feature in zip(self.lateral_convs, finer)]
        coarsest = self.ppm(coarsest)  # (1)

        # (2), from coarse to fine
        level = coarsest
        for k in reversed(range(len(finer))):
            level = finer[k] + resize(level, finer[k].shape[-2:])
            finer[k] = level

        # (3)
        size = maps[0].shape[-2:]
        levels = [fpn_conv(level) for fpn_conv, level in zip(self.fpn_convs, finer)]
        levels = [resize(level, size) for level in [*levels, coarsest]]
        fused = self.fpn_bottleneck(torch.cat(levels, dim=1))
        return self.conv_seg(fused)

    def forward(self, images, labels=None):
        # in float32: bf16 would blur enlarged logits, and the loss
        maps = list(self.pyramid(images).values())
        logits = self.decode(maps).float()
        logits = resize(logits, images.shape[-2:])
        if labels is None:
            return logits

        # (4)
        if tuple(labels.shape) != (len(images), *images.shape[-2:]):
            raise ValueError(f"labels {tuple(labels.shape)} must be one class number per pixel of the images "
                             f"{tuple(images.shape)}: (B, H, W)")
        labels = labels.long()
        main = pixel_loss(logits, labels)
        auxiliary = self.auxiliary_head(maps[self.aux_level])
        auxiliary = pixel_loss(auxiliary.float(), labels)
        return Segmented(main + self.aux_weight * auxiliary, main, auxiliary, logits)


def conv(dim, out, size, norm):
    """Convolution, norm and ReLU, with the initialization of He et al. (arXiv 1502.01852)."""
    layer = nn.Conv2d(dim, out, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, norm(out), nn.ReLU())


def average(x, parts):
    """Means of parts x parts equal regions of a map."""
    if x.device.type == "mps":  # it can pool only into parts that divide the map
        return F.adaptive_avg_pool2d(x.cpu(), parts).to(x.device)
    return F.adaptive_avg_pool2d(x, parts)


def resize(x, size):
    """Bilinear, (B, C, H, W) -> (B, C, *size); x itself if it has that size."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    # a CPU is faster if the channels of a pixel are side by side in memory, also in a softmax over them
    x = x.contiguous(memory_format=torch.channels_last)
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def pixel_loss(logits, labels, ignore_index=IGNORE):
    """Mean cross-entropy over the labeled pixels; zero (with a graph) without any.

    logits (B, K, h, w), enlarged to the labels (B, H, W)
    """
    logits = rearrange(resize(logits, labels.shape[-2:]), "b k h w -> (b h w) k")
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction="sum")
    return loss / (labels != ignore_index).sum().clamp(min=1)


# ---------------------------------------------------------------------------- inference


@torch.no_grad()
def predict(model, images, size=None, window=None, stride=None, flip=False):
    """The class of each pixel, (B, *size) int64. The model should be in eval mode.

    size            (H, W) of the result, default the images'
    window, stride  of `slide`; None: the whole image at once
    flip            average the class probabilities of image and mirror image
    """
    def scores(images):
        logits = whole(model, images) if window is None else slide(model, images, window, stride)
        return resize(logits, size or images.shape[-2:])

    logits = scores(images)
    if not flip:
        return logits.argmax(dim=1)
    mirrored = scores(images.flip(-1))
    probabilities = logits.softmax(dim=1) + mirrored.softmax(dim=1).flip(-1)
    return probabilities.argmax(dim=1)


def whole(model, images):
    """Logits (B, K, H, W) of images of any size.

    They are padded at the right and bottom to a multiple of model.stride, with zeros: the mean color.
    """
    stride = getattr(model, "stride", 1)
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % stride, 0, -height % stride))
    return model(padded)[..., :height, :width]


def slide(model, images, window, stride=None):
    """Logits (B, K, H, W), averaged over overlapping windows: for images larger than those of training.

    window  pixels, a number or (rows, columns); a shorter side is taken whole
    stride  from one window to the next, default two thirds of the window (341 of 512, as mmsegmentation)
    """
    window = as_pair(window)
    if stride is None:
        stride = max(1, window[0] * 2 // 3), max(1, window[1] * 2 // 3)
    stride = as_pair(stride)
    if min(stride) < 1 or stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"stride {stride} must lie between 1 and window {window}, or pixels are left out")

    # sum and number of the logits of each pixel
    height, width = images.shape[-2:]
    rows = min(window[0], height)
    columns = min(window[1], width)
    total = None
    count = images.new_zeros(1, 1, height, width)
    for top in starts(height, rows, stride[0]):
        for left in starts(width, columns, stride[1]):
            bottom, right = top + rows, left + columns
            logits = whole(model, images[..., top:bottom, left:right])
            if total is None:
                total = logits.new_zeros(len(images), logits.shape[1], height, width)
            total[..., top:bottom, left:right] += logits
            count[..., top:bottom, left:right] += 1
    return total / count


def starts(side, window, stride):
    """Where windows begin along a side: every `stride` pixels; the last one is moved back inside."""
    positions = range(0, max(side - window + stride - 1, 0) + 1, stride)
    return [min(position, side - window) for position in positions]


def as_pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


# ---------------------------------------------------------------------------- mean IoU


def confusion_matrix(prediction, labels, num_classes, ignore_index=IGNORE):
    """n_ij of (5), (K, K) int64: pixels of class i (row) that are predicted as j (column).

    prediction, labels (..., H, W), of any integer type; labels of ignore_index are left out
    """
    if prediction.shape != labels.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and labels {tuple(labels.shape)} must have the "
                         "same shape; resize the logits to the labels")
    kept = labels != ignore_index
    labels = labels[kept].long()
    prediction = prediction[kept].long()
    check_classes("labels", labels, num_classes)
    check_classes("prediction", prediction, num_classes)
    counts = torch.bincount(labels * num_classes + prediction, minlength=num_classes**2)
    return rearrange(counts, "(i j) -> i j", i=num_classes)


def mean_iou(confusion):
    """(5) of a confusion matrix (K, K): dict of miou and pixel_acc, fractions, and iou, (K,) float64.

    iou is NaN for a class that neither occurs nor was predicted, 0 for one that was only predicted.
    """
    confusion = confusion.cpu().double()
    right = confusion.diagonal()
    iou = right / (confusion.sum(0) + confusion.sum(1) - right)  # 0 / 0 is NaN
    pixel_acc = right.sum() / confusion.sum()
    return dict(miou=iou.nanmean().item(), pixel_acc=pixel_acc.item(), iou=iou)


def check_classes(name, numbers, num_classes):
    wrong = numbers[(numbers < 0) | (numbers >= num_classes)]
    if len(wrong):
        raise ValueError(f"{name} hold class {wrong[0]}, outside 0..{num_classes - 1}; map the ids, and write "
                         f"{IGNORE} for pixels to ignore")


@torch.no_grad()
def segment_evaluate(
    model,  # images (B, C, H, W) -> logits (B, num_classes, H, W)
    loader,  # batches (images, labels), stacked or, where sizes differ, lists; each process has its own share
    num_classes,
    device="cpu",
    window=None,  # this and the next two: of predict
    stride=None,
    flip=False,
    progress=False,
):
    """mean_iou over a loader, the same in every process. Labels keep their size, logits are enlarged to it."""
    was_training = model.training
    model.eval()
    total = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for images, labels in tqdm(loader, desc="evaluate", leave=False, disable=None if progress else True):
        # lists: one image after the other
        if isinstance(images, torch.Tensor):
            pairs = [(images, labels)]
        else:
            pairs = [(image[None], label[None]) for image, label in zip(images, labels, strict=True)]
        for image, label in pairs:
            label = label.to(device)
            prediction = predict(model, image.to(device), label.shape[-2:], window, stride, flip)
            total += confusion_matrix(prediction, label, num_classes)
    model.train(was_training)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return mean_iou(total)


if __name__ == "__main__":
    from torchvision.utils import draw_segmentation_masks

    from shapes import CLASSES, Shapes, save_grid
    from vit import create_vit

    # eight scenes with a label for each pixel; class 0 is the background
    torch.manual_seed(0)
    scenes = [Shapes(8, 64).scene(i) for i in range(8)]
    pixels = torch.stack([scene["image"] for scene in scenes]) / 255
    labels = torch.stack([scene["semantic"] for scene in scenes])
    mean = torch.tensor(Shapes.mean).view(3, 1, 1)
    std = torch.tensor(Shapes.std).view(3, 1, 1)
    images = (pixels - mean) / std
    classes = len(CLASSES) + 1
    encoder = create_vit("vit_demo", img_size=64, patch_size=8, depth=4, num_classes=0)
    model = UperNet(encoder, classes, channels=32, aux_channels=32, norm="group")

    # train on batches of four
    steps = 200
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        batch = torch.randperm(len(images))[:4]
        out = model(images[batch], labels[batch])
        optimizer.zero_grad()
        out.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 40 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {out.loss:.3f} = {out.main:.3f} + 0.4 x {out.auxiliary:.3f}")

    ways = dict(whole={}, windows=dict(window=48, stride=16), mirrored=dict(flip=True))
    for name, options in ways.items():
        result = segment_evaluate(model, [(images, labels)], classes, **options)
        print(f"{name:8s} mIoU {result['miou']:.3f}  pixel accuracy {result['pixel_acc']:.3f}")
    print("(expect an mIoU above 0.9 for whole images, less for windows and mirrored images, which are new to the")
    print("model; to predict background everywhere gives mIoU 0.08, accuracy 0.81)")

    # every class but the background in its color
    def draw(image, numbers):
        masks = numbers == torch.arange(1, classes)[:, None, None]
        return draw_segmentation_masks(image, masks, alpha=0.7)

    columns = {"image": pixels[:6]}
    prediction = predict(model.eval(), images)
    for name, maps in dict(truth=labels, prediction=prediction).items():
        columns[name] = torch.stack([draw(*pair) for pair in zip(pixels[:6], maps)])
    save_grid("segment_demo.png", columns)
    print("saved segment_demo.png: truth and prediction should have the same colors")

"""Segmentation: a class for every pixel, read from the same pyramid of maps as detection.

To know what a pixel is takes both ends of the pyramid: the coarse map M4 has seen the scene (this is a
street), the fine map M1 knows where things end. UperNet joins them in three steps. [ ] puts channels
side by side, conv1 and conv3 are convolutions with norm and ReLU, up is bilinear:

    pool   L4 = conv3[M4, up conv1 avg_1(M4), ... avg_2, avg_3, avg_6]     avg_s: the means of s x s parts (1)
    down   Lk = conv1(Mk) + up(Lk+1),  k = 3, 2, 1                                                       (2)
    fuse   F = conv3[conv3(L1), up conv3(L2), up conv3(L3), up L4],  logits = up(W F)                    (3)
    loss   CE(logits) + 0.4 CE(up(W' conv3(M3)))         over labelled pixels only                       (4)

The second term of (4) is a helper: a short way from the labels to the encoder, not computed after training.
What counts is intersection over union. With n_ij the pixels of class i that were called j, over the whole set,

    IoU_i = n_ii / (sum_j n_ij + sum_j n_ji - n_ii),  mIoU = their mean over classes that occur or were predicted (5)

These counts add up: over batches, over processes, in any order, to the same integers.

Source: UperNet, Xiao et al. 2018, arXiv 1807.10221; pooling, and a helper of weight 0.4: PSPNet, Zhao et al. 2016,
arXiv 1612.01105. Written from the papers; details they leave open follow mmsegmentation's models of this name
(same numbers from the same weights). We differ: the mean in (4) is over labelled pixels, there by default over all.
Needs: torch, torchvision, einops, tqdm; checkpoints.py, detect.py, shapes.py, an encoder (vit.py for the demo).
Demo: python segment.py (30 s on a CPU) learns eight scenes by heart and saves segment_demo.png.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont  # comes with torchvision
from torch import nn
from tqdm import tqdm

from detect import NORMS, as_pyramid
from shapes import colour, save_grid

POOL_SCALES = (1, 2, 3, 6)


def resize(x, size):
    """Bilinear, (B, C, H, W) -> (B, C, *size); untouched where that is its size."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    # a pixel's channels side by side in memory: a CPU is faster with them, and so is the softmax over classes
    return F.interpolate(x.contiguous(memory_format=torch.channels_last), size=tuple(size), mode="bilinear", align_corners=False)


# ---------------------------------------------------------------------------- the model


def conv(dim, out, size, norm):
    layer = nn.Conv2d(dim, out, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, norm(out), nn.ReLU())


class PyramidPooling(nn.Module):
    """(1): the coarsest map (B, D, H, W) -> (B, channels, H, W), every place told what the scene around it is."""

    def __init__(self, dim, channels, norm):
        super().__init__()
        # a map as small as 1 x 1 has one number per channel, and 32 groups would leave next to nothing of it: one group here
        pooled_norm = partial(nn.GroupNorm, 1) if norm == "group" else NORMS[norm]
        self.branches = nn.ModuleList(conv(dim, channels, 1, pooled_norm) for _ in POOL_SCALES)
        self.bottleneck = conv(dim + len(POOL_SCALES) * channels, channels, 3, pooled_norm)

    def forward(self, x):
        norm = self.branches[0][1]
        if len(x) == 1 and norm.training and isinstance(norm, nn.BatchNorm2d):  # the synchronised one is another class, and sees more
            raise ValueError("norm 'batch' has nothing to average over in the 1 x 1 pooled map of a batch of one; train with batches of at least 2, "
                             "convert_sync_batchnorm over several processes, or norm='group'")
        seen = x.cpu() if x.device.type == "mps" else x  # MPS pools into parts that divide the map only
        pooled = [branch(F.adaptive_avg_pool2d(seen, scale).to(x.device)) for scale, branch in zip(POOL_SCALES, self.branches, strict=True)]
        return self.bottleneck(torch.cat([x, *(resize(p, x.shape[-2:]) for p in pooled)], dim=1))


def pixel_loss(logits, labels, ignore_index=255):
    """Mean cross-entropy over the labelled pixels, logits (B, K, h, w) enlarged to labels (B, H, W). If there are none: zero, with a graph."""
    each = rearrange(resize(logits, labels.shape[-2:]), "b k h w -> (b h w) k")
    loss = F.cross_entropy(each, labels.flatten(), ignore_index=ignore_index, reduction="sum")
    return loss / (labels != ignore_index).sum().clamp(min=1)


class Segmented(NamedTuple):
    loss: torch.Tensor  # scalar, (4)
    main: torch.Tensor  # scalar, its first term
    auxiliary: torch.Tensor  # scalar, its second before the weight
    logits: torch.Tensor  # (B, K, H, W)


class UperNet(nn.Module):
    """Normalised images (B, C, H, W) -> logits (B, num_classes, H, W); with labels (B, H, W) -> Segmented, whose .loss trains.

    encoder          a ViT, a HierarchicalViT, a ResNet, or a pyramid of detect.py. It is taken over and loses its head; call
                     load_pretrained on it first
    num_classes      2..255; labels are 0..num_classes-1, and 255 where a pixel is to be ignored
    channels         width of the head; aux_channels: of the helper, which reads the third map (of a shorter pyramid the last)
    norm             in the head: "batch" (as published; convert_sync_batchnorm it for several GPUs) cannot train on one image at a
                     time, and estimates badly from a few: take "group" then; or "layer"
    dropout          of whole channels, before the classifiers
    window_size, global_blocks, pyramid, rel_pos_bias, checkpointing, img_size   of ViTPyramid, for a ViT. At segmentation sizes all
                     blocks can see all of the map; rel_pos_bias None: only if the ViT brings one

    Sides must be multiples of `stride` (predict pads). Convolutions start as He et al. (arXiv 1502.01852), classifiers at
    normal(1 / sqrt(width)), logits of the size of 1: with the usual normal(0.01) the demo ends at an mIoU of 0.2 to 0.3 instead of 0.95
    (3 seeds each). ValueError where something does not fit.
    """

    def __init__(self, encoder, num_classes, channels=512, aux_channels=256, norm="batch", dropout=0.1, aux_weight=0.4, window_size=14,
                 global_blocks="all", pyramid="taps", rel_pos_bias=None, checkpointing=False, img_size=None):
        super().__init__()
        if not 2 <= num_classes <= 255:
            raise ValueError(f"num_classes {num_classes} must lie in 2..255, as 255 marks the pixels to ignore")
        if norm not in NORMS:
            raise ValueError(f"norm {norm!r} is unknown; choose {', '.join(NORMS)}")
        bias = getattr(encoder, "has_relative_bias", False) if rel_pos_bias is None else rel_pos_bias
        encoder = as_pyramid(encoder, window_size=window_size, global_blocks=global_blocks, pyramid=pyramid, rel_pos_bias=bias,
                             checkpointing=checkpointing, img_size=img_size)
        self.pyramid, self.num_classes, self.aux_weight = encoder, num_classes, aux_weight
        self.stride = getattr(getattr(encoder, "vit", getattr(encoder, "encoder", None)), "stride", 1)  # a ResNet takes any size
        widths, make_norm = encoder.channels, NORMS[norm]
        self.aux_level = min(2, len(widths) - 1)

        self.ppm = PyramidPooling(widths[-1], channels, norm)
        self.lateral_convs = nn.ModuleList(conv(dim, channels, 1, make_norm) for dim in widths[:-1])
        self.fpn_convs = nn.ModuleList(conv(channels, channels, 3, make_norm) for _ in widths[:-1])
        self.fpn_bottleneck = conv(len(widths) * channels, channels, 3, make_norm)
        self.conv_seg = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1))
        self.auxiliary_head = nn.Sequential(conv(widths[self.aux_level], aux_channels, 3, make_norm), nn.Dropout2d(dropout),
                                            nn.Conv2d(aux_channels, num_classes, 1))
        for classifier in (self.conv_seg[-1], self.auxiliary_head[-1]):
            nn.init.normal_(classifier.weight, std=classifier.in_channels**-0.5)
            nn.init.zeros_(classifier.bias)

    def decode(self, maps):
        """(1) to (3): maps from fine to coarse -> logits at the size of the finest."""
        levels = [lateral(m) for lateral, m in zip(self.lateral_convs, maps)] + [self.ppm(maps[-1])]
        for k in range(len(levels) - 2, -1, -1):
            levels[k] = levels[k] + resize(levels[k + 1], levels[k].shape[-2:])  # (2)
        levels = [*(smooth(level) for smooth, level in zip(self.fpn_convs, levels)), levels[-1]]
        return self.conv_seg(self.fpn_bottleneck(torch.cat([resize(level, maps[0].shape[-2:]) for level in levels], dim=1)))  # (3)

    def forward(self, images, labels=None):
        maps = list(self.pyramid(images).values())
        logits = resize(self.decode(maps).float(), images.shape[-2:])  # bf16 would blur what is enlarged, and the loss
        if labels is None:
            return logits
        if tuple(labels.shape) != (len(images), *images.shape[-2:]):
            raise ValueError(f"labels {tuple(labels.shape)} must be (B, H, W) of the images {tuple(images.shape)}: one class number per pixel")
        if labels.device.type == "cpu" and ((labels < 0) | (labels >= self.num_classes) & (labels != 255)).any():  # on a GPU it would have to wait
            raise ValueError(f"labels reach from {labels.min()} to {labels.max()}, outside 0..{self.num_classes - 1}; map the ids, 255 marks pixels to ignore")
        main = pixel_loss(logits, labels.long())
        auxiliary = pixel_loss(self.auxiliary_head(maps[self.aux_level]).float(), labels.long())
        return Segmented(main + self.aux_weight * auxiliary, main, auxiliary, logits)  # (4)


# ---------------------------------------------------------------------------- inference


def whole(model, images):
    """Logits (B, K, H, W) of images of any size: padded at the right and bottom to model.stride, the mean colour once normalised; cut back."""
    stride = getattr(model, "stride", 1)
    height, width = images.shape[-2:]
    return model(F.pad(images, (0, -width % stride, 0, -height % stride)))[..., :height, :width]


def starts(side, window, stride):
    """Where windows begin along a side: every stride pixels, the last one moved back inside."""
    return [min(at, side - window) for at in range(0, max(side - window + stride - 1, 0) + 1, stride)]


def slide(model, images, window, stride=None):
    """Logits (B, K, H, W), the mean over overlapping windows; for images larger than those the model has seen.

    window  pixels, a number or (rows, columns); a side shorter than it is taken whole. Where one covers the image, this is `whole`
    stride  from one window to the next, default two thirds of the window (341 of 512, as mmsegmentation)
    """
    sizes = (window, window) if isinstance(window, int) else tuple(window)
    steps = [max(1, size * 2 // 3) for size in sizes] if stride is None else [stride, stride] if isinstance(stride, int) else list(stride)
    if len(sizes) != 2 or len(steps) != 2 or min(sizes) < 1 or any(not 1 <= step <= size for step, size in zip(steps, sizes)):
        raise ValueError(f"window {window} and stride {stride} must be pixels or (rows, columns), with 1 <= stride <= window, else there are gaps")
    height, width = images.shape[-2:]
    tall, wide = min(sizes[0], height), min(sizes[1], width)
    total, count = None, images.new_zeros(1, 1, height, width)
    for top in starts(height, tall, steps[0]):
        for left in starts(width, wide, steps[1]):
            logits = whole(model, images[..., top:top + tall, left:left + wide])
            total = logits.new_zeros(*logits.shape[:2], height, width) if total is None else total
            total[..., top:top + tall, left:left + wide] += logits
            count[..., top:top + tall, left:left + wide] += 1
    return total / count


@torch.no_grad()
def predict(model, images, size=None, window=None, stride=None, flip=False):
    """The class of every pixel, (B, *size) int64; size (H, W), default the images'. The model should be in eval mode.

    window, stride of `slide`, None: the whole image at once; flip: the mean of the class probabilities of image and mirror image decides
    """
    def scores(images):
        logits = whole(model, images) if window is None else slide(model, images, window, stride)
        logits = resize(logits, size or images.shape[-2:])
        return logits.softmax(dim=1) if flip else logits

    out = scores(images)
    if flip:
        out = out + scores(images.flip(-1)).flip(-1)
    return out.argmax(dim=1)


# ---------------------------------------------------------------------------- mean IoU


def confusion_matrix(prediction, labels, num_classes, ignore_index=255):
    """n_ij of (5), (K, K) int64: pixels of class i (row) that were called j (column), labels of ignore_index left out.

    prediction, labels (..., H, W), any integer type. ValueError for other class numbers than 0..num_classes-1
    """
    if prediction.shape != labels.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and labels {tuple(labels.shape)} must agree; resize the logits to the labels")
    kept = labels != ignore_index
    pairs = torch.stack([labels[kept].long(), prediction[kept].long()])
    for name, numbers in zip(("labels", "prediction"), pairs):
        wrong = numbers[(numbers < 0) | (numbers >= num_classes)]
        if len(wrong):
            raise ValueError(f"{name} hold class {wrong[0]}, outside 0..{num_classes - 1}; map the ids, or write {ignore_index} for pixels to ignore")
    return torch.bincount(pairs[0] * num_classes + pairs[1], minlength=num_classes**2).view(num_classes, num_classes)


def mean_iou(confusion):
    """(5) of a confusion matrix (K, K): dict of miou and pixel_acc, fractions, and iou, (K,) float64 on the CPU.

    A class that neither occurs nor was predicted is NaN in iou and left out of the mean; one that was only predicted has 0
    """
    confusion = confusion.cpu().double()
    right = confusion.diagonal()
    iou = right / (confusion.sum(0) + confusion.sum(1) - right)  # 0 / 0 is NaN
    return dict(miou=iou.nanmean().item(), pixel_acc=(right.sum() / confusion.sum()).item(), iou=iou)


@torch.no_grad()
def segment_evaluate(model, loader, num_classes, device="cpu", window=None, stride=None, flip=False, progress=False):
    """mean_iou over a loader, the same in every process, and for any number of them up to rounding of the logits: only counts are added.

    model   images (B, C, H, W) -> logits (B, num_classes, H, W); stride of `whole` where it has one
    loader  batches (images, labels), stacked, or lists of (C, H, W) and (h, w) where sizes differ: each process its own share, every
            image once over all. Labels keep their size, logits are enlarged to it; label 255 is ignored
    window, stride, flip   of predict
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for images, labels in tqdm(loader, desc="evaluate", leave=False, disable=None if progress else True):
        stacked = isinstance(images, torch.Tensor)
        for image, label in [(images, labels)] if stacked else zip(images, labels, strict=True):
            image, label = (part.to(device) if stacked else part[None].to(device) for part in (image, label))
            total += confusion_matrix(predict(model, image, label.shape[-2:], window, stride, flip), label, num_classes)
    model.train(was_training)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return mean_iou(total)


# ---------------------------------------------------------------------------- pictures


def palette(classes):
    """A colour per class, (K + 1, 3) in [0, 1], neighbours far apart; "background" is grey; the last, for what is ignored, black."""
    hue, turn = torch.arange(len(classes)) * 0.381966 % 1, torch.arange(len(classes)) % 3  # a golden angle apart; three shades take turns
    colours = colour(hue, 0.9 - 0.2 * turn, 0.35 + 0.15 * turn)
    colours[[name == "background" for name in classes]] = 0.25
    return torch.cat([colours, torch.zeros(1, 3)])


def save_segments(path, images, labels, predictions, classes, cell=160, largest=320):
    """A PNG with a row per image: image, truth, prediction, and below them the names of the classes that occur.

    images (3, H, W) in [0, 1]; labels and predictions (h, w); sizes may differ. Of sides above `largest` every second, third, ... pixel is shown
    """
    colours, names, step = palette(classes), [*classes, "(ignored)"], -(-max(side for m in labels for side in m.shape) // largest)
    truth, found = ([torch.where(m.cpu() == 255, len(classes), m.cpu().long())[::step, ::step] for m in column] for column in (labels, predictions))
    columns = {"image": [F.interpolate(i[None].cpu(), m.shape, mode="bilinear", antialias=True)[0] for i, m in zip(images, truth, strict=True)],
               "truth": [colours[m].permute(2, 0, 1) for m in truth], "prediction": [colours[m].permute(2, 0, 1) for m in found]}
    height, width = (max(m.shape[side] for m in truth) for side in (0, 1))
    save_grid(path, {name: torch.stack([F.pad(p, (0, width - p.shape[-1], 0, height - p.shape[-2]), value=1.0) for p in column])
                     for name, column in columns.items()}, cell)
    with Image.open(path) as grid:
        page = Image.new("RGB", (grid.width, grid.height + 20 * len(names)), "white")
        page.paste(grid)
    draw, font, x, y = ImageDraw.Draw(page), ImageFont.load_default(size=13), 6, grid.height + 4
    for k in torch.cat([m.flatten() for m in truth + found]).unique().tolist():
        wide = 32 + font.getlength(names[k])
        if x > 6 and x + wide > page.width:
            x, y = 6, y + 20
        draw.rectangle((x, y + 2, x + 12, y + 14), fill=tuple((colours[k] * 255).round().int().tolist()), outline="grey")
        draw.text((x + 18, y), names[k], fill="black", font=font)
        x += wide
    page.crop((0, 0, page.width, y + 24)).save(path)


if __name__ == "__main__":
    from shapes import CLASSES, Shapes
    from vit import create_vit

    torch.manual_seed(0)
    steps, scenes = 200, [Shapes(8, 64).scene(i) for i in range(8)]
    pixels, labels = torch.stack([s["image"] for s in scenes]) / 255, torch.stack([s["semantic"] for s in scenes])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (Shapes.mean, Shapes.std))
    images, classes = (pixels - mean) / std, ["background", *CLASSES]
    encoder = create_vit("vit_demo", img_size=64, patch_size=8, depth=4, num_classes=0)
    model = UperNet(encoder, len(classes), channels=32, aux_channels=32, norm="group")
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        some = torch.randperm(len(images))[:4]
        out = model(images[some], labels[some])
        optimizer.zero_grad()
        out.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 40 == 0 or step == steps - 1:
            figures = mean_iou(confusion_matrix(out.logits.argmax(1), labels[some], len(classes)))
            print(f"step {step:3d}  loss {out.loss:.3f} = {out.main:.3f} + 0.4 x {out.auxiliary:.3f}  mIoU {figures['miou']:.3f}")
    for name, options in dict(whole={}, windows=dict(window=48, stride=16), mirrored=dict(flip=True)).items():
        figures = segment_evaluate(model, [(images, labels)], len(classes), **options)
        print(f"{name:8s} mIoU {figures['miou']:.3f}  pixel accuracy {figures['pixel_acc']:.3f}")
    print("(expect above 0.9 for the whole image, less for parts and mirrored images, which are new to it; all background: mIoU 0.08, accuracy 0.81)")
    save_segments("segment_demo.png", pixels[:6], labels[:6], predict(model.eval(), images[:6]), classes)
    print("saved segment_demo.png")

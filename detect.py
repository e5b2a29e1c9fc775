"""Detection: a plain ViT sees at one scale; bend it into a pyramid, and hand that to Mask R-CNN.

A detector wants maps at several strides, fine ones for small objects. A ViT has one map, of its patch
size, and attention over all of a large image is out of reach. Two small changes make it a backbone:

    windows   attention within windows of r x r tokens; only the last block of each quarter of the
              depth looks at the whole map: cost r^2 h w instead of (h w)^2                            (1)
    taps      after each of these four blocks, the map at a quarter, a half, once and twice the patch:
              deconvolved twice, once, left alone, max-pooled. Patch 16: strides 4, 8, 16, 32          (2)
    bias      softmax(q k^T / sqrt(d) + b[offset]): one table b for all windowed, one for all global
              blocks, zero at the start                                                                (3)

The rest is torchvision's Mask R-CNN with the stronger heads of that paper: normalised feature pyramid,
two convolutions before the proposals, four convolutions and a layer for boxes, normalised mask head.
Everything is sized by arguments, so that it also trains on a laptop.

Windows at the border are simply smaller. That equals padding them and masking the padding, without
computing it; the official follow-up (ViTDet) pads and attends to the padding. We differ: torchvision's
RoIAlign samples half a pixel beside detectron2's, and its box loss is smooth L1, there L1.

Source: Li et al. 2021, arXiv 2111.11429; simple pyramid: ViTDet, Li et al. 2022, arXiv 2203.16527. Written
from the papers, sizes checked in detectron2's ViTDet and MIMDet.
Needs: torch, torchvision, einops; checkpoints.py, an encoder (vit.py and shapes.py for the demo).
Demo: python detect.py (a minute on a CPU) finds the shapes in eight scenes it has learnt by heart, and saves detect_demo.png.
"""

import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from checkpoints import resample

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------- attention


def pieces(size, window):
    """Cut 0..size into windows: [(start, stop, window)], whole ones first, then the rest as one smaller window."""
    whole = size // window * window
    return [piece for piece in ((0, whole, window), (whole, size, size - whole)) if piece[0] < piece[1]]


def attend(attn, x, window=None, bias=None):
    """(1): attention within each window of a map, or (None) over all of it. x (B, H, W, D) -> alike.

    bias  a RelativeBias or None
    """
    height, width = x.shape[1:3]
    tall, wide = window or (height, width)
    rows = []
    for top, bottom, h in pieces(height, tall):
        row = []
        for left, right, w in pieces(width, wide):
            part = x[:, top:bottom, left:right]
            tokens = rearrange(part, "b (n h) (m w) d -> (b n m) (h w) d", h=h, w=w)
            tokens = attn(tokens, None if bias is None else bias(h, w))
            row.append(rearrange(tokens, "(b n m) (h w) d -> b (n h) (m w) d", h=h, w=w, n=part.shape[1] // h, m=part.shape[2] // w))
        rows.append(torch.cat(row, dim=2) if len(row) > 1 else row[0])
    return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]


def run_block(block, x, window, bias):
    """A block of vit.py on a map (B, H, W, D), its attention confined to windows."""
    out = attend(block.attn, block.norm1(x), window, bias)
    x = x + block.drop_path(out if block.gamma_1 is None else block.gamma_1 * out)
    out = block.mlp(block.norm2(x))
    return x + block.drop_path(out if block.gamma_2 is None else block.gamma_2 * out)


class RelativeBias(nn.Module):
    """(3): one learnt number per head and offset, for maps up to `window`: (h, w) -> (heads, h w, h w).

    A smaller map reads the middle of the table; a larger one a bicubic enlargement of it.
    """

    def __init__(self, window, num_heads):
        super().__init__()
        self.window = tuple(window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), num_heads))

    def forward(self, height, width):
        table, (tall, wide) = self.relative_position_bias_table, self.window
        if height > tall or width > wide:
            old, tall, wide = (2 * tall - 1, 2 * wide - 1), max(tall, height), max(wide, width)
            table = resample(table, old, (2 * tall - 1, 2 * wide - 1))
        y, x = (torch.arange(side, device=table.device) for side in (height, width))
        down, right = (side[:, None] - side for side in (y, x))  # from key to query, (h, h) and (w, w)
        index = (down[:, None, :, None] + tall - 1) * (2 * wide - 1) + (right[None, :, None, :] + wide - 1)  # (h, w, h, w)
        return rearrange(table[index], "a b c d m -> m (a b) (c d)")


# ---------------------------------------------------------------------------- pyramids


def up(dim, out):
    return nn.ConvTranspose2d(dim, out, kernel_size=2, stride=2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W), at each place by itself."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def group_norm(dim):
    return nn.GroupNorm(math.gcd(32, dim), dim)


NORMS = {"batch": nn.BatchNorm2d, "group": group_norm, "layer": partial(ChannelNorm, eps=1e-6)}


class ViTPyramid(nn.Module):
    """A ViT as a backbone: images (B, C, H, W) -> OrderedDict of maps "0" (finest), "1", ...

    vit            a ViT of vit.py; it is taken over: class token, last norm and head are gone afterwards, its positions train
    window_size    r of (1), or (rows, columns)
    global_blocks  "quarters": the last of each quarter; "all"; "none"; or a list of block numbers
    pyramid        "taps" (2); "simple": four scales of the last map (ViTDet); "single": the last map alone
    rel_pos_bias   (3). A shared bias of BEiT in the vit is transferred and resized
    checkpointing  recompute each block in the backward pass
    img_size       int or (H, W) of the images to come, default the vit's. Its tables are resized to it, once, so build the vit in the
                   size it was pre-trained with. A BEiT without absolute table gets a random one, as in the benchmark

    channels and strides say what the maps are like, positions what became of the vit's position information. Images of yet another
    size are taken too: the tables are resized on the way.
    """

    def __init__(self, vit, window_size=14, global_blocks="quarters", pyramid="taps", rel_pos_bias=True, checkpointing=False, img_size=None):
        super().__init__()
        depth, dim = len(vit.blocks), vit.embed_dim
        window = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
        if len(window) != 2 or min(window) < 1:
            raise ValueError(f"window_size {window_size} must be a number of tokens or (rows, columns), at least 1")
        if all(isinstance(norm, nn.Identity) for norm in (vit.norm, vit.fc_norm)):
            raise ValueError("this vit is already in a pyramid, which took its norm and tables over; build it anew")
        for option, value, others in (("pyramid", pyramid, "'simple'"), ("global_blocks", global_blocks, "'all', 'none' or a list")):
            if depth % 4 and value in ("taps", "quarters"):
                raise ValueError(f"depth {depth} has no quarters for {option}={value!r}; take {option}={others}, or a depth that is a multiple of 4")
        if pyramid not in ("taps", "simple", "single"):
            raise ValueError(f"pyramid {pyramid!r} is unknown; choose 'taps', 'simple' or 'single'")
        quarters = [depth * k // 4 - 1 for k in (1, 2, 3, 4)]
        p = vit.patch_size
        if p % 4 and pyramid != "single":
            raise ValueError(f"patch_size {p} cannot be divided by 4 for the finest map; take a multiple of 4 or pyramid='single'")
        named = {"quarters": quarters, "all": range(depth), "none": ()}
        if isinstance(global_blocks, str) and global_blocks not in named:
            raise ValueError(f"global_blocks {global_blocks!r} is unknown; choose 'quarters', 'all', 'none' or a list of block numbers")
        chosen = set(named[global_blocks] if isinstance(global_blocks, str) else global_blocks)
        if not chosen <= set(range(depth)):
            raise ValueError(f"global_blocks {sorted(chosen)} must lie in 0..{depth - 1}")
        img_size = vit.img_size if img_size is None else (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        grid = vit.grid(*img_size)
        self.kind, self.global_blocks, self.window, self.checkpointing = pyramid, chosen, window, checkpointing
        self.taps = quarters if pyramid == "taps" else [depth - 1] * (4 if pyramid == "simple" else 1)

        self.bias = None
        if rel_pos_bias:
            # a table without use would get no gradient and upset DDP; one for more than the map would be stretched and read in its middle
            used = {"window": tuple(map(min, window, grid))} if len(chosen) < depth else {}
            used |= {"global": grid} if chosen else {}
            self.bias = nn.ModuleDict({name: RelativeBias(size, vit.num_heads) for name, size in used.items()})
        self.positions = []  # (what, as it came, as it is now)
        self.take_over_positions(vit, img_size, grid)
        vit.norm, vit.fc_norm, vit.head, vit.num_classes = nn.Identity(), nn.Identity(), nn.Identity(), 0  # a norm without gradient upsets DDP
        self.vit = vit

        if pyramid == "taps":
            self.channels, self.strides = [dim] * 4, [p / 4, p / 2, p, 2 * p]
            fine = nn.Sequential(up(dim, dim), group_norm(dim), nn.GELU(), up(dim, dim))
            half = up(dim, dim)
        elif pyramid == "simple":
            self.channels, self.strides = [dim // 4, dim // 2, dim, dim], [p / 4, p / 2, p, 2 * p]
            fine = nn.Sequential(up(dim, dim // 2), ChannelNorm(dim // 2, eps=1e-6), nn.GELU(), up(dim // 2, dim // 4))
            half = up(dim, dim // 2)
        if pyramid == "single":
            self.channels, self.strides, scales = [dim], [p], [nn.Identity()]
        else:
            scales = [fine, half, nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)]
        self.scales = nn.ModuleList(scales)

    def take_over_positions(self, vit, img_size, grid):
        """Resample the vit's tables to the new grid, without what belongs to the class token. BEiT's shared bias becomes (3)."""
        def by(size):
            return f"{size[0]}x{size[1]}"

        if vit.has_relative_bias and self.bias is None:
            raise ValueError("rel_pos_bias=False would throw away the relative position bias that this encoder was trained with; set it to True")
        if vit.has_relative_bias and vit.rel_pos_bias is None:
            raise ValueError("the encoder has a bias in every block, but windowed and global blocks share one each; build it with "
                             "rel_pos_bias='shared', as BEiT pre-trains it")
        old, beit = vit.grid_size, vit.has_relative_bias
        for name, bias in (self.bias or {}).items():
            now = f"zeros, {by(bias.window)}, trains"
            if beit:
                before, after = (tuple(2 * side - 1 for side in size) for size in (old, bias.window))
                table = vit.rel_pos_bias.relative_position_bias_table.detach()[:math.prod(before)]
                bias.relative_position_bias_table.data.copy_(resample(table, before, after))
                now = ("kept" if old == bias.window else f"resized to {by(bias.window)}") + ", trains"
            self.positions.append((f"bias of {name.replace('window', 'windowed')} blocks", f"{by(old)}, shared" if beit else "none", now))
        vit.rel_pos_bias, vit.has_relative_bias = None, False
        vit.drop_class_token()
        row = ["absolute table", "none", "none"]
        if vit.pos_embed is not None:
            vit.pos_embed = nn.Parameter(resample(vit.pos_embed.detach()[0], old, grid)[None].clone())  # trains, also if it was frozen
            row[1:] = by(old), ("kept" if old == grid else f"resized to {by(grid)}") + ", trains"
        elif beit:
            vit.pos_embed = nn.Parameter(0.02 * torch.randn(1, math.prod(grid), vit.embed_dim, device=vit.patch_embed.proj.weight.device))
            row[2] = f"random, {by(grid)}, trains"
        self.positions.insert(0, tuple(row))
        vit.img_size, vit.grid_size = img_size, grid

    def forward(self, x):
        gh, gw = self.vit.grid(*x.shape[-2:])
        x = rearrange(self.vit.embed(x), "b (h w) d -> b h w d", h=gh)
        tapped = {}
        for i, block in enumerate(self.vit.blocks):
            everywhere = i in self.global_blocks
            bias = None if self.bias is None else self.bias["global" if everywhere else "window"]
            window = None if everywhere else self.window
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(run_block, block, x, window, bias, use_reentrant=False)
            else:
                x = run_block(block, x, window, bias)
            if i in self.taps:
                tapped[i] = rearrange(x, "b h w d -> b d h w")
        return OrderedDict((str(k), scale(tapped[i])) for k, (i, scale) in enumerate(zip(self.taps, self.scales, strict=True)))


class StagePyramid(nn.Module):
    """A hierarchical encoder of mixmim.py, whose maps are already there; a LayerNorm makes each comparable."""

    kind, positions = "taps", [("absolute table and biases", "the encoder's", "as loaded; the table is fixed, the biases train")]

    def __init__(self, encoder):
        super().__init__()
        encoder.norm, encoder.head, encoder.num_classes = nn.Identity(), nn.Identity(), 0
        self.encoder = encoder
        stages = len(encoder.depths)
        self.channels = [encoder.embed_dim * 2**k for k in range(stages)]
        self.strides = [encoder.patch_size * 2**k for k in range(stages)]
        self.norms = nn.ModuleList(ChannelNorm(dim, eps=1e-6) for dim in self.channels)

    def forward(self, x):
        maps = self.encoder.forward_maps(x)
        return OrderedDict((str(k), norm(m)) for k, (norm, m) in enumerate(zip(self.norms, maps, strict=True)))


class ResNetPyramid(IntermediateLayerGetter):
    """The four stages of a torchvision ResNet, or of resnet.py's: the baseline."""

    kind, positions = "taps", []

    def __init__(self, resnet):
        if not isinstance(getattr(resnet, "layer4", None), nn.Sequential):
            raise ValueError("the encoder has no four stages of strides 4 to 32; take resnet18 or resnet50, the small forms have three")
        super().__init__(resnet, {f"layer{k + 1}": str(k) for k in range(4)})
        widths = [stage[-1] for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)]
        self.channels = [(block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels for block in widths]
        self.strides = [4, 8, 16, 32]


def as_pyramid(encoder, **options):
    """The pyramid for an encoder: a ViT (options of ViTPyramid), a HierarchicalViT, a ResNet; a pyramid is given back as it is."""
    if hasattr(encoder, "forward_maps"):
        return StagePyramid(encoder)
    if hasattr(encoder, "drop_class_token"):
        return ViTPyramid(encoder, **options)
    if hasattr(encoder, "layer4"):
        return ResNetPyramid(encoder)
    if not hasattr(encoder, "strides"):
        raise ValueError(f"{type(encoder).__name__} is no encoder this file knows; give a ViT, a HierarchicalViT or a ResNet")
    return encoder


class Backbone(nn.Module):
    """Pyramid and neck: images -> OrderedDict of maps of out_channels each. Taps get a top-down path (FPN) and one coarser level."""

    def __init__(self, pyramid, out_channels, norm):
        super().__init__()
        self.pyramid, self.out_channels = pyramid, out_channels
        self.coarser = LastLevelMaxPool() if pyramid.kind != "single" else None
        if pyramid.kind == "taps":
            self.neck = FeaturePyramidNetwork(pyramid.channels, out_channels, norm_layer=norm)
        else:
            self.neck = nn.ModuleDict({str(k): nn.Sequential(
                nn.Conv2d(dim, out_channels, 1, bias=False), norm(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), norm(out_channels)) for k, dim in enumerate(pyramid.channels)})
        self.strides = pyramid.strides + ([2 * pyramid.strides[-1]] if self.coarser else [])

    def forward(self, x):
        maps = self.pyramid(x)
        maps = self.neck(maps) if self.pyramid.kind == "taps" else OrderedDict((k, self.neck[k](m)) for k, m in maps.items())
        if self.coarser:
            values, names = self.coarser(list(maps.values()), list(maps.values()), list(maps))
            maps = OrderedDict(zip(names, values))
        return maps


# ---------------------------------------------------------------------------- the detector


def roi_align(size, strides, canonical_scale):
    """torchvision's MultiScaleRoIAlign for maps of these strides.

    It would guess the strides from the first image that comes, before padding, and keep the guess: wrong by two for a landscape.
    """
    pool = MultiScaleRoIAlign([str(k) for k in range(len(strides))], size, sampling_ratio=0, canonical_scale=canonical_scale)
    finest = round(math.log2(strides[0]))
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(finest, finest + len(strides) - 1, canonical_scale=canonical_scale)
    return pool


def to_float32(module, args, out):
    """A forward hook against autocast: torchvision decodes boxes in the type of the predictions, and bf16 has pixels of 4 at 1,000."""
    if isinstance(out, dict):
        return OrderedDict((key, value.float()) for key, value in out.items())
    if isinstance(out, (tuple, list)):
        return type(out)(to_float32(module, args, part) for part in out)
    return out.float()


def vit_mask_rcnn(encoder, num_classes, img_size=1024, window_size=14, global_blocks="quarters", pyramid="taps", rel_pos_bias=True,
                  checkpointing=False, norm="batch", channels=256, rpn_convs=2, box_convs=4, box_dim=1024, mask_convs=4, anchor_sizes=None,
                  aspect_ratios=(0.5, 1.0, 2.0), canonical_scale=224, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, **options):
    """torchvision's MaskRCNN around an encoder. Lists of images (C, H, W) in [0, 1], targets as torchvision's.

    encoder          a ViT, a HierarchicalViT, a ResNet, or a pyramid of this file, made with its own options. Build the ViT in the size
                     it was pre-trained with and call load_pretrained on it first; its tables are resized here
    num_classes      without background; labels are 1..num_classes
    img_size         the longer side of an image becomes img_size, and the rest is padded to a square, in training and inference
    window_size, global_blocks, pyramid, rel_pos_bias, checkpointing   of ViTPyramid
    norm             in neck and heads: "batch" (convert_sync_batchnorm it for several GPUs), "group" or "layer"
    channels         of neck and heads; rpn_convs, box_convs, box_dim, mask_convs: the heads' depths and width
    anchor_sizes     a tuple of pixels per level; default 8 strides each, and for pyramid="single" the sizes of all five levels
    canonical_scale  the size in pixels of an object that is read from the level of stride 16 (at 224: that of ImageNet)
    options          of torchvision's MaskRCNN: rpn_batch_size_per_image, box_batch_size_per_image, rpn_post_nms_top_n_train, ...
    """
    if not isinstance(img_size, int) or img_size < 1:
        raise ValueError(f"img_size {img_size} must be one number of pixels: images are padded to a square")
    if num_classes < 1:
        raise ValueError(f"num_classes {num_classes} counts classes without background; it must be at least 1")
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r} is unknown; choose {', '.join(NORMS)}")
    encoder = as_pyramid(encoder, window_size=window_size, global_blocks=global_blocks, pyramid=pyramid, rel_pos_bias=rel_pos_bias,
                         checkpointing=checkpointing, img_size=img_size)
    in_chans = next((p.shape[1] for p in encoder.parameters() if p.ndim == 4), 3)  # of the first convolution
    make_norm = NORMS[norm]
    backbone = Backbone(encoder, channels, make_norm)
    if anchor_sizes is None:
        strides = [round(8 * stride) for stride in backbone.strides]
        if encoder.kind == "single":
            strides = [round(8 * encoder.strides[0] * 2.0**k) for k in (-2, -1, 0, 1, 2)]
        anchor_sizes = [strides] if encoder.kind == "single" else [(side,) for side in strides]
    if len(anchor_sizes) != len(backbone.strides):
        raise ValueError(f"anchor_sizes has {len(anchor_sizes)} levels, the pyramid {len(backbone.strides)} (strides {backbone.strides}); give a "
                         "tuple of sizes for each")
    if len(image_mean) != in_chans or len(image_std) != in_chans:
        raise ValueError(f"image_mean has {len(image_mean)} and image_std {len(image_std)} values, the encoder takes {in_chans} channels; give one each")
    anchors = AnchorGenerator(tuple(map(tuple, anchor_sizes)), (tuple(aspect_ratios),) * len(anchor_sizes))
    per_place = set(anchors.num_anchors_per_location())
    if len(per_place) > 1:
        raise ValueError(f"anchor_sizes {anchor_sizes} must have the same number of sizes on every level, as one head serves all of them")
    # a head built for another number of anchors raises nothing in torchvision and learns nothing
    rpn_head = RPNHead(channels, per_place.pop(), conv_depth=rpn_convs)
    # regions are read from the encoder's own levels; the one that was added serves proposals only
    box_pool, mask_pool = (roi_align(size, encoder.strides, canonical_scale) for size in (7, 14))
    model = MaskRCNN(
        backbone, min_size=img_size, max_size=img_size, size_divisible=img_size, image_mean=list(image_mean), image_std=list(image_std),
        rpn_anchor_generator=anchors, rpn_head=rpn_head,
        box_roi_pool=box_pool, box_head=FastRCNNConvFCHead((channels, 7, 7), [channels] * box_convs, [box_dim], norm_layer=make_norm),
        box_predictor=FastRCNNPredictor(box_dim, num_classes + 1),
        mask_roi_pool=mask_pool, mask_head=MaskRCNNHeads(channels, [channels] * mask_convs, 1, norm_layer=make_norm),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1), **options)
    for part in (model.backbone, model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor):
        part.register_forward_hook(to_float32)
    return model


def init_as_beit(vit):
    """The random start of the benchmark: truncated normal 0.02, the l-th block's last layers divided by sqrt(2 l)."""
    for module in vit.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        for number, block in enumerate(vit.blocks, start=1):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight /= math.sqrt(2 * number)


@torch.no_grad()
def proposal_recall(model, images, targets, iou=0.5):
    """(found, all): how many true boxes some proposal covers with at least this overlap. The first thing to look at when nothing is learnt."""
    was_training = model.training
    model.eval()
    batch, scaled = model.transform(images, targets)
    proposals, _ = model.rpn(batch, model.backbone(batch.tensors))
    model.train(was_training)
    return sum(covered(t["boxes"], p, iou) for t, p in zip(scaled, proposals)), sum(len(t["boxes"]) for t in targets)


def covered(boxes, proposals, iou=0.5):
    """How many of the boxes some proposal overlaps with at least this IoU."""
    return (box_iou(boxes, proposals) >= iou).any(dim=1).sum().item() if len(boxes) and len(proposals) else 0


def check_target(image, target, num_classes, name="image"):
    """ValueError in one sentence, beginning with `name`, unless the sample is what torchvision's detectors take."""
    absent = {"boxes", "labels", "masks"} - set(target)
    if absent:
        raise ValueError(f"{name}: the target has no {', '.join(sorted(absent))}; an image without objects has empty ones")
    boxes, labels, masks = (target[key] for key in ("boxes", "labels", "masks"))
    if image.ndim != 3 or not image.is_floating_point() or image.min() < 0 or image.max() > 1:
        raise ValueError(f"{name}: the image must be floats (C, H, W) in [0, 1], got {tuple(image.shape)} {image.dtype} from {image.min():g} to "
                         f"{image.max():g}; divide bytes by 255, and do not normalise, the detector does")
    height, width = image.shape[-2:]
    if boxes.ndim != 2 or boxes.shape[-1] != 4 or len(labels) != len(boxes) or len(masks) != len(boxes):
        raise ValueError(f"{name}: boxes {tuple(boxes.shape)}, labels {tuple(labels.shape)} and masks {tuple(masks.shape)} must be (n, 4), (n,) "
                         "and (n, H, W) of the same n, also when it is 0")
    if tuple(masks.shape[1:]) != (height, width):
        raise ValueError(f"{name}: masks are {tuple(masks.shape[1:])}, the image is {(height, width)}; make them the same size")
    for k, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist())):
        x1, y1, x2, y2 = box
        if not (x2 > x1 and y2 > y1):  # NaN too
            raise ValueError(f"{name}: box {k} {box} has no area as (x1, y1, x2, y2); is it (x, y, width, height)? Convert with "
                             "torchvision.ops.box_convert")
        if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
            raise ValueError(f"{name}: box {k} {box} reaches beyond the image of width {width} and height {height}; is it (x, y, width, height)? "
                             "If not, clip it")
        if not 1 <= label <= num_classes:
            raise ValueError(f"{name}: label {label} of box {k} must lie in 1..{num_classes}; 0 is the background")


if __name__ == "__main__":
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image

    from shapes import CLASSES, Shapes
    from vit import create_vit

    torch.manual_seed(0)
    size, count, steps = 96, 8, 150
    scenes = [Shapes(count, size).scene(i) for i in range(count)]
    images = [scene["image"].float() / 255 for scene in scenes]
    targets = [{key: scene[key] for key in ("boxes", "labels", "masks")} for scene in scenes]
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        check_target(image, target, len(CLASSES), f"scene {i}")
    model = vit_mask_rcnn(
        create_vit("vit_demo", img_size=size, patch_size=8, depth=4, num_classes=0), len(CLASSES), img_size=size, window_size=6, norm="group",
        channels=48, box_convs=1, box_dim=128, mask_convs=1, anchor_sizes=[(12,), (20,), (32,), (48,), (72,)], aspect_ratios=(1.0,),
        canonical_scale=112, image_mean=Shapes.mean, image_std=Shapes.std, rpn_batch_size_per_image=64, box_batch_size_per_image=32,
        rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=100)
    print("strides", model.backbone.strides, "anchors", [size[0] for size in model.rpn.anchor_generator.sizes])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    for step in range(steps):
        some = torch.randperm(count)[:4].tolist()
        losses = model([images[i] for i in some], [targets[i] for i in some])
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 30 == 0 or step == steps - 1:
            print(f"step {step:3d}  " + "  ".join(f"{name.removeprefix('loss_')} {value.item():.3f}" for name, value in losses.items()))
    found, there = proposal_recall(model, images, targets)
    print(f"proposals cover {found} of {there} shapes")
    with torch.no_grad():
        outputs = model.eval()(images)
    right, pictures = 0, []
    for image, target, output in zip(images, targets, outputs, strict=True):
        sure = output["scores"] > 0.5
        boxes, labels = output["boxes"][sure], output["labels"][sure]
        hits = (box_iou(target["boxes"], boxes) > 0.5) & (target["labels"][:, None] == labels)
        right += hits.any(1).sum().item()
        seen = draw_segmentation_masks(image, output["masks"][sure, 0] > 0.5, alpha=0.5, colors="red") if sure.any() else image
        pictures += [draw_bounding_boxes(image, target["boxes"], colors="white"), draw_bounding_boxes(seen, boxes, colors="yellow")]
    print(f"found with the right class and IoU above 0.5: {right} of {there} (expect most of them)")
    save_image(F.interpolate(torch.stack(pictures), scale_factor=2), "detect_demo.png", nrow=8)
    print("saved detect_demo.png: truth in white, beside it what was found, yellow")

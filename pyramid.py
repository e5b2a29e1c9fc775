"""Pyramid: feature maps at several strides, from any encoder, for detection and segmentation.

A dense head needs fine maps for edges and small objects, and coarse ones for large objects and context.
A ResNet and a hierarchical encoder have both. A plain ViT has one map, of its patch size, and attention
over all tokens of a large image is too expensive. Three changes make it a backbone:

    windows   attention within windows of r x r tokens; only the last block of each quarter of the
              depth is global: cost r^2 h w instead of (h w)^2                                   (1)
    taps      after each of these four blocks the map is taken, and brought to strides of 1/4,
              1/2, 1 and 2 patches: deconvolved twice, once, unchanged, max-pooled               (2)
    bias      softmax(q k^T / sqrt(d) + b[offset]): one table b shared by all windowed blocks,
              one by all global blocks, both zero at the start                                   (3)

Windows at the border are simply smaller. That equals padding them and masking the padding, without
computing it. We differ: ViTDet pads them, and lets tokens attend to the padding.

Source: Li et al. 2021, arXiv 2111.11429; simple pyramid: ViTDet, Li et al. 2022, arXiv 2203.16527.
Written from the papers, sizes checked in detectron2's ViTDet and MIMDet.
Needs: torch, torchvision, einops; vit.py (demo: shapes.py).
Demo: python pyramid.py (5 s on a CPU) shows how far a token sees, with and without global blocks, and
saves pyramid_demo.png.
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

from vit import resample


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W), separately at each place."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def group_norm(dim):
    return nn.GroupNorm(math.gcd(32, dim), dim)


layer_norm = partial(ChannelNorm, eps=1e-6)
NORMS = {"batch": nn.BatchNorm2d, "group": group_norm, "layer": layer_norm}  # for necks and heads


def norm_layer(name):
    if name not in NORMS:
        raise ValueError(f"norm {name!r} is unknown; choose {', '.join(NORMS)}")
    return NORMS[name]


# ---------------------------------------------------------------------------- attention


def split_side(size, window):
    """Cut 0..size into windows: [(start, stop, window)], first all full windows, then a smaller one."""
    full = size // window * window
    parts = []
    if full > 0:
        parts.append((0, full, window))
    if full < size:
        parts.append((full, size, size - full))
    return parts


def attend_in_windows(attn, x, window, tables):
    """(1): attention within each window of a map. x (B, H, W, D) -> (B, H, W, D).

    window  (rows, columns), None: the whole map
    tables  (3) for each size of window, of bias_tables; {}: no bias
    """
    height, width = x.shape[1:3]
    rows, columns = window or (height, width)
    strips = []
    for top, bottom, h in split_side(height, rows):
        strip = []
        for left, right, w in split_side(width, columns):
            # all windows of size h x w at once
            part = x[:, top:bottom, left:right]
            n, m = (bottom - top) // h, (right - left) // w
            tokens = rearrange(part, "b (n h) (m w) d -> (b n m) (h w) d", h=h, w=w)
            tokens = attn(tokens, tables.get((h, w)))
            strip.append(rearrange(tokens, "(b n m) (h w) d -> b (n h) (m w) d", n=n, m=m, h=h))
        # torch.cat would copy even a single part
        strips.append(torch.cat(strip, dim=2) if len(strip) > 1 else strip[0])
    return torch.cat(strips, dim=1) if len(strips) > 1 else strips[0]


def run_block(block, x, window, tables):
    """A block of vit.py on a map (B, H, W, D), with attention as in (1)."""
    out = attend_in_windows(block.attn, block.norm1(x), window, tables)
    x = x + block.drop_path(out if block.gamma_1 is None else block.gamma_1 * out)
    out = block.mlp(block.norm2(x))
    return x + block.drop_path(out if block.gamma_2 is None else block.gamma_2 * out)


class RelativeBias(nn.Module):
    """(3): one learned number per head and offset: (h, w) -> (heads, h w, h w).

    A map smaller than `window` reads the middle of the table; for a larger one the table is resized.
    """

    def __init__(self, window, num_heads):
        super().__init__()
        self.window = tuple(window)
        rows, columns = offsets(window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows * columns, num_heads))

    def forward(self, height, width):
        # the table, enlarged where the map needs that
        table = self.relative_position_bias_table
        window = max(self.window[0], height), max(self.window[1], width)
        table = resample(table, offsets(self.window), offsets(window))

        # offsets from key to query, counted from the smallest one
        y = torch.arange(height, device=table.device)
        x = torch.arange(width, device=table.device)
        down = y[:, None] - y + window[0] - 1  # (h, h)
        right = x[:, None] - x + window[1] - 1  # (w, w)

        # the row of the table for each pair of tokens
        row_length = 2 * window[1] - 1
        index = down[:, None, :, None] * row_length + right[None, :, None, :]  # (h, w, h, w)
        bias = F.embedding(index, table)  # its backward pass is faster than that of indexing
        return rearrange(bias, "a b c d m -> m (a b) (c d)").contiguous()


def bias_tables(bias, height, width, window):
    """(3) for each size of window that a map is cut into: {(h, w): (heads, h w, h w)}."""
    rows, columns = window or (height, width)
    tables = {}
    for _, _, h in split_side(height, rows):
        for _, _, w in split_side(width, columns):
            tables[h, w] = bias(h, w)
    return tables


# ---------------------------------------------------------------------------- pyramids


def up(dim, out):
    return nn.ConvTranspose2d(dim, out, kernel_size=2, stride=2)


def numbered(maps):
    return OrderedDict((str(level), feature) for level, feature in enumerate(maps))


class ViTPyramid(nn.Module):
    """A plain ViT as a backbone: images (B, C, H, W) -> OrderedDict of maps "0" (finest), "1", ...

    The ViT is modified: it loses class token, last norm and head, and its position table trains. Position
    tables are resized once, to img_size, so build the ViT in the size it was pre-trained with. Images of
    other sizes work too, with tables resized on the fly.

    channels, strides  one number per map
    positions          the sizes of the position tables, [(table, before, after)]
    """

    def __init__(
        self,
        vit,  # a ViT of vit.py
        window_size=14,  # r of (1), or (rows, columns)
        global_blocks="quarters",  # the last block of each quarter; "all"; "none"; or a list of numbers
        pyramid="taps",  # (2); "simple": four scales of the last map (ViTDet); "single": only the last map
        rel_pos_bias=True,  # (3); the shared bias of a BEiT is taken over and resized
        checkpointing=False,  # recompute each block in the backward pass
        img_size=None,  # int or (H, W) of the images to come; default: the ViT's
    ):
        super().__init__()
        check_options(vit, global_blocks, pyramid)
        depth = len(vit.blocks)
        quarters = [depth * k // 4 - 1 for k in (1, 2, 3, 4)]
        named = {"quarters": quarters, "all": range(depth), "none": ()}
        self.kind = pyramid
        self.window = as_pair(window_size)
        self.global_blocks = named[global_blocks] if isinstance(global_blocks, str) else global_blocks
        self.global_blocks = set(self.global_blocks)
        self.checkpointing = checkpointing

        # (3): no table that no block reads (DDP needs a gradient for each), none larger than the map
        img_size = as_pair(vit.img_size if img_size is None else img_size)
        grid = vit.grid(*img_size)
        self.bias = nn.ModuleDict() if rel_pos_bias else None
        if rel_pos_bias and len(self.global_blocks) < depth:
            window = min(self.window[0], grid[0]), min(self.window[1], grid[1])
            self.bias["window"] = RelativeBias(window, vit.num_heads)
        if rel_pos_bias and self.global_blocks:
            self.bias["global"] = RelativeBias(grid, vit.num_heads)
        self.positions = take_over_positions(vit, self.bias, img_size)

        # the encoder, without the parts that no map needs
        vit.norm = nn.Identity()
        vit.fc_norm = nn.Identity()
        vit.head = nn.Identity()
        vit.num_classes = 0
        self.vit = vit

        # (2)
        self.taps = quarters if pyramid == "taps" else [depth - 1]
        self.build_scales(pyramid, vit.embed_dim, vit.patch_size)

    def build_scales(self, pyramid, dim, patch_size):
        """Layers that bring the tapped maps to their strides."""
        if pyramid == "single":
            self.channels = [dim]
            self.strides = [patch_size]
            self.scales = nn.ModuleList([nn.Identity()])
            return

        # ViTDet's fine maps are narrower
        is_simple = pyramid == "simple"
        half = dim // 2 if is_simple else dim
        fine = dim // 4 if is_simple else dim
        norm = layer_norm(half) if is_simple else group_norm(half)
        self.channels = [fine, half, dim, dim]

        # a quarter, a half, once and twice the patch
        self.strides = [patch_size / 4, patch_size / 2, patch_size, 2 * patch_size]
        self.scales = nn.ModuleList([
            nn.Sequential(up(dim, half), norm, nn.GELU(), up(half, fine)),
            up(dim, half),
            nn.Identity(),
            nn.MaxPool2d(2, ceil_mode=True),
        ])

    def forward(self, x):
        grid = self.vit.grid(*x.shape[-2:])
        x = rearrange(self.vit.embed(x), "b (h w) d -> b h w d", h=grid[0])

        # (3), once for all blocks
        windows = {"window": self.window, "global": None}
        tables = {"window": {}, "global": {}}
        if self.bias is not None:
            tables = {name: bias_tables(bias, *grid, windows[name]) for name, bias in self.bias.items()}

        # (1)
        tapped = []
        for i, block in enumerate(self.vit.blocks):
            name = "global" if i in self.global_blocks else "window"
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(run_block, block, x, windows[name], tables[name], use_reentrant=False)
            else:
                x = run_block(block, x, windows[name], tables[name])
            if i in self.taps:
                tapped.append(rearrange(x, "b h w d -> b d h w"))

        # (2)
        if self.kind == "simple":
            tapped = tapped * 4
        return numbered(scale(feature) for scale, feature in zip(self.scales, tapped, strict=True))


class StagePyramid(nn.Module):
    """A hierarchical encoder, whose stages are the maps; a LayerNorm brings each to the same scale."""

    kind = "taps"
    positions = [("all tables", "the encoder's", "the same")]

    def __init__(self, encoder):
        super().__init__()
        encoder.norm = nn.Identity()
        encoder.head = nn.Identity()
        encoder.num_classes = 0
        self.encoder = encoder
        stages = len(encoder.depths)
        self.channels = [encoder.embed_dim * 2**k for k in range(stages)]
        self.strides = [encoder.patch_size * 2**k for k in range(stages)]
        self.norms = nn.ModuleList(layer_norm(dim) for dim in self.channels)

    def forward(self, x):
        maps = self.encoder.forward_maps(x)
        return numbered(norm(feature) for norm, feature in zip(self.norms, maps, strict=True))


class ResNetPyramid(IntermediateLayerGetter):
    """The four stages of a ResNet, torchvision's or that of resnet.py: the baseline."""

    kind = "taps"
    positions = []

    def __init__(self, resnet):
        if not isinstance(getattr(resnet, "layer4", None), nn.Sequential):
            raise ValueError("the ResNet has three stages, a pyramid needs four; choose resnet18 or resnet50")
        super().__init__(resnet, {f"layer{k + 1}": str(k) for k in range(4)})
        self.strides = [4, 8, 16, 32]
        self.channels = []
        for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
            last = [module for module in stage[-1].modules() if isinstance(module, nn.Conv2d)][-1]
            self.channels.append(last.out_channels)


def as_pyramid(encoder, **options):
    """The pyramid of a ViT (with options of ViTPyramid), a hierarchical encoder or a ResNet; or a pyramid itself."""
    if hasattr(encoder, "forward_maps"):
        return StagePyramid(encoder)
    if hasattr(encoder, "drop_class_token"):
        return ViTPyramid(encoder, **options)
    if hasattr(encoder, "layer4"):
        return ResNetPyramid(encoder)
    if not hasattr(encoder, "strides"):
        name = type(encoder).__name__
        raise ValueError(f"encoder {name} is unknown; give a ViT, a HierarchicalViT or a ResNet")
    return encoder


# ---------------------------------------------------------------------------- position tables


def offsets(window):
    """How many offsets, (down, right), two tokens of a window can have."""
    return 2 * window[0] - 1, 2 * window[1] - 1


def take_over_positions(vit, bias, img_size):
    """Resize the ViT's tables for img_size, without the class token's rows -> [(table, before, after)].

    bias  the modules of (3) by name, or None; BEiT's shared bias is copied into them
    """
    if vit.has_relative_bias and bias is None:
        raise ValueError("rel_pos_bias=False discards the bias the encoder was trained with; set it to True")
    if vit.has_relative_bias and vit.rel_pos_bias is None:
        raise ValueError("the encoder has a relative bias in each block, but a pyramid shares it among blocks; "
                         "build the encoder with rel_pos_bias='shared', as BEiT pre-trains it")
    is_beit, shared = vit.has_relative_bias, vit.rel_pos_bias
    old = vit.grid_size
    grid = vit.grid(*img_size)

    # relative tables; BEiT's last rows belong to the class token
    biases = []
    for name, module in [] if bias is None else bias.items():
        before, after = "none", f"zeros {by(module.window)}"
        if is_beit:
            count = math.prod(offsets(old))
            rows = shared.relative_position_bias_table.detach()[:count]
            rows = resample(rows, offsets(old), offsets(module.window))
            module.relative_position_bias_table.data.copy_(rows)
            before, after = by(old), by(module.window)
        blocks = "windowed" if name == "window" else "global"
        biases.append((f"bias of {blocks} blocks", before, after))
    vit.rel_pos_bias = None
    vit.has_relative_bias = False
    vit.drop_class_token()

    # absolute table: it trains, even if it was frozen
    before, after = "none", "none"
    if vit.pos_embed is not None:
        rows = resample(vit.pos_embed.detach()[0], old, grid)
        vit.pos_embed = nn.Parameter(rows[None].clone())
        before, after = by(old), by(grid)
    elif is_beit:
        # BEiT has none; the benchmark gives it a random one
        device = vit.patch_embed.proj.weight.device
        rows = torch.randn(1, math.prod(grid), vit.embed_dim, device=device)
        vit.pos_embed = nn.Parameter(0.02 * rows)
        after = f"random {by(grid)}"
    vit.img_size = img_size
    vit.grid_size = grid
    return [("absolute table", before, after), *biases]


def by(size):
    return f"{size[0]}x{size[1]}"


def as_pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def check_options(vit, global_blocks, pyramid):
    """ValueError for what would give a wrong pyramid without an error."""
    depth = len(vit.blocks)
    is_named = isinstance(global_blocks, str)
    if isinstance(vit.norm, nn.Identity) and isinstance(vit.fc_norm, nn.Identity):
        raise ValueError("the vit is already part of a pyramid, which modified it; build a new one")
    if pyramid not in ("taps", "simple", "single"):
        raise ValueError(f"pyramid {pyramid!r} is unknown; choose 'taps', 'simple' or 'single'")
    if is_named and global_blocks not in ("quarters", "all", "none"):
        raise ValueError(f"global_blocks {global_blocks!r} is unknown; choose 'quarters', 'all', 'none' or numbers")
    if not is_named and not set(global_blocks) <= set(range(depth)):
        raise ValueError(f"global_blocks {sorted(global_blocks)} must lie in 0..{depth - 1}")
    if depth % 4 and (pyramid == "taps" or global_blocks == "quarters"):
        raise ValueError(f"depth {depth} cannot be cut into quarters; take a multiple of 4, or pyramid='simple' "
                         "with global_blocks='all'")
    if vit.patch_size % 4 and pyramid != "single":
        raise ValueError(f"patch_size {vit.patch_size} is not a multiple of 4, as the finest map needs; "
                         "change it or take pyramid='single'")


if __name__ == "__main__":
    from shapes import save_grid, shapes
    from vit import create_vit

    image = shapes(1, img_size=128)
    columns = {"image": image}
    for blocks in ("none", "quarters"):
        torch.manual_seed(0)
        vit = create_vit("vit_demo", img_size=128, patch_size=8, depth=4, num_classes=0)
        model = ViTPyramid(vit, window_size=4, global_blocks=blocks)

        # which pixels change the coarsest map at row 3, column 3?
        pixels = image.clone().requires_grad_()
        maps = model(pixels)
        maps["3"][0, :, 3, 3].sum().backward()
        reach = (pixels.grad.abs().sum(1, keepdim=True) > 0).float()
        columns[f"seen with global_blocks={blocks!r}"] = image * (0.2 + 0.8 * reach)
        print(f"global_blocks={blocks!r}: a place of the coarsest map sees {reach.mean():.1%} of the image")
    print("(expect 6.2%, one window of 4 x 4 tokens out of 16 x 16, then everything)")

    for stride, feature in zip(model.strides, maps.values()):
        print(f"stride {stride:4.0f}: map {tuple(feature.shape)}")
    save_grid("pyramid_demo.png", columns, cell=256)
    print("saved pyramid_demo.png: what a place of the coarsest map does not see is dark")

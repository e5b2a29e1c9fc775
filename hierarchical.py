"""Hierarchical vision transformer: attention inside windows, and a coarser map after every stage.

A plain ViT cuts the image coarsely, because attention among N tokens costs N^2. Here the patches are small,
and tokens attend only to tokens of their own window. Between two stages 2 x 2 tokens merge into one of twice
the width, until one window covers the whole map. The maps of all stages are the feature pyramid that
detection and segmentation need.

    z_0 = LN(W x + b) + pos                                             (1)   pos: fixed sin-cos table
    z   = z + WindowAttention(LN z),  then  z = z + MLP(LN z)           (2)   pre-norm block
    WindowAttention(z) = proj(softmax(q k^T / sqrt(d) + bias + G) v)    (3)   in every window
    bias_ij = table[row_i - row_j, column_i - column_j]                 (4)   learned, per head
    G_ij    = 0 if group_i = group_j, else -inf                         (5)   attention within groups only
    z'      = W' LN[z_00 ; z_10 ; z_01 ; z_11]                          (6)   merging 2 x 2 tokens

The groups of (5) serve three purposes. Padding stays out where a window does not divide the map. Windows
that are shifted, as in Swin, do not join opposite borders. MixMIM keeps the tokens of two images apart
(mixmim.py).

Source: Liu et al. 2021 (Swin), arXiv 2103.14030. Without shift it is the encoder of MixMIM, Liu et al. 2022,
arXiv 2205.13137. Written from the papers; parameter names are the official ones. We differ: the official
code cannot pad, so its windows must divide the map.
Needs: torch, torchvision, einops; vit.py, masking.py.
Demo: python hierarchical.py (seconds) prints how much of the image a token of each stage sees.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from masking import enlarge_mask
from vit import Mlp, PatchEmbed, attention, init_weights
from vit import relative_position_index, resize_pos_embed, sincos_pos_embed

PRESETS = {  # keyword arguments of HierarchicalViT
    "mixmim_b": dict(embed_dim=128, num_heads=(4, 8, 16, 32)),
    "mixmim_l": dict(embed_dim=192, num_heads=(6, 12, 24, 48)),
    "mixmim_h": dict(embed_dim=352, num_heads=(11, 22, 44, 88)),
    "mixmim_demo": dict(
        img_size=64,
        embed_dim=48,
        depths=(2, 2, 4),
        num_heads=(2, 4, 8),
        window_size=(8, 8, 4),
    ),
}


def create_mixmim(name, **overrides):
    """The encoder by preset name: create_mixmim("mixmim_b", img_size=384, window_size=(16, 16, 24, 12))."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(PRESETS)}")
    return HierarchicalViT(**{**PRESETS[name], **overrides})


# ---------------------------------------------------------------------------- windows


class Windows(NamedTuple):
    """How to cut a map (B, H, W, D) into windows; all blocks of a stage that cut alike share it."""

    size: tuple  # (wh, ww) tokens
    pad: tuple  # rows added at the bottom, columns added at the right
    shift: tuple  # the map is rolled back by so many rows and columns before it is cut
    mask: torch.Tensor | None  # G of (5), (b, windows, 1, N, N) with b = 1 or B; None: all attend to all


def cut_windows(height, width, window, shifted, source, device):
    """Plan the windows of a map of height x width tokens -> Windows.

    window   (wh, ww); a side larger than the map is clamped to it
    shifted  cut half a window further down and right (Swin)
    source   (b, H, W) bool or None: tokens attend only to tokens with the same value
    """
    wh = min(window[0], height)
    ww = min(window[1], width)
    pad_rows = -height % wh
    pad_cols = -width % ww
    pad = (pad_rows, pad_cols)

    # a side that one window covers is not shifted
    shift_rows = shift_cols = 0
    if shifted and height > wh:
        shift_rows = wh // 2
    if shifted and width > ww:
        shift_cols = ww // 2
    shift = (shift_rows, shift_cols)

    if source is None:
        if pad == (0, 0) and shift == (0, 0):
            return Windows((wh, ww), pad, shift, mask=None)
        source = torch.zeros(1, height, width, device=device)

    # group of a token: 0 or 1 for its source, 2 for padding
    group = F.pad(source.long(), (0, pad_cols, 0, pad_rows), value=2)

    # rolling moves the first rows and columns behind the last: two more bits keep them apart
    group = group.roll((-shift_rows, -shift_cols), dims=(1, 2))
    height, width = group.shape[1:]
    wrapped_rows = torch.arange(height, device=device) >= height - shift_rows
    wrapped_cols = torch.arange(width, device=device) >= width - shift_cols
    wrapped = 2 * wrapped_rows[:, None] + wrapped_cols
    group = 4 * group + wrapped

    # (5) in every window; the third dimension is for the heads
    group = rearrange(group, "b (nh wh) (nw ww) -> b (nh nw) 1 (wh ww)", wh=wh, ww=ww)
    return Windows((wh, ww), pad, shift, group_mask(group))


def group_mask(group):
    """(5): group numbers (..., N) -> (..., N, N), 0 where two tokens have the same number, else -inf.

    exp(-inf) is exactly 0, so nothing leaks between groups. No row is all -inf: i = j is always 0.
    """
    differs = group[..., :, None] != group[..., None, :]
    mask = torch.zeros(differs.shape, device=group.device)
    return mask.masked_fill(differs, -torch.inf)


# ---------------------------------------------------------------------------- blocks


class WindowAttention(nn.Module):
    """Self-attention inside windows (3): (B, H, W, D) -> (B, H, W, D)."""

    def __init__(self, dim, num_heads, window):
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

        # (4)
        wh, ww = window
        offsets = (2 * wh - 1) * (2 * ww - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))
        index = relative_position_index(wh, ww)[1:, 1:]  # without the class token
        self.register_buffer("relative_position_index", index, persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias(self, wh, ww):
        """(4) for windows of wh x ww tokens: (h, N, N)."""
        index = self.relative_position_index
        if (wh, ww) != self.window:
            # the map is smaller than the table's window: equal offsets read equal rows
            index = index.view(*self.window, *self.window)
            index = index[:wh, :ww, :wh, :ww]
        # an embedding, because its backward pass is faster than that of indexing
        bias = F.embedding(index.flatten(), self.relative_position_bias_table)
        return rearrange(bias, "(n m) h -> h n m", n=wh * ww).contiguous()

    def forward(self, x, windows):
        wh, ww = windows.size
        nh = x.shape[1] // wh
        nw = x.shape[2] // ww

        # windows and heads become one dimension, so that the mask is not repeated over the batch
        def split(tokens):
            pattern = "b (nh wh) (nw ww) (h d) -> b (nh nw h) (wh ww) d"
            return rearrange(tokens, pattern, wh=wh, ww=ww, h=self.num_heads)

        q, k, v = map(split, self.qkv(x).chunk(3, dim=-1))

        # (4) and (5)
        bias = self.bias(wh, ww)
        if windows.mask is not None:
            bias = (bias + windows.mask).flatten(1, 2)  # (b, windows h, N, N)
        else:
            bias = bias.repeat(nh * nw, 1, 1)  # (windows h, N, N)

        # (3)
        x = attention(q, k, v, bias)
        pattern = "b (nh nw h) (wh ww) d -> b (nh wh) (nw ww) (h d)"
        return self.proj(rearrange(x, pattern, nh=nh, nw=nw, wh=wh))


class WindowBlock(nn.Module):
    """Pre-norm block (2): (B, H, W, D) -> (B, H, W, D)."""

    def __init__(self, dim, num_heads, window, mlp_ratio, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, x, windows):
        height, width = x.shape[1:3]
        pad_rows, pad_cols = windows.pad
        shift_rows, shift_cols = windows.shift

        # pad and shift, attend, then undo both
        y = self.norm1(x)
        if pad_rows or pad_cols:
            y = F.pad(y, (0, 0, 0, pad_cols, 0, pad_rows))
        if shift_rows or shift_cols:
            y = y.roll((-shift_rows, -shift_cols), dims=(1, 2))
        y = self.attn(y, windows)
        if shift_rows or shift_cols:
            y = y.roll((shift_rows, shift_cols), dims=(1, 2))
        y = y[:, :height, :width]

        # (2)
        x = x + self.drop_path(y)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y)


class PatchMerging(nn.Module):
    """2 x 2 tokens become one of twice the width (6): (B, H, W, D) -> (B, H / 2, W / 2, 2 D)."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-5)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        # the row index p runs fastest: 00, 10, 01, 11
        x = rearrange(x, "b (h p) (w q) d -> b h w (q p d)", p=2, q=2)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """Blocks at one resolution: (B, H, W, D) -> (B, H, W, D).

    `downsample` leads to the next stage. It lives here for its name in checkpoints; the encoder calls it.
    """

    def __init__(self, dim, num_heads, window, mlp_ratio, drop_path, shift, checkpointing, last):
        super().__init__()
        self.window = window
        self.shift = shift
        self.checkpointing = checkpointing
        blocks = [WindowBlock(dim, num_heads, window, mlp_ratio, rate) for rate in drop_path]
        self.blocks = nn.ModuleList(blocks)
        self.downsample = None if last else PatchMerging(dim)

    def forward(self, x, source=None):
        # cut once for all blocks: with shift every other block uses the shifted windows
        height, width = x.shape[1:3]
        cuts = []
        for shifted in (False, True) if self.shift else (False,):
            cuts.append(cut_windows(height, width, self.window, shifted, source, x.device))

        for i, block in enumerate(self.blocks):
            windows = cuts[i % len(cuts)]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, windows, use_reentrant=False)
            else:
                x = block(x, windows)
        return x


class NormedPatchEmbed(PatchEmbed):
    """Patch embedding and LayerNorm: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__(patch_size, in_chans, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)

    def forward(self, x):
        return self.norm(super().forward(x))


# ---------------------------------------------------------------------------- encoder


class HierarchicalViT(nn.Module):
    """MixMIM's encoder: (B, C, H, W) -> logits (B, num_classes), or features (B, D) if num_classes=0.

    img_size       int or (H, W), multiples of `stride`. Other input sizes work too: the position table is
                   resized on the fly, windows are padded at the border and clamped to a smaller map
    embed_dim      width of the first stage; it doubles from stage to stage
    depths, num_heads, window_size   one number per stage. A window larger than its map is clamped to it
    drop_path      stochastic depth at the last block, growing linearly from 0 at the first
    shift          every other block cuts its windows half a window further, as in Swin
    checkpointing  recompute each block in the backward pass: less memory, about a third more time
    """

    def __init__(
        self,
        img_size=224,
        patch_size=4,
        in_chans=3,
        num_classes=1000,
        embed_dim=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        window_size=(14, 14, 14, 7),
        mlp_ratio=4.0,
        drop_path=0.0,
        shift=False,
        checkpointing=False,
    ):
        super().__init__()
        if not len(depths) == len(num_heads) == len(window_size):
            raise ValueError(
                f"depths {depths}, num_heads {num_heads} and window_size {window_size} must have "
                "one number per stage each"
            )
        last = len(depths) - 1
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, embed_dim
        self.depths = tuple(depths)
        self.num_heads = tuple(num_heads)
        self.window_size = tuple(window_size)
        self.stride = patch_size * 2**last  # pixels per token of the last stage
        self.num_features = embed_dim * 2**last  # width of the last stage
        self.grid_size = self.grid(*self.img_size)  # (gh, gw) tokens of the first stage

        # (1): positions stay fixed, also in fine-tuning
        self.patch_embed = NormedPatchEmbed(patch_size, in_chans, embed_dim)  # PyTorch's initialization
        table = sincos_pos_embed(embed_dim, *self.grid_size, cls_token=False)
        self.absolute_pos_embed = nn.Parameter(table[None], requires_grad=False)

        # stages: each has half the resolution and twice the width of the one before
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").split(self.depths)
        self.layers = nn.ModuleList()
        for s in range(len(depths)):
            dim = embed_dim * 2**s
            window = tuple(min(window_size[s], side // 2**s) for side in self.grid_size)
            if dim % num_heads[s]:
                raise ValueError(f"num_heads {num_heads[s]} of stage {s} does not divide its width {dim}")
            stage = Stage(
                dim, num_heads[s], window, mlp_ratio, rates[s].tolist(), shift, checkpointing, last=s == last
            )
            self.layers.append(stage)

        self.norm = nn.LayerNorm(self.num_features, eps=1e-5)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def forward_stages(self, x, grid, source=None):
        """Tokens (B, N, D) without positions -> the map (B, h, w, d) of every stage, before merging.

        grid    (gh, gw) of the tokens
        source  (b, h, w) bool on the grid of the LAST stage, b = 1 or B: tokens attend only to tokens with
                the same value, in all stages
        """
        pos = self.absolute_pos_embed
        if grid != self.grid_size:
            pos = resize_pos_embed(pos, self.grid_size, grid, prefix=0)
        x = rearrange(x + pos, "b (h w) d -> b h w d", h=grid[0])

        maps = []
        scale = self.stride // self.patch_size
        for stage in self.layers:
            # the source of the last stage, enlarged to the map of this one
            x = stage(x, None if source is None else enlarge_mask(source, scale))
            maps.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
                scale = scale // 2
        return maps

    def forward_maps(self, x):
        """Maps of all stages, fine to coarse, (B, d, h, w) each, not normalized: a feature pyramid."""
        grid = self.grid(*x.shape[-2:])  # the convolution would silently cut off what does not fit
        maps = self.forward_stages(self.patch_embed(x), grid)
        return [rearrange(m, "b h w d -> b d h w") for m in maps]

    def forward_features(self, x):
        """Tokens (B, N, D) of the last stage after the last norm."""
        last = self.forward_maps(x)[-1]
        return self.norm(rearrange(last, "b d h w -> b (h w) d"))

    def forward_head(self, x):
        """Tokens (B, N, D) -> their mean -> logits (B, num_classes)."""
        return self.head(x.mean(dim=1))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes):
        """Attach a new head; num_classes=0 removes it, and the model returns features."""
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            device = self.norm.weight.device
            self.head = nn.Linear(self.num_features, num_classes, device=device)
            init_weights(self.head)

    def grid(self, height, width):
        """(gh, gw): the tokens of the first stage for an image of height x width pixels."""
        stride = self.stride
        if height % stride or width % stride:
            smaller = [max(side // stride, 1) * stride for side in (height, width)]
            raise ValueError(
                f"img_size {height}x{width} is not a multiple of {stride}, the stride of the last stage; "
                f"try {smaller[0]}x{smaller[1]}"
            )
        return height // self.patch_size, width // self.patch_size


if __name__ == "__main__":
    # A token depends on the pixels that have a gradient. Windows are 4 x 4 tokens.
    for shift in (False, True):
        torch.manual_seed(0)
        encoder = create_mixmim("mixmim_demo", window_size=(4, 4, 4), shift=shift)
        image = torch.rand(1, 3, 64, 64, requires_grad=True)
        for stage, features in enumerate(encoder.forward_maps(image)):
            channels, side = features.shape[1:3]
            token = features[0, :, side // 2, side // 2]
            gradient, = torch.autograd.grad(token.square().sum(), image, retain_graph=True)
            seen = gradient.any(dim=1).float().mean()
            print(f"shift {shift!s:5} stage {stage}: {side:2} x {side:2} tokens, {channels:3} channels; "
                  f"the middle token sees {seen:4.0%} of the image")
    print("(expect 6 %, 25 %, 100 % without shift; 25 %, 100 %, 100 % with shift)")

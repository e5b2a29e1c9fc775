"""MixMIM: fill the holes of one image with another image, then take the two apart.

A mask symbol in the encoder's input costs compute and never occurs again after pre-training.
MixMIM hides patches of image A by putting image B's patches there: the encoder works on real
tokens everywhere, and one pass serves two puzzles. In mixture k image k is the host (A), and another
image p(k) of the batch is the guest (B) that fills its holes. Three things look like bugs and are
the idea:

    partner     p(k) is never k: an image mixed with itself would have no holes
    complement  what is hidden of the host is exactly what is visible of the guest: one mask M for both
    stitching   an image's hidden patches are predicted from the mixture in which it was the host, its
                other patches from the one in which it was the guest: together each patch counts once

    x_k = (1 - M) e_k + M e_p(k),  then + pos              (1)   e = patch embedding; M = 1: from the partner
    token i attends to token j  only if  M_i = M_j         (2)   same source, in every window of every stage
    a_k = (1 - M) D z_k + M m,   b_k = M D z_k + (1 - M) m (3)   z = Encoder(x); m = mask token; un-mixed
    y_k = M dec(a_k) + (1 - M) dec(b_q(k)),  p(q(k)) = k   (4)   q(k): the mixture in which k was the guest
    L   = mean over all patches of (y_k - x~_k)^2          (5)   x~: masking.py

The encoder is hierarchical: windows of tokens attend among themselves, and 2 x 2 tokens merge
between stages. M is drawn on the coarsest grid and enlarged, so no merge ever mixes two sources.
The encoder comes first; whoever wants the idea alone may start at "objective".

Source: Liu et al. 2022, arXiv 2205.13137; windows and relative bias of Swin, Liu et al. 2021,
arXiv 2103.14030. Written from the published descriptions; the numbering of the equations is ours.
Details follow the official code's behaviour, whose numbers are met (tests/golden/mixmim_*). We
differ: in an odd batch the official flip pairs the middle image with itself, here it joins a
cycle of three.
Needs: torch, torchvision, einops; vit.py, masking.py (and shapes.py for the demo).
Demo: python mixmim.py (half a minute on a CPU) overfits 8 scenes and saves mixmim_demo.png.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from masking import enlarge_mask, masked_loss, mix_mask, normalize_patches, patch_statistics, patchify, unpatchify
from vit import (Block, Mlp, PatchEmbed, ViT, attention, init_weights, relative_position_index, resize_pos_embed,
                 sincos_pos_embed)

PRESETS = {  # keyword arguments of HierarchicalViT
    "mixmim_b": dict(embed_dim=128, num_heads=(4, 8, 16, 32)),
    "mixmim_l": dict(embed_dim=192, num_heads=(6, 12, 24, 48)),
    "mixmim_h": dict(embed_dim=352, num_heads=(11, 22, 44, 88)),
    "mixmim_demo": dict(img_size=64, embed_dim=48, depths=(2, 2, 4), num_heads=(2, 4, 8), window_size=(8, 8, 4)),
}


def create_mixmim(name, **overrides):
    """The hierarchical encoder by preset name: create_mixmim("mixmim_b", img_size=384, window_size=(16, 16, 24, 12))."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(PRESETS)}")
    return HierarchicalViT(**{**PRESETS[name], **overrides})


# ---------------------------------------------------------------------------- encoder


class Windows(NamedTuple):
    """How a stage's map (B, H, W, D) is cut; the same for all its blocks of one kind."""

    size: tuple  # (wh, ww) tokens
    pad: tuple  # rows and columns added at the bottom and right, so that the windows fit
    shift: tuple  # the map is rolled by this before cutting (Swin); (0, 0) in MixMIM
    mask: torch.Tensor | None  # (b, windows, 1, N, N), 0 or -inf; b = 1 or B. None where all may see all


def cut_windows(height, width, window, shifted, source, device):
    """Who may attend to whom: one group number per token, and attention stays within equal numbers.

    Three reasons to be apart, one mechanism: another image's token (source), padding, and tokens that only
    the shift's wrap-around made neighbours. source (b, H, W) bool or None.
    """
    wh, ww = min(window[0], height), min(window[1], width)  # this image may be smaller than the one it was built for
    shift = (0, 0)
    if shifted:  # where one window covers the map there is nothing to shift
        shift = (wh // 2 if height > wh else 0, ww // 2 if width > ww else 0)
    pad = (-height % wh, -width % ww)
    if source is None and not any(pad) and not any(shift):
        return Windows((wh, ww), pad, shift, None)
    group = torch.zeros(1, height, width, dtype=torch.long, device=device) if source is None else source.long()
    group = F.pad(group, (0, pad[1], 0, pad[0]), value=2)  # 0 host, 1 guest, 2 padding
    group = group.roll((-shift[0], -shift[1]), (1, 2))
    rows = torch.arange(height + pad[0], device=device) >= height + pad[0] - shift[0]  # wrapped around
    cols = torch.arange(width + pad[1], device=device) >= width + pad[1] - shift[1]
    group = 4 * group + 2 * rows[:, None] + cols  # the two low bits: wrapped around in rows, in columns
    group = rearrange(group, "b (nh wh) (nw ww) -> b (nh nw) (wh ww)", wh=wh, ww=ww)
    return Windows((wh, ww), pad, shift, group_mask(group)[:, :, None])


def group_mask(group):
    """(2) as a term of the attention logits: (..., N) group numbers -> (..., N, N), 0 within a group, else -inf.

    exp(-inf) is exactly 0: what is masked cannot leak, not even in the last bit. Every token sees itself.
    """
    apart = group[..., :, None] != group[..., None, :]
    return torch.zeros(apart.shape, device=group.device).masked_fill(apart, -torch.inf)


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learnt bias per head and 2-D offset: (B, H, W, D) -> (B, H, W, D)."""

    def __init__(self, dim, num_heads, window):
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        index = relative_position_index(*window)[1:, 1:]  # no class token
        self.relative_position_bias_table = nn.Parameter(torch.zeros(int(index.max()) + 1, num_heads))
        self.register_buffer("relative_position_index", index, persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias(self, wh, ww):
        """(h, N, N). In a window smaller than the table's, equal offsets read equal rows."""
        index = self.relative_position_index
        if (wh, ww) != self.window:
            index = index.view(*self.window, *self.window)[:wh, :ww, :wh, :ww].reshape(wh * ww, wh * ww)
        table = F.embedding(index.flatten(), self.relative_position_bias_table)  # its backward is faster than indexing's
        return rearrange(table, "(n m) h -> h n m", n=wh * ww).contiguous()

    def forward(self, x, windows):
        wh, ww = windows.size
        nh, nw = x.shape[1] // wh, x.shape[2] // ww
        # windows and heads become one dimension, so that the mask need not be repeated over the batch
        q, k, v = (rearrange(part, "b (nh wh) (nw ww) (h d) -> b (nh nw h) (wh ww) d", wh=wh, ww=ww, h=self.num_heads)
                   for part in self.qkv(x).chunk(3, dim=-1))
        bias = self.bias(wh, ww)
        if windows.mask is not None:
            bias = (bias + windows.mask).flatten(1, 2)  # (b, windows h, N, N)
        elif nh * nw > 1:
            bias = bias.repeat(nh * nw, 1, 1)
        x = attention(q, k, v, bias)
        return self.proj(rearrange(x, "b (nh nw h) (wh ww) d -> b (nh wh) (nw ww) (h d)", nh=nh, nw=nw, wh=wh))


class WindowBlock(nn.Module):
    """Pre-norm block whose attention stays inside windows: (B, H, W, D) -> (B, H, W, D)."""

    def __init__(self, dim, num_heads, window, mlp_ratio, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, x, windows):
        height, width = x.shape[1:3]
        (down, right), shift = windows.pad, windows.shift
        y = self.norm1(x)
        if down or right:
            y = F.pad(y, (0, 0, 0, right, 0, down))
        if any(shift):
            y = y.roll((-shift[0], -shift[1]), (1, 2))
        y = self.attn(y, windows)
        if any(shift):
            y = y.roll(shift, (1, 2))
        x = x + self.drop_path(y[:, :height, :width])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """2 x 2 tokens become one of twice the width: (B, H, W, D) -> (B, H / 2, W / 2, 2 D)."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-5)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        # (row, column) offsets in the order 00, 10, 01, 11
        return self.reduction(self.norm(rearrange(x, "b (h p) (w q) d -> b h w (q p d)", p=2, q=2)))


class Stage(nn.Module):
    """Blocks at one resolution. `downsample` leads to the next; it lives here for its name in checkpoints, the encoder calls it."""

    def __init__(self, dim, num_heads, window, mlp_ratio, drop_path, shift, checkpointing, last):
        super().__init__()
        self.window, self.shift, self.checkpointing = window, shift, checkpointing
        self.blocks = nn.ModuleList(WindowBlock(dim, num_heads, window, mlp_ratio, rate) for rate in drop_path)
        self.downsample = None if last else PatchMerging(dim)

    def forward(self, x, source=None):
        kinds = [False, True] if self.shift else [False]  # blocks take turns
        cuts = [cut_windows(*x.shape[1:3], self.window, shifted, source, x.device) for shifted in kinds]  # once for all blocks
        for i, block in enumerate(self.blocks):
            windows = cuts[i % len(cuts)]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, windows, use_reentrant=False)
            else:
                x = block(x, windows)
        return x


class NormedPatchEmbed(PatchEmbed):
    """(B, C, H, W) -> (B, N, D), row by row, with a LayerNorm."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__(patch_size, in_chans, embed_dim)  # MixMIM leaves the convolution as PyTorch initialises it
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)

    def forward(self, x):
        return self.norm(super().forward(x))


class HierarchicalViT(nn.Module):
    """MixMIM's encoder: (B, C, H, W) -> logits (B, num_classes), or features (B, D) if num_classes=0.

    img_size     int or (H, W), multiples of `stride`, and so may be any image's: the position table is resized on the fly,
                 windows are padded at the border, on a map smaller than they are they read the middle of their bias table
                 (load_pretrained into a model of that size resamples it instead)
    embed_dim    width of the first stage; it doubles from stage to stage
    depths, num_heads, window_size   one number per stage. A window larger than the map at img_size becomes the map
    drop_path    stochastic depth at the last block, growing linearly from 0 at the first
    shift        every other block cuts its windows half a window further, as in Swin; the fixed positions stay
    checkpointing recompute each block in the backward pass: less memory, about a third more time

    ValueError if sizes do not divide.
    """

    def __init__(self, img_size=224, patch_size=4, in_chans=3, num_classes=1000, embed_dim=128, depths=(2, 2, 18, 2),
                 num_heads=(4, 8, 16, 32), window_size=(14, 14, 14, 7), mlp_ratio=4.0, drop_path=0.0, shift=False,
                 checkpointing=False):
        super().__init__()
        for name, value in (("depths", depths), ("num_heads", num_heads), ("window_size", window_size)):
            if not isinstance(value, (tuple, list)):
                raise ValueError(f"{name} {value!r} must be a tuple with one number per stage, such as (2, 2, 18, 2)")
        if not isinstance(img_size, int) and not (isinstance(img_size, (tuple, list)) and len(img_size) == 2):
            raise ValueError(f"img_size {img_size!r} must be a whole number or (height, width)")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path {drop_path} must lie in [0, 1)")
        stages = len(depths)
        if len(num_heads) != stages or len(window_size) != stages:
            raise ValueError(f"depths {tuple(depths)}, num_heads {tuple(num_heads)} and window_size {tuple(window_size)} must have one "
                             "number per stage each")
        if min(patch_size, in_chans, embed_dim, *depths, *num_heads, *window_size) < 1:
            raise ValueError(f"patch_size {patch_size}, in_chans {in_chans}, embed_dim {embed_dim}, depths {tuple(depths)}, num_heads "
                             f"{tuple(num_heads)} and window_size {tuple(window_size)} must all be at least 1")
        for stage, heads in enumerate(num_heads):
            if embed_dim * 2**stage % heads:
                raise ValueError(f"width {embed_dim * 2**stage} of stage {stage} (embed_dim {embed_dim}, doubled {stage} times) is not a "
                                 f"multiple of its num_heads {heads}")
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, embed_dim
        self.depths, self.num_heads, self.window_size = tuple(depths), tuple(num_heads), tuple(window_size)
        self.stride = patch_size * 2 ** (stages - 1)  # pixels per token of the last stage
        self.num_features = embed_dim * 2 ** (stages - 1)
        self.grid_size = self.grid(*self.img_size)  # (gh, gw) tokens of the first stage

        self.patch_embed = NormedPatchEmbed(patch_size, in_chans, embed_dim)
        table = sincos_pos_embed(embed_dim, *self.grid_size, cls_token=False)
        self.absolute_pos_embed = nn.Parameter(table[None], requires_grad=False)  # stays fixed, also in fine-tuning
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").split(depths)
        self.layers = nn.ModuleList()
        for s in range(stages):
            window = tuple(min(window_size[s], side // 2**s) for side in self.grid_size)
            self.layers.append(Stage(embed_dim * 2**s, num_heads[s], window, mlp_ratio, rates[s].tolist(), shift, checkpointing,
                                     last=s == stages - 1))
        self.norm = nn.LayerNorm(self.num_features, eps=1e-5)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes):
        """A fresh head; num_classes=0 removes it, features come out."""
        if num_classes < 0:
            raise ValueError(f"num_classes {num_classes} must be 0 (features) or more")
        self.num_classes = num_classes
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=self.norm.weight.device)
            init_weights(self.head)
        else:
            self.head = nn.Identity()

    def grid(self, height, width):
        """(gh, gw), the patches of an image of this size."""
        for name, size in (("height", height), ("width", width)):
            if size < self.stride or size % self.stride:
                lower = size // self.stride * self.stride
                fits = f"{lower} or {lower + self.stride}" if lower else f"{self.stride}"
                raise ValueError(f"img_size {size} ({name}) is not a multiple of {self.stride}, the stride of the last of "
                                 f"{len(self.depths)} stages with patch_size {self.patch_size}; try {fits}")
        return height // self.patch_size, width // self.patch_size

    def embed(self, x):
        """(B, C, H, W) -> tokens (B, N, D) of the first stage, not yet with their positions."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images (B, {self.in_chans}, H, W), got {tuple(x.shape)}; in_chans is {self.in_chans}")
        self.grid(*x.shape[-2:])
        return self.patch_embed(x)

    def forward_stages(self, x, grid, source=None):
        """Tokens (B, N, D) without positions -> every stage's map (B, h, w, d), before the merging that follows it.

        grid    (gh, gw) of the tokens
        source  (b, h, w) bool on the LAST stage's grid, b = 1 or B: attention only among equal ones, in all stages
        """
        pos = self.absolute_pos_embed
        if grid != self.grid_size:
            pos = resize_pos_embed(pos, self.grid_size, grid, prefix=0)
        x = rearrange(x + pos, "b (h w) d -> b h w d", h=grid[0])
        maps = []
        for stage in self.layers:
            scale = 2 ** (len(self.layers) - 1 - len(maps))
            x = stage(x, None if source is None else enlarge_mask(source, scale))
            maps.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def forward_maps(self, x):
        """Feature maps of all stages, fine to coarse, (B, d, h, w) each, not normalised: for detection and segmentation."""
        maps = self.forward_stages(self.embed(x), self.grid(*x.shape[-2:]))
        return [rearrange(m, "b h w d -> b d h w") for m in maps]

    def forward_features(self, x):
        """Tokens (B, N, D) of the last stage after the last norm."""
        return self.norm(self.forward_stages(self.embed(x), self.grid(*x.shape[-2:]))[-1].flatten(1, 2))

    def forward_head(self, x):
        """Tokens (B, N, D) -> their mean -> logits (B, num_classes)."""
        return self.head(x.mean(dim=1))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


# ---------------------------------------------------------------------------- objective


def choose_partners(batch):
    """Whose patches fill image k's holes: p (B,), a permutation in which nobody is his own partner.

    Pairs from the outside in, as the official code flips the batch. In an odd batch that would leave the middle
    image alone with itself, so the middle three form a cycle.
    """
    if batch < 2:
        raise ValueError(f"MixMIM mixes images with each other, but the batch holds {batch}; use a batch of at least 2")
    partner = torch.arange(batch).flip(0)
    if batch % 2:
        middle = torch.arange(batch // 2 - 1, batch // 2 + 2)
        partner[middle] = middle.roll(1)
    return partner


def first_of_cycle(partner):
    """(B,) -> (B,): the smallest member of each image's cycle k, p(k), p(p(k)), ..., none longer than three."""
    return torch.minimum(torch.minimum(torch.arange(len(partner)), partner), partner[partner])


class MixMIMOutput(NamedTuple):
    loss: torch.Tensor  # scalar
    # (B, N, P): image k at every position, each from the mixture in which it was hidden. In the contrasts that predict only the
    # host (dual=False, fill="mask") it means something only where mask = 1
    pred: torch.Tensor
    mask: torch.Tensor  # (B, N), 1 = removed from image k in mixture k, filled by the partner's patch
    partner: torch.Tensor  # (B,) whose patches those are (fill="mask": k itself)


class MixMIM(nn.Module):
    """Mixed and masked image modelling around a hierarchical or a plain ViT.

    encoder           a HierarchicalViT, or a ViT: that loses its class token, which would read both sources, and its
                      position table becomes the fixed sin-cos one, frozen. Either loses its head
    norm_pix_loss     predict patches normalised to mean 0, variance 1 instead of raw pixels
    mask_per_cycle    False: one mask per batch, as the official code. True: one for each cycle of partners
                      (images that share a mixture must share its mask, or (4) would leave gaps)
    fill              "mix"; or "mask", a contrast: a learnt symbol fills the holes, every image is alone and predicted
                      at its holes only (as SimMIM); dual and masked_attention then mean nothing
    dual              False, a contrast: only the host of each mixture is predicted, at its holes
    masked_attention  False, a contrast: both sources attend to each other

    out = model(imgs) has out.loss, out.pred (B, N, P), out.mask (B, N), out.partner (B,). N counts the patches of the
    last stage: encoder.stride pixels wide, 32 for mixmim_b. ValueError where sizes do not fit.
    """

    def __init__(self, encoder, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16, norm_pix_loss=True,
                 mask_per_cycle=False, fill="mix", dual=True, masked_attention=True):
        super().__init__()
        if decoder_num_heads < 1 or decoder_embed_dim % decoder_num_heads:
            raise ValueError(f"decoder_embed_dim {decoder_embed_dim} is not a multiple of decoder_num_heads {decoder_num_heads}")
        if fill not in ("mix", "mask"):
            raise ValueError(f"fill {fill!r} is unknown; choose 'mix' or 'mask'")
        self.patch_size = encoder.stride  # of what is hidden and predicted
        self.grid_size = tuple(side // self.patch_size for side in encoder.img_size)
        table = sincos_pos_embed(decoder_embed_dim, *self.grid_size, cls_token=False)
        # every check is behind us: only now is the encoder changed
        if isinstance(encoder, ViT):
            encoder.drop_class_token()
            encoder.fix_pos_embed()
        encoder.reset_classifier(0)
        self.encoder, self.norm_pix_loss, self.mask_per_cycle = encoder, norm_pix_loss, mask_per_cycle
        self.fill = fill
        self.dual = dual and fill == "mix"
        self.masked_attention = masked_attention and fill == "mix"

        self.decoder_embed = nn.Linear(encoder.num_features, decoder_embed_dim)
        # "mix": stands in the decoder for what was hidden. "mask": stands in the encoder's input
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim if fill == "mix" else encoder.embed_dim))
        self.decoder_pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads, norm_eps=1e-5) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-5)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.patch_size**2 * encoder.in_chans)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def choose_mask(self, partner, mask_ratio, noise, mask):
        """The mask as bool (1 or B, N), True = from the partner; checked."""
        n, cycle = self.grid_size[0] * self.grid_size[1], first_of_cycle(partner).to(self.mask_token.device)
        rows = (len(partner),) if self.mask_per_cycle else ()
        for name, given, fitting in (("noise", noise, [(*rows, n)]), ("mask", mask, [(*rows, n), (*rows, *self.grid_size)])):
            if given is not None and tuple(given.shape) not in fitting:
                raise ValueError(f"{name} {tuple(given.shape)} must be {' or '.join(map(str, fitting))}: one row "
                                 + ("per image (mask_per_cycle=True)" if rows else "for the whole batch (mask_per_cycle=False)"))
        if mask is not None:
            mask = mask.to(cycle.device).reshape(-1, n).bool()
            if bool((mask.all(dim=1) | ~mask.any(dim=1)).any()):
                raise ValueError(f"mask must hide some of the {n} positions, not all or none")
            if rows and not torch.equal(mask, mask[cycle]):
                raise ValueError("mask must be the same for all images of a cycle of partners, see choose_partners")
            return mask
        if noise is None:
            noise = torch.rand(*rows, n, device=cycle.device)
        mask = mix_mask(noise.to(cycle.device), mask_ratio).view(-1, n)
        return mask[cycle] if rows else mask

    def encode(self, x, grid, mask):
        """(2): tokens (B, N', D') with their holes filled -> (B, N, D) normalised; grid (gh, gw) of N'."""
        source = mask if self.masked_attention else None
        if isinstance(self.encoder, ViT):
            bias = None if source is None else group_mask(source)[:, None]  # (b, 1, N, N)
            return self.encoder.fc_norm(self.encoder.forward_blocks(x + self.encoder.pos_embed, bias=bias))
        if source is not None:
            source = source.view(-1, *self.grid_size)
        return self.encoder.norm(self.encoder.forward_stages(x, grid, source)[-1].flatten(1, 2))

    def decode(self, x):
        """(B, N, decoder_embed_dim) -> (B, N, P)."""
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))

    def forward(self, imgs, mask_ratio=0.5, noise=None, mask=None):
        """imgs (B, C, H, W) -> MixMIMOutput.

        noise (N,): fixes the mask, the smallest are taken from the partner; mask (N,) or (gh, gw) gives it outright,
        1 = from the partner. With mask_per_cycle=True both have B rows, and the first image of a cycle decides.
        """
        if imgs.ndim != 4 or imgs.shape[1] != self.encoder.in_chans:
            raise ValueError(f"expected images (B, {self.encoder.in_chans}, H, W), got {tuple(imgs.shape)}; in_chans is "
                             f"{self.encoder.in_chans}")
        if tuple(imgs.shape[-2:]) != self.encoder.img_size:
            raise ValueError(f"images are {imgs.shape[-2]}x{imgs.shape[-1]}, the model pre-trains at img_size "
                             f"{self.encoder.img_size[0]}x{self.encoder.img_size[1]}; resize them or build the encoder for their size")
        partner = choose_partners(len(imgs)) if self.fill == "mix" else torch.arange(len(imgs))
        mask = self.choose_mask(partner, mask_ratio, noise, mask)
        guest_in = partner.argsort().to(imgs.device)  # q(k) of (4): for pairs the partner again
        partner = partner.to(imgs.device)
        from_b = mask[..., None]  # (b, N, 1), True where mixture k holds the guest p(k); elsewhere the host k

        e, grid = self.encoder.patch_embed(imgs), self.encoder.grid_size
        scale = grid[0] // self.grid_size[0]
        from_b_fine = enlarge_mask(mask.view(-1, *self.grid_size), scale).flatten(1)[..., None]
        fill = e[partner] if self.fill == "mix" else self.mask_token.to(e.dtype)  # partner
        z = self.encode(torch.where(from_b_fine, fill, e), grid, mask)  # (1): guests get the position of those they replace
        z = self.decoder_embed(z)

        target = patchify(imgs, self.patch_size)
        if self.norm_pix_loss:
            target = normalize_patches(target)
        mask = mask.float().expand(len(imgs), -1)
        if self.fill == "mask":
            pred = self.decode(z)
            return MixMIMOutput(masked_loss(pred, target, mask), pred, mask, partner)
        hole = self.mask_token.to(z.dtype)
        a = torch.where(from_b, hole, z)  # (3): the host's tokens, holes where the guest is
        if not self.dual:
            pred = self.decode(a)
            return MixMIMOutput(masked_loss(pred, target, mask), pred, mask, partner)
        b = torch.where(from_b, z, hole)  # complement: the guest's tokens, by the same mask
        of_host, of_guest = self.decode(torch.cat([a, b])).chunk(2)
        # stitching (4): what mixture k hid of image k is predicted there, as the host; the rest was hidden in the mixture where
        # k was the guest. Both have the same mask, so together they cover k once, and no prediction has seen what it predicts
        pred = torch.where(from_b, of_host, of_guest[guest_in])
        return MixMIMOutput(masked_loss(pred, target, torch.ones_like(mask)), pred, mask, partner)  # (5)

    @torch.no_grad()
    def reconstruct(self, imgs, mask_ratio=0.5, noise=None, mask=None, use_true_patch_statistics=False):
        """The predicted images (B, C, H, W): every patch from the decoder, no true pixel in it.

        fill="mask" and dual=False are trained at out.mask only; elsewhere their pictures mean nothing. Normalised
        predictions need each patch's mean and std back. By default they are guessed from the patches near it that were
        visible in the same mixture; use_true_patch_statistics=True takes the true ones, which LEAK part of the answer.
        """
        out = self(imgs, mask_ratio, noise, mask)
        pred = out.pred.float()
        if self.norm_pix_loss:
            # k is hidden at the mask in one mixture and at its complement in the other
            as_host, as_guest = (patch_statistics(imgs, self.patch_size, hidden, use_true_patch_statistics)
                                 for hidden in (out.mask, 1 - out.mask))
            mean, std = (torch.where(out.mask[..., None] > 0, host, guest) for host, guest in zip(as_host, as_guest, strict=True))
            pred = pred * std + mean
        return unpatchify(pred, self.patch_size, self.grid_size)


def convert_official(state_dict):
    """The official pre-training or fine-tuning state dict under our names, for load_state_dict of MixMIM or HierarchicalViT.

    The official index tables are left out: the model computes its own.
    """
    state = {key: value for key, value in state_dict.items() if not key.endswith("relative_position_index")}
    ours = ("mask_token", "decoder_")
    if not any(key.startswith(ours) for key in state):
        return state
    return {key if key.startswith(ours) else f"encoder.{key}": value for key, value in state.items()}


if __name__ == "__main__":
    from masking import hide, paste
    from shapes import save_grid, shapes

    torch.manual_seed(0)
    encoder = create_mixmim("mixmim_demo")
    model = MixMIM(encoder, decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=3)
    imgs, steps = shapes(8, img_size=64), 300
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps + 1)
    for step in range(steps + 1):
        loss = model(imgs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:3d}  loss, every patch hidden once {loss.item():.2f}")
    print("(predicting each patch's mean scores 1.00; expect below 0.35 at the end)")

    model.eval()
    noise = torch.rand(16)  # 4 x 4 places
    out = model(imgs, noise=noise)
    other = imgs.clone()
    other[out.partner[0]] = torch.rand_like(imgs[0])
    hidden, moved = out.mask[0] > 0, {}
    for masked in (False, True):
        model.masked_attention = masked
        before, after = (model(x, noise=noise).pred[0][hidden] for x in (imgs, other))
        moved[masked] = (before - after).abs().max().item()
    print(f"other pixels in B: what A's mixture predicts of A moves by {moved[True]:.2g} with masked attention (expect 0), by "
          f"{moved[False]:.2g} without")

    # overfitted structure; brightness and contrast are not predicted, so take each patch's true mean and std
    a, b, p = imgs, imgs[out.partner], model.patch_size
    pred = model.reconstruct(imgs, noise=noise, use_true_patch_statistics=True)
    columns = {
        "image A: true pixels": a,
        "image B, A's partner: true pixels": b,
        "mixture: the model's view": paste(a, b, out.mask, p),
        "complement: what is left of A": hide(a, out.mask, p),
        "complement: what is left of B": hide(b, 1 - out.mask, p),
        "predicted here of A (TRUE mean, std)": hide(pred, 1 - out.mask, p),
        "predicted here of B (TRUE mean, std)": hide(pred[out.partner], out.mask, p),
        "A', stitched from two mixtures": pred,
        "B', stitched from two mixtures": pred[out.partner],
    }
    save_grid("mixmim_demo.png", {caption: pictures[:4] for caption, pictures in columns.items()})  # each pair once
    print("saved mixmim_demo.png")

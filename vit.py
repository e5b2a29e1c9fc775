"""ViT: an image is a sentence of patches.

Cut the image into squares, embed each one linearly, add where it came from, and let
self-attention blocks mix the sequence. One class token, or the mean of the patch
tokens, stands for the image.

    z_0 = [cls ; W x_1 + b ; ... ; W x_N + b] + pos               (1)
    z   = z + Attention(LN z),  then  z = z + MLP(LN z)           (2)   pre-norm block
    Attention(z) = softmax(q k^T / sqrt(d) + bias) v, then proj   (3)   bias: BEiT only

Deep and narrow (S-54: 54 blocks) is the same code as wide and shallow (B: 12 blocks).

Source: Dosovitskiy et al. 2021, arXiv 2010.11929; presets S-54, B-24, B-48 from MIRL,
arXiv 2309.14136; initialisation and sin-cos table of MAE, arXiv 2111.06377; layer scale
and relative position bias of BEiT, arXiv 2106.08254. Written from the papers; parameter
names are timm's and MAE's, so published checkpoints load by key (see checkpoints.py).
Needs: torch, torchvision, einops.
Demo: python vit.py (10 s on a CPU) learns to find a cross among dots, and prints what
the class token looks at.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

PRESETS = {  # keyword arguments of ViT
    "vit_demo": dict(img_size=32, patch_size=4, embed_dim=96, depth=12, num_heads=3),
    "vit_ti16": dict(patch_size=16, embed_dim=192, depth=12, num_heads=3),
    # Two conventions for S share every shape but not the outputs. This is DeiT's and timm's, 6 heads
    # of 64; MoCo v3's and MIRL's ViT-S has 12 heads of 32: create_vit("vit_s16", num_heads=12).
    "vit_s16": dict(patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "vit_b16": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "vit_l16": dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16),
    "vit_h14": dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16),
    "vit_s54": dict(patch_size=16, embed_dim=384, depth=54, num_heads=12),  # MIRL: 12 heads, also for S
    "vit_b24": dict(patch_size=16, embed_dim=768, depth=24, num_heads=12),
    "vit_b48": dict(patch_size=16, embed_dim=768, depth=48, num_heads=12),
}


def create_vit(name, **overrides):
    """A ViT by preset name: create_vit("vit_s54", img_size=224, num_classes=1000)."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(PRESETS)}")
    return ViT(**{**PRESETS[name], **overrides})


def attention(q, k, v, bias=None):
    """softmax(q k^T / sqrt(d) + bias) v, by the fused kernel where it is the fastest.

    q (B, h, N, d); k, v (B, h, M, d); bias broadcasts to (B, h, N, M) -> (B, h, N, d)
    """
    on_cpu = q.device.type == "cpu"
    # On a CPU the bf16 kernel is several times slower than the fp32 one below about 500 tokens,
    # and autocast would cast back: step out of it for this one call.
    if on_cpu and q.dtype == torch.bfloat16 and k.shape[2] < 512:
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            return attention(q.float(), k.float(), v.float(), bias).to(q.dtype)
    if bias is not None:
        bias = bias.to(q.dtype)
        if on_cpu and bias.requires_grad:  # the fused CPU kernel has no gradient for a bias; its stand-in is slower than this
            attn = (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(dim=-1)
            return attn.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Attention(nn.Module):
    """Multi-head self-attention (3). window=(gh, gw) adds a relative position bias of this block's own."""

    def __init__(self, dim, num_heads, window=None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if window is not None:
            index = relative_position_index(*window)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(int(index.max()) + 1, num_heads))
            self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x, bias=None, return_attn=False):
        # split before turning: the three gradients are then joined in one copy, not in two
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        if hasattr(self, "relative_position_bias_table"):
            own = rearrange(self.relative_position_bias_table[self.relative_position_index], "n m h -> h n m")
            bias = own if bias is None else bias + own
        if not return_attn:
            x = attention(q, k, v, bias)
            return self.proj(rearrange(x, "b h n d -> b n (h d)"))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        attn = (logits if bias is None else logits + bias).float().softmax(dim=-1)
        x = attn.to(v.dtype) @ v
        return self.proj(rearrange(x, "b h n d -> b n (h d)")), attn


class RelativePositionBias(nn.Module):
    """BEiT's bias shared by all blocks: one learnt number per head and 2-D offset, () -> (h, 1 + N, 1 + N)."""

    def __init__(self, window, num_heads):
        super().__init__()
        index = relative_position_index(*window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(int(index.max()) + 1, num_heads))
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self):
        return rearrange(self.relative_position_bias_table[self.relative_position_index], "n m h -> h n m")


def relative_position_index(gh, gw):
    """Which row of the bias table each pair of tokens reads, (1 + N, 1 + N), class token first.

    Rows 0 .. (2 gh - 1)(2 gw - 1) - 1 are the offsets, row-major; then cls to token, token to cls,
    cls to cls, as in BEiT's code.
    """
    with torch.device("cpu"):  # a few numbers, needed for the table's size even when the model is on meta
        y, x = torch.meshgrid(torch.arange(gh), torch.arange(gw), indexing="ij")
        y, x = y.flatten(), x.flatten()
        offsets = (2 * gh - 1) * (2 * gw - 1)
        index = torch.empty(1 + gh * gw, 1 + gh * gw, dtype=torch.long)
        index[1:, 1:] = (y[:, None] - y + gh - 1) * (2 * gw - 1) + (x[:, None] - x + gw - 1)
        index[0, 1:], index[1:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()  # exact, as the official codes; a module, so that a hook can watch it
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block (2), (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, drop_path=0.0, window=None, layer_scale=None, norm_eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()
        # BEiT's names; without layer scale the product below is skipped, not multiplied by one
        self.gamma_1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x, bias=None, return_attn=False):
        out = self.attn(self.norm1(x), bias, return_attn)
        out, attn = out if return_attn else (out, None)
        x = x + self.drop_path(out if self.gamma_1 is None else self.gamma_1 * out)
        out = self.mlp(self.norm2(x))
        x = x + self.drop_path(out if self.gamma_2 is None else self.gamma_2 * out)
        return (x, attn) if return_attn else x


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel: (B, C, H, W) -> (B, N, D), row by row."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return rearrange(self.proj(x), "b d gh gw -> b (gh gw) d")


class ViT(nn.Module):
    """Plain Vision Transformer: (B, C, H, W) -> logits (B, num_classes), or features (B, D) if num_classes=0.

    img_size      int or (H, W); other input sizes work too, the position table is resized on the fly
    pool          "cls": class token after `norm`; "mean": mean of the patch tokens, then `fc_norm`
    pos_embed     "learned", "sincos" (fixed 2-D table, frozen) or None
    rel_pos_bias  None, "shared" (BEiT pre-training) or "block" (BEiT fine-tuning)
    layer_scale   initial value of the per-channel residual gains (BEiT-B: 0.1), None for none
    drop_path     stochastic depth at the last block, growing linearly from 0 at the first
    checkpointing recompute each block in the backward pass: less memory, about a third more time

    ValueError if sizes do not divide or an option is unknown.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, embed_dim=768, depth=12,
                 num_heads=12, mlp_ratio=4.0, drop_path=0.0, pool="cls", class_token=True, pos_embed="learned",
                 rel_pos_bias=None, layer_scale=None, checkpointing=False):
        super().__init__()
        if min(patch_size, in_chans, embed_dim, depth, num_heads) < 1:
            raise ValueError(f"patch_size {patch_size}, in_chans {in_chans}, embed_dim {embed_dim}, depth {depth} and "
                             f"num_heads {num_heads} must all be at least 1")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if pos_embed not in ("learned", "sincos", None):
            raise ValueError(f"pos_embed {pos_embed!r} is unknown; choose 'learned', 'sincos' or None")
        if rel_pos_bias not in ("shared", "block", None):
            raise ValueError(f"rel_pos_bias {rel_pos_bias!r} is unknown; choose 'shared', 'block' or None")
        if rel_pos_bias and not class_token:
            raise ValueError("rel_pos_bias is BEiT's and holds rows for the class token; keep class_token=True")
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size, self.in_chans, self.embed_dim, self.num_heads = patch_size, in_chans, embed_dim, num_heads
        self.stride, self.num_features = patch_size, embed_dim  # pixels and width per output token, as of any encoder
        self.grid_size = self.grid(*self.img_size)  # (gh, gw)
        self.checkpointing, self.has_relative_bias = checkpointing, rel_pos_bias is not None

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = None
        if pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, class_token + math.prod(self.grid_size), embed_dim))
        elif pos_embed == "sincos":
            self.fix_pos_embed()
        self.rel_pos_bias = RelativePositionBias(self.grid_size, num_heads) if rel_pos_bias == "shared" else None
        window = self.grid_size if rel_pos_bias == "block" else None
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, drop_path * i / max(depth - 1, 1), window, layer_scale)
            for i in range(depth))
        self.reset_classifier(num_classes, pool)

        self.apply(init_weights)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # MAE: as if it were a Linear
        nn.init.zeros_(self.patch_embed.proj.bias)
        for token in (self.cls_token, self.pos_embed if pos_embed == "learned" else None):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def reset_classifier(self, num_classes, pool=None):
        """A fresh head: pool None keeps the present one; num_classes=0 removes the head, features come out."""
        pool = pool or self.pool
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool {pool!r} is unknown; choose 'cls' or 'mean'")
        if pool == "cls" and self.cls_token is None:
            raise ValueError("pool 'cls' needs a class token; use pool='mean' or class_token=True")
        if pool != getattr(self, "pool", None):
            device = self.patch_embed.proj.weight.device
            norm = nn.LayerNorm(self.embed_dim, eps=1e-6, device=device)
            # exactly one of the two exists: an unused LayerNorm would get no gradient and upset DDP
            self.norm, self.fc_norm = (norm, nn.Identity()) if pool == "cls" else (nn.Identity(), norm)
        self.pool, self.num_classes = pool, num_classes
        if num_classes:
            self.head = nn.Linear(self.embed_dim, num_classes, device=self.patch_embed.proj.weight.device)
            init_weights(self.head)
        else:
            self.head = nn.Identity()

    def fix_pos_embed(self):
        """Replace the position table by the fixed sin-cos one and freeze it (what MAE and MIRL train with)."""
        table = sincos_pos_embed(self.embed_dim, *self.grid_size, cls_token=self.cls_token is not None)
        device = self.patch_embed.proj.weight.device
        self.pos_embed = nn.Parameter(table[None].to(device), requires_grad=False)

    def drop_class_token(self):
        """Patch tokens only, pooled by their mean."""
        if self.has_relative_bias:
            raise ValueError("a relative position bias holds rows for the class token; build the encoder with rel_pos_bias=None")
        if self.cls_token is None:
            return
        self.cls_token = None
        self.reset_classifier(self.num_classes, pool="mean")
        if self.pos_embed is not None:
            self.pos_embed = nn.Parameter(self.pos_embed.detach()[:, 1:].clone(), self.pos_embed.requires_grad)

    def prepare_for_masking(self):
        """What masked pre-training asks of an encoder: last norm but no head, fixed and frozen positions."""
        if self.cls_token is None:
            raise ValueError("masked pre-training needs an encoder with class_token=True, got class_token=False")
        if self.has_relative_bias:
            raise ValueError("an encoder that sees only the visible patches cannot use a relative position bias over the "
                             "full grid; build it with rel_pos_bias=None")
        self.reset_classifier(0, pool="cls")
        self.fix_pos_embed()

    def grid(self, height, width):
        """(gh, gw), the patches of an image of this size."""
        p = self.patch_size
        for name, size in (("height", height), ("width", width)):
            if size < p or size % p:
                lower = size // p * p
                fits = f"{lower} or {lower + p}" if lower else f"{p}"
                raise ValueError(f"img_size {size} ({name}) is not a multiple of patch_size {p}; try {fits}")
        return height // p, width // p

    def embed(self, x, ids_keep=None):
        """(1): (B, C, H, W) -> (B, 1 + N, D). ids_keep (B, n) keeps these patches only: (B, 1 + n, D)."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images (B, {self.in_chans}, H, W), got {tuple(x.shape)}; in_chans is "
                             f"{self.in_chans}")
        grid = self.grid(*x.shape[-2:])
        if grid != self.grid_size and self.has_relative_bias:
            raise ValueError(f"relative position bias is built for {self.img_size[0]}x{self.img_size[1]} images, got "
                             f"{x.shape[-2]}x{x.shape[-1]}; build the model with that img_size and load_pretrained "
                             "resizes the bias")
        x = self.patch_embed(x)
        pos, cls = self.pos_embed, self.cls_token
        prefix = int(cls is not None)
        if pos is not None:
            if grid != self.grid_size:
                pos = resize_pos_embed(pos, self.grid_size, grid, prefix)
            x = x + pos[:, prefix:]
            cls = cls + pos[:, :1] if prefix else None
        if ids_keep is not None:
            x = x.gather(1, ids_keep[..., None].expand(-1, -1, x.shape[-1]))
        return x if cls is None else torch.cat([cls.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)

    def forward_blocks(self, x, start=0, stop=None, bias=None):
        """Blocks start .. stop-1: (B, N, D) -> (B, N, D). bias: added to the attention logits, e.g. 0 / -inf as a mask."""
        if self.rel_pos_bias is not None:
            bias = self.rel_pos_bias() if bias is None else bias + self.rel_pos_bias()
        for block in self.blocks[start:stop]:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, bias, use_reentrant=False)
            else:
                x = block(x, bias)
        return x

    def forward_features(self, x, return_attn=False, layers=None):
        """Tokens (B, 1 + N, D) after the last norm (pool="mean": before fc_norm); nothing is ever masked.

        layers       block numbers, -1 the last: a list of those blocks' raw outputs instead
        return_attn  also a list of attention weights (B, h, 1 + N, 1 + N), one per block or chosen layer
        """
        depth = len(self.blocks)
        chosen = range(depth) if layers is None else [i + depth if i < 0 else i for i in layers]
        if any(not 0 <= i < depth for i in chosen):
            raise ValueError(f"layers {list(layers)} must lie in 0..{depth - 1} (or -{depth}..-1)")
        x = self.embed(x)
        if layers is None and not return_attn:
            return self.norm(self.forward_blocks(x))
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        features, attns = {}, {}
        for i, block in enumerate(self.blocks[:max(chosen, default=-1) + 1]):
            if return_attn and i in chosen:
                x, attns[i] = block(x, bias, return_attn=True)
            else:
                x = self.forward_blocks(x, i, i + 1)
            features[i] = x
        out = self.norm(x) if layers is None else [features[i] for i in chosen]
        return (out, [attns[i] for i in chosen]) if return_attn else out

    def forward_head(self, x):
        """Tokens (B, 1 + N, D) -> pooled -> logits (B, num_classes)."""
        prefix = int(self.cls_token is not None)
        x = x[:, 0] if self.pool == "cls" else x[:, prefix:].mean(dim=1)
        return self.head(self.fc_norm(x))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def init_weights(module):
    """MAE's initialisation: Xavier-uniform weights (the fused qkv as one matrix), zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sincos_pos_embed(dim, gh, gw, cls_token=True):
    """MAE's fixed 2-D table (1 + gh gw, dim), zeros for the class token.

    First half of the channels: the COLUMN, second half: the row (MoCo v3 has them the other way round).
    In each half sines, then cosines, at dim / 4 frequencies 10000^(-j / (dim / 4)).
    """
    if dim % 4:
        raise ValueError(f"a sin-cos position table needs a width that is a multiple of 4, got {dim}")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row = torch.arange(gh, dtype=torch.float64)[:, None, None].expand(gh, gw, 1)
    col = torch.arange(gw, dtype=torch.float64)[None, :, None].expand(gh, gw, 1)
    angles = [col * frequency, row * frequency]  # (gh, gw, dim / 4) each
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=-1).flatten(0, 1).float()
    return torch.cat([torch.zeros(1, dim), table]) if cls_token else table


def resize_pos_embed(pos_embed, old_grid, new_grid, prefix=1):
    """Bicubic resampling of a table (1, prefix + gh gw, D) to another grid; the prefix rows stay."""
    head, grid = pos_embed[:, :prefix], pos_embed[:, prefix:]
    grid = rearrange(grid, "1 (gh gw) d -> 1 d gh gw", gh=old_grid[0])
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([head, rearrange(grid, "1 d gh gw -> 1 (gh gw) d")], dim=1)


if __name__ == "__main__":
    # Which of 10 colours has the only cross among 15 dots? The class token must find one patch of 16.
    torch.manual_seed(0)
    cross = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    colours = torch.rand(10, 3)

    def scenes(n):
        label, place = torch.randint(10, (n,)), torch.randint(16, (n,))
        patches = colours[torch.randint(10, (n, 16))][..., None, None] * (1 - cross)  # (n, 16, 3, 4, 4)
        patches[torch.arange(n), place] = colours[label][..., None, None] * cross
        return rearrange(patches, "n (gh gw) c p q -> n c (gh p) (gw q)", gh=4), label, place

    model = create_vit("vit_demo", img_size=16, depth=4, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(300):
        imgs, label, _ = scenes(64)
        loss = F.cross_entropy(model(imgs), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == 299:
            print(f"step {step:3d}  loss {loss.item():.2f}")
    imgs, label, place = scenes(256)
    with torch.no_grad():
        tokens, attns = model.forward_features(imgs, return_attn=True)
        accuracy = (model(imgs).argmax(1) == label).float().mean()
        print(f"accuracy on new scenes {accuracy:.2f} (chance 0.10; expect above 0.9)")
        print(f"fused and explicit attention differ by {(tokens - model.forward_features(imgs)).abs().max():.0e}")
    looks = attns[-1][:, :, 0, 1:].mean(1)  # class token to patches, mean over heads, last block
    print(f"the class token gives the cross {looks[range(256), place].mean():.2f} of its attention (even: 0.06)")
    print("one scene, attention of the class token in percent, the cross is at row "
          f"{place[0] // 4}, column {place[0] % 4}:\n{(100 * looks[0]).int().view(4, 4).tolist()}")

"""ViT: an image as a sequence of patches.

Cut the image into squares, embed each one linearly, add its position, and let self-attention blocks mix the
sequence. A class token, or the mean of the patch tokens, represents the image.

    z_0 = [cls ; W x_1 + b ; ... ; W x_N + b] + pos               (1)
    z   = z + Attention(LN z),  then  z = z + MLP(LN z)           (2)   pre-norm block
    Attention(z) = softmax(q k^T / sqrt(d) + bias) v, then proj   (3)   bias: BEiT only

Source: Dosovitskiy et al. 2021, arXiv 2010.11929; presets S-54, B-24, B-48 from MIRL, arXiv 2309.14136;
initialization and sin-cos table of MAE, arXiv 2111.06377; layer scale and relative position bias of BEiT,
arXiv 2106.08254. Written from the papers, with timm's and MAE's parameter names, for checkpoints.py.
Needs: torch, torchvision, einops.
Demo: python vit.py (10 s on a CPU) learns to find a cross among dots, and prints where the class token looks.
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
    "vit_ti16": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_s16": dict(embed_dim=384, depth=12, num_heads=6),  # DeiT, timm; MoCo v3 and MIRL: num_heads=12
    "vit_b16": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_l16": dict(embed_dim=1024, depth=24, num_heads=16),
    "vit_h14": dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16),
    "vit_s54": dict(embed_dim=384, depth=54, num_heads=12),  # MIRL: 12 heads, also for S
    "vit_b24": dict(embed_dim=768, depth=24, num_heads=12),
    "vit_b48": dict(embed_dim=768, depth=48, num_heads=12),
}


def create_vit(name, **overrides):
    """A ViT by preset name: create_vit("vit_s54", img_size=224, num_classes=1000)."""
    check_choice("model", name, PRESETS)
    return ViT(**{**PRESETS[name], **overrides})


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown; choose from {', '.join(map(repr, choices))}")


def attention(q, k, v, bias=None):
    """(3) without proj: q (B, h, N, d); k, v (B, h, M, d); bias (B, h, N, M) or broadcast -> (B, h, N, d)."""
    on_cpu = q.device.type == "cpu"
    # A CPU without bf16 instructions takes longer in bf16 (autocast casts back to it): 1.3, 2.4, 6.2, 7.2 and 6.4
    # times at 17, 65, 197, 577 and 1024 tokens, 1.2 times with MixMIM's masked windows; forward and backward pass
    if on_cpu and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            return attention(q.float(), k.float(), v.float(), bias).to(q.dtype)
    if bias is not None:
        bias = bias.to(q.dtype)
        # the fused CPU kernel has no gradient for a bias; torch's fallback is slower than this
        if on_cpu and bias.requires_grad:
            logits = q * q.shape[-1] ** -0.5 @ k.mT + bias
            return logits.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Attention(nn.Module):
    """Multi-head self-attention (3). window=(gh, gw) adds a relative position bias for this block alone."""

    def __init__(self, dim, num_heads, window=None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if window is not None:
            add_bias_table(self, window, num_heads)

    def inputs(self, x, bias):
        # chunk before rearranging: the backward pass then joins the three gradients in one copy, not in two
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in parts)
        return q, k, v, with_relative_bias(self, bias)

    def forward(self, x, bias=None):
        x = attention(*self.inputs(x, bias))
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))

    def weights(self, x, bias=None):
        """The softmax of (3) itself, (B, h, N, N), which the fused kernel does not return."""
        q, k, _, bias = self.inputs(x, bias)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        logits = logits if bias is None else logits + bias
        return logits.float().softmax(dim=-1)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()  # exact, as in the official codes; a module, so that a hook can watch it
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block (2), (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, drop_path=0.0, window=None, layer_scale=None,
                 norm_eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()
        for name in ("gamma_1", "gamma_2"):  # layer scale, under BEiT's names
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.register_parameter(name, gamma)

    def forward(self, x, bias=None):
        out = self.attn(self.norm1(x), bias)
        x = x + self.drop_path(out if self.gamma_1 is None else self.gamma_1 * out)
        out = self.mlp(self.norm2(x))
        return x + self.drop_path(out if self.gamma_2 is None else self.gamma_2 * out)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel size: (B, C, H, W) -> (B, N, D), row by row."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return rearrange(self.proj(x), "b d gh gw -> b (gh gw) d")


class ViT(nn.Module):
    """Vision Transformer: (B, C, H, W) -> logits (B, num_classes), or features (B, D) if num_classes=0."""

    def __init__(
        self,
        img_size=224,  # int or (H, W); for inputs of other sizes the position table is resized on the fly
        patch_size=16, in_chans=3, num_classes=1000,
        embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
        drop_path=0.0,  # stochastic depth at the last block, growing linearly from 0 at the first
        pool="cls",  # "cls": class token after `norm`; "mean": mean of the patch tokens, then `fc_norm`
        class_token=True, pos_embed="learned",  # "learned", "sincos" (fixed 2-D table, frozen) or None
        rel_pos_bias=None,  # None, "shared" (BEiT pre-training) or "block" (BEiT fine-tuning)
        layer_scale=None,  # initial value of the per-channel residual gains (BEiT-B: 0.1)
        checkpointing=False,  # recompute each block in the backward pass: less memory, a third more time
        weight_init="mae",  # "mae", or "jax": as the JAX code trains from scratch
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        check_choice("pos_embed", pos_embed, ("learned", "sincos", None))
        check_choice("rel_pos_bias", rel_pos_bias, ("shared", "block", None))
        check_choice("weight_init", weight_init, ("mae", "jax"))
        if weight_init == "jax" and pos_embed == "sincos":
            raise ValueError("weight_init 'jax' learns its positions; use pos_embed='learned', not 'sincos'")
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size, self.in_chans = patch_size, in_chans
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.stride, self.num_features = patch_size, embed_dim  # of an output token, as in every encoder
        self.grid_size = self.grid(*self.img_size)  # (gh, gw)
        self.checkpointing, self.weight_init, self.pool = checkpointing, weight_init, None
        self.has_relative_bias = rel_pos_bias is not None

        # (1)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = None
        if pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, class_token + math.prod(self.grid_size), embed_dim))
        elif pos_embed == "sincos":
            self.fix_pos_embed()

        # (2), (3)
        self.rel_pos_bias = nn.Module() if rel_pos_bias == "shared" else None
        if self.rel_pos_bias is not None:
            add_bias_table(self.rel_pos_bias, self.grid_size, num_heads)
        window = self.grid_size if rel_pos_bias == "block" else None
        self.blocks = nn.ModuleList()
        for i in range(depth):
            rate = drop_path * i / max(depth - 1, 1)
            self.blocks.append(Block(embed_dim, num_heads, mlp_ratio, rate, window, layer_scale))
        self.reset_classifier(num_classes, pool)
        init_vit(self, weight_init)

    def grid(self, height, width):
        """(gh, gw), the number of patches of an image of this size."""
        p = self.patch_size
        for size in (height, width):
            if size == 0 or size % p:
                low = max(size // p, 1) * p
                fits = f"{low} or {low + p}"
                raise ValueError(f"img_size {size} is not a multiple of patch_size {p}; try {fits}")
        return height // p, width // p

    def embed(self, x, ids_keep=None):
        """(1): (B, C, H, W) -> (B, 1 + N, D). ids_keep (B, n) keeps these patches only: (B, 1 + n, D)."""
        grid = self.grid(*x.shape[-2:])
        x, pos, cls = self.patch_embed(x), self.pos_embed, self.cls_token
        prefix = int(cls is not None)
        if pos is not None:
            if grid != self.grid_size:
                pos = resize_pos_embed(pos, self.grid_size, grid, prefix)
            x = x + pos[:, prefix:]
            cls = cls + pos[:, :1] if prefix else None
        if ids_keep is not None:
            x = x.gather(1, ids_keep[..., None].expand(-1, -1, self.embed_dim))
        if cls is None:
            return x
        cls = cls.expand(x.shape[0], -1, -1).to(x.dtype)
        return torch.cat([cls, x], dim=1)

    def forward_blocks(self, x, start=0, stop=None, bias=None):
        """Blocks start to stop - 1. bias: added to the attention logits, such as 0 / -inf for a mask."""
        bias = with_relative_bias(self.rel_pos_bias, bias)
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
        x = self.embed(x)
        if layers is None and not return_attn:
            return self.norm(self.forward_blocks(x))
        numbers = range(len(self.blocks))
        chosen = numbers if layers is None else [numbers[i] for i in layers]  # IndexError if there is none
        bias = with_relative_bias(self.rel_pos_bias, None)
        features, attns = {}, {}
        for i, block in enumerate(self.blocks):
            if return_attn and i in chosen:
                attns[i] = block.attn.weights(block.norm1(x), bias)
            features[i] = x = self.forward_blocks(x, i, i + 1)
        out = self.norm(x) if layers is None else [features[i] for i in chosen]
        return (out, [attns[i] for i in chosen]) if return_attn else out

    def forward_head(self, x):
        """Tokens (B, 1 + N, D) -> pooled -> logits (B, num_classes)."""
        prefix = int(self.cls_token is not None)
        x = x[:, 0] if self.pool == "cls" else x[:, prefix:].mean(dim=1)
        return self.head(self.fc_norm(x))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes, pool=None):
        """A new head; pool=None keeps the present one; num_classes=0 removes the head and gives features."""
        pool = pool or self.pool
        check_choice("pool", pool, ("cls", "mean"))
        if pool == "cls" and self.cls_token is None:
            raise ValueError("pool 'cls' needs a class token; use class_token=True or pool='mean'")
        device = self.patch_embed.proj.weight.device
        if pool != self.pool:
            # exactly one of the two exists: DDP fails on an unused LayerNorm, which gets no gradient
            norm = nn.LayerNorm(self.embed_dim, eps=1e-6, device=device)
            self.norm, self.fc_norm = (norm, nn.Identity()) if pool == "cls" else (nn.Identity(), norm)
        self.pool, self.num_classes = pool, num_classes
        self.head = nn.Linear(self.embed_dim, num_classes, device=device) if num_classes else nn.Identity()
        init_weights(self.head)
        if num_classes and self.weight_init == "jax":
            nn.init.zeros_(self.head.weight)

    def fix_pos_embed(self):
        """Replace the position table by the fixed sin-cos one and freeze it, as MAE and MIRL do."""
        table = sincos_pos_embed(self.embed_dim, *self.grid_size, cls_token=self.cls_token is not None)[None]
        self.pos_embed = nn.Parameter(table.to(self.patch_embed.proj.weight.device), requires_grad=False)

    def drop_class_token(self):
        """Keep patch tokens only, pooled by their mean."""
        if self.cls_token is None:
            return
        if self.has_relative_bias:
            raise ValueError("rel_pos_bias has rows for the class token; build with rel_pos_bias=None")
        self.cls_token = None
        self.reset_classifier(self.num_classes, pool="mean")
        if self.pos_embed is not None:
            table = self.pos_embed
            self.pos_embed = nn.Parameter(table.detach()[:, 1:].clone(), table.requires_grad)

    def prepare_for_masking(self):
        """For masked pre-training: the last norm but no head, fixed and frozen positions."""
        if self.has_relative_bias:
            raise ValueError("masking leaves no full grid for rel_pos_bias; build with rel_pos_bias=None")
        self.reset_classifier(0, pool="cls")
        self.fix_pos_embed()


def init_weights(module):
    """MAE's initialization: Xavier-uniform weights (the fused qkv as one matrix), zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_vit(model, weight_init):
    """A whole ViT: "mae", or "jax" as the JAX code vision_transformer, which the SAM paper trains with."""
    # what both have in common: Xavier-uniform kernels, a learned position table of std 0.02
    model.apply(init_weights)
    kernel = model.patch_embed.proj.weight
    nn.init.xavier_uniform_(kernel.flatten(1))  # as if it were a Linear
    nn.init.zeros_(model.patch_embed.proj.bias)
    for token in (model.cls_token, model.pos_embed):
        if token is not None and token.requires_grad:
            nn.init.normal_(token, std=0.02)
    if weight_init == "mae":
        return
    # what JAX does differently: zero head and class token, q, k, v each by itself, MLP biases not quite zero
    model.reset_classifier(model.num_classes)
    if model.cls_token is not None:
        nn.init.zeros_(model.cls_token)
    for block in model.blocks:
        for matrix in block.attn.qkv.weight.detach().chunk(3):
            nn.init.xavier_uniform_(matrix)
        nn.init.normal_(block.mlp.fc1.bias, std=1e-6)
        nn.init.normal_(block.mlp.fc2.bias, std=1e-6)
    # flax's LeCun normal: cut at two sigma, which narrows it by 0.87962566; variance 1 / fan_in after the cut
    std = kernel[0].numel() ** -0.5 / 0.87962566
    nn.init.trunc_normal_(kernel, std=std, a=-2 * std, b=2 * std)


def sincos_pos_embed(dim, gh, gw, cls_token=True):
    """MAE's fixed 2-D table (1 + gh gw, dim), zeros for the class token.

    First half of the channels: the COLUMN, second half: the row (MoCo v3: the reverse). Each half has sines,
    then cosines, at dim / 4 frequencies 10000^(-j / (dim / 4)).
    """
    if dim % 4:
        raise ValueError(f"a sin-cos position table needs a width that is a multiple of 4, got {dim}")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row = torch.arange(gh).repeat_interleave(gw)[:, None] * frequency  # (gh gw, dim / 4)
    col = torch.arange(gw).repeat(gh)[:, None] * frequency
    table = torch.cat([col.sin(), col.cos(), row.sin(), row.cos()], dim=1).float()
    return torch.cat([torch.zeros(1, dim), table]) if cls_token else table


def resample(rows, old, new):
    """Bicubic resampling of a table (h w, D) from the grid old = (h, w) to the grid new."""
    if old == new:
        return rows
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    image = rearrange(rows, "(h w) d -> 1 d h w", h=old[0])
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return rearrange(image, "1 d h w -> (h w) d")


def resize_pos_embed(pos_embed, old_grid, new_grid, prefix=1):
    """A position table (1, prefix + gh gw, D) for another grid; the prefix rows stay."""
    head, rows = pos_embed[0, :prefix], pos_embed[0, prefix:]
    rows = resample(rows, old_grid, new_grid).to(head.dtype)
    return torch.cat([head, rows])[None]


def relative_position_index(gh, gw):
    """The row of the bias table for each pair of tokens, (1 + N, 1 + N), class token first."""
    cols = 2 * gw - 1
    with torch.device("cpu"):  # real numbers even when the model is on meta: no state dict holds them
        place = torch.cartesian_prod(torch.arange(gh), torch.arange(gw)) @ torch.tensor([cols, 1])
        index = F.pad(place[:, None] - place + place[-1], (1, 0, 1, 0))
    offsets = (2 * gh - 1) * cols  # BEiT: these, row-major; then cls to token, token to cls, cls to cls
    index[0], index[1:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


def add_bias_table(module, window, num_heads):
    """BEiT's relative position bias: one learned number per head and 2-D offset."""
    table = torch.zeros(math.prod(2 * side - 1 for side in window) + 3, num_heads)
    module.relative_position_bias_table = nn.Parameter(table)
    module.register_buffer("relative_position_index", relative_position_index(*window), persistent=False)


def with_relative_bias(module, bias):
    """bias (None: zero) plus that of the module's table, if it has one, (h, 1 + N, 1 + N)."""
    if not hasattr(module, "relative_position_bias_table"):
        return bias
    table = module.relative_position_bias_table[module.relative_position_index].permute(2, 0, 1)
    return table if bias is None else bias + table


if __name__ == "__main__":
    # Which of 10 colors has the only cross among 15 dots? The class token must find one patch of 16.
    torch.manual_seed(0)
    cross = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    colors = torch.rand(10, 3)[..., None, None]

    def scenes(n):  # images (n, 3, 16, 16), color and patch of the cross
        label, place = torch.randint(10, (n,)), torch.randint(16, (n,))
        patches = colors[torch.randint(10, (n, 16))] * (1 - cross)  # (n, 16, 3, 4, 4)
        patches[torch.arange(n), place] = colors[label] * cross
        return rearrange(patches, "n (gh gw) c p q -> n c (gh p) (gw q)", gh=4), label, place

    model = create_vit("vit_demo", img_size=16, depth=4, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(200):
        imgs, label, _ = scenes(64)
        loss = F.cross_entropy(model(imgs), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        imgs, label, place = scenes(256)
        accuracy = (model(imgs).argmax(dim=1) == label).float().mean()
        attn = model.forward_features(imgs, return_attn=True)[1][-1]  # of the last block
    share = attn[torch.arange(256), :, 0, 1 + place].mean()
    print(f"accuracy on new scenes {accuracy:.2f} (chance: 0.10; expect above 0.9)")
    print(f"attention of the class token to the cross {share:.2f} (uniform: 0.06; expect above 0.2)")

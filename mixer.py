"""MLP-Mixer: an image is a table; mix its columns, then its rows, and attend to nothing.

Cut the image into patches and embed each one: a table of N tokens (rows, places) by D channels
(columns, features). Two small MLPs take turns. One works along the columns: for each channel it
reads all places, with the same weights for every channel. The other works along the rows: for each
place it reads all channels, with the same weights for every place.

    X     = the patches x_n of the image, as rows W x_n + b     (N, D)    (1)
    X     = X + T(LN X),    T on each column:  (N) -> D_S -> (N)          (2)   token mixing, D_S wide inside
    X     = X + C(LN X),    C on each row:     (D) -> D_C -> (D)          (3)   channel mixing, D_C wide: says what
    T, C  : v -> W2 gelu(W1 v + b1) + b2                                  (4)
    logits = head(mean over the places of LN X)                           (5)

No position table is needed: row n of T's weights belongs to place n. So a Mixer is tied to the number
of tokens it was built for, and neighbors mean nothing to it: patches shuffled in one fixed order,
and T's weights with them, give the same logits. D_S does not grow with N, so cost is linear in N.

Source: Tolstikhin et al. 2021, arXiv 2105.01601; trained with SAM by Chen et al. 2022, arXiv 2106.01548.
Written from the papers; the numbering of the equations is ours. Parameter names are timm's, so its
checkpoints load by key. Initialisation as in the official JAX codes (vision_transformer and big_vision
agree). We differ: GELU is exact, theirs (Flax) is the tanh approximation, at most 5e-4 away; stochastic
depth grows linearly over the blocks as in big_vision, but scales up what it keeps, which theirs does not.
Needs: torch, torchvision, einops.
Demo: python mixer.py (10 s on a CPU) learns to say where a cross is and of what colour, then does
without one of the two MLPs.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.ops import StochasticDepth

PRESETS = {  # keyword arguments of Mixer
    "mixer_demo": dict(img_size=32, patch_size=4, embed_dim=128, depth=6),
    "mixer_s32": dict(patch_size=32, embed_dim=512, depth=8),
    "mixer_s16": dict(patch_size=16, embed_dim=512, depth=8),
    "mixer_b32": dict(patch_size=32, embed_dim=768, depth=12),
    "mixer_b16": dict(patch_size=16, embed_dim=768, depth=12),
}


def create_mixer(name, **overrides):
    """A Mixer by preset name: create_mixer("mixer_s16", num_classes=10)."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(PRESETS)}")
    return Mixer(**{**PRESETS[name], **overrides})


class Mlp(nn.Module):
    """(4), along the last dimension: (..., dim) -> (..., dim)."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()  # a module, so that a hook can watch it
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class MixerBlock(nn.Module):
    """(2), then (3): (B, N, D) -> (B, N, D)."""

    def __init__(self, num_tokens, dim, tokens_dim, channels_dim, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_tokens = Mlp(num_tokens, tokens_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_channels = Mlp(dim, channels_dim)
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def mix_tokens(self, x):
        """T of (2): the columns become the last dimension, and rows again."""
        return rearrange(self.mlp_tokens(rearrange(x, "b n d -> b d n")), "b d n -> b n d")

    def forward(self, x):
        x = x + self.drop_path(self.mix_tokens(self.norm1(x)))
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


class PatchEmbed(nn.Module):
    """(1), a convolution whose stride is its kernel: (B, C, H, W) -> (B, N, D), row by row."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return rearrange(self.proj(x), "b d gh gw -> b (gh gw) d")


class Mixer(nn.Module):
    """MLP-Mixer: (B, C, H, W) -> logits (B, num_classes), or features (B, D) if num_classes=0.

    img_size   int or (H, W), multiples of patch_size; images of any other size are refused
    mlp_ratio  (D_S, D_C), the hidden widths of token and channel mixing, both as multiples of embed_dim
    drop_path  stochastic depth at the last block, growing linearly from 0 at the first

    ValueError if sizes do not divide or an option makes no sense.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        embed_dim=512,
        depth=8,
        mlp_ratio=(0.5, 4.0),
        drop_path=0.0,
    ):
        super().__init__()
        if not isinstance(img_size, int) and not (isinstance(img_size, (tuple, list)) and len(img_size) == 2):
            raise ValueError(f"img_size {img_size!r} must be a whole number or (height, width)")
        if not isinstance(mlp_ratio, (tuple, list)) or len(mlp_ratio) != 2:
            raise ValueError(
                f"mlp_ratio {mlp_ratio!r} must be a pair, for token and channel mixing, such as (0.5, 4.0)"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path {drop_path} must lie in [0, 1)")
        tokens_dim, channels_dim = (int(ratio * embed_dim) for ratio in mlp_ratio)
        if min(patch_size, in_chans, embed_dim, depth, tokens_dim, channels_dim) < 1:
            raise ValueError(
                f"patch_size {patch_size}, in_chans {in_chans}, embed_dim {embed_dim}, depth {depth} and both hidden "
                f"widths {tokens_dim}, {channels_dim} (mlp_ratio times embed_dim) must all be at least 1"
            )
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        for name, size in zip(("height", "width"), self.img_size):
            if size < patch_size or size % patch_size:
                lower = size // patch_size * patch_size
                fits = f"{lower} or {lower + patch_size}" if lower > 0 else f"{patch_size}"
                raise ValueError(f"img_size {size} ({name}) is not a multiple of patch_size {patch_size}; try {fits}")
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, embed_dim
        self.stride, self.num_features = patch_size, embed_dim  # pixels and width per output token, as of any encoder
        self.grid_size = self.img_size[0] // patch_size, self.img_size[1] // patch_size  # (gh, gw)

        self.stem = PatchEmbed(patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList(
            MixerBlock(
                math.prod(self.grid_size), embed_dim, tokens_dim, channels_dim, drop_path * i / max(depth - 1, 1)
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes):
        """A fresh head, all zeros as the official one: logits start at 0. num_classes=0 removes it, features come out."""
        self.num_classes, self.head = num_classes, nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.embed_dim, num_classes).to(self.norm.weight)  # its device and dtype
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward_features(self, x):
        """(1) to (3), and the last norm: (B, C, H, W) -> tokens (B, N, D)."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"expected images (B, {self.in_chans}, H, W), got {tuple(x.shape)}; in_chans is {self.in_chans}"
            )
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"a Mixer's token mixing is built for one number of tokens, here of "
                f"{self.img_size[0]}x{self.img_size[1]} "
                f"images, got {x.shape[-2]}x{x.shape[-1]}; resize the images or build the model with that img_size"
            )
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_head(self, x):
        """(5): tokens (B, N, D) -> logits (B, num_classes)."""
        return self.head(x.mean(dim=1))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def init_weights(module):
    """The official JAX codes': LeCun-normal weights, a normal cut at two sigma with variance 1 / fan_in; zero biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        std = module.weight[0].numel() ** -0.5 / 0.87962566  # the cut narrows it by this factor
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(module.bias)


if __name__ == "__main__":
    # One cross among 15 dots, each in one of 7 colors. In which quarter is the cross, and of what colour is it?
    torch.manual_seed(0)
    cross = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    colors = torch.tensor([[code >> c & 1 for c in range(3)] for code in range(1, 8)])  # RGB, each on or off

    def scenes(n):
        what, place = torch.randint(7, (n,)), torch.randint(16, (n,))
        patches = colors[torch.randint(7, (n, 16))][..., None, None] * (1 - cross)  # (n, 16, 3, 4, 4)
        patches[torch.arange(n), place] = colors[what][..., None, None] * cross
        imgs = rearrange(patches, "n (gh gw) c p q -> n c (gh p) (gw q)", gh=4).float()
        return imgs, place // 8 * 2 + place % 4 // 2, what

    model, steps = create_mixer("mixer_demo", img_size=16, embed_dim=64, depth=2, num_classes=4 + 7), 200
    table, block = torch.randn(1, 16, 64, requires_grad=True), model.blocks[0]
    print("one number of the table is computed from (expect 16 x 1, 1 x 64, 16 x 64)")
    for name, mix in (
        ("token mixing", block.mix_tokens),
        ("channel mixing", block.mlp_channels),
        ("the block", block),
    ):
        read = torch.autograd.grad(mix(table)[0, 3, 5], table)[0][0] != 0  # (N, D)
        print(f"  {name:22s} {read.any(1).sum():2d} places x {read.any(0).sum():2d} channels")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps + 1)
    for step in range(steps + 1):
        imgs, where, what = scenes(64)
        logits = model(imgs).split([4, 7], dim=1)
        loss = F.cross_entropy(logits[0], where) + F.cross_entropy(logits[1], what)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step:3d}  loss {loss.item():.2f}")

    # Silencing a half shows what this model uses. (Trained without channel mixing, another learns so small a task
    # all the
    # same: T bends its numbers too. Trained without token mixing, none can say where: the mean forgets the places.)
    imgs, where, what = scenes(512)
    print("accuracy on new scenes    where   what")
    for name, mlp in (
        ("as trained", None),
        ("channel mixing silenced", "mlp_channels"),
        ("token mixing silenced", "mlp_tokens"),
    ):
        hooks = [
            getattr(block, mlp).register_forward_hook(lambda *args: 0 * args[-1]) for block in model.blocks if mlp
        ]
        with torch.no_grad():
            logits = model(imgs).split([4, 7], dim=1)
        for hook in hooks:
            hook.remove()
        print(
            f"  {name:24s} {(logits[0].argmax(1) == where).float().mean():.2f}   "
            f"{(logits[1].argmax(1) == what).float().mean():.2f}"
        )
    print(
        "(chance is 0.25 and 0.14; expect above 0.95 as trained, and without token mixing no better than chance on "
        "where)"
    )

"""MLP-Mixer: an image as a table of tokens, mixed along its columns and its rows, without attention.

Cut the image into patches and embed each one: a table of N tokens (rows, places) by D channels (columns,
features). Two small MLPs alternate. Token mixing works along the columns: for each channel it reads all
places, with the same weights for every channel. Channel mixing works along the rows: for each place it reads
all channels, with the same weights for every place.

    X     = the patches x_n of the image, as rows W x_n + b     (N, D)    (1)
    X     = X + T(LN X),    T on each column:  (N) -> D_S -> (N)          (2)   token mixing
    X     = X + C(LN X),    C on each row:     (D) -> D_C -> (D)          (3)   channel mixing
    T, C  : v -> W2 gelu(W1 v + b1) + b2                                  (4)
    logits = head(mean over the places of LN X)                           (5)

No position table is needed: row n of T's weights belongs to place n. So a Mixer is tied to the number of
tokens it was built for, and neighbors are not special: patches shuffled in one fixed order, and T's weights
with them, give the same logits. D_S does not grow with N, so the cost is linear in N.

Source: Tolstikhin et al. 2021, arXiv 2105.01601; trained with SAM by Chen et al. 2022, arXiv 2106.01548.
Written from the papers; the numbering of the equations is ours. Parameter names are timm's, so its
checkpoints load by key. Initialization as in the official JAX codes (vision_transformer and big_vision
agree). We differ: GELU is exact, theirs (Flax) is the tanh approximation, at most 5e-4 away; stochastic
depth grows linearly over the blocks as in big_vision, but scales up what it keeps, which theirs does not.
Needs: torch, torchvision, einops.
Demo: python mixer.py (10 s on a CPU) learns where a cross is and of what color, then runs without one MLP.
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
        raise ValueError(f"model {name!r} is unknown; choose from {', '.join(PRESETS)}")
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
        """T of (2)."""
        columns = rearrange(x, "b n d -> b d n")
        return rearrange(self.mlp_tokens(columns), "b d n -> b n d")

    def forward(self, x):
        x = x + self.drop_path(self.mix_tokens(self.norm1(x)))
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


class PatchEmbed(nn.Module):
    """(1), a convolution whose stride is its kernel size: (B, C, H, W) -> (B, N, D), row by row."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return rearrange(self.proj(x), "b d gh gw -> b (gh gw) d")


class Mixer(nn.Module):
    """MLP-Mixer: (B, C, H, W) -> logits (B, num_classes), or features (B, D) if num_classes=0."""

    def __init__(
        self,
        img_size=224,  # int or (H, W), multiples of patch_size; images of any other size are refused
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        embed_dim=512,
        depth=8,
        mlp_ratio=(0.5, 4.0),  # D_S and D_C as multiples of embed_dim
        drop_path=0.0,  # stochastic depth at the last block, growing linearly from 0 at the first
        weight_init="jax",  # the only one; "mae" is of vit.py
    ):
        super().__init__()
        if weight_init != "jax":
            raise ValueError(f"weight_init {weight_init!r} is unknown; a Mixer has 'jax' only")
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        height, width = self.img_size
        for size in self.img_size:
            if size == 0 or size % patch_size:
                low = max(size // patch_size, 1) * patch_size
                raise ValueError(
                    f"img_size {size} is not a multiple of patch_size {patch_size}; "
                    f"try {low} or {low + patch_size}"
                )
        self.patch_size, self.in_chans, self.embed_dim = patch_size, in_chans, embed_dim
        self.stride, self.num_features = patch_size, embed_dim  # of an output token, as in every encoder
        self.grid_size = (height // patch_size, width // patch_size)

        num_tokens = math.prod(self.grid_size)
        tokens_dim, channels_dim = (int(ratio * embed_dim) for ratio in mlp_ratio)
        self.stem = PatchEmbed(patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            rate = drop_path * i / max(depth - 1, 1)
            self.blocks.append(MixerBlock(num_tokens, embed_dim, tokens_dim, channels_dim, rate))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes):
        """A new head of zeros, as the official one: logits start at 0. num_classes=0 removes it."""
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.embed_dim, num_classes).to(self.norm.weight)  # its device and dtype
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward_features(self, x):
        """(1) to (3), and the last norm: (B, C, H, W) -> tokens (B, N, D)."""
        size = tuple(x.shape[-2:])
        if size != self.img_size:  # as many tokens in another grid would pass, but mean something else
            raise ValueError(f"images of size {size} do not fit img_size {self.img_size}; resize them")
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
    """As the JAX codes: LeCun-normal weights (a normal cut at two sigma, variance 1 / fan_in), zero biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        fan_in = module.weight[0].numel()
        std = fan_in**-0.5 / 0.87962566  # the cut narrows it by this factor
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(module.bias)


if __name__ == "__main__":
    # One cross among 15 dots, each in one of 7 colors. In which quarter is the cross, and what is its color?
    torch.manual_seed(0)
    cross = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    colors = torch.cartesian_prod(*3 * [torch.arange(2)])[1:, :, None, None]  # RGB, each on or off, not black

    def scenes(n):
        """Images (n, 3, 16, 16), the quarter and the color of the cross."""
        color, place = torch.randint(7, (n,)), torch.randint(16, (n,))
        patches = colors[torch.randint(7, (n, 16))] * (1 - cross)  # (n, 16, 3, 4, 4)
        patches[torch.arange(n), place] = colors[color] * cross
        imgs = rearrange(patches, "n (gh gw) c p q -> n c (gh p) (gw q)", gh=4).float()
        quarter = place // 8 * 2 + place % 4 // 2
        return imgs, quarter, color

    def accuracy(model):
        imgs, quarter, color = scenes(512)
        with torch.no_grad():
            where, what = model(imgs).split([4, 7], dim=1)
        where = (where.argmax(dim=1) == quarter).float().mean()
        what = (what.argmax(dim=1) == color).float().mean()
        return f"where {where:.2f}, what {what:.2f}"

    model, steps = create_mixer("mixer_demo", img_size=16, embed_dim=64, depth=2, num_classes=4 + 7), 200
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        imgs, quarter, color = scenes(64)
        where, what = model(imgs).split([4, 7], dim=1)
        loss = F.cross_entropy(where, quarter) + F.cross_entropy(what, color)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step:3d}  loss {loss.item():.2f}")

    # Without one of the MLPs: what this model uses each for. A model trained without channel mixing also learns
    # this small task (T is nonlinear too); one trained without token mixing cannot learn where.
    print(f"accuracy on new scenes: {accuracy(model)} (expect above 0.95; chance: 0.25 and 0.14)")
    for name in ("mlp_channels", "mlp_tokens"):
        mlps = [getattr(block, name) for block in model.blocks]
        hooks = [mlp.register_forward_hook(lambda module, inputs, out: 0 * out) for mlp in mlps]
        print(f"  without {name}: {accuracy(model)}")
        for hook in hooks:
            hook.remove()
    print("(expect without mlp_tokens no better than chance on where)")

"""Masking: cut images into patches, choose which to hide, score the predictions.

Masked image modeling hides most of an image and predicts the hidden part. What such methods share is here,
as pure functions without state:

    patches      (B, C, H, W) <-> (B, N, P), P = p * p * C, channel fastest
    masks        random (MAE), block (BEiT), grid (MAE), drawn by hand, mixed (MixMIM)
    target       x~ = (x - mean) / sqrt(var + 1e-6) per patch, unbiased variance       (1)
    loss         L  = sum_i m_i mean_d (y_i - x~_i)^2 / sum_i m_i                      (2)

One convention throughout: a mask is 1 (True) where a patch is REMOVED.

Source: He et al. 2021 (MAE), arXiv 2111.06377; Bao et al. 2021 (BEiT), arXiv 2106.08254;
Liu et al. 2022 (MixMIM), arXiv 2205.13137. Written from the papers.
Needs: torch, einops.
Demo: python masking.py (a second) prints the masks as text.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

# ---------------------------------------------------------------------------- patches


def patchify(imgs, patch_size):
    """(B, C, H, W) -> (B, N, P): patches row by row; inside one, pixels row by row, channel fastest."""
    return rearrange(imgs, "b c (gh p) (gw q) -> b (gh gw) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches, patch_size, grid):
    """(B, N, P) -> (B, C, H, W), the inverse of patchify; grid = (gh, gw), N = gh gw."""
    gh, gw = grid
    return rearrange(
        patches,
        "b (gh gw) (p q c) -> b c (gh p) (gw q)",
        gh=gh,
        gw=gw,
        p=patch_size,
        q=patch_size,
    )


# ---------------------------------------------------------------------------- target and loss


def normalize_patches(patches):
    """(1): each patch to mean 0 and variance 1. The decoder then predicts structure, not brightness."""
    mean = patches.mean(dim=-1, keepdim=True)
    var = patches.var(dim=-1, keepdim=True)  # unbiased
    return (patches - mean) / (var + 1e-6).sqrt()


def masked_loss(pred, target, mask):
    """(2): mean squared error over the removed patches; 0 where nothing is removed.

    pred, target (B, N, P); mask (B, N), 1 = removed -> scalar
    """
    # under autocast the predictions are bf16; the loss is computed in at least float32
    dtype = torch.promote_types(pred.dtype, torch.float32)
    error = pred.to(dtype) - target.to(dtype)
    error = error.square().mean(dim=-1)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def hidden_error(picture, imgs, mask, patch_size):
    """Mean squared error of a picture (B, C, H, W) on the removed patches of imgs, as text for its caption."""
    error = masked_loss(patchify(picture, patch_size), patchify(imgs, patch_size), mask)
    return f"error {error.item():.3f}"


def patch_mean_loss(imgs, patch_size, normalize=True):
    """The loss of predicting each patch's mean: a model below it has learned something."""
    patches = patchify(imgs, patch_size)
    if normalize:
        return normalize_patches(patches).square().mean()
    return patches.var(dim=-1, unbiased=False).mean()


# ---------------------------------------------------------------------------- choosing patches from noise


class Split(NamedTuple):
    ids_keep: torch.Tensor  # (B, n) the visible patches, in the order of their noise
    ids_restore: torch.Tensor  # (B, N) undoes the shuffle: x = cat([visible, hidden]).gather(ids_restore)
    mask: torch.Tensor  # (B, N) float, 1 = removed


def num_visible(num_patches, mask_ratio):
    """How many patches stay: int(N (1 - ratio)), as in the official codes."""
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio {mask_ratio} must lie in [0, 1)")
    keep = int(num_patches * (1 - mask_ratio))
    if keep < 1:
        most = math.floor(1000 - 1001 / num_patches) / 1000  # rounded down, so that it works
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves none of {num_patches} patches visible; use at most {most}"
        )
    return keep


def choose_patches(imgs, img_size, patch_size, mask_ratio, noise=None, mask=None):
    """Which patches of a batch stay visible: from a mask, from noise, or from new random noise -> Split.

    imgs (B, C, H, W) must be of img_size (H, W); noise (B, N); mask (B, N) or (B, gh, gw)
    """
    height, width = imgs.shape[-2:]
    if (height, width) != tuple(img_size):
        raise ValueError(
            f"images of {height}x{width} do not fit img_size {img_size[0]}x{img_size[1]}; "
            "resize them or build the encoder for their size"
        )
    num_patches = (height // patch_size) * (width // patch_size)
    shape = (len(imgs), num_patches)

    if mask is not None:
        mask = mask.to(imgs.device).flatten(1)
        check_shape("mask", mask, shape)
        return split_by_mask(mask)
    if noise is None:
        noise = torch.rand(shape, device=imgs.device)
    check_shape("noise", noise, shape)
    keep = num_visible(num_patches, mask_ratio)
    return split_by_noise(noise.to(imgs.device), keep)


def check_shape(name, tensor, shape):
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} {tuple(tensor.shape)} must be {shape}, a number per image and patch")


def split_by_noise(noise, keep):
    """Keep the patches with the smallest noise. noise (B, N) -> Split."""
    ids_shuffle = noise.argsort(dim=1, stable=True)  # stable: a 0/1 mask given as noise keeps its order
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= keep).float()
    return Split(ids_shuffle[:, :keep], ids_restore, mask)


def split_by_mask(mask):
    """A mask (B, N) or (B, gh, gw), 1 = removed -> Split. Every image must lose equally many patches."""
    mask = mask.flatten(1).float()
    visible = (mask == 0).sum(dim=1).tolist()
    if min(visible) < max(visible) or visible[0] == 0:
        raise ValueError(
            f"mask leaves {visible} patches visible; it must leave the same number in each image, "
            "at least 1"
        )
    return split_by_noise(mask, visible[0])


def unshuffle(visible, mask_token, ids_restore):
    """Put visible tokens back in their places, and the mask token everywhere else.

    visible (B, n, D), mask_token (1, 1, D), ids_restore (B, N) -> (B, N, D)
    """
    batch, num_patches = ids_restore.shape
    keep, dim = visible.shape[1:]
    hidden = mask_token.to(visible.dtype)
    hidden = hidden.expand(batch, num_patches - keep, -1)
    tokens = torch.cat([visible, hidden], dim=1)
    index = ids_restore[..., None].expand(-1, -1, dim)
    return tokens.gather(1, index)


# ---------------------------------------------------------------- masks, all (B, gh, gw) bool, True = removed


def num_masked(grid, mask_ratio):
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"mask_ratio {mask_ratio} must lie in [0, 1]")
    n = math.prod(grid)
    return n - int(n * (1 - mask_ratio))


def random_mask(batch, grid, mask_ratio, generator=None):
    """Each image loses its own random patches (MAE)."""
    n = math.prod(grid)
    noise = torch.rand(batch, n, generator=generator)
    rank = noise.argsort(dim=1).argsort(dim=1)
    keep = n - num_masked(grid, mask_ratio)
    return (rank >= keep).view(batch, *grid)


def grid_mask(batch, grid, mask_ratio, generator=None):
    """A regular lattice stays: 3 / 4 keeps one patch of each 2 x 2, 1 / 2 a checkerboard (MAE's ablation).

    Patches stay in the order of Bayer's dither matrix, of which every prefix is spread evenly;
    each image gets its own random shift of the lattice.
    """
    bayer = torch.tensor([
        [0, 8, 2, 10],
        [12, 4, 14, 6],
        [3, 11, 1, 9],
        [15, 7, 13, 5],
    ])
    gh, gw = grid
    shift = torch.randint(4, (batch, 2, 1), generator=generator)
    y = torch.arange(gh) + shift[:, 0]  # (B, gh)
    x = torch.arange(gw) + shift[:, 1]  # (B, gw)
    order = bayer[y[:, :, None] % 4, x[:, None] % 4]  # (B, gh, gw)
    order = order.flatten(1).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)
    keep = gh * gw - num_masked(grid, mask_ratio)
    return (rank >= keep).view(batch, gh, gw)


def block_mask(batch, grid, mask_ratio, generator=None, min_block=4, max_aspect=1 / 0.3):
    """Random rectangles are removed until the ratio is reached (BEiT); the last is cut to the exact count.

    min_block  patches in the smallest rectangle (BEiT on 14 x 14: 16)
    """
    gh, gw = grid
    target = num_masked(grid, mask_ratio)
    log_aspect = math.log(max_aspect)

    def uniform(low, high):
        share = torch.rand((), generator=generator).item()
        return low + (high - low) * share

    masks = torch.zeros(batch, gh, gw, dtype=torch.bool)
    for mask in masks:
        while (missing := target - int(mask.sum())) > 0:
            # a random area, aspect ratio and place
            area = uniform(min_block, max(missing, min_block))
            aspect = math.exp(uniform(-log_aspect, log_aspect))
            h = round(math.sqrt(area * aspect))
            w = round(math.sqrt(area / aspect))
            h = min(max(h, 1), gh)
            w = min(max(w, 1), gw)
            top = int(uniform(0, gh - h + 1))
            left = int(uniform(0, gw - w + 1))

            # its patches that are not removed yet, and no more than are missing
            block = torch.zeros_like(mask)
            block[top:top + h, left:left + w] = True
            block &= ~mask
            new = block.flatten().nonzero()[:missing, 0]
            mask.view(-1)[new] = True
    return masks


def mask_from_image(picture, patch_size, threshold=0.5):
    """A drawn mask (B, H, W) in [0, 1], 1 = remove -> (B, gh, gw): patches at least `threshold` covered."""
    batch, height, width = picture.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"picture of {height}x{width} has sides that are no multiple of patch_size {patch_size}"
        )
    picture = picture[:, None].float()
    covered = F.avg_pool2d(picture, patch_size)[:, 0]
    return covered >= threshold


def mix_mask(noise, mask_ratio):
    """MixMIM's mask: the int(N ratio) positions with the SMALLEST noise come from the partner.

    noise (N,) or (B, N) -> bool of the same shape, True = removed from this image, filled by the partner's.
    """
    n = noise.shape[-1]
    if n < 2:
        raise ValueError(f"mixing takes at least 2 positions, got {n}; use a larger img_size")
    count = int(n * mask_ratio)
    if not 0 < count < n:
        # rounded so that both work
        low = math.ceil(1000 / n) / 1000
        high = math.floor(1000 - 1000 / n) / 1000
        raise ValueError(
            f"mask_ratio {mask_ratio} hides none or all of the {n} positions; use {low} to {high}"
        )
    rank = noise.argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank < count


def enlarge_mask(mask, scale):
    """Nearest-neighbor enlargement (..., gh, gw) -> (..., gh scale, gw scale)."""
    mask = mask.repeat_interleave(scale, dim=-2)
    return mask.repeat_interleave(scale, dim=-1)


# ---------------------------------------------------------------------------- pictures


def hide(imgs, mask, patch_size, value=0.5):
    """The model's view: removed patches filled with `value`. imgs (B, C, H, W), mask (B, N), 1 = removed."""
    value = torch.as_tensor(value, dtype=imgs.dtype, device=imgs.device)
    return paste(imgs, value, mask, patch_size)


def paste(imgs, pred, mask, patch_size):
    """True pixels where visible, predicted ones where removed. imgs, pred (B, C, H, W); mask (B, N)."""
    height, width = imgs.shape[-2:]
    mask = mask.view(-1, 1, height // patch_size, width // patch_size)
    removed = enlarge_mask(mask, patch_size).bool()
    return torch.where(removed, pred, imgs)


def patch_statistics(imgs, patch_size, mask, use_true_patch_statistics=False):
    """Mean and std (B, N, 1) that turn normalized predictions into pixels again.

    The true ones of a hidden patch leak part of the answer into the picture. So by default each patch
    takes them from the VISIBLE patches near it, with Gaussian weights about one patch wide.
    """
    patches = patchify(imgs, patch_size)
    mean = patches.mean(dim=-1, keepdim=True)
    std = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    if use_true_patch_statistics:
        return mean, std

    height, width = imgs.shape[-2:]
    rows = torch.arange(height // patch_size)
    columns = torch.arange(width // patch_size)
    place = torch.cartesian_prod(rows, columns).to(patches)  # (N, 2)
    logits = -torch.cdist(place, place).square()  # (N, N)
    hidden = mask[:, None].bool()
    weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)  # (B, N, N)
    return weights @ mean, weights @ std


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(8, generator=generator)
    mixed = mix_mask(noise, 0.5).view(2, 4)
    masks = {
        "random": random_mask(1, (8, 16), 0.75, generator)[0],
        "block": block_mask(1, (8, 16), 0.75, generator)[0],
        "grid": grid_mask(1, (8, 16), 0.75, generator)[0],
        "mix, patches of 4": enlarge_mask(mixed, 4),
    }
    for name, mask in masks.items():
        print(f"{name}: {mask.float().mean():.0%} removed (#)")
        for row in mask:
            print("  " + "".join("# " if removed else ". " for removed in row))

    imgs = torch.rand(4, 3, 32, 48, generator=generator)
    patches = patchify(imgs, 4)
    target = normalize_patches(patches)
    same = torch.equal(unpatchify(patches, 4, (8, 12)), imgs)
    mask = random_mask(4, (8, 12), 0.75).flatten(1)
    loss = masked_loss(torch.zeros_like(target), target, mask)
    variance = target.var(dim=-1).mean()
    print(f"patches {tuple(patches.shape)}; unpatchify gives the images back: {same} (expect True)")
    print(f"normalized variance {variance:.3f} (expect 1.000)")
    print(f"loss of predicting the patch mean {loss:.3f} (expect 0.979, (P - 1) / P)")

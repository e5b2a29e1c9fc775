"""Masking: cut images into patches, choose which to hide, score the guesses.

Masked image modelling hides most of an image and asks for the rest. Everything that such
methods share is here, as pure functions without state:

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
    height, width = imgs.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"image size {height}x{width} is not a multiple of patch_size {patch_size}")
    return rearrange(imgs, "b c (gh p) (gw q) -> b (gh gw) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches, patch_size, grid):
    """(B, N, P) -> (B, C, H, W), the inverse of patchify; grid = (gh, gw), N = gh gw."""
    gh, gw = grid
    if patches.shape[1] != gh * gw or patches.shape[2] % patch_size**2:
        raise ValueError(f"patches {tuple(patches.shape)} do not fill a grid {gh}x{gw} of {patch_size}x{patch_size} pixels")
    return rearrange(patches, "b (gh gw) (p q c) -> b c (gh p) (gw q)", gh=gh, p=patch_size, q=patch_size)


# ---------------------------------------------------------------------------- choosing patches from noise


class Split(NamedTuple):
    ids_keep: torch.Tensor  # (B, n) the visible patches, in the order of their noise
    ids_restore: torch.Tensor  # (B, N) undoes the shuffle: x = cat([visible, hidden]).gather(ids_restore)
    mask: torch.Tensor  # (B, N) float, 1 = removed


def num_visible(num_patches, mask_ratio):
    """How many patches stay: int(N (1 - ratio)) as in the official codes; ValueError if none would."""
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio {mask_ratio} must lie in [0, 1)")
    keep = int(num_patches * (1 - mask_ratio))
    if keep < 1:
        most = math.floor((1 - 1 / num_patches - 1e-9) * 1000) / 1000  # rounded down, so that it does work
        raise ValueError(f"mask_ratio {mask_ratio} leaves none of {num_patches} patches visible; use at most {most}")
    return keep


def choose_patches(imgs, img_size, patch_size, mask_ratio, noise=None, mask=None):
    """Which patches of a batch stay visible: from a mask, from noise, or from fresh noise -> Split.

    imgs (B, C, H, W) must be of img_size (H, W); noise (B, N); mask (B, N) or (B, gh, gw)
    """
    if tuple(imgs.shape[-2:]) != tuple(img_size):
        raise ValueError(f"images are {imgs.shape[-2]}x{imgs.shape[-1]}, the model pre-trains at img_size "
                         f"{img_size[0]}x{img_size[1]}; resize them or build the encoder for their size")
    batch, num_patches = len(imgs), (img_size[0] // patch_size) * (img_size[1] // patch_size)
    flat, grid = (batch, num_patches), (batch, img_size[0] // patch_size, img_size[1] // patch_size)
    for name, given, shapes in (("noise", noise, [flat]), ("mask", mask, [flat, grid])):
        if given is not None and tuple(given.shape) not in shapes:
            raise ValueError(f"{name} {tuple(given.shape)} must be {' or '.join(map(str, shapes))}")
    if mask is not None:
        return split_by_mask(mask.to(imgs.device))
    if noise is None:
        noise = torch.rand(batch, num_patches, device=imgs.device)
    return split_by_noise(noise.to(imgs.device), num_visible(num_patches, mask_ratio))


def split_by_noise(noise, keep):
    """Keep the patches with the smallest noise. noise (B, N) -> Split."""
    ids_shuffle = noise.argsort(dim=1, stable=True)  # stable: a 0/1 mask given as noise keeps its order
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= keep).float()
    return Split(ids_shuffle[:, :keep], ids_restore, mask)


def split_by_mask(mask):
    """A given mask, (B, N) or (B, gh, gw), 1 = removed -> Split. Every row must hide equally many."""
    mask = mask.flatten(1).float()
    visible = (mask == 0).sum(dim=1)
    if not bool((visible == visible[0]).all()) or visible[0] == 0:
        raise ValueError(f"mask must leave the same number of patches, at least 1, visible in each image; it leaves {visible.tolist()}")
    return split_by_noise(mask, int(visible[0]))


def unshuffle(visible, mask_token, ids_restore):
    """Visible tokens back in their places, the mask token everywhere else.

    visible (B, n, D), mask_token (1, 1, D), ids_restore (B, N) -> (B, N, D)
    """
    hidden = mask_token.to(visible.dtype).expand(len(visible), ids_restore.shape[1] - visible.shape[1], -1)
    tokens = torch.cat([visible, hidden], dim=1)
    return tokens.gather(1, ids_restore[..., None].expand(-1, -1, tokens.shape[-1]))


# ---------------------------------------------------------------------------- masks, all (B, gh, gw) bool, True = removed


def num_masked(grid, mask_ratio):
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"mask_ratio {mask_ratio} must lie in [0, 1]")
    n = math.prod(grid)
    return n - int(n * (1 - mask_ratio))


def random_mask(batch, grid, mask_ratio, generator=None):
    """Each image loses its own random patches (MAE)."""
    noise = torch.rand(batch, math.prod(grid), generator=generator)
    rank = noise.argsort(dim=1).argsort(dim=1)
    return (rank >= math.prod(grid) - num_masked(grid, mask_ratio)).view(batch, *grid)


def grid_mask(batch, grid, mask_ratio, generator=None):
    """A regular lattice stays: 3 / 4 keeps one patch of each 2 x 2, 1 / 2 a checkerboard (MAE's ablation).

    Patches stay in the order of Bayer's dither matrix, whose every prefix is as even as can be;
    each image gets its own random shift of the lattice.
    """
    bayer = torch.tensor([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])
    gh, gw = grid
    shift = torch.randint(4, (batch, 2, 1), generator=generator)
    y, x = torch.arange(gh) + shift[:, 0], torch.arange(gw) + shift[:, 1]  # (B, gh), (B, gw)
    order = bayer[y[:, :, None] % 4, x[:, None, :] % 4].flatten(1)
    rank = order.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank >= gh * gw - num_masked(grid, mask_ratio)).view(batch, gh, gw)


def block_mask(batch, grid, mask_ratio, generator=None, min_block=4, max_aspect=1 / 0.3):
    """Rectangles are removed until the share is reached (BEiT), then exactly the surplus is given back.

    min_block  patches in the smallest rectangle (BEiT on 14 x 14: 16)
    """
    gh, gw = grid
    target = num_masked(grid, mask_ratio)

    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    masks = torch.zeros(batch, gh, gw, dtype=torch.bool)
    for mask in masks:
        while (missing := target - int(mask.sum())) > 0:
            area = uniform(min_block, max(missing, min_block))
            aspect = math.exp(uniform(-math.log(max_aspect), math.log(max_aspect)))
            h = min(max(round(math.sqrt(area * aspect)), 1), gh)
            w = min(max(round(math.sqrt(area / aspect)), 1), gw)
            top, left = int(uniform(0, gh - h + 1)), int(uniform(0, gw - w + 1))
            new = torch.zeros_like(mask)
            new[top:top + h, left:left + w] = True
            new &= ~mask
            surplus = int(new.sum()) - missing
            if surplus > 0:  # keep the count exact: the last rectangle is cut off, row by row
                new.view(-1)[new.view(-1).nonzero()[-surplus:, 0]] = False
            mask |= new
    return masks


def mask_from_image(picture, patch_size, threshold=0.5):
    """A drawn mask (B, H, W) in [0, 1], 1 = remove -> (B, gh, gw): patches at least `threshold` covered."""
    if picture.shape[-2] % patch_size or picture.shape[-1] % patch_size:
        raise ValueError(f"picture {tuple(picture.shape)} has sides that are no multiple of patch_size {patch_size}")
    return F.avg_pool2d(picture[:, None].float(), patch_size)[:, 0] >= threshold


def mix_mask(noise, mask_ratio):
    """MixMIM's mask: the int(N ratio) positions with the SMALLEST noise come from the partner.

    noise (N,) or (B, N) -> bool of the same shape, True = removed from this image, filled by the partner's.
    ValueError if one of the two sources would get no position at all.
    """
    n = noise.shape[-1]
    if n < 2:
        raise ValueError(f"there is {n} position to mask, but mixing takes at least 2; use a larger img_size")
    count = int(n * mask_ratio)
    if not 0 < count < n:
        low, high = math.ceil(1000 / n) / 1000, math.floor(1000 * (n - 1) / n) / 1000  # rounded so that both do work
        raise ValueError(f"mask_ratio {mask_ratio} hides none or all of the {n} positions; use {low} to {high}")
    return noise.argsort(dim=-1, stable=True).argsort(dim=-1) < count


def enlarge_mask(mask, scale):
    """Nearest-neighbour enlargement (..., gh, gw) -> (..., gh scale, gw scale)."""
    return mask.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


# ---------------------------------------------------------------------------- target and loss


def normalize_patches(patches):
    """(1): each patch to mean 0 and variance 1. The decoder then predicts structure, not brightness."""
    mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)  # var is unbiased
    return (patches - mean) / (var + 1e-6).sqrt()


def masked_loss(pred, target, mask):
    """(2): mean squared error over the removed patches; 0 where nothing is removed.

    pred, target (B, N, P); mask (B, N), 1 = removed -> scalar
    """
    wide = torch.promote_types(pred.dtype, torch.float32)  # under autocast predictions are bf16, the loss is not
    error = (pred.to(wide) - target.to(wide)).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def patch_mean_loss(imgs, patch_size, normalize=True):
    """The loss of predicting each patch's mean: what a model must beat to have learnt anything."""
    patches = patchify(imgs, patch_size)
    if normalize:
        return normalize_patches(patches).square().mean()
    return patches.var(dim=-1, unbiased=False).mean()


# ---------------------------------------------------------------------------- pictures


def hide(imgs, mask, patch_size, value=0.5):
    """The model's view: removed patches painted over. imgs (B, C, H, W), mask (B, N), 1 = removed."""
    return paste(imgs, torch.as_tensor(value, dtype=imgs.dtype, device=imgs.device), mask, patch_size)


def paste(imgs, pred, mask, patch_size):
    """True pixels where visible, predicted ones where removed. imgs (B, C, H, W), pred alike; mask (B, N)."""
    grid = imgs.shape[-2] // patch_size, imgs.shape[-1] // patch_size
    return torch.where(enlarge_mask(mask.view(len(imgs), 1, *grid), patch_size).bool(), pred, imgs)


def patch_statistics(imgs, patch_size, mask, use_true_patch_statistics=False):
    """Mean and std (B, N, 1) that turn normalised predictions into pixels again.

    The true ones of a hidden patch leak part of the answer into the picture. So by default each patch
    borrows them from the VISIBLE patches near it, with Gaussian weights about one patch wide.
    """
    patches = patchify(imgs, patch_size)
    mean, std = patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    if use_true_patch_statistics:
        return mean, std
    y, x = torch.meshgrid(torch.arange(imgs.shape[-2] // patch_size), torch.arange(imgs.shape[-1] // patch_size), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], dim=1).to(patches)
    logits = -torch.cdist(place, place).square()  # (N, N)
    weights = logits.masked_fill(mask[:, None, :].bool(), -torch.inf).softmax(dim=-1)  # (B, N, N)
    return weights @ mean, weights @ std


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    grid = (8, 16)
    masks = {name: make(1, grid, 0.75, generator)[0] for name, make in
             (("random", random_mask), ("block", block_mask), ("grid", grid_mask))}
    masks["mix, patches of 4"] = enlarge_mask(mix_mask(torch.rand(8, generator=generator), 0.5).view(2, 4), 4)
    for name, mask in masks.items():
        print(f"{name}: {mask.float().mean():.0%} removed (#)")
        print("\n".join("  " + "".join("# " if m else ". " for m in row) for row in mask.tolist()))

    imgs = torch.rand(4, 3, 32, 48, generator=generator)
    patches = patchify(imgs, 4)
    target = normalize_patches(patches)
    same = torch.equal(unpatchify(patches, 4, (8, 12)), imgs)
    print(f"patches {tuple(patches.shape)}; unpatchify gives the images back: {same} (expect True)")
    print(f"normalised: mean {target.mean().abs():.3f}, variance {target.var(-1).mean():.3f} (expect 0.000 and 1.000)")
    nothing = torch.zeros_like(target)
    print(f"loss of predicting the patch mean {masked_loss(nothing, target, random_mask(4, (8, 12), 0.75).flatten(1)):.3f} "
          "(expect 0.979, (P - 1) / P)")

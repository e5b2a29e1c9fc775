"""MIRL: shallow blocks predict the image, deep blocks predict the residual.

Masked image modeling with one loss at the end trains the deep blocks of a deep ViT badly: more depth stops
helping. MIRL cuts the encoder into K segments and gives each a small decoder. Decoders are paired from the
outside in, 1 with K, 2 with K-1, ... The shallow one predicts the main component of the hidden patches, the
deep one the residual; only their sum is compared with the image. So every segment has a short path to a
loss, and the deep ones have an easier target. After pre-training all decoders are discarded.

    z_0 = [cls ; visible patches + pos],   z_k = Segment_k(z_{k-1}),   k = 1 .. K     (1)
    t_0 = E_0 LN z_0,   t_k = E_k LN_k z_k                                            (2)
    u_k = unshuffle(t_k, mask tokens) + pos                                           (3)
    decoder k:  u = u + SelfAttn(LN u);  u = u + CrossAttn(LN u, LN C_k);  u = u + MLP(LN u)
                with the dense context C_k = [t_{k-1}, ..., t_1, t_0]                 (4)
    y_k = P_k LN u_k,  every column of P_k of unit length                             (5)
    L   = 2/K sum_{j <= K/2} mean over hidden patches of (y_j + y_{K+1-j} - x~)^2     (6)

Nothing forces y_j to be the image and y_{K+1-j} the residual: a constant can move between them without
changing (6), and no loss is on y_j alone. Whether the two roles emerge shows in the parts and their sum.

Source: Huang, Fu, Bors 2023, arXiv 2309.14136. Written from the paper; details it leaves open follow the
official code, whose numbers this file reproduces (tests/golden/mirl_*). We differ: any even K that divides
the depth (the release is fixed to 6, and its 12-block presets do not run); norm_pix_loss=False predicts raw
pixels (the release normalizes x~ whatever its flag says).
Needs: torch, torchvision, einops; vit.py, masking.py (and shapes.py for the demo).
Demo: python mirl.py (half a minute on a CPU) predicts held-out scenes and saves mirl_demo.png.
"""

import re
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from masking import (choose_patches, hidden_error, masked_loss, normalize_patches, paste, patch_mean_loss,
                     patch_statistics, patchify, unpatchify, unshuffle)
from vit import Attention, Mlp, attention, init_weights, sincos_pos_embed


class CrossAttention(nn.Module):
    """Queries x (B, N, D) read from the context c (B, M, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, c):
        heads = self.num_heads
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=heads)
        k, v = rearrange(self.kv(c), "b m (two h d) -> two b h m d", two=2, h=heads)
        x = attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class CrossBlock(nn.Module):
    """Decoder block (4): self-attention, cross-attention to the context, MLP."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)  # queries
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)  # context
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm4 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, u, context):
        u = u + self.attn(self.norm1(u))
        u = u + self.cross_attn(self.norm2(u), self.norm3(context))
        return u + self.mlp(self.norm4(u))


class Decoder(nn.Module):
    """One segment's decoder, (3) to (5): visible tokens t_k (B, 1 + n, D) -> predictions (B, N, P)."""

    def __init__(self, grid_size, dim, depth, num_heads, patch_dim, weight_norm_pred):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = sincos_pos_embed(dim, *grid_size)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.ModuleList(CrossBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, patch_dim)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        if weight_norm_pred:
            # (5). dim=1: one norm per INPUT feature, over the outputs, as the official code in Paddle, which
            # stores [in, out] and takes its dim 0. The magnitudes stay at 1.
            self.pred = weight_norm(self.pred, dim=1)
            magnitude = self.pred.parametrizations.weight.original0
            nn.init.ones_(magnitude)
            magnitude.requires_grad_(False)

    def forward(self, t, context, ids_restore):
        patches = unshuffle(t[:, 1:], self.mask_token, ids_restore)
        u = torch.cat([t[:, :1], patches], dim=1) + self.pos_embed  # (3)
        for block in self.blocks:
            u = block(u, context)  # (4)
        return self.pred(self.norm(u))[:, 1:]  # (5); the class token was a query like the others


class MIRLOutput(NamedTuple):
    loss: torch.Tensor  # scalar
    pred: list  # K tensors (B, N, P), shallow to deep
    mask: torch.Tensor  # (B, N), 1 = removed
    pairs: list  # K / 2 scalars: pairs[j] scores pred[j] + pred[K-1-j] (pairing=False: K scalars, one each)


class Reconstruction(NamedTuple):
    main: torch.Tensor
    residual: torch.Tensor  # a difference, around 0
    sum: torch.Tensor  # main + residual


class MIRL(nn.Module):
    """Masked image residual learning around a ViT.

    encoder           a ViT with class token; it loses its head, and its position table becomes the fixed
                      sin-cos one, frozen
    segments          K, even, divides the encoder's depth
    weight_norm_pred  prediction weights with columns of unit length (5)
    norm_pix_loss     predict patches normalized to mean 0, variance 1 instead of raw pixels
    pairing           False: plain deep supervision, every decoder predicts the whole image (an ablation)
    dense_context     False: decoders read t_0 only, not the earlier segments (an ablation)

    out = model(imgs) has out.loss, out.pred, out.mask, out.pairs.
    """

    def __init__(self, encoder, segments=6, decoder_embed_dim=512, decoder_depth=2, decoder_num_heads=16,
                 weight_norm_pred=True, norm_pix_loss=True, pairing=True, dense_context=True):
        super().__init__()
        depth, width = len(encoder.blocks), decoder_embed_dim
        if segments < 2 or segments % 2 or depth % segments:
            fitting = [k for k in range(2, depth + 1, 2) if depth % k == 0]
            raise ValueError(
                f"segments {segments} must be even and divide the depth {depth}; choose from {fitting}"
            )
        if width % decoder_num_heads:
            raise ValueError(
                f"decoder_embed_dim {width} is not a multiple of decoder_num_heads {decoder_num_heads}"
            )
        encoder.prepare_for_masking()
        self.encoder, self.segments = encoder, segments
        self.norm_pix_loss = norm_pix_loss
        self.pairing, self.dense_context = pairing, dense_context

        # (2): LN for z_0 .. z_{K-1} (the encoder's own last norm serves z_K), E_0 .. E_K
        self.norms = nn.ModuleList(nn.LayerNorm(encoder.embed_dim, eps=1e-6) for _ in range(segments))
        self.embeds = nn.ModuleList(nn.Linear(encoder.embed_dim, width) for _ in range(segments + 1))
        self.embeds.apply(init_weights)
        # (3) to (5)
        patch_dim = encoder.patch_size**2 * encoder.in_chans
        self.decoders = nn.ModuleList(
            Decoder(encoder.grid_size, width, decoder_depth, decoder_num_heads, patch_dim, weight_norm_pred)
            for _ in range(segments)
        )

    def forward_encoder(self, imgs, ids_keep):
        """(1) and LN of (2): normalized z_0 .. z_K, each (B, 1 + n, D)."""
        z = self.encoder.embed(imgs, ids_keep)
        features = [self.norms[0](z)]
        step = len(self.encoder.blocks) // self.segments
        for k, norm in enumerate([*self.norms[1:], self.encoder.norm]):
            z = self.encoder.forward_blocks(z, k * step, (k + 1) * step)  # the next segment gets z, not LN z
            features.append(norm(z))
        return features

    def forward_decoders(self, features, ids_restore):
        """(2) to (5): K predictions (B, N, P), shallow to deep."""
        t = [embed(z) for embed, z in zip(self.embeds, features, strict=True)]
        preds = []
        for k, decoder in enumerate(self.decoders, start=1):
            context = t[:k] if self.dense_context else t[:1]
            preds.append(decoder(t[k], torch.cat(context, dim=1), ids_restore))
        return preds

    def forward(self, imgs, mask_ratio=0.75, noise=None, mask=None):
        """imgs (B, C, H, W) -> MIRLOutput.

        noise (B, N) fixes the mask: the smallest stay. Or mask (B, N) or (B, gh, gw) gives it.
        """
        encoder = self.encoder
        split = choose_patches(imgs, encoder.img_size, encoder.patch_size, mask_ratio, noise, mask)
        features = self.forward_encoder(imgs, split.ids_keep)
        preds = self.forward_decoders(features, split.ids_restore)

        # (6); gradients flow into both predictions of a pair
        target = patchify(imgs, encoder.patch_size)
        if self.norm_pix_loss:
            target = normalize_patches(target)
        sums = preds
        if self.pairing:
            sums = [preds[j] + preds[-1 - j] for j in range(self.segments // 2)]
        losses = [masked_loss(y, target, split.mask) for y in sums]
        return MIRLOutput(torch.stack(losses).mean(), preds, split.mask, losses)

    def to_pixels(self, imgs, out, use_true_patch_statistics=False, center=False):
        """Predictions as pictures, see reconstruct."""
        patch_size, grid_size = self.encoder.patch_size, self.encoder.grid_size
        mean, std = 0.0, 1.0
        if self.norm_pix_loss:
            mean, std = patch_statistics(imgs, patch_size, out.mask, use_true_patch_statistics)
        preds = [pred.float() for pred in out.pred]
        if not self.pairing:
            return [unpatchify(pred * std + mean, patch_size, grid_size) for pred in preds]

        rows = []
        for j in range(self.segments // 2):
            main, residual = preds[j], preds[-1 - j]
            if center:
                main, residual = center_residual(main, residual, out.mask)
            parts = main * std + mean, residual * std, (main + residual) * std + mean
            rows.append(Reconstruction(*(unpatchify(part, patch_size, grid_size) for part in parts)))
        return rows

    @torch.no_grad()
    def reconstruct(self, imgs, mask_ratio=0.75, noise=None, mask=None, use_true_patch_statistics=False,
                    center=False):
        """K / 2 Reconstructions of (B, C, H, W), or K pictures if pairing=False; no true pixel in any.

        center  move the mean of the residual to the main component, see center_residual

        Normalized predictions need each patch's mean and std. By default these are estimated from visible
        patches nearby; use_true_patch_statistics=True takes the true ones, which LEAK part of the answer.
        """
        out = self(imgs, mask_ratio, noise, mask)
        return self.to_pixels(imgs, out, use_true_patch_statistics, center)

    @torch.no_grad()
    def pictures(self, images, mask_ratio=0.75, noise=None, gray=0.5):
        """Columns of a picture, caption -> (B, C, H, W), in the same space as images (B, C, H, W).

        gray  mid-gray in that space, (C, 1, 1): it fills what the model does not see or is not trained for

        The parts are those of the outermost pair, centered over the batch: the larger, the better. Their
        captions end with the mean squared error on hidden patches, over all images.
        """
        patch_size = self.encoder.patch_size
        gray = torch.as_tensor(gray).to(images)
        out = self(images, mask_ratio, noise)
        predictions = self.to_pixels(images, out, center=True)
        if self.pairing:
            main, residual, whole = predictions[0]
            parts = {
                "main, no true pixels": main,
                "residual, gray is zero": residual + gray,
                "sum, no true pixels": whole,
            }
        else:
            whole = predictions[-1]
            parts = {
                "segment 1, no true pixels": predictions[0],
                f"segment {self.segments}, no true pixels": whole,
            }
        columns = {
            "input, all pixels true": images,
            "true pixels, hidden in gray": paste(images, gray, out.mask, patch_size),
        }
        for caption, picture in parts.items():
            error = hidden_error(picture, images, out.mask, patch_size)
            # predictions of visible patches are not trained: gray
            columns[f"{caption}, {error}"] = paste(picture, gray, 1 - out.mask, patch_size)
        columns["true pixels + prediction"] = paste(images, whole, out.mask, patch_size)
        return columns


def center_residual(main, residual, mask):
    """Move what (6) leaves undetermined: at each hidden position, the residual's mean over the batch.

    main, residual (B, N, P), mask (B, N) -> both (B, N, P), with the same sum
    """
    hidden = mask[..., None]
    constant = (residual * hidden).sum(dim=0) / hidden.sum(dim=0).clamp(min=1)  # (N, P)
    return main + constant, residual - constant


OFFICIAL_NAMES = {  # pattern -> our name; {0} is the segment from 0, {1} the segment from 1
    r"decoder_embed0_1\.": "embeds.0.",  # of the raw input
    r"decoder_embed(\d+)\.": "embeds.{1}.",
    r"norm_low\.": "norms.0.",
    r"norm(\d+)\.": "norms.{1}.",
    r"mask_token(\d+)": "decoders.{0}.mask_token",
    r"decoder_pos_embed(\d+)": "decoders.{0}.pos_embed",
    r"decoder_blocks(\d+)\.": "decoders.{0}.blocks.",
    r"decoder_norm(\d+)\.": "decoders.{0}.norm.",
    r"decoder_pred(\d+)\.weight_g": "decoders.{0}.pred.parametrizations.weight.original0",  # magnitude
    r"decoder_pred(\d+)\.weight_v": "decoders.{0}.pred.parametrizations.weight.original1",  # direction
    r"decoder_pred(\d+)\.": "decoders.{0}.pred.",
    r"": "encoder.",
}


def convert_official(state_dict):
    """The official pre-training state dict, as torch tensors with [out, in] weights, under our names."""
    converted = {}
    for key, value in state_dict.items():
        matches = (re.match(pattern, key) for pattern in OFFICIAL_NAMES)
        match = next(match for match in matches if match)
        segment = int(match[1]) if match.re.groups else 0
        name = OFFICIAL_NAMES[match.re.pattern].format(segment, segment + 1)
        if key.endswith("weight_g"):
            value = value.reshape(1, -1)
        converted[name + key[match.end():]] = value
    return converted


if __name__ == "__main__":
    from shapes import Shapes, save_grid
    from vit import create_vit

    torch.manual_seed(0)
    # simple scenes are flat, and a flat patch has no contrast to normalize: raw pixels
    encoder = create_vit("vit_demo", depth=8, patch_size=8, embed_dim=64, num_heads=4)
    model = MIRL(encoder, 4, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2, norm_pix_loss=False)
    trained = Shapes(1024, scenes="simple").images / 255
    held_out = Shapes(256, train=False, scenes="simple").images / 255
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(401):
        batch = trained[torch.randint(len(trained), (32,))]
        out = model(batch, mask_ratio=0.5)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 100 == 0:
            outer, inner = out.pairs
            print(f"step {step:3d}  loss {out.loss.item():.4f}, mean of pairs {outer:.4f} and {inner:.4f}")

    model.eval()
    for name, imgs in (("trained", trained[:256]), ("held-out", held_out)):
        with torch.no_grad():
            out = model(imgs, mask_ratio=0.5)
        target = patchify(imgs, 8)
        print(f"{name} images: predicting each patch's mean {patch_mean_loss(imgs, 8, normalize=False):.4f}")
        for j in range(2):
            main, _ = center_residual(out.pred[j], out.pred[-1 - j], out.mask)
            error = masked_loss(main, target, out.mask)
            print(f"  pair {j + 1}: main alone {error:.4f}, main + residual {out.pairs[j]:.4f}")
    print("expect main + residual below main alone")
    imgs = torch.cat([trained[:32], held_out[:32]])  # the residual is centered over a batch, the larger the better
    columns = model.pictures(imgs, mask_ratio=0.5)
    shown = [0, 1, 2, 3, 32, 33, 34, 35]
    save_grid("mirl_demo.png", {caption: pictures[shown] for caption, pictures in columns.items()})
    print("saved mirl_demo.png: 4 trained images, below them 4 held-out ones")
